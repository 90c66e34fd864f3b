"""What was measured on which computer and how, and the table of its cells."""

from collections.abc import Sequence
from typing import Any

from duo_mlx.bench.report.charts import written
from duo_mlx.bench.report.markup import Node, boxed, node, unfolded
from duo_mlx.bench.report.rows import PEER, Cell, Result

COLUMNS = (
    "route", "engine", "strategy", "TPOT (ms)", "TTFT (ms)", "tokens/s", "p95 (ms)", "speed-up", "byte ratio",
    "FLOP ratio", "% of roofline", "J/token gross", "J/token net", "EDP (mJ·s)", "loss", "KL", "agreement (%)",
)  # fmt: skip
DRAFTED = ("tokens per verification", "accepted (%)")  # where any cell speculates
SHOWN = ("device", "chip", "model", "platform", "os", "memory_bytes", "power_source", "power_mode", "thermal_level")


def about(result: Result) -> Node:
    """A result's conditions."""
    record = result.record
    system, model, meter = record["system"], record["model"], record["meter"]
    facts = {
        "Model": f"{model['name']}: {model['layers']} layers, {model['parameters']:,} parameters",
        "Revision": model["revision"],
        "Complete": "yes" if record["complete"] else "NO: it was interrupted, or still runs",
        "Energy": _meter(meter),
        "Noise floor": "; ".join(_noise(session["noise_floor"]) for session in record["sessions"]),
        "Bandwidth": _bandwidth(record["roofline"]),
        "Machine": "; ".join(_flat({key: system[key] for key in SHOWN if key in system})),
        "Versions": "; ".join(_flat(system["versions"])),
        "Texts": "; ".join(_text(name, text) for name, text in record["texts"].items()),
        "Settings": "; ".join(_flat(record["settings"])),
        "Command": record["command"],
    }
    cautions = dict.fromkeys(caution for session in record["sessions"] for caution in session["cautions"])
    invalid = [f"{cell.name}: {_invalid(cell)}" for cell in result.cells if not cell.usable]
    pairs = [
        node("div", node("dt", key), node("dd", node("code", value) if key == "Command" else value))
        for key, value in facts.items()
        if value
    ]
    return node(
        "section",
        node("h3", result.label),
        *_listed("Cautions: what spoke against measuring then", list(cautions)),
        *_listed("Invalid cells, which no chart shows", invalid),
        *_listed("Remarks of the meter", [*meter["notes"], *_flags(result)]),
        node("dl", *pairs),
        unfolded("The whole system record", node("ul", *(node("li", line) for line in _flat(system)))),
        class_="machine",
        aria_label=result.label,
    )


def summary(results: Sequence[Result]) -> Node:
    """The table of all cells, a body a result; ``data-value`` is what a script sorts by."""
    several = len(results) > 1
    drafts = any(cell.speculates for result in results for cell in result.cells)
    columns = COLUMNS + DRAFTED * drafts
    head = node("tr", *(node("th", node("button", column, type="button"), scope="col") for column in columns))
    bodies = []
    for result in results:
        first = node("th", result.label, scope="rowgroup", colspan=str(len(columns)))
        rows = [node("tr", first, class_="machine-row")] if several else []
        bodies.append(node("tbody", *rows, *(_row(cell, drafts) for cell in result.cells)))
    return boxed(node("table", node("thead", head), *bodies, id="cells"), "All cells; scrolls sideways")


