"""A result of ``duo-mlx bench run`` as a row a cell: CSV for programs, Markdown for people.

A cell that is not valid keeps its row in the CSV, without figures: nobody can average them by mistake. They stay in
the JSON.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from duo_mlx.bench import results

Row = dict[str, Any]
SIZES = {
    "prompt_tokens": "prompt tokens",
    "generated_tokens": "generated tokens",
    "batch": "batch",
    "context": "context",
    "quantisation": "quantisation",
}


def rows(result: Mapping[str, Any]) -> list[Row]:
    """One flat row a cell, whose columns are the same for every result; None where there is no figure.

    Names end in the unit: ``tpot_ms``, ``tpot_low_ms``, ``tpot_high_ms`` are a median with its 95 % interval.
    """
    return [
        {"device": result["system"]["device"], "model": result["model"]["name"]} | _row(cell)
        for cell in result["cells"]
    ]


def _row(cell: Mapping[str, Any]) -> Row:
    summary = (cell["valid"] and cell["summary"]) or {}
    quality = (cell["valid"] and cell["quality"]) or {}
    share, between, mix = summary.get("roofline_share"), summary.get("inter_token_s", {}), summary.get("route_mix", {})
    drafts = (cell["valid"] and cell.get("speculation")) or {}
    routed = ("engine", "route", "speculate", "draft_tokens", "strategy", "strategy_ran")
    named = ("id", *routed, *SIZES, "big_layers", "valid")
    return {
        **{name: cell.get(name) for name in named},
        "invalid_why": "; ".join(cell["invalid_why"]),
        "rounds": summary.get("rounds"),
        **_spread("tpot", "_ms", summary.get("tpot_s"), 1e3),
        **_spread("ttft", "_ms", summary.get("ttft_s"), 1e3),
        **_spread("prefill", "_tokens_per_s", summary.get("prefill_tps")),
        **_spread("decode", "_tokens_per_s", summary.get("decode_tps")),
        **{f"inter_token_{name}_ms": _scaled(between.get(name), 1e3) for name in ("p50", "p95", "p99")},
        **_energy("decode", summary.get("decode_energy") or {}),
        **_energy("prefill", summary.get("prefill_energy") or {}),
        "why_no_energy": summary.get("why_no_energy", ""),
        "edp_js": summary.get("edp_js"),
        **{name: summary.get(name) for name in ("peak_bytes", "working_bytes", "bytes_per_token", "flops_per_token")},
        "roofline_percent": _scaled(share, 100),
        **_spread("speed_up", "", summary.get("speed_up")),
        **{name: summary.get(name) for name in ("byte_ratio", "flop_ratio")},
        **{f"mix_{name}_percent": _scaled(mix.get(name), 100) for name in ("big", "small", "skip")},
        **_spread("loss", "_nats", quality.get("loss")),
        "perplexity": quality.get("perplexity"),
        "kl_nats": quality.get("kl"),
        "argmax_agreement_percent": _scaled(quality.get("argmax_agreement"), 100),
        "held_out_tokens": quality.get("tokens"),
        "tokens_per_verification": drafts.get("tokens_per_verification"),
        "verifications": drafts.get("verifications"),
        **{name: sum(drafts[name]) if drafts else None for name in ("drafted", "accepted")},
        "accepted_by_position_percent": " ".join(f"{100 * share:.4g}" for share in accepted(drafts)),
    }


def accepted(speculation: Mapping[str, Any]) -> list[float]:
    """By position in a round, the share of drafted tokens that stood; of a cell's ``speculation``, empty or not."""
    both = (speculation.get(name, ()) for name in ("accepted", "drafted"))
    return [stood / drafted for stood, drafted in zip(*both, strict=True)]


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else float(f"{scale * value:.12g}")  # without what binary makes of 1000 x 0.0012


def _spread(name: str, unit: str, found: Mapping[str, float] | None, scale: float = 1.0) -> Row:
    """A figure and its interval in three columns."""
    found = found or {}
    columns = {f"{name}{unit}": "median", f"{name}_low{unit}": "low", f"{name}_high{unit}": "high"}
    return {column: _scaled(found.get(key), scale) for column, key in columns.items()}


def _energy(kind: str, found: Mapping[str, Any]) -> Row:
    rails = found.get("rails_j_per_token", {}).items()
    return {
        **_spread(kind, "_j_per_token", found.get("j_per_token")),
        **_spread(f"{kind}_net", "_j_per_token", found.get("net_j_per_token")),
        **_spread(f"{kind}_mean", "_w", found.get("mean_w")),
        f"{kind}_rails_j_per_token": " ".join(f"{rail}={joules:.6g}" for rail, joules in rails if joules is not None),
        f"{kind}_window_s": found.get("window_s"),
        f"{kind}_energy_flags": "; ".join(found.get("flags", ())),
    }


