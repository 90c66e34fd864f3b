"""How many tokens to draft before the next verification: a fixed number, or what pays.

A round drafts k tokens and verifies them in one pass, which gives one token more than it accepts. With a_i the share of
i-th drafted tokens that are accepted where all before them were, it is expected to give 1 + a_1 + a_1 a_2 + ... + a_1
... a_k tokens. It takes k draft steps and a verifying pass over k + 1 tokens. `best_length` is the k with the most
tokens a second, and 0, plain decoding, is one of them.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.routes import FEW

LONGEST = FEW - 1  # drafted by `Auto`: with the token before them, what a pass still takes as decoding
OPENING = (0, 1, 3, 7)  # lengths whose times are learned first: passes over 1 token, 2, 4 and 8
PROBE = 32  # rounds after which another choice is tried once
SHARE = 0.01  # of all time that such tries may lose
KEPT = 5  # times of a length that count, the latest
FADE = 1 - 1 / 16  # of what a position's acceptance was, with each token that tells of it
WEIGHT = 2.0  # in tokens, of what all positions tell of one

Floats = NDArray[np.float64]


def tokens_expected(acceptance: Sequence[float] | Floats) -> Floats:
    """What a round with 0, 1, 2 ... drafted tokens is expected to give, ``[lengths + 1]``.

    ``acceptance [lengths]``: of the first, second ... drafted token, where all before it were accepted.
    """
    return np.concatenate([[1.0], 1 + np.cumsum(np.cumprod(acceptance))])


def best_length(acceptance: Sequence[float] | Floats, seconds: Sequence[float] | Floats) -> int:
    """The number of drafted tokens with the most tokens a second; of equals, the least.

    Args:
        acceptance: see `tokens_expected`.
        seconds: of a round with 0, 1, 2 ... drafted tokens, ``[lengths + 1]``.
    """
    return int(np.argmax(tokens_expected(acceptance) / np.asarray(seconds)))


def round_seconds(draft: float, verify: Mapping[int, float], longest: int = LONGEST) -> Floats:
    """The time of a round with 0 to ``longest`` drafted tokens, ``[longest + 1]``, from those of its passes.

    Args:
        draft: seconds of a draft step.
        verify: seconds of a verifying pass by its number of tokens, such as 1, 2, 4 and 8, from 1 to at least
            ``longest + 1``; between them it is taken as linear.
        longest: number of drafted tokens.

    Raises:
        DuoError: ``verify`` lacks 1, or ends too early.
    """
    known = sorted(verify)
    if not known or known[0] != 1 or known[-1] <= longest:
        raise DuoError(f"times of verifying passes must be of 1 to at least {longest + 1} tokens, not of {known}")
    lengths = np.arange(longest + 1)
    return lengths * draft + np.interp(lengths + 1, known, [verify[tokens] for tokens in known])


class Lengths(Protocol):
    """Chooses the number of drafted tokens round by round."""

    def choose(self) -> int:
        """How many to draft next; fewer are drafted where no more fit."""

    def observe(self, drafted: int, accepted: int, seconds: float) -> None:
        """What a round came to."""


class Fixed:
    """Always the same number."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def choose(self) -> int:
        return self.tokens

    def observe(self, drafted: int, accepted: int, seconds: float) -> None:
        """Nothing is learned."""


