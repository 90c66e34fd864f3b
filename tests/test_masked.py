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
from duo_mlx.model import BigOnlyFFN, DuoFFN, ModelArgs

ROUTES = {
    "one skips": [[0]],
    "one small": [[1]],
    "one big": [[2]],
    "a batch": [[0], [2], [1], [2]],
    "a chunk": [[1, 0, 2, 1, 2, 2, 0]],
}


@pytest.fixture
def ffns(tiny_config):
    """``ffns(**changes)``: two modules with random weights, wider than a block of the product."""

    def make(kind=DuoFFN, **changes):
        sizes = {"hidden_size": 80, "intermediate_size": 150, "small_intermediate_size": 5} | changes
        made = kind(ModelArgs.from_dict(tiny_config(**sizes)))
        keys = iter(mx.random.split(mx.random.key(0), 20))
        made.update(tree_map(lambda value: mx.random.normal(value.shape, key=next(keys)) / 5, made.parameters()))
        return made

    return make


@pytest.mark.parametrize("kind", [DuoFFN, BigOnlyFFN])
@pytest.mark.parametrize("biases", [{}, {"small_bias": True}, {"mlp_bias": True}], ids=["no", "small's", "all"])
@pytest.mark.parametrize("name", ROUTES)
def test_the_modules_numbers(ffns, name, biases, kind):
    modules, route = ffns(kind, **biases), mx.array(ROUTES[name])
    x, residual = (mx.random.normal((*route.shape, 80), key=mx.random.key(seed)) for seed in (1, 2))
    found, expected = (conditional.run(modules, x, route, strategy, residual) for strategy in ("masked", "dense"))
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=1e-4)
    skipped = (route == 0)[..., None]
    assert mx.array_equal(mx.where(skipped, found, 0), mx.where(skipped, residual, 0)).item()


def test_what_it_cannot_run_has_a_reason(ffns):
    plain, quantised = ffns(), ffns(hidden_size=64)
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
