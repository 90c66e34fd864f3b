"""Which tokens gain from more compute: token difficulty (Duo-LLM, arXiv 2410.10846, stage 2).

Difficulty is all-small's loss less the oracle's, and "a token with a high loss need not be difficult". Two things hide
in it. All-small's loss is a term of it, so that the two rise together by arithmetic alone; and the oracle's loss is a
minimum over many patterns, which luck lowers, too. So beside ``difficulty`` stand gaps to other losses, which share the
first and differ in the second:

* ``gap_to_big``: to all-big's loss, which is no minimum;
* ``gap_to_best_of_66``: to the minimum over 66 of the budget's patterns, where it has so many;
* ``gap_to_noise_66``: to the minimum over as many noisy all-big passes: what luck would call difficulty.

The last two are there if the oracle had controls, see `duo_mlx.study.controls`. Intervals are bootstrapped over
sequences, which stay whole; thresholds and ranks are those of all tokens, and draws treat them as given.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import combinations, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.intervals import Interval, of_means
from duo_mlx.routes import Route, format_pattern
from duo_mlx.study.results import Arrays

GAPS = {
    "difficulty": "oracle_loss",
    "gap_to_big": "loss_big",
    "gap_to_best_of_66": "best_of_66",
    "gap_to_noise_66": "noise_66",
}  # all-small's loss less this one
NEEDED = ("loss_small", "loss_big", "oracle_loss", "entropy_small", "oracle_routes")
BINS = 8  # of positions, at most
ROUNDING = 1e-4  # nats; all-small's loss and the same pattern's in a search come from different passes
HIGH, MIDDLING = 0.9, (0.4, 0.6)  # quantiles of all-small's loss
EXAMPLES = 6  # of a kind, at most
BEFORE = 10  # tokens of an example's context

CLASSES = {
    "function word": "begins a word of the closed list below and is all of it",
    "lower-case word": "begins another word with no capital",
    "capitalised word": "begins another word with a capital",
    "continuation": "goes on with a word, also after an apostrophe or a hyphen",
    "number": "digits come first",
    "punctuation": "neither letters nor digits",
    "other": "white space, special tokens and pieces of a character",
}
_CLOSED = (
    "a about after against all am among an and any are as at be because been before being between both but by can "
    "could did do does down during each either for from had has have he her hers him his how i if in into is it its "
    "may me might mine must my neither no nor not of off on or our ours out over shall she should since so some "
    "such than that the their theirs them then there these they this those though through to under until up upon us "
    "was we were what when where which while who whom whose why will with within without would you your yours"
)
FUNCTION_WORDS = frozenset(_CLOSED.split())
DECODED_AFTER = 4  # pieces that decide how one is written, such as whether a space precedes it
# what a continuation follows: in well-bred a word goes on; in well--the another begins, and so it does in 'tis
_JOINED = re.compile(r"[^\W_]['\u2019-]?\Z")
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Correlation:
    """Of two figures over all tokens."""

    a: str
    b: str
    pearson: Interval
    spearman: Interval


@dataclass(frozen=True)
class Group:
    """Some of the tokens and their mean figures: losses and gaps in nats, and big layers of the oracle's patterns."""

    name: str
    tokens: int
    means: Mapping[str, Interval]


@dataclass(frozen=True)
class Example:
    """One token. ``position`` is that of the input that predicts it, from 0; losses are in nats."""

    sequence: int
    position: int
    context: str
    target: str
    token_class: str
    loss_small: float
    loss_big: float
    oracle_loss: float
    difficulty: float
    pattern: str


@dataclass(frozen=True)
class Study:
    """What one table shows of difficulty.

    ``high_but_easy`` is, for each gap, the share of the tokens in the top decile of all-small's loss whose gap is below
    its median over all tokens: 0.5 if the two had nothing to do with each other, 0 if they went together.
    """

    whole: Group
    correlations: Sequence[Correlation]
    positions: Sequence[Group]
    classes: Sequence[Group]
    high_but_easy: Mapping[str, Interval]
    high_and_easy_examples: Sequence[Example]
    middling_but_difficult_examples: Sequence[Example]

    def record(self) -> dict[str, Any]:
        """For JSON; a figure is ``{"value": v, "interval": [low, high]}``, or null where there is none."""
        found: dict[str, Any] = _plain(self)
        return found


