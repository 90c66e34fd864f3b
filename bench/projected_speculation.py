"""How much faster speculation should decode on Apple chips: a projection, and it hangs on one open question.

A round with k drafted tokens takes k steps by the draft, a verifying pass over k + 1 tokens, and one wait, in which the
device stands still until the host knows what was accepted; plain decoding waits for nothing. The time of each is
`duo_mlx.projection`'s sum of bytes and kernels. Layers in which both routes begin alike verify one token only.

The question is how the time of a verifying pass grows with its tokens, the rows of its products. `GROWTHS` has bounds
and a report between them; it multiplies the time in which weights are read:

- ``read once``: the weights are read once, and nothing else takes time. No kernel is better.
- ``as reported``: MLX's kernel for few rows (``qmv_wide``, since 0.32.0; 4 bits; M3 and later) reads weights once for
  up to 5 rows, but computes long enough to show. M3 Max, 5120 x 17408, weights not in a cache: 0.129 ms for 1 and for 2
  rows, 0.165 for 4, 0.263 for 6, 0.323 for 8 (github.com/ml-explore/mlx/pull/3863). A whole model of 70 B parameters on
  an M5 Max: 1.12 for 3 rows, 1.48 for 5, 2.25 for 8 (pull/3791); an M4 Pro: 1.1 to 1.6 for 4, 1.7 to 2.7 for 8
  (issues/3839). An M3 Ultra whose one row came faster than its memory allows, from a cache: 3.3 and 6.1 (issues/4265).
- ``read per row``: on M1 and M2 the same products go to ``qmv``, whose grid has a group of threads for each row, which
  reads all weights (``dispatch_qmv`` and ``get_qmv_batch_limit`` in mlx/backend/metal/quantized.cpp; from 6 to 32 rows
  on, by chip and matrix, ``qmm`` takes over). What rows share in caches makes it cheaper; users of M1 and M2 report
  speculation slower than plain decoding at 45 to 62 % accepted (github.com/lmstudio-ai/mlx-engine/issues/113 and 103).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from duo_mlx import cost, work
from duo_mlx.bench.growth import layer_parameters
from duo_mlx.config import Config
from duo_mlx.drafting import LONGEST, best_length, tokens_expected
from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.projection import SHAPES, Constants, Machine, seconds
from duo_mlx.rounds import shared_layers
from duo_mlx.routes import Routes
from duo_mlx.work import Work

Growth = Mapping[int, float]  # time of a pass over that of one row, by rows; linear between them
GROWTHS: dict[str, Growth] = {
    "read once": {1: 1.0, LONGEST + 1: 1.0},
    "as reported": {1: 1.0, 2: 1.0, 4: 0.165 / 0.129, 6: 0.263 / 0.129, 8: 0.323 / 0.129},
    "read per row": {1: 1.0, LONGEST + 1: LONGEST + 1},
}
GOAL = 1.5  # for a model of `LARGE` parameters and more
LARGE = 1e9
ASSUMPTIONS = (
    "speculation: as many drafted tokens as are best; a round waits for the host once, plain decoding never",
    "read once: a verifying pass takes the time of one token's, the most that any kernel can give",
    "as reported: it grows as a 4-bit product did on an M3 Max (x1.28 for 4 tokens, x2.50 for 8), for M3 and later",
    "read per row: it grows with its tokens, since MLX's kernel for M1 and M2 reads weights for each; caches help it",
    "the acceptance is taken over from another model; after a wait the host builds the first draft step at no cost",
)


class Expected(NamedTuple):
    """The best number of drafted tokens, 0 where plain decoding is faster, and the speed-up over that."""

    draft_tokens: int
    speed_up: float


def kernels_of_judgement(drafts: int) -> int:
    """Kernels of a round beside its passes: copies that join hidden states, tokens and results; compare and cast."""
    hidden, tokens, results, compare, cast = drafts + 1, drafts, 3, 1, 1
    return hidden + tokens + results + compare + cast if drafts else 0


def round_seconds(
    model: Model, verify: Routes, draft: Routes, longest: int, context: int, constants: Constants, growth: Growth
) -> list[float]:
    """The time of a round with 0, 1 ... ``longest`` drafted tokens, ``[longest + 1]``.

    Args:
        model: its weights are never read.
        verify: the verifying routes ``[layers]``, as realised.
        draft: the draft's.
        longest: number of drafted tokens.
        context: positions attended to.
        constants: the machine's.
        growth: of a verifying pass, see `GROWTHS`.
    """
    weights, cache = cost.weight_bytes(model), cost.cache_bytes(model, context)
    kernels = work.dispatches(model, "planned")
    shared = shared_layers(draft[None], verify[None])
    of_shared = int(weights.by_route[np.arange(shared), verify[:shared]].sum())
    of_rest = int(weights.of(verify)) - of_shared
    rows = np.interp(np.arange(longest + 1) + 1, sorted(growth), [growth[each] for each in sorted(growth)])

    def seconds_of(pattern: Routes, read: float, more_kernels: int = 0, waits: int = 0) -> float:
        found = Work(read + int(cache.of(pattern)), int(kernels.of(pattern)) + more_kernels, waits)
        return seconds(found, constants)

    step = seconds_of(draft, int(cost.draft_bytes(model).of(draft)))
    return [
        drafts * step
        + seconds_of(verify, of_shared + rows[drafts] * of_rest, kernels_of_judgement(drafts), waits=min(drafts, 1))
        for drafts in range(longest + 1)
    ]


def expected(acceptance: Sequence[float], times: Sequence[float]) -> Expected:
    """What speculation should bring.

    Args:
        acceptance: of a round's first, second ... drafted token, where all before were accepted, ``[longest]``.
        times: as `round_seconds` gives them, ``[longest + 1]``.
    """
    best = best_length(acceptance, times)
    return Expected(best, float(tokens_expected(acceptance)[best] * times[0] / times[best]))


def project(
    models: Mapping[str, Model], pattern: Routes, acceptance: Sequence[float], context: int, machines: Sequence[Machine]
) -> list[dict[str, Any]]:
    """For each model the draft's share of bytes, and by machine and growth what to expect under all big.

    The pattern is stretched to each model's layers. ``speed_up_range`` is by the constants' range.
    """
    rows = []
    for name, model in models.items():
        big = np.full(model.config.num_hidden_layers, 2, np.uint8)
        draft = model.config.realised(stretched(pattern, len(big)))
        table, cache = cost.weight_bytes(model), cost.cache_bytes(model, context)
        on: dict[str, Any] = {}
        for machine in machines:
            for growth, by_rows in GROWTHS.items():
                rounds = (
                    round_seconds(model, big, draft, len(acceptance), context, each, by_rows)
                    for each in machine.constants
                )
                found = [expected(acceptance, times) for times in rounds]
                low, *_, high = sorted(each.speed_up for each in found)
                on.setdefault(machine.name, {})[growth] = found[0]._asdict() | {"speed_up_range": [low, high]}
        share = float((cost.draft_bytes(model) + cache).of(draft) / (table + cache).of(big))
        rows.append({"name": name, "parameters": parameters(model.config), "draft_bytes_share": share, "on": on})
    return rows


def large_shapes() -> list[str]:
    """Names of the known shapes that the goal is for."""
    return [name for name, args in SHAPES.items() if parameters(args) >= LARGE]


def parameters(args: Config) -> int:
    """Of a model without its small FFNs and norms."""
    embeddings = args.hidden_size * args.vocab_size * (1 if args.base.get("tie_word_embeddings", True) else 2)
    return embeddings + int(layer_parameters(args).by_route[:, 2].sum())


def stretched(pattern: Routes, layers: int) -> Routes:
    """The pattern over another number of layers, each with the route at the same depth."""
    return pattern[np.arange(layers) * len(pattern) // layers]


def read_acceptance(text: str, spec: str) -> list[float]:
    """Acceptance by position, as numbers with commas between, the last of which holds on, or from a file.

    Args:
        text: ``0.8,0.7`` or what ``python -m duo_mlx.bench.speculated`` wrote.
        spec: the draft, of which a file may hold several.

    Raises:
        DuoError: it is neither.
    """
    if Path(text).suffix == ".json":
        try:
            of_drafts = json.loads(Path(text).read_text(encoding="utf-8"))["summary"]["expected"]
        except (OSError, ValueError, LookupError, TypeError):
            raise DuoError(f"--acceptance {text}: cannot be read as what duo_mlx.bench.speculated wrote") from None
        if spec not in of_drafts:
            raise DuoError(f"--acceptance {text}: has {', '.join(of_drafts) or 'no drafts'}, but not {spec}")
        found: list[float] = of_drafts[spec]["acceptance"][:LONGEST]
        return found
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise DuoError(
            f"--acceptance {text}: must be shares from 0 to 1 with commas between, such as 0.8,0.7, or a FILE"
        )
    return (shares + [shares[-1]] * LONGEST)[:LONGEST]
