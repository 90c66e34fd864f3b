"""Texts that a model writes: each token is what one pass over all before it says."""

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx.sampling import Sampling
from duo_mlx.training.continued import continued, windows

SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
PATTERN = np.array([2, 1, 0, 2], np.uint8)


def said(model, prompt, tokens):
    """What greedy decoding says after a prompt, each token by a pass without a cache."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(mx.argmax(model(mx.array([ids]), routes=PATTERN)[0, -1])))
    return ids


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("config", [{}, SLIDING], ids=["full", "sliding"])
def test_each_text_is_its_prompt_s_own(tiny_model, length, config):
    model = tiny_model(**config)
    prompts = windows(np.arange(300) * 7 % 31, length, 5, seed=1)
    expected = [said(model, prompt, 6) for prompt in prompts.tolist()]
    for batch in (1, 2, 64):
        assert list(continued(model, prompts, 6, PATTERN, Sampling(), batch=batch)) == expected
    assert len({tuple(each[length:]) for each in expected}) > 1


def test_a_text_ends_before_a_token_that_ends_it(tiny_model):
    model, prompts = tiny_model(), windows(np.arange(300) * 7 % 31, 5, 8, seed=1)
    whole = list(continued(model, prompts, 6, PATTERN, Sampling()))
    end = whole[0][7]
    found = list(continued(model, prompts, 6, PATTERN, Sampling(), ends={end}))
    for ids, cut in zip(whole, found, strict=True):
        new = ids[5:]
        assert cut == ids[:5] + (new[: new.index(end)] if end in new else new)
    assert len(found[0]) <= 7 and max(map(len, found)) == 11


def test_tokens_are_drawn_at_a_temperature(tiny_model):
    """Frequencies of the first token are its probabilities, within five standard deviations."""
    model, count = tiny_model(), 4000
    prompts = np.tile(np.array([[3, 1, 4]], np.int32), (count, 1))
    mx.random.seed(0)
    first = [ids[3] for ids in continued(model, prompts, 1, PATTERN, Sampling(0.8), batch=500)]
    logits = np.array(model(mx.array(prompts[:1]), routes=PATTERN))[0, -1].astype(np.float64) / 0.8
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    found = np.bincount(first, minlength=len(expected)) / count
    assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / count) + 1e-9).all()


def test_windows_are_of_the_text_and_of_every_place_of_it():
    ids = np.arange(50)
    found = windows(ids, 8, 400, seed=0)
    assert found.shape == (400, 8) and (np.diff(found, axis=1) == 1).all()
    assert set(found[:, 0]) == set(range(43))
    assert np.array_equal(found, windows(ids, 8, 400, seed=0)) and not np.array_equal(found, windows(ids, 8, 400, 1))
