"""Output to a terminal, for all commands: safe text, numbers, and each warning once."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from rich.console import Console


def make_console(**options) -> "Console":
    """
    A console for text that may come from a model: nothing in it is markup, an emoji code or a number to color.

    In a notebook it prints plain text. Jupyter's kernel asks for colors, which rich would take for a terminal.
    """
    from rich.console import Console

    if not sys.stdout.isatty():
        options.setdefault("force_terminal", False)
    return Console(markup=False, emoji=False, highlight=False, force_jupyter=False, **options)


def shorten(text: str, length: int) -> str:
    """`text` with its middle left out, if it has more than `length` characters."""
    if len(text) <= length:
        return text
    head = length // 3
    return f"{text[:head]} […] {text[len(text) - (length - head) :]}"


def printable(text: str) -> str:
    """`text` with control characters, which a terminal would act on, written out."""
    return "".join(
        char if char in "\n\t" or char.isprintable() or char == " " else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def fill(entries: Sequence[str], width: int) -> list[str]:
    """`entries` in as many lines of at most `width` characters as they need, none of them broken."""
    lines: list[str] = []
    for entry in entries:
        if lines and len(lines[-1]) + 2 + len(entry) <= width:
            lines[-1] += f"  {entry}"
        else:
            lines.append(entry)
    return lines


def duration(seconds: float) -> str:
    """`seconds` as `0:12` or `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def number(value: float, sign: str = "-") -> str:
    """`value` with three digits, and its sign as in a format specification."""
    if 0 < abs(value) < 1e-12:  # what rounding leaves of a difference
        value = 0.0
    return f"{value:{sign}#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:{sign},.0f}"


class _Once(logging.Filter):
    """Lets each warning through once, however often a library repeats it."""

    def __init__(self):
        super().__init__()
        self._seen: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        key = (record.name, record.getMessage())
        if record.levelno != logging.WARNING:
            return True
        if key in self._seen:
            return False
        self._seen.add(key)
        return True


class _Handler(logging.StreamHandler):
    """Writes to the current `sys.stderr`, which a live display may replace."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr


def set_up_logging() -> None:
    """
    Print what this package logs at level INFO, and the warnings of all libraries once each, without source lines.

    On several processes only the first one prints. To be called before transformers and TRL are imported.
    """
    import warnings

    from transformers.utils import logging as transformers_logging

    def show(message, category, filename, lineno, file=None, line=None):
        package = filename.rpartition("site-packages")[2].strip("/\\").replace("\\", "/").split("/")[0]
        logging.getLogger("py.warnings").warning(
            "%s: %s", package or category.__name__, " ".join(str(message).split())
        )

    handler = _Handler()
    handler.addFilter(_Once())
    logging.basicConfig(format="%(message)s", handlers=[handler])
    warnings.showwarning = show
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    is_first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("gd2po_trl").setLevel(logging.INFO if is_first else logging.WARNING)
    if not is_first:
        logging.getLogger("py.warnings").setLevel(logging.ERROR)
