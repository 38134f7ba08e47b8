"""Tables of text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], numbers: int) -> list[str]:
    """Lines of a table, the first ruled off as its header; the last ``numbers`` columns right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        if numbers:
            last = zip(row[-numbers:], widths[-numbers:], strict=True)
            cells[-numbers:] = [cell.rjust(width) for cell, width in last]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines
