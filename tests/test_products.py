"""Products in pieces: the same numbers, in as few pieces as OpenBLAS multiplies with uncopied weights where it can."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duo_mlx import _blas
from duo_mlx.bench.peer import primitives
from duo_mlx.cpu import products

AVX512 = _blas.Loaded("libopenblas.so.0", "SkylakeX", 1)
WIDTH, OUTPUTS = 32, 4096  # four pieces for one token


def random(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


@pytest.mark.parametrize(
    ("shape", "pieces"), [((1, WIDTH), 4), ((WIDTH,), 4), ((2, 1, WIDTH), 8), ((1, 3, WIDTH), 16), ((1, 60, WIDTH), 1)]
)
@pytest.mark.parametrize("kind", ["plain", "biased", "residual", "both"])
def test_a_product_is_the_same_in_pieces(blas, shape, pieces, kind):
    blas(AVX512)
    linear = nn.Linear(WIDTH, OUTPUTS, bias=kind in ("biased", "both"))
    weight, x, residual = random(OUTPUTS, WIDTH), random(*shape), random(*shape[:-1], OUTPUTS)
    linear.weight = mx.array(weight)
    assert products.pieces(linear.weight, mx.array(x)) == pieces
    expected = x @ weight.T
    if "bias" in linear:
        expected += np.array(linear.bias)
    if kind in ("residual", "both"):
        found = products.onto(mx.array(residual), linear, mx.array(x))
        expected += residual
    else:
        found = products.through(linear, mx.array(x))
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=1e-5)


def test_what_is_cut_is_multiplied_in_pieces(blas):
    x, weight = mx.array(random(1, WIDTH)), mx.array(random(OUTPUTS, WIDTH))
    counts = {}
    for name, loaded in {"cut": AVX512, "whole": None}.items():
        blas(loaded)
        counts[name] = primitives(products.times(x, weight))
    assert counts["whole"] == primitives(x @ weight.T) < counts["cut"]


@given(st.integers(1, 200_000), st.integers(1, 20_000), st.integers(1, 8))
def test_pieces_are_as_few_as_copy_no_weights(outputs, width, tokens):
    products._pieces.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_blas, "preload", lambda: AVX512)
        found = products._pieces(outputs, width, tokens)
    products._pieces.cache_clear()

    def uncopied(count):
        part = outputs // count
        return width >= 32 and part * tokens <= 1200 and part * width * tokens <= 1_000_000

    possible = [count for count in range(1, outputs // 32 + 1) if outputs % count == 0 and uncopied(count)]
    assert found == (possible[0] if possible else 1)


@pytest.mark.parametrize(
    "loaded",
    [
        None,
        _blas.Loaded("libopenblas.so.0"),
        _blas.Loaded("libopenblas.so.0", "Haswell", 1),
        _blas.Loaded("libopenblas.so.0", "SkylakeX", 3),
    ],
    ids=["another BLAS", "unknown kernels", "kernels that always copy", "more threads than were measured"],
)
def test_nothing_is_cut_elsewhere(blas, loaded):
    blas(loaded)
    assert products.pieces(mx.array(random(OUTPUTS, WIDTH)), mx.array(random(1, WIDTH))) == 1


def test_nothing_is_cut_in_half_precision_or_on_a_gpu(blas, monkeypatch):
    blas(AVX512)
    weight, x = mx.array(random(OUTPUTS, WIDTH)), mx.array(random(1, WIDTH))
    assert products.pieces(weight, x) == 4
    assert products.pieces(weight.astype(mx.bfloat16), x) == 1
    monkeypatch.setattr(products, "on_cpu", lambda: False)
    assert products.pieces(weight, x) == 1


def test_a_quantised_map_stays_whole(blas):
    blas(AVX512)
    linear = nn.QuantizedLinear.from_linear(nn.Linear(64, OUTPUTS, bias=False), group_size=64, bits=8)
    x = mx.array(random(1, 64))
    assert mx.array_equal(products.through(linear, x), linear(x))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1,), (2, 1), (1, 3), (1, 20)])
def test_the_head_is_the_same_for_few_tokens_and_for_many(tiny_model, blas, tied, shape):
    blas(AVX512)
    model = tiny_model(vocab_size=OUTPUTS, tie_word_embeddings=tied)
    table = model.model.embed_tokens.weight if tied else model.lm_head.weight
    out = random(*shape, model.config.hidden_size)
    found = model.head(mx.array(out))
    assert found.shape == (*shape, OUTPUTS)
    np.testing.assert_allclose(np.array(found), out @ np.array(table).T, rtol=0, atol=1e-4)
