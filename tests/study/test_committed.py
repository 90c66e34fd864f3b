"""One token's patterns after settled ones: the losses of decoding each, and nothing is written."""

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx.errors import DuoError
from duo_mlx.routes import Route
from duo_mlx.study import tree
from duo_mlx.study.committed import Token

IDS = np.random.default_rng(1).integers(0, 32, 8)


def decoded(model, settled, place, pattern):
    """The loss of decoding one token by a pattern after a pass over those before by theirs."""
    cache = model.make_cache()
    if place:
        model(mx.array(IDS[None, :place]), cache=cache, routes=np.array(settled)[None])
    logits = np.array(model(mx.array(IDS[None, place : place + 1]), cache=cache, routes=pattern))[0, 0]
    return np.log(np.exp(logits.astype(np.float64)).sum()) - logits[IDS[place + 1]]


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("choices", [(Route.SMALL, Route.BIG), tuple(Route)])
@pytest.mark.parametrize("changes", [{}, {"skip_scope": "layer"}, {"rope_traditional": True, "num_key_value_heads": 4}])
def test_from_left_to_right(tiny_model, choices, rows, changes):
    model = tiny_model(**changes)
    options, cache, settled = tree.layer_options(model, choices), model.make_cache(), []
    for place in range(4):
        walk = Token(model, cache, int(IDS[place]), int(IDS[place + 1]), options, rows)
        patterns, losses = (np.concatenate(each) for each in zip(*walk.losses(), strict=True))
        assert all(layer.offset == place for layer in cache) and losses.shape == (len(choices) ** 4, 1)
        expected = [decoded(model, settled, place, pattern) for pattern in patterns]
        np.testing.assert_allclose(losses[:, 0], expected, rtol=0, atol=1e-5)
        best = patterns[losses[:, 0].argmin()]
        model(mx.array(IDS[None, place : place + 1]), cache=cache, routes=best)
        settled.append(best)


def test_sliding_attention_is_refused(tiny_model):
    model = tiny_model(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=3)
    with pytest.raises(DuoError, match="attention sees all positions before it"):
        Token(model, model.make_cache(), 1, 2, tree.layer_options(model, tuple(Route)))
