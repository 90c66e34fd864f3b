"""FLOPs of a token that are counted in graphs, against the sizes of matrices and of attention."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import quantize_model

from duo_mlx import cost, cpu
from duo_mlx.bench import growth
from duo_mlx.errors import DuoError
from duo_mlx.flops import _of_primitive, flops
from duo_mlx.routes import Route
from duo_mlx.study.limits import parse_limit
from tests.architectures import ARCHITECTURES
from tests.test_architectures import made

BASES = ("qwen3", "gemma3_text", "gpt2", "mixtral", "phi", "deepseek_v3", "plamo", "spark2_5", "opt")
CONTEXT = 6  # less than all windows
REFUSED = {"dbrx": "eval", "iquestloopcoder": "does not call its layers"}


def matrices(module):
    """How many numbers the matrices of a module have that a token is multiplied with."""
    total = sum(array.size for _, array in tree_flatten(module.parameters()) if array.ndim > 1)
    for part in module.modules():
        if isinstance(part, SwitchLinear):
            experts = part.weight.shape[0]
            total -= part.weight.size * (experts - cost.chosen_experts(module)) // experts
            total -= part.bias.size if "bias" in part else 0
    return total


@pytest.mark.parametrize("kind", BASES)
def test_ffns_and_head_of_any_base(kind):
    model = made(kind)
    table = flops(model)(CONTEXT)
    for layer, ffn in enumerate(model.ffns):
        skip, small, big = table.by_route[layer]
        assert small - skip == 2 * matrices(ffn.small) == 2 * 3 * 64 * 32
        assert big - skip == 2 * matrices(ffn.big)
    assert table.fixed == 2 * matrices(model.table)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt2", "mixtral", "phi", "opt"])
def test_attention_of_any_base(kind):
    """Scores and mixing for four heads of 16, as far as a layer's window goes."""
    model = made(kind)
    blocks = np.array([2 * (matrices(block) - matrices_of_ffn(block)) for block in model.layers])
    at = flops(model)
    for context in (CONTEXT, 100):
        seen = np.array([min(context, window or context) for window in cost.windows(model)])
        np.testing.assert_array_equal(at(context).by_route[:, Route.SKIP], blocks + 4 * 64 * seen)


def matrices_of_ffn(block):
    return matrices(next(part for part in block.values() if getattr(part, "replaces_ffn", False)))


@pytest.mark.parametrize("kind", [kind for kind, row in ARCHITECTURES.items() if not row.refused])
def test_every_architecture_is_counted_or_refused_by_name(kind):
    model = made(kind)
    if kind in REFUSED:
        with pytest.raises(DuoError, match=f"^FLOPs of a {kind} cannot be counted: .*{REFUSED[kind]}"):
            parse_limit("flops:0.6", model, CONTEXT)
        return
    short, long = flops(model)(CONTEXT), flops(model)(100)
    assert (np.diff(short.by_route, axis=1)[:, 0] > 0).all()
    assert (short.by_route[:, Route.SKIP] < short.by_route[:, Route.BIG]).all()
    assert (long.by_route >= short.by_route).all() and short.fixed == long.fixed > 0
    assert mx.isfinite(model(mx.array([[5]]))).any()  # the model itself still has its weights


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_a_llamas_are_the_formulas(tiny_model, skip_scope):
    model = tiny_model(skip_scope=skip_scope)
    found, formula = flops(model)(10), growth.flops(model.config, 10)
    assert found.fixed == formula.fixed
    np.testing.assert_array_equal(found.by_route[:, 1:], formula.by_route[:, 1:])
    left = 2 * 2 * 16 * 16 + 4 * 16 * 10 if skip_scope == "layer" else 0  # queries, outputs and attention
    np.testing.assert_array_equal(found.by_route[:, 0], formula.by_route[:, 0] - left)


def test_how_a_model_computes_does_not_count():
    expected = flops(made("llama"))(CONTEXT).by_route
    fused, quantised = made("llama"), quantize_model(made("llama"), {}, 32, 4)[0]
    cpu.quicken(fused, fuse=True)
    for model in (fused, quantised):
        np.testing.assert_array_equal(flops(model)(CONTEXT).by_route, expected)


def test_attention_that_is_one_primitive_on_a_gpu():
    arrays = [("q", (1, 4, 1, 24), "f"), ("k", (1, 2, 9, 24), "f"), ("v", (1, 2, 9, 16), "f")]
    assert _of_primitive({"name": "ScaledDotProductAttention", "inputs": arrays}) == 2 * 4 * 9 * (24 + 16)
