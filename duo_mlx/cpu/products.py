"""Products with weights in fewer and faster operations: what is left to save where a small model decodes a token.

`join` makes several linear maps of one input one product: the weights are put one after the other into one array, and
those of the parts become views of it. Names, numbers and bytes stay, and who needs a single part (a prefill, a masked
product, a kernel, a token that only writes keys and values) finds it. `onto` adds a residual within the product.

`through` and `times` cut the outputs of a product into pieces where these are faster. OpenBLAS copies weights before it
multiplies with them, though a few tokens need them but once. Its kernels for AVX-512 leave that out of small products
(`sgemm_small_kernel_permit_skylakex.c`), so there products are cut into pieces as small as that: `duo_mlx.bench.pieces`
has the times. Other kernels always copy. Where more threads share a product than there are figures for, nothing is
cut, since a piece has one thread.
"""

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn

from duo_mlx import _blas
from duo_mlx.device import on_cpu
from duo_mlx.routes import FEW

FORMAT = ("mode", "bits", "group_size")
UNCOPIED = {"SkylakeX", "Cooperlake", "SapphireRapids"}  # kernels that copy no weights for products
OUTPUTS, MULTIPLICATIONS = 1200, 1_000_000  # of at most so many numbers, and so many multiplications,
LEAST = 32  # and of at least so wide inputs. Pieces have as many outputs, or there would be too many
THREADS = 2  # at most
RULE = f"products are cut for OpenBLAS with kernels for {', '.join(sorted(UNCOPIED))} and at most {THREADS} threads"


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
    whole = _empty(parts[0])
    for name in sorted(parts[0]):
        together = whole[name] = mx.concatenate([part[name] for part in parts])
        start = 0
        for part in parts:
            stop = start + part[name].shape[0]
            part[name], start = together[start:stop], stop
    return whole


def _empty(like: nn.Module) -> nn.Module:
    """A linear map without weights, whose weights will be stored as those of ``like`` are."""
    found: nn.Module = nn.QuantizedLinear(128, 1) if "scales" in like else nn.Linear(1, 1)
    found.clear()
    for name in FORMAT:
        if hasattr(like, name):
            setattr(found, name, getattr(like, name))
    return found


def onto(residual: mx.array | None, linear: nn.Module, x: mx.array) -> mx.array:
    """``residual + linear(x)`` for few tokens ``[..., width]``, in one operation where it is one of plain floats."""
    if residual is None:
        return through(linear, x)
    if type(linear) is nn.Linear and "bias" not in linear and pieces(linear.weight, x) == 1:
        return mx.addmm(residual, x, linear.weight.T)
    return residual + through(linear, x)


def through(linear: nn.Module, x: mx.array) -> mx.array:
    """``linear(x)`` for few tokens ``[..., width]``."""
    if type(linear) is not nn.Linear or pieces(linear.weight, x) == 1:
        out: mx.array = linear(x)
        return out
    product = times(x, linear.weight)
    return product + linear.bias if "bias" in linear else product


def times(x: mx.array, weight: mx.array) -> mx.array:
    """``x @ weight.T`` for ``x [..., width]`` and ``weight [outputs, width]``."""
    cut = pieces(weight, x)
    if cut == 1:
        return x @ weight.T
    outputs, width = weight.shape
    parts = x.reshape(-1, width) @ weight.reshape(cut, -1, width).swapaxes(1, 2)  # [pieces, tokens, their outputs]
    return parts.swapaxes(0, 1).reshape(*x.shape[:-1], outputs)


def cuts() -> bool:
    """Whether the BLAS that was loaded is one for which products are cut."""
    blas = _blas.preload()
    return blas is not None and blas.kernels in UNCOPIED and (blas.threads or THREADS) <= THREADS


def pieces(weight: mx.array, x: mx.array) -> int:
    """In how many equal pieces the product of ``x [..., width]`` with ``weight [outputs, width]`` is the fastest."""
    if not on_cpu() or weight.dtype != mx.float32:
        return 1
    return _pieces(*weight.shape, x.size // x.shape[-1])


@lru_cache(maxsize=1024)
def _pieces(outputs: int, width: int, tokens: int) -> int:
    if not cuts():
        return 1
    most = min(OUTPUTS, MULTIPLICATIONS // width) // tokens  # outputs of a piece
    if outputs <= most or min(most, width) < LEAST:
        return 1
    cut = next(count for count in range(-(-outputs // most), outputs + 1) if outputs % count == 0)
    return cut if outputs // cut >= LEAST else 1
