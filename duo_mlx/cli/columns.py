"""Rows of text as aligned columns."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int | None = None) -> list[str]:
    """A line for each row; the first ``left`` columns to the left, the others to the right; None: all to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if left is None else left
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = (text.ljust(to) if column < left else text.rjust(to) for column, (text, to) in enumerate(cells))
        lines.append("  ".join(padded).rstrip())
    return lines
