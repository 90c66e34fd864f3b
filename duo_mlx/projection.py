"""Projection: how long Apple chips should take to decode a token, from what a route reads, starts and waits for.

Nobody has measured this project on a Mac. What is here are counts (exact: bytes from the shapes of arrays, kernels from
the graphs that the strategies build) times constants that others report, and each result is a range. Time is their sum:

    seconds = bytes / bandwidth + dispatches x dispatch + waits x read-back

It is a sum, not a maximum, because the kernels of one token are a chain: each starts when the one before has written,
so the gap between two of them is spent reading nothing. What the host does meanwhile (it builds the next token's graph)
overlaps and is left out. `duo_mlx.bench.mixes` checks the form of the sum on the machine at hand.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from duo_mlx.config import Config
from duo_mlx.errors import DuoError
from duo_mlx.kernels import verdicts
from duo_mlx.work import ON_DEVICE, Work

# Shares of a chip's peak bandwidth that matrix-vector products reach, what a dispatch costs on the device and what the
# host's read of one value costs on Metal, all as others report them: (typical, fastest, slowest).
REACHABLE = (0.75, 0.85, 0.70)
DISPATCH_S = 5e-6
READ_BACK_S = (0.275e-3, 0.2e-3, 0.35e-3)
COMPUTE_FLOPS_S = (2.6e12, 20.8e12)  # reported float32 peaks, M1 and M1 Ultra; for prefill only


class Chip(NamedTuple):
    """An Apple chip and its peak memory bandwidth, as Apple states it."""

    name: str
    peak_gb_s: int

    def __str__(self) -> str:
        return f"{self.name} ({self.peak_gb_s} GB/s)"


# Where a chip is sold with fewer memory channels it stands twice.
_PEAKS_GB_S: dict[str, dict[str, tuple[int, ...]]] = {
    "M1": {"": (68,), " Pro": (200,), " Max": (400,), " Ultra": (800,)},
    "M2": {"": (100,), " Pro": (200,), " Max": (400,), " Ultra": (800,)},
    "M3": {"": (100,), " Pro": (150,), " Max": (300, 400), " Ultra": (819,)},
    "M4": {"": (120,), " Pro": (273,), " Max": (410, 546)},
    "M5": {"": (153,), " Pro": (307,), " Max": (460, 614)},
}
CHIPS = tuple(
    Chip(generation + tier, peak)
    for generation, tiers in _PEAKS_GB_S.items()
    for tier, peaks in tiers.items()
    for peak in peaks
)
DEFAULT_CHIPS = ("M1", "M4 Pro", "M3 Ultra")


def _llama(
    hidden: int, layers: int, inner: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = True
) -> Config:
    return Config.from_dict(
        {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "intermediate_size": inner,
            "small_intermediate_size": inner // 16,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-5,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
        }
    )


# Known shapes, with a small FFN 16 times narrower; Duo-LLM's own as its paper has it, the smallest first.
SHAPES = {
    "SmolLM2 135M": _llama(576, 30, 1536, 9, 3, 49152),
    "SmolLM2 360M": _llama(960, 32, 2560, 15, 5, 49152),
    "Llama 3.2 1B": _llama(2048, 16, 8192, 32, 8, 128256),
    "Duo-LLM 1.4B": _llama(2560, 12, 10240, 20, 20, 32000),
    "SmolLM2 1.7B": _llama(2048, 24, 8192, 32, 32, 49152),
    "Llama 3.2 3B": _llama(3072, 28, 8192, 24, 8, 128256),
    "Llama 3.1 8B": _llama(4096, 32, 14336, 32, 8, 128256, tied=False),
}
MIXES = {  # shares of skip, small and big in every layer
    "big": np.array([0.0, 0.0, 1.0]),
    "half small": np.array([0.0, 0.5, 0.5]),
    "small": np.array([0.0, 1.0, 0.0]),
    "skip": np.array([1.0, 0.0, 0.0]),
}
PAYS = 0.5  # share of the gain that fewer bytes promise which must be left


class Constants(NamedTuple):
    """What the sum needs of a machine."""

    bandwidth_bytes_s: float
    dispatch_s: float
    read_back_s: float


class Range(NamedTuple):
    """A projected figure, and what it is if the constants are the fastest and the slowest that are reported."""

    typical: float
    fastest: float
    slowest: float


class Machine(NamedTuple):
    """A machine to project for; its constants in the order of `Range`."""

    name: str
    constants: tuple[Constants, Constants, Constants]

    @classmethod
    def of_chip(cls, chip: Chip) -> "Machine":
        typical, fastest, slowest = (
            Constants(share * chip.peak_gb_s * 1e9, DISPATCH_S, wait)
            for share, wait in zip(REACHABLE, READ_BACK_S, strict=True)
        )
        return cls(str(chip), (typical, fastest, slowest))

    @property
    def typical(self) -> Constants:
        return self.constants[0]


def machines(names: Sequence[str] = ()) -> list[Machine]:
    """The machines to project for: chips by name, or a few; this one by its own figures where the doctor took them.

    Raises:
        DuoError: a name is not in the table.
    """
    chips = dict.fromkeys(chip for name in names or DEFAULT_CHIPS for chip in find_chips(name))
    figures, here = verdicts.figures(), str(mx.device_info().get("device_name", "this machine"))
    if figures is None:
        return [Machine.of_chip(chip) for chip in chips]
    found = Constants(figures.bandwidth_bytes_s, figures.dispatch_s, figures.read_back_s)
    measured = Machine(f"{here}, this machine, its constants measured by the doctor", (found,) * 3)
    others = [Machine.of_chip(chip) for chip in chips if _plain(chip.name) != _plain(here)]
    return [measured, *others] if not names or len(others) < len(chips) else others


def find_chips(name: str) -> list[Chip]:
    """The chips that ``name`` means, such as ``M4 Max``, ``m4max`` or, with its bandwidth, ``M4 Max 546``.

    Raises:
        DuoError: there is none.
    """
    wanted = _plain(name)
    if found := [chip for chip in CHIPS if wanted in (_plain(chip.name), _plain(f"{chip.name}{chip.peak_gb_s}"))]:
        return found
    known = {_plain(chip.name): chip.name for chip in CHIPS}
    close = [known[match] for match in difflib.get_close_matches(wanted, known, n=4, cutoff=0.4)]
    raise DuoError(f"--chip {name!r} is not in the table; it has {', '.join(close or known.values())}")


def _plain(name: str) -> str:
    kept = "".join(letter for letter in name.lower() if letter.isalnum())
    return kept.removeprefix("apple").removesuffix("gbs")


def seconds(work: Work, constants: Constants) -> float:
    """The time of the work, as the sum that the module's description explains."""
    return (
        work.bytes / constants.bandwidth_bytes_s
        + work.dispatches * constants.dispatch_s
        + work.waits * constants.read_back_s
    )


