"""How results are shown: tables for a terminal and for Markdown, numbers in sentences, colors of figures, and JSON."""

import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .terminal import make_console, printable


if TYPE_CHECKING:
    from rich.table import Table as RichTable

INK, MUTED, GRID = "#1f2933", "#6b7785", "#dde2e8"
# Distinguishable with any color vision, and in order of use.
PALETTE = ["#0a6ebd", "#d1570c", "#2f9e5b", "#a3369c", "#b8860b", "#4b5fc0", "#c2255c"]


@dataclass(frozen=True)
class Table:
    """
    A table of text.

    Args:
        title (`str`): What it shows.
        columns (`list[str]`): Headings.
        rows (`list[list[str]]`): One cell per column.
        help (`str`, *optional*): How to read it.
        text_columns (`int`, *optional*, defaults to 1): How many columns from the left are text, not numbers.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    help: str = ""
    text_columns: int = 1

    def markdown(self) -> str:
        """Title, table and help as Markdown."""
        parts = (f"**{self.title}**", markdown_table(self.columns, self.rows), self.help)
        return "\n\n".join(filter(None, parts))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table as Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows))


def make_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", text_columns: int = 1
) -> "RichTable":
    """
    The table for a terminal.

    Names are wrapped between words and cut nowhere; numbers are never wrapped.

    Args:
        title (`str`): What it shows.
        columns (sequence of `str`): Headings.
        rows (iterable of sequences of `str`): One cell per column.
        caption (`str`, *optional*): How to read it.
        text_columns (`int`, *optional*, defaults to 1): How many columns from the left are text, not numbers.
    """
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(
        title=Text(title, style="bold"),
        caption=Text(caption) if caption else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    rows = list(rows)
    for index, column in enumerate(columns):
        # A column of numbers is as wide as they or the longest word of its heading are, so that names get the rest.
        width = max([*map(len, column.split()), *(len(row[index]) for row in rows), 1])
        is_text = index < text_columns
        heading = column if is_text else textwrap.fill(column, width, break_on_hyphens=False)
        table.add_column(
            Text(printable(heading)),
            justify="left" if is_text else "right",
            vertical="top" if is_text else "bottom",
            overflow="fold",
            no_wrap=not is_text,
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> None:
    """Print the table of [`make_table`]."""
    make_console().print(make_table(title, columns, rows, caption))


def decimals(value: float | None, digits: int) -> str:
    """`value` with so many decimals; a dash for `None`."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(share: float) -> str:
    """`share` as a percentage, with one decimal where the whole number would say too little; a dash for NaN."""
    if math.isnan(share):
        return "–"
    value = 100 * share
    if 0 < value < 1.95 or 98.05 < value < 100:
        return f"{min(max(value, 0.1), 99.9):.1f}%"
    return f"{value:.0f}%"


def short_number(value: float) -> str:
    """`value` with at most three digits; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3g}"


def join(names: Sequence[str]) -> str:
    """`a`, `a and b`, or `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1] if names else ""]))


def write_json(path: Path, document: Any) -> None:
    """Write `document` to `path`; what JSON does not have, NaN and infinity, becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.write_text(json.dumps(finite(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")
