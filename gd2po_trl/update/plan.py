"""
Which rollouts share a forward pass.

A forward never costs more than one of TRL's own, a padded micro-batch, on either count that takes memory: tokens run,
and keys and values gathered in a layer. Costs are given as the larger of the two shares of that budget, so that
processes with different batches can agree on a plan by taking the maximum of their costs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .layout import gathered_keys, segments_of
from .rows import RowTable


@dataclass
class MicroBatch:
    """
    A micro-batch to train.

    Args:
        batch (`dict`):
            As TRL's loss takes it.
        table ([`RowTable`]):
            Its rows, as far as planning goes.
        factor (`float` or `torch.Tensor`):
            What its loss is multiplied by.
    """

    batch: dict[str, Any]
    table: RowTable
    factor: Any

    @property
    def num_rows(self) -> int:
        """Rows, equal on all processes. Without any, TRL's loss is not computed."""
        return len(self.batch["advantages"])


@dataclass
class Window:
    """
    The forwards of consecutive slots that belong to one optimizer step and one pass over the generation batch.

    Args:
        first (`int`):
            The first slot.
        ends (list of `int`):
            The last slot of each forward, ascending.
        pending (list of `int`):
            Slots that were collected and whose forward is not due yet.
    """

    first: int
    ends: list[int]
    pending: list[int] = field(default_factory=list)


def join_tables(tables: Sequence[RowTable]) -> RowTable:
    """One table of the rollouts of several, in their order."""
    if len(tables) == 1:
        return tables[0]
    return RowTable(
        torch.cat([table.prompts for table in tables]),
        torch.cat([table.prompt_lengths for table in tables]),
        torch.cat([table.lengths for table in tables]),
        torch.cat([table.trained_tokens for table in tables]),
        all(table.is_plain for table in tables),
    )


def cost(table: RowTable, budget: int) -> tuple[float, int]:
    """
    What a packed forward over the rollouts of `table` costs.

    Args:
        table ([`RowTable`]):
            The rollouts; those of length 0 are not run.
        budget (`int`):
            Tokens of a padded micro-batch, padding included.

    Returns:
        `tuple` of the share of the budget that it takes (`float`) and the tokens that it runs (`int`).
    """
    segments, _ = segments_of(table)
    tokens = sum(segment.length for segment in segments)
    return max(tokens, gathered_keys(segments)) / budget, tokens


def cut(num_slots: int, share: Callable[[int, int], float]) -> list[int]:
    """
    Cut consecutive micro-batches into forwards, as few as fit when filled from the front.

    Args:
        num_slots (`int`):
            Number of micro-batches.
        share (`Callable`):
            `share(first, last)` is the share of the budget that a forward over micro-batches `first` to `last` takes.

    Returns:
        Number of the last micro-batch of each forward, ascending; a single micro-batch is always allowed.
    """
    ends = []
    first = 0
    for last in range(num_slots):
        if last > first and share(first, last) > 1:
            ends.append(last - 1)
            first = last
    return [*ends, num_slots - 1]


def cost_tables(tables: Sequence[RowTable], budget: int) -> torch.Tensor:
    """
    Costs of all runs of consecutive micro-batches that may become a forward.

    Args:
        tables (sequence of [`RowTable`]):
            Of n micro-batches.
        budget (`int`):
            As for [`cost`].

    Returns:
        `torch.Tensor` of shape `(2, n, n)`, float64: share of the budget and tokens of the forward over micro-batches
        i to j; infinite shares where j < i, or where a shorter run already exceeds the budget.
    """
    result = torch.zeros(2, len(tables), len(tables), dtype=torch.float64)
    result[0] = torch.inf
    for first in range(len(tables)):
        for last in range(first, len(tables)):
            share, tokens = cost(join_tables(tables[first : last + 1]), budget)
            result[:, first, last] = torch.tensor([share, tokens])
            if share > 1 and last > first:
                break
    return result


def fill_forwards(table: RowTable, budget: int) -> list[torch.Tensor]:
    """
    Split rollouts that may be run in any order into forwards within the budget, prompts kept together.

    Returns:
        Row indices (int64) of each forward; rollouts of length 0 are in none.
    """
    rows = torch.argsort(table.prompts, stable=True)
    rows = rows[table.lengths[rows] > 0]
    ends = cut(len(rows), lambda first, last: cost(table.select(rows[first : last + 1]), budget)[0])
    return [] if len(rows) == 0 else list(torch.tensor_split(rows, [end + 1 for end in ends[:-1]]))