def project(work: Work, machine: Machine) -> Range:
    """The projected seconds of the work on a machine."""
    return Range(*(seconds(work, constants) for constants in machine.constants))


@dataclass(frozen=True)
class Outlook:
    """What routing a model's tokens promises on a machine: a mix against all big.

    Args:
        bytes_ratio: what fewer bytes promise.
        host_known: the speed-up under ``planned``.
        on_device: the speed-up under ``strategy``, the fastest for all big of those that ask a router.
        strategy: see above.
        kept: share of the promised gain that is left on the device.
        pays: whether that is at least `PAYS`.
        slack: how many times slower than MLX's own products ``fused`` may read big until ``sync`` beats it.
    """

    bytes_ratio: float
    host_known: float
    on_device: float
    strategy: str
    kept: float
    pays: bool
    slack: float


def outlook(
    works: Mapping[str, Mapping[str, Work]], big_bytes: float, constants: Constants, mix: str = "small"
) -> Outlook:
    """The outlook of one mix.

    Args:
        works: what `duo_mlx.work.works` found for the mix and for ``big`` under every usable strategy.
        big_bytes: of all layers' big FFNs.
        constants: the machine's.
        mix: the name of the mix.
    """
    time = {name: {key: seconds(found, constants) for key, found in each.items()} for name, each in works.items()}
    best = min((name for name in ON_DEVICE if name in works), key=lambda name: time[name]["big"])
    bytes_ratio = works["planned"]["big"].bytes / works["planned"][mix].bytes
    on_device = time[best]["big"] / time[best][mix]
    kept = (on_device - 1) / (bytes_ratio - 1)
    return Outlook(
        bytes_ratio,
        host_known=time["planned"]["big"] / time["planned"][mix],
        on_device=on_device,
        strategy=best,
        kept=kept,
        pays=kept >= PAYS,
        slack=1 + (time["sync"]["big"] - time["fused"]["big"]) * constants.bandwidth_bytes_s / big_bytes,
    )


def smallest_module(constants: Constants) -> float:
    """Bytes of weights that take as long to read as a dispatch: skipping less on the device cannot pay."""
    return constants.bandwidth_bytes_s * constants.dispatch_s


def padded_limit(args: Config, read_back_s: float, flops_s: float) -> float:
    """Tokens of a chunk that do not go to big, below which ``dense`` beats ``sorted`` in a prefill by a router.

    ``sorted`` waits for the host once a layer to leave out big where no token needs it. ``dense``, which is what a sort
    padded to full groups comes to, runs both modules on every token and waits for nothing. So they are equal where
    big on the tokens that do not need it takes as long as the wait.
    """
    return read_back_s * flops_s / (6 * args.hidden_size * args.intermediate_size)


_WAIT, _SHORT, _LONG = (1e3 * each for each in READ_BACK_S)
_SLOW_GPU, _FAST_GPU = (each / 1e12 for each in COMPUTE_FLOPS_S)
ASSUMPTIONS = (
    "nobody has run this project on a Mac yet",
    "one token is decoded at a time; what is left out is not read, and our kernels read as fast as MLX's own",
    "time = bytes / bandwidth + kernels x dispatch + waits x read-back: a sum, as each kernel waits for the one before",
    f"bandwidth: {REACHABLE[0]:.0%} of the peak that Apple states ({REACHABLE[2]:.0%} to {REACHABLE[1]:.0%}), reported",
    f"a dispatch takes {1e6 * DISPATCH_S:.0f} us on any chip, reported without a range: where kernels are most of "
    "the time the projected range is too narrow",
    f"the host waits {_WAIT:.3f} ms for a route ({_SHORT:.2f} to {_LONG:.2f}), reported",
    f"a GPU computes {_SLOW_GPU:.1f} to {_FAST_GPU:.1f} TFLOP/s in a prefill: M1's and M1 Ultra's peaks, reported",
    "planned: the host knows the routes; every other strategy: a router in each layer decides, with the mix named",
    "the host builds the next token's graph meanwhile, at no cost; sampling is argmax",
)
