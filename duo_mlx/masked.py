"""Strategy ``masked``: matrix products whose mask is the route, for FFNs of plain floats and a known form.

On Metal a product whose block is masked out returns before it reads the weights (MLX's ``gemv_masked.h``), so a route
on the device decides what is read without the host. On the CPU the numbers are the same and nothing is saved.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

from duo_mlx.errors import DuoError
from duo_mlx.ffn import FFNs
from duo_mlx.forms import ACTIVATIONS, Gated, form, unknown
from duo_mlx.routes import Route

BLOCK = 64  # of MLX's product; a row of tokens has a mask of its own, so one block spans every output


def refusal(ffns: FFNs, dtype: mx.Dtype) -> str | None:
    """Why these FFNs cannot run under ``masked`` on the default device; None if they can."""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    allowed = (mx.float32,) if on_cpu else (mx.float32, mx.float16, mx.bfloat16)
    if dtype not in allowed:
        names = ", ".join(str(known).removeprefix("mlx.core.") for known in allowed)
        return f"MLX's masked product takes {names} here, not {str(dtype).removeprefix('mlx.core.')}"
    for name, module in (("big", ffns.big), ("small", ffns.small)):
        found = form(module)
        if found is None:
            return f"{name}: {unknown(module)}"
        for linear in found[:-1]:
            if not isinstance(linear, nn.Linear):
                return "MLX's masked product takes plain floats, and these weights are quantised"
            if linear.weight.dtype != dtype:
                return "weights and activations have different dtypes"
    return None


def run(ffns: FFNs, x: mx.array, route: mx.array) -> mx.array:
    """The FFNs' output ``[..., hidden]`` by the routes ``[...]``; zeros where a token skips."""
    rows, mask = x.reshape(-1, 1, x.shape[-1]), route.reshape(-1, 1, 1)
    if ffns.small is ffns.big:
        return _module(ffns.big, rows, mask != Route.SKIP).reshape(x.shape)
    out = _module(ffns.big, rows, mask == Route.BIG) + _module(ffns.small, rows, mask == Route.SMALL)
    return out.reshape(x.shape)


def _module(ffn: nn.Module, rows: mx.array, mask: mx.array) -> mx.array:
    found = form(ffn)
    if found is None:
        raise DuoError(unknown(ffn))
    inner = _product(found.up, rows, mask)
    if not isinstance(found, Gated):
        inner = ACTIVATIONS[found.activation](inner)
    elif found.activation == "silu":  # one kernel
        inner = swiglu(_product(found.gate, rows, mask), inner)
    else:
        inner = ACTIVATIONS[found.activation](_product(found.gate, rows, mask)) * inner
    return _product(found.down, inner, mask)


def _product(linear: nn.Module, rows: mx.array, mask: mx.array) -> mx.array:
    # transposed: the kernel for that layout is the one that takes a broadcast mask
    out = mx.block_masked_mm(rows, linear.weight.T, BLOCK, mask_out=mask)
    if "bias" in linear:
        out = out + mx.where(mask, linear.bias, mx.zeros((), out.dtype))
    return out
