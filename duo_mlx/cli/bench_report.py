"""``duo-mlx bench report``: results as one page of HTML and as plots."""

from pathlib import Path

import click


@click.command()
@click.argument("results", nargs=-1, required=True, metavar="RESULT...", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="[default: report.html beside the first]")
@click.option("--static", type=click.Path(path_type=Path), metavar="DIR", help="Write every chart as SVG, PNG and CSV.")
@click.option("--oracle", type=click.Path(path_type=Path), metavar="DIR|FILE",
              help="Folder of a duo-mlx oracle, or one of its tables.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace files that exist.")
def command(
    results: tuple[Path, ...], out: Path | None, static: Path | None, oracle: Path | None, force: bool
) -> None:  # fmt: skip
    """Show results of bench run: one page that opens offline, and plots.

    RESULT is a results folder or its results.json; several are shown side by side. The page has quality against energy,
    latency by part, context and token, the memory's bandwidth, and a text whose tokens' routes can be compared. Needs
    `pip install 'duo-mlx[plot]'`.

    \b
    Examples:
      duo-mlx bench report results
      duo-mlx bench report m1 m4 --out both.html --static plots
    """
    from duo_mlx.bench.report import explorer, page, rows
    from duo_mlx.bench.report import static as plots
    from duo_mlx.files import output_file, write_text

    found = rows.load(results)
    texts = explorer.texts(found, oracle)
    charts = page.charts(found, oracle if oracle and oracle.is_dir() else None)
    first = results[0]
    out = out or (first if first.is_dir() else first.parent) / "report.html"
    drawn = plots.planned(charts, static, force) if static else []
    with output_file(out, force) as new:
        write_text(new, page.page(found, charts, texts))
    if static:
        plots.write(charts, static, force)
    also = f" and {len(drawn)} files in {static}" if static else ""
    click.echo(f"wrote {out}{also}", err=True)
