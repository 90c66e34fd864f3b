"""What the kernels do not take: there is a reason in one line and no launch."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from duo_mlx import masked
from duo_mlx.errors import DuoError
from duo_mlx.kernels import fused, launch

FLOAT = (64, "float", "float")
HALF = (32, "float", "float")


def quantised(bits, group, mode="affine"):
    def change(ffns):
        linear = nn.Linear(128, 128, bias=False)
        for name in ("gate_proj", "up_proj"):
            setattr(ffns.big, name, nn.QuantizedLinear.from_linear(linear, group, bits, mode=mode))

    return change


def no_linear(ffns):
    ffns.small.up_proj = nn.Identity()


def other_dtype(part):
    def change(ffns):
        ffns.big.gate_proj[part] = ffns.big.gate_proj[part].astype(mx.float16)

    return change


def stored_differently(ffns):
    ffns.big.up_proj = nn.QuantizedLinear.from_linear(ffns.big.up_proj, 32, 4)


def other_scales(ffns):
    quantised(4, 32)(ffns)
    ffns.big.gate_proj.scales = ffns.big.gate_proj.scales[:, :2]


def other_shape(ffns):
    ffns.small.down_proj.weight = ffns.small.down_proj.weight[:, :3]


def one_bias(ffns):
    ffns.small.gate_proj.bias = mx.zeros(32)


def other_hidden(ffns):
    ffns.small.gate_proj.weight = ffns.small.up_proj.weight = mx.zeros((32, 16))
    ffns.small.down_proj.weight = mx.zeros((16, 32))


def too_wide(ffns):
    ffns.small.gate_proj.weight = ffns.small.up_proj.weight = mx.zeros((65, 64))
    ffns.small.down_proj.weight = mx.zeros((64, 65))


CASES = {
    **{f"{bits} bits": (quantised(bits, 32), f"big.up has {bits}-bit weights") for bits in (2, 3, 5, 6)},
    "mxfp4": (quantised(4, 32, "mxfp4"), "mode 'mxfp4'"),
    "nvfp4": (quantised(4, 16, "nvfp4"), "mode 'nvfp4'"),
    "no linear map": (no_linear, "small: mlx_lm.models.llama.MLP is not known as .*; its up_proj is of type Identity"),
    "weight dtype": (other_dtype("weight"), "big.gate is stored in float16 and the activations are float32"),
    "gate and up": (stored_differently, "big.gate and big.up are stored differently .float, q4g32."),
    "a bias of gate only": (one_bias, "small.gate and small.up are stored differently .float.bias, float."),
    "scales": (other_scales, "not one for each group of 32"),
    "shapes": (other_shape, "shapes of small's projections"),
    "hidden": (other_hidden, "small is for 16 hidden values and big for 64"),
    "small is wider": (too_wide, "small is 65 wide and big only 64"),
}


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    def execute(launched):
        raise AssertionError(f"{launched.kernel} was launched")

    monkeypatch.setattr(launch, "execute", execute)


def refused(ffns, rows, dtype):
    """The reason, which `refusal` gives and `ffn` raises."""
    reason = fused.refusal(ffns, rows, dtype)
    assert reason and "\n" not in reason
    x = mx.zeros((1, rows, 64), dtype)
    for call in (
        lambda: fused.ffn(ffns, x, mx.zeros((1, rows), mx.uint32)),
        lambda: fused.signature(ffns, rows, dtype),
    ):
        with pytest.raises(DuoError) as raised:
            call()
        assert str(raised.value) == reason
    return reason


@pytest.mark.parametrize("case", CASES)
def test_ffns_that_do_not_fit(ffns_of, case):
    change, reason = CASES[case]
    ffns = ffns_of(64, FLOAT, HALF, mx.float32)
    assert fused.refusal(ffns, 1, mx.float32) is None
    change(ffns)
    with pytest.raises(DuoError, match=reason):
        raise DuoError(refused(ffns, 1, mx.float32))


def test_groups_of_another_size(ffns_of):
    ffns = ffns_of(64, (64, "q4g64", "q4g64"), HALF, mx.float32)
    ffns.big.gate_proj.group_size = 16
    assert "big.gate has groups of 16" in refused(ffns, 1, mx.float32)


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint8, mx.float64, mx.complex64])
def test_other_dtypes(ffns_of, dtype):
    ffns = ffns_of(64, FLOAT, HALF, mx.float32)
    name = str(dtype).removeprefix("mlx.core.")
    assert fused.refusal(ffns, 1, dtype) == f"the kernels take float32, float16, bfloat16, not {name}"
    assert name in fused.router_refusal(64, 2, 1, dtype)


@pytest.mark.parametrize("rows", [0, 9, 512])
def test_more_rows_than_a_decoding_batch(ffns_of, rows):
    ffns = ffns_of(64, FLOAT, HALF, mx.float32)
    assert refused(ffns, rows, mx.float32) == f"the kernels take 1 to 8 tokens, not {rows}"
    assert fused.router_refusal(64, 2, rows, mx.float32) == f"the kernels take 1 to 8 tokens, not {rows}"


def test_routers_that_do_not_fit():
    assert fused.router_refusal(64, 2, 1, mx.bfloat16) is None
    assert "among 1 to 3 routes" in fused.router_refusal(64, 4, 1, mx.float32)
    with pytest.raises(DuoError, match="among 1 to 3 routes"):
        fused.decide(mx.zeros((1, 1, 64)), mx.zeros((4, 64)), mx.zeros(4), (0, 1, 2, 2))


def test_inputs_of_other_shapes_or_dtypes(ffns_of):
    """They would be read out of bounds."""
    ffns = ffns_of(64, FLOAT, HALF, mx.float32)
    x, route = mx.zeros((1, 2, 64)), mx.zeros((1, 2), mx.uint32)
    for call in (
        lambda: fused.ffn(ffns, x[..., :63], route),
        lambda: fused.ffn(ffns, x, route[:, :1]),
        lambda: fused.decide(x, mx.zeros((2, 63)), mx.zeros(2), (1, 2)),
        lambda: fused.decide(x, mx.zeros((1, 64)), mx.zeros(2), (1, 2)),
        lambda: fused.decide(x, mx.zeros((2, 64)), mx.zeros(1), (1, 2)),
    ):
        with pytest.raises(DuoError, match="^(x|the router)"):
            call()


def test_a_signature_tells_variants_apart_and_stays_the_same(ffns_of):
    """Verdicts of self-checks are kept under it."""
    found = {}
    for big in (FLOAT, (64, "q4g32", "q4g64"), (64, "q8g64", "q8g64+bias")):
        for small in (None, HALF, (32, "float+bias", "float+bias")):
            for dtype in (mx.float32, mx.bfloat16):
                ffns = ffns_of(64, big, small, dtype)
                for rows in range(1, 9):
                    assert fused.refusal(ffns, rows, dtype) is None
                    name = fused.signature(ffns, rows, dtype)
                    found.setdefault(name, set()).add(int(np.ceil(np.log2(rows))))
    assert len(found) == 3 * 3 * 2 * 4
    assert all(len(buckets) == 1 for buckets in found.values())
    ffns = ffns_of(64, (64, "q4g32", "q4g64"), (32, "float+bias", "float"), mx.bfloat16)
    assert (
        fused.signature(ffns, 3, mx.bfloat16)
        == "bfloat16 rows4 big gated silu q4g32/q4g64 small gated silu float+bias/float"
    )
    assert "small is big" in fused.signature(ffns_of(64, FLOAT, None, mx.float32), 1, mx.float32)


def test_the_form_is_a_part_of_the_signature(ffns_of):
    gelu, plain = (*FLOAT, "gated gelu_tanh"), (*FLOAT, "plain relu2")
    found = {fused.signature(ffns_of(64, big, small, mx.float32), 1, mx.float32)
             for big in (FLOAT, gelu, plain) for small in (FLOAT, gelu, plain, None)}  # fmt: skip
    assert len(found) == 12
    assert "float32 rows1 big plain relu2 float/float small gated gelu_tanh float/float" in found


def test_experts_are_refused_by_their_class(ffns_of):
    """Their FFN is neither gated nor two matrices to who calls it with hidden states alone."""
    ffns = SimpleNamespace(big=SwitchGLU(64, 64, 4), small=ffns_of(64, FLOAT, HALF, mx.float32).small)
    reason = refused(ffns, 1, mx.float32)
    assert reason.startswith("big: mlx_lm.models.switch_layers.SwitchGLU is not known as ")
    assert masked.refusal(ffns, mx.float32) == reason


def test_this_machine_is_told_why_it_has_no_kernels():
    reason = launch.unavailable()
    assert (reason is None) == (mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu)
    assert reason is None or "GPU" in reason
