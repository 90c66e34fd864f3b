"""Products with weights in fewer and faster operations: what is left to save where a small model decodes a token.

`onto` adds a residual within the product. `tall` is a head's product in pieces that suit a CPU. `join` makes several
linear maps of one input one product: the weights are put one after the other into one array, and those of the parts
become views of it. Names, numbers and bytes stay, and who needs a single part (a prefill, a masked product, a kernel, a
token that only writes keys and values) finds it.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from duo_mlx.auto import FEW

FORMAT = ("mode", "bits", "group_size")
PIECES = 64  # of a tall product
TALL = 256 * PIECES  # outputs


def on_cpu() -> bool:
    """Whether MLX runs on the CPU, where some of its fused primitives are many small ones.

    Where a small model decodes, these take longer than what they stand between, the products with its weights.
    """
    return mx.default_device().type == mx.DeviceType.cpu


def few(x: mx.array) -> bool:
    """Whether hidden states ``[..., hidden]`` are of so few tokens that a pass over them decodes."""
    return x.size <= FEW * x.shape[-1]


def join(parts: Sequence[nn.Module]) -> nn.Module | None:
    """One linear map whose outputs are those of the parts, one after the other; None where they are stored differently.

    From then on the weights of the parts must not be changed, since the whole would keep the old ones.
    """
    formats = {(type(part), *(getattr(part, name, None) for name in FORMAT), *sorted(part)) for part in parts}
    if len(formats) != 1 or type(parts[0]) not in (nn.Linear, nn.QuantizedLinear):
        return None
    whole = nn.Linear(1, 1) if type(parts[0]) is nn.Linear else nn.QuantizedLinear(128, 1)
    whole.clear()
    for name in FORMAT:
        if hasattr(parts[0], name):
            setattr(whole, name, getattr(parts[0], name))
    for name in sorted(parts[0]):
        together = whole[name] = mx.concatenate([part[name] for part in parts])
        start = 0
        for part in parts:
            stop = start + part[name].shape[0]
            part[name], start = together[start:stop], stop
    return whole


def onto(residual: mx.array | None, linear: nn.Module, row: mx.array) -> mx.array:
    """``residual + linear(row)`` for ``[..., width]``, in one operation where the map is of plain floats."""
    if residual is None:
        return linear(row)
    if type(linear) is nn.Linear and "bias" not in linear:
        return mx.addmm(residual, row, linear.weight.T)
    return residual + linear(row)


def tall(row: mx.array, weight: mx.array) -> mx.array:
    """``row @ weight.T`` for a single ``[1, width]`` and the table of a vocabulary, ``[outputs, width]``.

    On the CPU it is done in pieces, with which OpenBLAS reads the table about 10 % faster than at once, where the table
    is tall enough and can be divided so.
    """
    outputs, width = weight.shape
    if not on_cpu() or outputs < TALL or outputs % PIECES:
        return row @ weight.T
    return (row @ weight.reshape(PIECES, -1, width).swapaxes(1, 2)).reshape(1, outputs)
