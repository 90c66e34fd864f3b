"""The tables of ``duo-mlx bench project``, from the object that its ``--json`` prints."""

from collections.abc import Iterator
from typing import Any

from duo_mlx.cli.columns import aligned

SIDE_BY_SIDE = 3  # machines in one table of a model
LEGEND = (
    "",
    "Known shapes with a small FFN of 1/16, projected speed-up over all big. half small, small: under planned;",
    "on device: under the fastest strategy for a router's routes; bytes: what fewer bytes promise all small; kept: how",
    "much of that gain is left on device; slack: how many times slower than MLX's products fused may read until sync",
    "is faster.",
)
COLUMNS = "half small", "on device", "small", "on device", "bytes", "kept", "slack", "strategy"


def lines(result: dict[str, Any]) -> Iterator[str]:
    """All of it, line by line."""
    yield "PROJECTION, not a measurement. It assumes:"
    yield from (f"  - {assumption}" for assumption in result["projection"])
    if "speculation" in result:
        yield from _speculation(result["speculation"])
        return
    yield from _model(result["model"])
    shapes = result.get("shapes", [])
    if shapes:
        yield from LEGEND
        for machine in shapes[0]["on"]:
            yield from _shapes(shapes, machine)
        yield from _prefill(shapes)


def _model(model: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"{model['name']}: a big FFN is {model['big_bytes_a_layer'] / 1e6:.2f} MB. Decoding a token at a context"
    yield f"of {model['context']}, projected ms (range) and speed-up over all big:"
    names = list(model["smallest_module_bytes"])
    for start in range(0, len(names), SIDE_BY_SIDE):
        machines = names[start : start + SIDE_BY_SIDE]
        rows = [["strategy", "routes", "MB", "kernels", "waits", *machines]]
        for row in model["rows"]:
            work = f"{row['bytes'] / 1e6:.1f}", f"{row['dispatches']:.0f}", f"{row['waits']:.0f}"
            times = (_time(row["seconds"][machine]) for machine in machines)
            rows.append([row["strategy"], row["routes"], *work, *times])
        yield from (f"  {line}" for line in aligned(rows, left=2))
    for machine, limit in model["smallest_module_bytes"].items():
        yield f"{machine}: leaving out less than {limit / 1e6:.2f} MB saves less than a dispatch"


def _time(seconds: dict[str, float]) -> str:
    return f"{_range(seconds)} x{seconds['speed_up']:.2f}"


def _range(seconds: dict[str, float]) -> str:
    return f"{1e3 * seconds['typical']:.2f} ({1e3 * seconds['fastest']:.2f}-{1e3 * seconds['slowest']:.2f})"


def _shapes(shapes: list[dict[str, Any]], machine: str) -> Iterator[str]:
    yield ""
    yield f"{machine}:"
    rows = [["shape", "bits", "big MB", "all big ms", *COLUMNS]]
    for shape in shapes:
        on = shape["on"][machine]
        half, small = on["half small"], on["small"]
        rows.append(
            [
                shape["name"],
                str(shape["bits"]),
                f"{shape['big_bytes_a_layer'] / 1e6:.1f}",
                _range(on["big_seconds"]),
                *(f"x{of[key]:.2f}" for of in (half, small) for key in ("host_known", "on_device")),
                f"x{small['bytes_ratio']:.2f}",
                f"{small['kept']:.0%}",
                f"{small['slack']:.1f}",
                small["strategy"],
            ]
        )
    yield from (f"  {line}" for line in aligned(rows, left=1))
    for bits in sorted({shape["bits"] for shape in shapes}):
        paying = [shape["name"] for shape in shapes if shape["bits"] == bits and shape["on"][machine]["small"]["pays"]]
        yield f"  half or more is kept at {bits} bits by: {', '.join(paying) or 'none of these'}"


def _prefill(shapes: list[dict[str, Any]]) -> Iterator[str]:
    yield ""
    yield "Prefill by a router: dense (both FFNs on every token; a sort padded to full groups comes to that) waits"
    yield "for nothing. It beats sorted (a wait a layer) where fewer tokens of a chunk than this do not go to big, from"
    yield "a slow GPU and a short wait to a fast GPU and a long wait:"
    for name, limits in {shape["name"]: shape["dense_beats_sorted_below_tokens"] for shape in shapes}.items():
        yield f"  {name:<14} {limits[0]:6.0f} to {limits[1]:6.0f}"


def _speculation(found: dict[str, Any]) -> Iterator[str]:
    goal = found["goal"]
    yield ""
    yield f"Drafts by {found['pattern']}, verified by all big, at a context of {found['context']}; accepted of a"
    yield f"round's first, second ... drafted token: {', '.join(f'{share:.2f}' for share in found['acceptance'])}."
    yield "Projected speed-up, and the number of drafted tokens (0: plain decoding is faster):"
    for machine, growths in found["rows"][0]["on"].items():
        yield ""
        yield f"{machine}:"
        rows = [["model", "draft reads", *growths]]
        for row in found["rows"]:
            on = row["on"][machine].values()
            speeds = (f"x{each['speed_up']:.2f} ({each['draft_tokens']})" for each in on)
            rows.append([row["name"], f"{row['draft_bytes_share']:.0%}", *speeds])
        yield from (f"  {line}" for line in aligned(rows, left=1))
        large = [row for row in found["rows"] if row["parameters"] >= goal["parameters"]]
        for growth in growths:
            reached = [row["name"] for row in large if row["on"][machine][growth]["speed_up"] >= goal["speed_up"]]
            yield f"  x{goal['speed_up']:.1f} from {goal['parameters'] / 1e9:.0f} B parameters on, {growth}: " + (
                "; ".join(reached) or "none"
            )