def study(table: Arrays, texts: Sequence[Sequence[str]]) -> Study:
    """What a table shows of difficulty.

    Args:
        table: arrays ``[sequences, length]`` of one budget, see `duo_mlx.study.table`; those in `NEEDED`.
        texts: of each sequence, what each of its tokens adds to the text, the last target included: ``length + 1``
            pieces, as `pieces` gives them.
    """
    losses = {name: table[name].astype(np.float64) for name in NEEDED[:4]}
    small = losses["loss_small"]
    gaps = gaps_of(table)
    big_layers = (table["oracle_routes"] == Route.BIG).sum(axis=-1).astype(np.float64)
    figures = losses | gaps | {"big_layers": big_layers}
    classes = np.array([token_classes(each)[1:] for each in texts])
    high = small >= np.quantile(small, HIGH)
    low_edge, high_edge = np.quantile(small, MIDDLING)
    easy = {name: (gap < np.median(gap)).astype(np.float64) for name, gap in gaps.items()}
    difficulty = gaps["difficulty"]

    def examples(places: list[tuple[int, int]]) -> list[Example]:
        return [_example(table, difficulty, texts, classes, *place) for place in places]

    return Study(
        whole=_group("all", figures, np.ones(small.shape, bool)),
        correlations=[
            Correlation(a, b, correlation(figures[a], figures[b]), correlation(ranks(figures[a]), ranks(figures[b])))
            for a, b in combinations((*gaps, "loss_small", "entropy_small"), 2)
        ],
        positions=by_position(figures),
        classes=[_group(name, figures, classes == name) for name in CLASSES if (classes == name).any()],
        high_but_easy=means(easy, high),
        high_and_easy_examples=examples(_lowest(difficulty, high & (easy["difficulty"] > 0))),
        middling_but_difficult_examples=examples(_lowest(-difficulty, (low_edge <= small) & (small <= high_edge))),
    )


def gaps_of(table: Arrays) -> dict[str, Values]:
    """All-small's loss less each other loss of `GAPS` that the table has of all tokens, nats ``[sequences, length]``.

    Less than `ROUNDING` is 0: where the other loss is of all small, too, there is no gap.
    """
    small = table["loss_small"].astype(np.float64)
    found = {name: small - table[of] for name, of in GAPS.items() if of in table and np.isfinite(table[of]).all()}
    return {name: np.where(np.abs(gap) < ROUNDING, 0, gap) for name, gap in found.items()}


def correlation(a: Values, b: Values) -> Interval:
    """Pearson's correlation of two figures ``[sequences, length]`` over all tokens, and its interval.

    Of `ranks` it is Spearman's: they are made once over all tokens, and draws of sequences do not rank anew. All NaN
    where a figure is the same for all tokens.
    """
    if not np.ptp(a) or not np.ptp(b):
        return Interval(*[float("nan")] * 3)
    x, y = ((each - each.mean()) / each.std() for each in (a, b))  # so that moments lose no digits
    return of_means(np.stack([each.mean(axis=1) for each in (x, y, x * x, y * y, x * y)], axis=1), _of_moments)


def _of_moments(moments: Values) -> Values:
    x, y, xx, yy, xy = np.moveaxis(moments, -1, 0)
    spread = np.minimum(xx - x * x, yy - y * y)
    # a draw of sequences in which a figure is all the same has no correlation, only rounding
    return np.where(spread > 1e-12, (xy - x * y) / np.sqrt((xx - x * x) * (yy - y * y)), np.nan)