def csv_text(result: Mapping[str, Any]) -> str:
    """The rows as CSV; what is None is empty."""
    found, text = rows(result), io.StringIO(newline="")
    writer = csv.DictWriter(text, list(found[0]) if found else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _figure(column: str, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "" if row[column] is None else _number(scale * row[column])


def _with_interval(name: str, unit: str = "") -> Callable[[Row], str]:
    def text(row: Row) -> str:
        values = [row[f"{name}{part}{unit}"] for part in ("", "_low", "_high")]
        return "" if None in values else "{} [{}, {}]".format(*map(_number, values))

    return text


def _joined(*columns: str) -> Callable[[Row], str]:
    return lambda row: "" if row[columns[0]] is None else " / ".join(_number(row[column]) for column in columns)


TABLES: dict[str, dict[str, Callable[[Row], str]]] = {
    "Speed": {
        "TPOT ms [95 %]": _with_interval("tpot", "_ms"),
        "TTFT ms [95 %]": _with_interval("ttft", "_ms"),
        "decode tok/s": _figure("decode_tokens_per_s"),
        "prefill tok/s": _figure("prefill_tokens_per_s"),
        "inter-token ms p50 / p95 / p99": _joined(*(f"inter_token_{name}_ms" for name in ("p50", "p95", "p99"))),
        "speed-up [95 %]": _with_interval("speed_up"),
        "byte ratio": _figure("byte_ratio"),
        "FLOP ratio": _figure("flop_ratio"),
        "% of roofline": _figure("roofline_percent"),
    },
    "Energy": {
        "decode J/token [95 %]": _with_interval("decode", "_j_per_token"),
        "net of idle [95 %]": _with_interval("decode_net", "_j_per_token"),
        "mean W": _figure("decode_mean_w"),
        "EDP mJ s": _figure("edp_js", 1e3),
        "prefill J/token [95 %]": _with_interval("prefill", "_j_per_token"),
        "prefill, net of idle [95 %]": _with_interval("prefill_net", "_j_per_token"),
    },
    "Memory and quality": {
        "% big / small / skip": _joined(*(f"mix_{name}_percent" for name in ("big", "small", "skip"))),
        "MB/token": _figure("bytes_per_token", 1e-6),
        "peak MB": _figure("peak_bytes", 1e-6),
        "loss nats [95 %]": _with_interval("loss", "_nats"),
        "perplexity": _figure("perplexity"),
        "KL nats": _figure("kl_nats"),
        "agreement %": _figure("argmax_agreement_percent"),
    },
}
SPECULATION: dict[str, Callable[[Row], str]] = {
    "tokens per verification": _figure("tokens_per_verification"),
    "verifications": _figure("verifications"),
    "drafted": _figure("drafted"),
    "accepted": _figure("accepted"),
    "% accepted by position": lambda row: row["accepted_by_position_percent"].replace(" ", " / "),
}


def markdown(result: Mapping[str, Any]) -> str:
    """Tables for people, with a head that says what they were measured on and how."""
    return "\n".join(_lines(result)) + "\n"


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    found = rows(result)
    valid = [row for row in found if row["valid"] and row["rounds"]]
    varying = [size for size in SIZES if len({row[size] for row in found}) > 1]
    yield f"# {_safe(result['model']['name'])} on {_safe(result['system']['device'])}"
    yield ""
    if not result["complete"]:
        yield "**Not finished: the run was interrupted, or goes on. What is here may change.**"
        yield ""
    yield from (f"- {name}: {_safe(text)}" for name, text in _head(result, found, varying) if text)
    yield "- Again:"
    yield ""
    yield f"      {' '.join(result['command'].split())}"
    tables = {title: (valid, columns) for title, columns in TABLES.items()}
    tables["Speculation"] = [row for row in valid if row["verifications"]], SPECULATION
    for title, (shown, columns) in tables.items():
        if not shown:
            continue
        yield ""
        yield f"## {title}"
        yield ""
        yield from _table(shown, varying, columns)
        if title == "Energy":
            yield from _of_energy(result, valid)
    for title, cells in (
        ("Not valid, and in no table", {row["id"]: row["invalid_why"] for row in found if not row["valid"]}),
        ("Not measured yet", {row["id"]: "no valid round" for row in found if row["valid"] and not row["rounds"]}),
    ):
        if cells:
            yield ""
            yield f"## {title}"
            yield ""
            yield from (f"- {_safe(cell)}: {_safe(why or 'not said why')}" for cell, why in cells.items())


def _table(valid: Sequence[Row], varying: Sequence[str], columns: Mapping[str, Callable[[Row], str]]) -> Iterator[str]:
    """A table without the columns that are empty everywhere, and a sentence that names these."""
    texts = {heading: [text(row) for row in valid] for heading, text in columns.items()}
    shown = {heading: column for heading, column in texts.items() if any(column)}
    if shown:
        named = {"route": [_safe(results.routed(row)) for row in valid]}
        named |= {"engine": [_safe(row["engine"]) for row in valid]}
        named |= {"strategy": [_safe(_strategy(row)) for row in valid]}
        named |= {SIZES[size]: [_safe(row[size]) for row in valid] for size in varying}
        yield "| " + " | ".join((*named, *shown)) + " |"
        yield "|" + "---|" * len(named) + "---:|" * len(shown)
        for line in zip(*named.values(), *shown.values(), strict=True):
            yield "| " + " | ".join(text or "-" for text in line) + " |"
    if absent := [heading.removesuffix(" [95 %]") for heading in texts if heading not in shown]:
        if shown:
            yield ""
        yield f"No cell has: {', '.join(absent)}."


def _strategy(row: Row) -> str:
    ran = row["strategy_ran"]
    return f"{row['strategy']} ({ran})" if ran and ran != row["strategy"] else str(row["strategy"])


def _of_energy(result: Mapping[str, Any], valid: Sequence[Row]) -> Iterator[str]:
    """Why there is none, and what must be said beside what there is."""
    said: dict[str, list[str]] = {}
    for row in valid:
        for text in filter(None, (row["why_no_energy"], row["decode_energy_flags"], row["prefill_energy_flags"])):
            said.setdefault(text, []).append(row["id"])
    if not said and result["meter"]["why"]:
        said[result["meter"]["why"]] = []
    for text, cells in said.items():
        yield ""
        which = "" if len(cells) in (0, len(valid)) else f" ({', '.join(dict.fromkeys(cells))})"
        yield f"{_safe(text + which)}."


def _head(result: Mapping[str, Any], found: Sequence[Row], varying: Sequence[str]) -> Iterator[tuple[str, str]]:
    system, model, meter, roofline = result["system"], result["model"], result["meter"], result["roofline"]
    memory, modes = system.get("memory_bytes"), system.get("power_mode") or {}
    machine = (
        system["device"],
        system.get("chip") if system.get("chip") != system["device"] else None,
        system.get("model"),
        f"{memory / 2**30:.0f} GiB" if memory else None,
        " ".join(filter(None, (system.get("os") or {}).values())) or system["platform"],
        system.get("power_source"),
        *(f"{name} {value}" for name, value in modes.items()),
    )
    yield "Machine", ", ".join(filter(None, machine))
    yield "Versions", ", ".join(f"{name} {known}" for name, known in system["versions"].items() if known)
    yield (
        "Model",
        ", ".join(
            filter(
                None,
                (
                    model["name"],
                    model["revision"] and f"revision {model['revision']}",
                    f"{model['layers']} layers, {model['parameters']} parameters",
                ),
            )
        ),
    )
    for name, text in result["texts"].items():
        what = "prompts" if name == "prompts" else "windows"
        yield f"Text, {name.replace('_', '-')}", f"{text['source']}, {text['tokens']} tokens, {text['count']} {what}"
    if found:
        yield "Every cell", ", ".join(f"{SIZES[size]} {found[0][size]}" for size in SIZES if size not in varying)
    if meter["why"]:
        yield "Energy", f"none: {meter['why']}"
    else:
        idle = meter["idle"]
        drawn = f"; idle {idle['total_j'] / idle['seconds']:.3g} W" if _measured(idle) else "; idle was not measured"
        yield "Energy", f"{meter['label']}{drawn}"
    yield "Of the meter", "; ".join(meter["notes"])
    if roofline:
        yield "Roofline", f"{roofline['bandwidth_bytes_s'] / 1e9:.4g} GB/s, {roofline['how']}"
    sessions = result["sessions"]
    yield "Started", ", ".join(session["started"] for session in sessions)
    floors = [session["noise_floor"] for session in sessions if session["noise_floor"]]
    texts = [f"{100 * (each['low'] - 1):+.2f} % to {100 * (each['high'] - 1):+.2f} %" for each in floors]
    yield "Noise floor, the first cell against itself", ", ".join(texts) or "not measured"
    cautions = dict.fromkeys(caution for session in sessions for caution in session["cautions"])
    yield "Cautions", "; ".join(cautions)


def _measured(idle: Mapping[str, Any] | None) -> bool:
    return bool(idle and idle.get("seconds") and idle.get("total_j") is not None)


def _safe(text: Any) -> str:
    """One line that Markdown shows as it is, within a table, too."""
    return re.sub(r"([\\|<*_`\[])", r"\\\1", " ".join(str(text).split()))
