"""Texts that a model writes itself, for its drafts to learn from.

In use drafts are asked what the model says next in its own text, which no book holds. DistillSpec (arXiv 2310.08461)
finds that what is distilled on such texts is accepted more often.
"""

from collections.abc import Collection, Iterator

import mlx.core as mx
import numpy as np

from duo_mlx.model import Model
from duo_mlx.routes import Routes
from duo_mlx.sampling import Sampling, normalised
from duo_mlx.training.tokens import Ids


def windows(ids: Ids, length: int, count: int, seed: int) -> Ids:
    """Random windows ``[count, length]`` of ``ids``, which are at least as long."""
    starts = np.random.default_rng(seed).integers(0, len(ids) - length + 1, count)
    return np.stack([ids[start : start + length] for start in starts]).astype(np.int32)


def continued(
    model: Model,
    prompts: Ids,
    tokens: int,
    routes: Routes,
    sampling: Sampling,
    ends: Collection[int] = (),
    batch: int = 64,
) -> Iterator[list[int]]:
    """Prompts and what the model says after them, one after the other.

    Args:
        model: a Duo.
        prompts: ids ``[prompts, length]``.
        tokens: that are said after each, at most.
        routes: of all tokens, ``[layers]``.
        sampling: how tokens are chosen; at random with MLX's own state.
        ends: ids that end a text and are no part of it.
        batch: prompts that are gone on with at once.
    """
    for start in range(0, len(prompts), batch):
        given = prompts[start : start + batch]
        cache, read = model.make_cache(), mx.array(given)
        if given.shape[1] > 1:
            model(read[:, :-1], cache, routes=routes)
            mx.eval([each.state for each in cache])  # without logits, which nobody asks for
        last, said = read[:, -1:], []
        for _ in range(tokens):
            logits = model(last, cache, routes=routes)[:, 0].astype(mx.float32)
            last = sampling(normalised(logits) if sampling.temp else logits)[:, None]
            mx.async_eval(last)
            said.append(last)
        for prompt, row in zip(given.tolist(), np.array(mx.concatenate(said, axis=1)).tolist(), strict=True):
            stop = next((place for place, token in enumerate(row) if token in ends), tokens)
            yield [*prompt, *row[:stop]]
