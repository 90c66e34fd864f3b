"""Forms of mlx-lm's own FFNs, found by trial, and what is not taken for one of them."""

import importlib
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import gemma3n, gpt_oss, llama, mixtral
from mlx_lm.models.switch_layers import SwitchGLU

from duo_mlx import forms
from duo_mlx.forms import Gated, TwoMatrices, form, unknown

GATED = ("gate_proj", "up_proj", "down_proj")
SIZES = SimpleNamespace(hidden_size=16, intermediate_size=24, n_embd=16, n_inner=24, mlp_bias=True)
# module and class of the FFN, its arguments, form, names of gate (if any), up and down
FFNS = {
    "llama.MLP": ((SIZES,), "gated silu", GATED),
    "qwen2.MLP": ((16, 24), "gated silu", GATED),
    "qwen3.MLP": ((16, 24), "gated silu", GATED),
    "gemma.MLP": ((16, 24), "gated gelu", GATED),
    "gemma2.MLP": ((16, 24), "gated gelu_tanh", GATED),
    "gemma3_text.MLP": ((16, 24), "gated gelu_tanh", GATED),
    "phi.PhiMLP": ((SIZES,), "plain gelu_tanh", ("fc1", "fc2")),
    "starcoder2.MLP": ((16, 24), "plain gelu", ("c_fc", "c_proj")),
    "gpt_bigcode.MLP": ((SIZES,), "plain gelu", ("c_fc", "c_proj")),
    "gpt2.MLP": ((SIZES,), "plain gelu_tanh", ("c_fc", "c_proj")),
    "gpt_neox.MLP": ((SIZES,), "plain gelu_tanh", ("dense_h_to_4h", "dense_4h_to_h")),
    "nemotron.MLP": ((SIZES,), "plain relu2", ("up_proj", "down_proj")),
    "stablelm.MLP": ((16, 24), "gated silu", GATED),
    "minicpm.MLP": ((SIZES,), "gated silu", GATED),
    "exaone4.MLP": ((16, 24), "gated silu", GATED),
    "olmo2.MLP": ((SIZES,), "gated silu", GATED),
}


def make(name, arguments):
    module, kind = name.split(".")
    return getattr(importlib.import_module(f"mlx_lm.models.{module}"), kind)(*arguments)


def check(ffn, kind, names):
    found = form(ffn)
    assert str(found) == kind
    assert isinstance(found, Gated if len(names) == 3 else TwoMatrices)
    assert all(part is ffn[name] for part, name in zip(found[:-1], names, strict=True))


@pytest.mark.parametrize("name", FFNS)
def test_mlx_lms_ffns(name):
    arguments, kind, names = FFNS[name]
    check(make(name, arguments), kind, names)


def test_quantised_weights_and_private_parts_change_nothing():
    ffn = llama.MLP(SimpleNamespace(hidden_size=64, intermediate_size=64))
    check(ffn, "gated silu", GATED)
    nn.quantize(ffn, 64, 4)
    ffn._kept = mx.zeros(3)
    check(ffn, "gated silu", GATED)


def test_weights_are_not_read():
    ffn = llama.MLP(SIZES)
    for name in GATED:
        ffn[name].weight = mx.zeros((1 << 20, 1 << 20))  # 4 TiB if anybody looks
    check(ffn, "gated silu", GATED)


class ByName(nn.Module):
    """An activation that an attribute names, between linear maps whose names say nothing."""

    def __init__(self, activation, gated):
        super().__init__()
        self.b, self.a = nn.Linear(16, 24), nn.Linear(24, 16)
        if gated:
            self.c = nn.Linear(16, 24)
        self.activation = activation

    def __call__(self, x):
        inner = forms.ACTIVATIONS[self.activation](self.b(x))
        return self.a(inner * self.c(x) if "c" in self else inner)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", forms.ACTIVATIONS)
def test_an_activation_is_told_apart_from_all_others_and_by_instance(activation, gated):
    names, kind = (("b", "c", "a"), "gated") if gated else (("b", "a"), "plain")
    check(ByName(activation, gated), f"{kind} {activation}", names)


def test_an_activation_may_be_a_module_or_a_function():
    class WithAct(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(16, 24), nn.Linear(24, 16), act

        def __call__(self, x):
            return self.fc2(self.act(self.fc1(x)))

    for act, kind in ((nn.GELU(), "gelu"), (nn.GELU("precise"), "gelu_tanh"), (nn.silu, "silu"), (nn.ReLU(), "relu")):
        check(WithAct(act), f"plain {kind}", ("fc1", "fc2"))
    assert form(WithAct(nn.Mish())) is None
    assert form(WithAct(nn.PReLU())) is None


def sparse(layer):
    config = SimpleNamespace(hidden_size=16, intermediate_size=24, activation_sparsity_pattern=[0.95, 0.0])
    return gemma3n.MLP(config, layer)


class Clipped(llama.MLP):
    def __call__(self, x):
        return super().__call__(mx.clip(x, -50, 50))


class Scaled(llama.MLP):
    def __call__(self, x):
        return 0.999 * super().__call__(x)


class Normed(llama.MLP):
    def __init__(self, sizes):
        super().__init__(sizes)
        self.norm = nn.RMSNorm(16)

    def __call__(self, x):
        return super().__call__(self.norm(x))


EXPERTS = SimpleNamespace(
    hidden_size=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, swiglu_limit=7.0
)
UNKNOWN = {
    "joined gate and up": lambda: make("phi3.MLP", (16, 24)),
    "experts alone": lambda: SwitchGLU(16, 24, 4),
    "mixtral": lambda: mixtral.MixtralSparseMoeBlock(EXPERTS),
    "gpt_oss": lambda: gpt_oss.MLPBlock(EXPERTS),
    "sparse activation": lambda: sparse(0),
    "clipped": lambda: Clipped(SIZES),
    "scaled": lambda: Scaled(SIZES),
    "a norm within": lambda: Normed(SIZES),
    "no FFN": lambda: nn.Linear(16, 16),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_forms_are_none(name):
    ffn = UNKNOWN[name]()
    assert form(ffn) is None
    reason = unknown(ffn)
    assert type(ffn).__qualname__ in reason and "\n" not in reason


def test_layers_of_one_class_may_differ():
    check(sparse(1), "gated gelu_tanh", GATED)
    assert form(sparse(0)) is None


def test_random_numbers_stay_what_they_were():
    class Own(llama.MLP):
        """One that no trial has met."""

    ffn = Own(SIZES)
    mx.random.seed(5)
    wanted = mx.random.normal((3,)).tolist()
    mx.random.seed(5)
    check(ffn, "gated silu", GATED)
    assert mx.random.normal((3,)).tolist() == wanted


def test_within_a_transformation():
    class Traced(llama.MLP):
        """One that no trial has met."""

    ffn = Traced(SIZES)
    found = []

    def step(x):
        found.append(str(form(ffn)))
        return ffn(x).sum()

    x = mx.ones((1, 1, 16))
    mx.eval(mx.compile(step, inputs=[ffn.state])(x), mx.grad(step)(x))
    assert found == ["gated silu"] * 2