def ranks(values: Values) -> Values:
    """The rank of each value among all of them, from 1; equal ones share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place].reshape(values.shape)


def means(figures: Mapping[str, Values], among: NDArray[np.bool_]) -> dict[str, Interval]:
    """Mean of each figure over some of the tokens, all ``[sequences, length]``, and its interval."""
    counts = among.sum(axis=1)
    return {
        name: of_means(
            np.stack([np.where(among, values, 0).sum(axis=1), counts], axis=1), lambda mean: mean[..., 0] / mean[..., 1]
        )
        for name, values in figures.items()
    }


def _group(name: str, figures: Mapping[str, Values], among: NDArray[np.bool_]) -> Group:
    return Group(name, int(among.sum()), means(figures, among))


def by_position(figures: Mapping[str, Values]) -> list[Group]:
    """Groups of neighbouring positions, `BINS` or fewer, named by the first and the last one, from 0."""
    shape = next(iter(figures.values())).shape
    place = np.broadcast_to(np.arange(shape[1]), shape)
    bins = [part.tolist() for part in np.array_split(np.arange(shape[1]), min(BINS, shape[1]))]
    return [_group(f"{part[0]}-{part[-1]}", figures, (part[0] <= place) & (place <= part[-1])) for part in bins]


def _lowest(score: Values, among: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Sequence and position of the lowest scores among some tokens, from the lowest on, at most one a sequence."""
    kept = np.where(among, score, np.inf)
    position, best = kept.argmin(axis=1), kept.min(axis=1)
    order = np.argsort(best, kind="stable")[:EXAMPLES]
    return [(int(row), int(position[row])) for row in order if np.isfinite(best[row])]


def _example(
    table: Arrays, difficulty: Values, texts: Sequence[Sequence[str]], classes: NDArray[np.str_], row: int, at: int
) -> Example:
    return Example(
        sequence=row,
        position=at,
        context="".join(texts[row][max(0, at + 1 - BEFORE) : at + 1]),
        target=texts[row][at + 1],
        token_class=str(classes[row, at]),
        loss_small=float(table["loss_small"][row, at]),
        loss_big=float(table["loss_big"][row, at]),
        oracle_loss=float(table["oracle_loss"][row, at]),
        difficulty=float(difficulty[row, at]),
        pattern=format_pattern(table["oracle_routes"][row, at]),
    )


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it, which says more than its own text: a space, or none.

    A character of several tokens is added by its last, bytes of none by what follows them; special tokens add nothing.
    """
    found, ends = [], [0]  # of what is decoded so far
    for at in range(len(ids)):
        begin, end = ends[-1 - DECODED_AFTER :][0], ends[-1]
        before, text = (tokenizer.decode(ids[begin:stop], skip_special_tokens=True) for stop in (end, at + 1))
        whole = not text.endswith("\ufffd")
        found.append(text[len(before) :] if whole else "")
        if whole:
            ends.append(at + 1)
    return found


def token_classes(texts: Sequence[str]) -> list[str]:
    """The class of each token, one of `CLASSES`, by what it and its neighbours add to the text.

    A token's first letter or digit decides; whether a letter begins a word is decided by what stands before it, in the
    token or earlier. A function word that the next token goes on with (``in`` and ``dividual``) is none.
    """
    found, before = [], ""
    for text, after in zip(texts, [*texts[1:], ""], strict=True):
        found.append(_class(before, text, after))
        before = (before + text)[-2:]
    return found


def _class(before: str, text: str, after: str) -> str:
    first = next((at for at, letter in enumerate(text) if letter.isalnum()), None)
    if first is None:
        shown = text.strip().replace("\ufffd", "")
        return "punctuation" if shown and shown.isprintable() else "other"
    letters = "".join(takewhile(str.isalpha, text[first:]))
    if not letters:
        return "number"
    if _JOINED.search(before + text[:first]):
        return "continuation"
    whole = first + len(letters) < len(text) or not after[:1].isalpha()
    if whole and letters.lower() in FUNCTION_WORDS:
        return "function word"
    return "capitalised word" if letters[0].isupper() else "lower-case word"


def _plain(value: Any) -> Any:
    """A study and what it holds, as JSON has them."""
    if isinstance(value, Interval):
        return {"value": value.median, "interval": [value.low, value.high]} if np.isfinite(value.median) else None
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
