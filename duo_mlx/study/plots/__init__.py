"""Figures of an oracle study, with a caption each that says what is seen: Duo-LLM's (arXiv 2410.10846), and controls.

``layers``, ``positions`` and ``skips`` show where an oracle puts which route, ``losses`` what it gains by budget and
what equally many candidates or noise would gain, ``text`` and ``difficulty`` which tokens gain, ``routers`` and
``router_layers`` what trained routers make of the same text. Captions are made from the data. The same data gives the
same files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from duo_mlx.files import output_directory, refuse_foreign, writing
from duo_mlx.study.plots.losses import losses
from duo_mlx.study.plots.maps import layers, positions, skips
from duo_mlx.study.plots.routers import router_layers, routers
from duo_mlx.study.plots.style import KINDS, LackingError, Plot, drawing, rendered
from duo_mlx.study.plots.tokens import difficulty, text
from duo_mlx.study.results import Found
from duo_mlx.study.routers import Routed

NAMES = ("layers", "positions", "losses", "text", "difficulty", "skips", "routers", "router_layers")
CAPTIONS = "captions.md"
FILES = {CAPTIONS, *(f"{name}.{kind}" for name in NAMES for kind in KINDS)}


@dataclass(frozen=True)
class Drawn:
    """What is to be written."""

    files: Mapping[str, bytes]  # by name
    left_out: Mapping[str, str]  # why, by figure


def draw(
    found: Found,
    with_skips: Found | None,
    sequence: int,
    words: Sequence[str] | None,
    routed: Sequence[Routed] = (),
) -> Drawn:
    """All figures that what is there can show.

    Args:
        found: a finished oracle.
        with_skips: one over choices that hold skip, for ``skips``; None: ``found``.
        sequence: which sequence ``text`` shows.
        words: the text of its target tokens ``[length]``; None: ``text`` is left out.
        routed: on the oracle's text.

    Raises:
        DuoError: matplotlib is missing.
    """
    plots: dict[str, Callable[[], Plot]] = {
        "layers": partial(layers, found),
        "positions": partial(positions, found),
        "losses": partial(losses, found),
        "text": partial(text, found, sequence, words),
        "difficulty": partial(difficulty, found),
        "skips": partial(skips, with_skips or found),
        "routers": partial(routers, found, routed),
        "router_layers": partial(router_layers, found, routed),
    }
    files: dict[str, bytes] = {}
    captions, left_out = [_heading(found)], {}
    with drawing():
        for name in NAMES:
            try:
                plot = plots[name]()
            except LackingError as lacking:
                left_out[name] = str(lacking)
                continue
            files |= {f"{name}.{kind}": content for kind, content in rendered(plot.figure).items()}
            captions.append(f"## {name}\n\n![{name}]({name}.svg)\n\n{plot.caption}\n")
    return Drawn(files | {CAPTIONS: "\n".join(captions).encode()}, left_out)


def _heading(found: Found) -> str:
    asked, (sequences, length) = found.summary, found.any["targets"].shape
    return (
        f"# Figures of an oracle\n\nModel {asked['model']['name']}, text {asked['text']['source']}, {sequences} "
        f"sequences of {length} tokens, choices {asked['choices']}, prefix {asked['prefix']}. Losses are in nats a "
        "token; [low, high] are 95 % bootstrap intervals over sequences.\n"
    )


def refuse_existing(out: Path, force: bool) -> None:
    """Refuse what `write` would refuse, before the work.

    Raises:
        DuoError: ``out`` exists and ``force`` is not given, or it is or holds something else than figures.
    """
    refuse_foreign(out, force, FILES.__contains__, "no figure's")


def write(drawn: Drawn, out: Path, force: bool) -> list[Path]:
    """Write a folder of figures, whole or not at all; its files.

    Raises:
        DuoError: see `refuse_existing`; or it cannot be written.
    """
    refuse_existing(out, force)
    if out.is_dir():
        with writing(out):
            for name in FILES:
                (out / name).unlink(missing_ok=True)
    with output_directory(out, force) as new:
        for name, content in drawn.files.items():
            with writing(new / name):
                (new / name).write_bytes(content)
    return [out / name for name in drawn.files]
