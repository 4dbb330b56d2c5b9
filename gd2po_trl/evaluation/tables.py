"""Results on the terminal."""

from collections.abc import Iterable, Sequence


def print_table(
    title: str, columns: Sequence[str], lines: Iterable[Sequence[str]], caption: str | None = None
) -> None:
    """Prints a table to the terminal; the first column is left-aligned, all others are numbers and right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    # Names and categories come from the data, and `[/INST]` in one is no markup.
    Console(markup=False, emoji=False).print(table)