def _row(cell: Cell, drafts: bool) -> Node:
    record, quality = cell.record, cell.record["quality"] or {}
    energy = cell.summary("decode_energy") or {}
    figures = [
        _scaled(cell.summary("tpot_s"), 1e3),
        _scaled(cell.summary("ttft_s"), 1e3),
        _scaled(cell.summary("decode_tps")),
        _scaled(cell.summary("inter_token_s", "p95"), 1e3),
        _scaled(cell.summary("speed_up")),
        _scaled(cell.summary("byte_ratio")),
        _scaled(cell.summary("flop_ratio")),
        _scaled(cell.summary("roofline_share"), 100.0),
        _scaled(energy.get("j_per_token")),
        _scaled(energy.get("net_j_per_token")),
        _scaled(cell.summary("edp_js"), 1e3),
        _scaled(quality.get("loss")),
        _scaled(quality.get("kl")),
        _scaled(quality.get("argmax_agreement"), 100.0),
    ]
    if drafts:
        counts = record.get("speculation") or {}
        share = sum(counts["accepted"]) / sum(counts["drafted"]) if counts.get("drafted") else None
        figures += [_scaled(counts.get("tokens_per_verification")), _scaled(share, 100.0)]
    name = cell.name.removeprefix(f"{PEER} ") if cell.peer else cell.name
    marks = [] if cell.usable else [node("span", " invalid", class_="mark", title=_invalid(cell))]
    return node(
        "tr",
        node("th", name, *marks, scope="row"),
        node("td", record["engine"]),
        node("td", record.get("strategy_ran", record["strategy"])),
        *(node("td", shown, **({} if value is None else {"data_value": repr(value)})) for value, shown in figures),
    )


def _scaled(found: Any, factor: float = 1.0) -> tuple[float | None, str]:
    """A figure or an interval as a number to sort by and as text."""
    if found is None:
        return None, written(None)
    if not isinstance(found, dict):
        return factor * found, written(float(factor * found))
    middle, low, high = (float(factor * found[key]) for key in ("median", "low", "high"))
    return middle, f"{written(middle)} [{written(low)}, {written(high)}]"


def _invalid(cell: Cell) -> str:
    return "; ".join(cell.record["invalid_why"]) or "it has no valid round yet"


def _meter(meter: dict[str, Any]) -> str:
    if meter["why"] or not meter["label"]:
        return f"none: {meter['why'] or 'the result does not say why'}"
    idle = meter["idle"]
    watts = f"; idle {idle['total_j'] / idle['seconds']:.3g} W" if idle and idle["total_j"] and idle["seconds"] else ""
    return f"{meter['label']} ({meter['name']}, {meter['scope']}){watts}. Gross has the idle computer's share, net not."


def _noise(floor: dict[str, float] | None) -> str:
    if floor is None:
        return "not measured"
    return f"the first cell against itself: ratio {floor['median']:.4f} [{floor['low']:.4f}, {floor['high']:.4f}]"


def _bandwidth(roofline: dict[str, Any] | None) -> str:
    return f"{roofline['bandwidth_bytes_s'] / 1e9:.4g} GB/s: {roofline['how']}" if roofline else "not measured"


def _text(name: str, text: dict[str, Any]) -> str:
    return f"{name.replace('_', '-')} {text['source']}: {text['tokens']} tokens in {text['count']}"


def _flags(result: Result) -> list[str]:
    energies = [cell.summary(kind) for cell in result.usable for kind in ("prefill_energy", "decode_energy")]
    return list(dict.fromkeys(flag for energy in energies if energy for flag in energy["flags"]))


def _flat(record: Any, name: str = "") -> list[str]:
    """``key value`` of everything that is known, below one another by dots."""
    if isinstance(record, dict):
        return [line for key, value in record.items() for line in _flat(value, f"{name}.{key}" if name else str(key))]
    if isinstance(record, list):
        record = " ".join(map(str, record))
    if isinstance(record, int) and name.endswith("bytes"):
        record = f"{record / 1e9:.4g} GB"
    return [] if record in (None, "") else [f"{name.removesuffix('_bytes').replace('_', ' ')} {record}"]


def _listed(title: str, lines: Sequence[str]) -> list[Node]:
    found = node("div", node("h4", title), node("ul", *(node("li", line) for line in lines)), class_="listed")
    return [found] if lines else []