class Auto:
    """What pays, by running acceptance and times.

    Acceptance is counted by position, fades, and leans on that of all positions where a position has seen little. The
    time of a round is the least of the latest with that many drafted tokens; other lengths are on straight lines
    through those that were measured. The first rounds measure `OPENING`, as long as all drafts stand and the next could
    pay. From then on a round now and then drafts one token more than seems best, or none, since acceptance and times
    change with the text and the context: as often as all such tries together are not expected to lose more than `SHARE`
    of the time. Between them a choice of none stands.

    Args:
        longest: number of drafted tokens.
    """

    def __init__(self, longest: int = LONGEST):
        self._longest = longest
        self._times: dict[int, deque[float]] = {}
        self._tried, self._accepted = np.zeros(longest), np.zeros(longest)
        self._opening = [length for length in OPENING if length <= longest]
        self._chosen = 0  # rounds after the opening
        self._best: int | None = None  # the length that pays, until a draft or a probe tells more
        self._pace: float | None = None  # seconds a token at that length, as expected
        self._elapsed = self._lost = 0.0  # seconds: in all, and by tries that were slower than that pace

    def choose(self) -> int:
        if self._opening:
            length = self._opening.pop(0)
            if length < 2 or self._may_pay(length):
                return length
            self._opening = []
        self._chosen += 1
        best = self._find_best() if self._best is None else self._best
        return self._probe() if self._chosen % PROBE == 0 else best

    def observe(self, drafted: int, accepted: int, seconds: float) -> None:
        self._times.setdefault(drafted, deque(maxlen=KEPT)).append(seconds)
        self._elapsed += seconds
        if drafted != (self._best or 0):
            pace = min(self._times.get(0, [seconds])) if self._pace is None else self._pace
            self._lost = max(0.0, self._lost + seconds - (accepted + 1) * pace)
        if drafted == 0:
            return  # plain decoding is not to be slowed by sums
        self._best = None
        tried = min(accepted + 1, drafted)  # those after the first that was not accepted tell nothing
        for counts, more in ((self._tried, tried), (self._accepted, accepted)):
            counts[:tried] *= FADE
            counts[:more] += 1
        if accepted < drafted:
            self._opening = []

    def acceptance(self) -> Floats:
        """Of each position's drafted token, where all before it were accepted, ``[longest]``."""
        of_all = (self._accepted.sum() + WEIGHT / 2) / (self._tried.sum() + WEIGHT)
        return np.asarray((self._accepted + WEIGHT * of_all) / (self._tried + WEIGHT))

    def seconds(self) -> Floats:
        """Of a round with 0, 1, 2 ... drafted tokens, ``[longest + 1]``."""
        known = sorted(self._times)
        least, lengths = [min(self._times[length]) for length in known], np.arange(self._longest + 1)
        found = np.interp(lengths, known, least)
        beyond = lengths > known[-1]
        slope = np.inf if len(known) == 1 else max(0.0, (least[-1] - least[-2]) / (known[-1] - known[-2]))
        found[beyond] = least[-1] + slope * (lengths[beyond] - known[-1])
        return found

    def _find_best(self) -> int:
        acceptance, seconds = self.acceptance(), self.seconds()
        self._best = best = best_length(acceptance, seconds)
        self._pace = float(seconds[best] / tokens_expected(acceptance)[best])
        return best

    def _probe(self) -> int:
        """Another length than the best one, if it may be tried; every other time none, where one pays."""
        best, tokens, seconds = self._find_best(), tokens_expected(self.acceptance()), self.seconds()
        length = 0 if best and self._chosen % (2 * PROBE) == 0 else min(best + 1, self._longest)
        loss = seconds[length] - tokens[length] * seconds[best] / tokens[best]
        return length if self._lost + loss <= SHARE * self._elapsed else best

    def _may_pay(self, length: int) -> bool:
        """Whether that many drafts, were they all accepted, would be faster than none."""
        seconds = self.seconds()
        return bool((length + 1) * seconds[0] > seconds[length])


def lengths(draft_tokens: int | str | Lengths) -> Lengths:
    """What chooses the number of drafted tokens: ``auto``, a number from 0, or a `Lengths` of one's own.

    Raises:
        DuoError: it is none of these.
    """
    if draft_tokens == "auto":
        return Auto()
    if not isinstance(draft_tokens, int | str):
        return draft_tokens
    text = str(draft_tokens)
    if not (text.isascii() and text.isdigit() and len(text) < 10):  # int() refuses thousands of digits
        raise DuoError(f"draft_tokens is {text}; it must be auto or a whole number from 0")
    return Fixed(int(text))
