"""The completions table that TRL writes: which columns it has, and that whatever rewards log beside them fits in."""

from collections import deque
from collections.abc import MutableMapping
from typing import Any

from accelerate.logging import get_logger


logger = get_logger(__name__)

# TRL's own, and `image`, which it adds for trackers.
COLUMNS = ("step", "prompt", "completion", "advantage", "image")
PREFIX = "gd2po_"


def is_table_column(name: str) -> bool:
    """Whether the table has a column `name` already, so that a reward of this name would replace it."""
    return name in COLUMNS or name.startswith(PREFIX)


def fill_missing_columns(pending: MutableMapping[str, list], logged: MutableMapping[str, deque], rows: int) -> None:
    """
    Give each column that rewards log at times (`log_extra`) a value for each rollout of this batch.

    Args:
        pending (mapping of `str` to `list`): What was logged for this batch, by column; completed in place.
        logged (mapping of `str` to `deque`): The columns of earlier batches.
        rows (`int`): Rollouts of this batch on this process.
    """
    for column in logged:
        if not column.startswith(PREFIX) and column not in pending:
            pending[column] = [None] * rows
    for column, values in pending.items():
        if len(values) != rows:
            logger.warning_once(f"The column {column!r} was logged more than once for a batch; the last values count.")
            pending[column] = values[-rows:]


def make_writable(logs: dict[str, Any]) -> None:
    """Make the extra columns as long as the others, and text where their values are of several types."""
    rows = len(logs["prompt"])
    for column, values in logs["extra"].items():
        if len(values) < rows:  # its first value came after the first rollout of the table
            values.extendleft([None] * (rows - len(values)))
        if not column.startswith(PREFIX) and not _has_one_type(values):
            logger.warning_once(
                f"The column {column!r} holds values of several types, or of one that a table cannot hold; it is "
                "written as text."
            )
            logs["extra"][column] = deque(
                (None if value is None else str(value) for value in values), maxlen=values.maxlen
            )


def _has_one_type(values: Any) -> bool:
    import pyarrow

    try:
        pyarrow.array(list(values), from_pandas=True)
    except Exception:  # pyarrow's own, and what a foreign type raises while it is read
        return False
    return True
