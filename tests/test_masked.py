"""Strategy ``masked``: products by mask agree with the modules, and what it cannot run is refused with a reason."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.models import gemma2, phi
from mlx_lm.models.switch_layers import SwitchGLU

from duo_mlx import conditional, forms, masked
from duo_mlx.errors import DuoError
from duo_mlx.ffn import DuoFFN, GatedFFN

ROUTES = {
    "one skips": [[0]],
    "one small": [[1]],
    "one big": [[2]],
    "a batch": [[0], [2], [1], [2]],
    "a chunk": [[1, 0, 2, 1, 2, 2, 0]],
}


@pytest.fixture
def ffns():
    """``ffns(**changes)``: two modules with random weights, wider than a block of the product."""

    def make(hidden=80, both=True, biases=()):
        big, small = (GatedFFN(hidden, inner, bias=name in biases) for name, inner in (("big", 150), ("small", 5)))
        made = DuoFFN(big, small if both else None, None, 0)
        keys = iter(mx.random.split(mx.random.key(0), 20))
        made.update(tree_map(lambda value: mx.random.normal(value.shape, key=next(keys)) / 5, made.parameters()))
        return made

    return make


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("biases", [(), ("small",), ("big", "small")], ids=["no", "small's", "all"])
@pytest.mark.parametrize("name", ROUTES)
def test_the_modules_numbers(ffns, name, biases, both):
    modules, route = ffns(both=both, biases=biases), mx.array(ROUTES[name])
    x = mx.random.normal((*route.shape, 80), key=mx.random.key(1))
    found, expected = (conditional.run(modules, x, route, strategy) for strategy in ("masked", "dense"))
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=1e-4)
    skipped = (route == 0)[..., None]
    assert not mx.where(skipped, found, 0).any().item()


def test_what_it_cannot_run_has_a_reason(ffns):
    plain, quantised = ffns(), ffns(hidden=64)
    nn.quantize(
        quantised,
        group_size=32,
        bits=4,
        class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0,
    )
    assert masked.refusal(plain, mx.float32) is None
    assert "takes float32 here, not float16" in masked.refusal(plain, mx.float16)
    assert "quantised" in masked.refusal(quantised, mx.float32)


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("activation", forms.ACTIVATIONS)
def test_other_forms(name, activation):
    class Plain(phi.PhiMLP):
        def __call__(self, x):
            return self.fc2(forms.ACTIVATIONS[activation](self.fc1(x)))

    class Gated(gemma2.MLP):
        def __call__(self, x):
            return self.down_proj(forms.ACTIVATIONS[activation](self.gate_proj(x)) * self.up_proj(x))

    big, small = Plain(SimpleNamespace(hidden_size=80, intermediate_size=150)), Gated(80, 5)
    modules, route = SimpleNamespace(big=big, small=small), mx.array(ROUTES[name])
    assert masked.refusal(modules, mx.float32) is None
    x = mx.random.normal((*route.shape, 80), key=mx.random.key(1))
    column = route[..., None]
    expected = mx.where(column == 2, big(x), mx.where(column == 1, small(x), 0))
    np.testing.assert_allclose(np.array(masked.run(modules, x, route)), np.array(expected), rtol=0, atol=1e-4)


def test_experts_are_refused():
    modules = SimpleNamespace(big=SwitchGLU(16, 24, 4), small=gemma2.MLP(16, 8))
    assert masked.refusal(modules, mx.float32).startswith("big: mlx_lm.models.switch_layers.SwitchGLU is not known as")


def test_a_refusal_says_what_would_do(ffns):
    modules = ffns()
    modules.set_dtype(mx.float16)
    x = mx.zeros((1, 1, 80), mx.float16)
    with pytest.raises(DuoError, match="'masked' cannot run here: .* not float16; use auto, sync, sorted or dense"):
        conditional.resolve("masked", modules, x, "device")
