"""A head's product in pieces: the same logits, in the pieces that pay, and only where they do."""

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx import products
from duo_mlx.bench.peer import primitives

WIDTH = 8


@pytest.mark.parametrize(
    ("outputs", "pieces"),
    [
        (products.TALL, products.PIECES),
        (products.TALL + products.PIECES, products.PIECES),
        (products.TALL + 1, 1),  # cannot be divided
        (products.TALL - products.PIECES, 1),  # not tall
    ],
)
def test_a_tall_product_is_done_in_pieces(outputs, pieces):
    random = np.random.default_rng(outputs)
    row, weight = random.standard_normal((1, WIDTH), np.float32), random.standard_normal((outputs, WIDTH), np.float32)
    found, plain = products.tall(mx.array(row), mx.array(weight)), mx.array(row) @ mx.array(weight).T
    assert (primitives(found) > primitives(plain)) == (pieces > 1)
    np.testing.assert_allclose(np.array(found), row @ weight.T, rtol=0, atol=1e-5)
    assert found.shape == (1, outputs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1,), (2, 1), (1, 3)])
def test_the_head_is_the_same_for_one_token_and_for_many(tiny_model, tied, shape):
    model = tiny_model(vocab_size=products.TALL, tie_word_embeddings=tied)
    table = model.model.embed_tokens.weight if tied else model.lm_head.weight
    out = np.random.default_rng(1).standard_normal((*shape, model.args.hidden_size)).astype(np.float32)
    found = model.head(mx.array(out))
    assert found.shape == (*shape, products.TALL)
    np.testing.assert_allclose(np.array(found), out @ np.array(table).T, rtol=0, atol=1e-4)
