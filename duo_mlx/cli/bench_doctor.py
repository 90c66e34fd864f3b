"""``duo-mlx bench doctor``: what this machine can do, for its user and for bug reports."""

from collections.abc import Callable, Sequence
from typing import Any

import click

from duo_mlx.cli.columns import aligned


@click.command()
@click.option("--model", metavar="DIR|HUB_ID", help="Check the FFNs of this model instead of made ones.")
@click.option("--quick", is_flag=True, help="Time nothing and repeat checks less often.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(model: str | None, quick: bool, as_json: bool) -> None:
    """Check this machine: versions, meters, kernels and speed, and what --strategy auto does here.

    On a Mac each Metal kernel is compiled, compared with MLX's own products and timed, and what was found is kept for
    auto; it is meant to take minutes, with --quick seconds. Elsewhere there are no kernels to check. The output has no
    user name, host name or serial number: paste it into bug reports. Exit code 1: a check failed.

    \b
    Examples:
      duo-mlx bench doctor
      duo-mlx bench doctor --quick --json
    """
    import json

    from duo_mlx.bench import doctor, variants
    from duo_mlx.cli.progress import shown

    with shown() as progress:
        report = doctor.examine(variants.QUICK if quick else variants.Plan(), model, progress)
    found = report.as_json()
    if as_json:
        click.echo(json.dumps(found))
    else:
        _print(found)
    if report.failed:
        click.get_current_context().exit(1)


def _print(found: dict[str, Any]) -> None:
    """The report for people: tables on a terminal, the same as plain text elsewhere."""
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False) if sys.stdout.isatty() else None

    def table(title: str, *columns: str, rows: Sequence[tuple[str, ...]]) -> None:
        lines = [columns, *rows] if any(columns) else rows
        if not rows:
            return
        if console is None:
            click.echo("\n".join((title, *(f"  {line}" for line in aligned(lines)), "")))
            return
        shown = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=any(columns))
        for row in rows:
            shown.add_row(*row)
        console.print(shown)

    table("machine", "", "", rows=_machine(found))
    meters = [(each["name"], "; ".join([each["label"] or each["why"], *each["notes"]])) for each in found["meters"]]
    table("energy meters", "", "", rows=meters)
    if found["no_kernels"]:
        table("kernels", "", rows=[(f"not checked: {found['no_kernels']}",)])
    checks, rows = found["checks"], sorted({check["rows"] for check in found["checks"]})
    tokens = [f"{number} token{'s' * (number > 1)}" for number in rows]
    table("kernels", "", "weights", "dtype", *tokens, rows=_outcomes(checks, rows))
    title = "time of big / small / skip over planned's big"
    table(title, "", "weights", "dtype", "shape", *tokens, rows=_times(checks, rows))
    refused = {(check["what"], check["weights"], check["dtype"], check["refused"]): None for check in checks}
    table("refused", "", "", "", "", rows=[each for each in refused if each[-1]])
    table("failed", "", rows=[(each,) for each in found["failed"]])
    figures = [(_words(name), *_values(name, figure)) for name, figure in found["figures"].items()]
    table(f"figures of the {found['device']}", "", "median", "quartiles", rows=figures)
    table("what auto does", "FFNs", "", "strategy", "passed over", rows=_decisions(found["auto"]))
    table("notes", "", rows=[(note,) for note in found["notes"]])
    kept = f"verdicts are stored in {found['stored']}" if found["stored"] else "nothing was stored"
    click.echo(f"For a bug report, paste all of the above and the command that went wrong; {kept}.")


def _machine(found: dict[str, Any]) -> list[tuple[str, ...]]:
    system = found["system"]
    memory = system["memory_bytes"]
    lines = {
        "device": system["device"],
        "chip": " ".join(filter(None, (system["chip"], system["model"]))),
        "memory": f"{memory / 2**30:.1f} GiB" if memory else "",
        "system": " ".join(filter(None, system["os"].values())),
        "versions": ", ".join(f"{name} {known}" for name, known in system["versions"].items() if known),
        "BLAS": found["blas"],
        "switches": ", ".join(f"{name}={value}" for name, value in system["environment"].items()),
    }
    return [(name, value) for name, value in lines.items() if value]


def _lines(
    checks: list[dict[str, Any]], rows: list[int], keys: Sequence[str], cell: Callable[[list[dict[str, Any]]], str]
) -> list[tuple[str, ...]]:
    """One line for all checks with the same keys, and in it what ``cell`` says of those with a number of tokens."""
    kinds = dict.fromkeys(tuple(check[key] for key in keys) for check in checks)
    return [
        (
            *kind,
            *(
                cell([c for c in checks if c["rows"] == number and tuple(c[key] for key in keys) == kind])
                for number in rows
            ),
        )
        for kind in kinds
    ]


def _outcomes(checks: list[dict[str, Any]], rows: list[int]) -> list[tuple[str, ...]]:
    def outcome(cell: list[dict[str, Any]]) -> str:
        failed, refused = (sum(bool(check[key]) for check in cell) for key in ("failed", "refused"))
        ran = len(cell) - refused
        if failed:
            return f"FAILED {failed} of {ran}"
        return f"{ran} ok" if ran else "refused" if refused else "-"

    return _lines(checks, rows, ("what", "weights", "dtype"), outcome)


def _times(checks: list[dict[str, Any]], rows: list[int]) -> list[tuple[str, ...]]:
    def times(cell: list[dict[str, Any]]) -> str:
        return ", ".join(" / ".join(f"{time:.2f}" for time in check["times"].values()) for check in cell)

    timed = [check for check in checks if check["times"]]
    return _lines(timed, rows, ("what", "weights", "dtype", "shape"), times)


def _words(name: str) -> str:
    return {
        "bandwidth_bytes_s": "bandwidth of a matrix-vector product",
        "dispatch_s": "one more kernel in a chain",
        "read_back_s": "the host waits for a route",
        "crossing_s": "to the CPU's stream and back",
        "fast_crossing_s": "the same with MLX_METAL_FAST_SYNCH=1",
    }[name]


def _values(name: str, figure: dict[str, float]) -> tuple[str, str]:
    scale, unit = (1e-9, "GB/s") if name.endswith("bytes_s") else (1e6, "us")
    median, low, high = (figure[part] * scale for part in ("median", "low", "high"))
    return f"{median:.3g} {unit}", f"{low:.3g} to {high:.3g}"


def _decisions(decisions: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            each["ffns"],
            each["situation"],
            each["strategy"],
            "; ".join(f"{name}: {why}" for name, why in each["passed_over"].items()),
        )
        for each in decisions
    ]
