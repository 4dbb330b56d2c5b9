"""
Leaving rollouts without advantage out of the update.

A rollout whose advantage is exactly 0, or of which no token counts in the loss, adds nothing to the gradient of the
policy loss. This module selects the rows of a micro-batch that do, and says by how much the loss over them has to be
multiplied to equal the loss over all.
"""

from typing import Any

import torch


# What the loss over the trained rows must be multiplied by: its denominator counts the rows of the micro-batch
# ("rows"), its trained tokens ("tokens"), or does not depend on the micro-batch (None).
LOSS_DENOMINATORS: dict[str, str | None] = {
    "grpo": "rows",
    "sapo": "rows",
    "dr_grpo": "rows",
    "luspo": "rows",
    "bnpo": "tokens",
    "dapo": None,
    "cispo": None,
    "vespo": None,
}

# Entries of a micro-batch that have one row per rollout and one column per completion token ...
COMPLETION_KEYS = frozenset(
    {
        "completion_ids",
        "completion_mask",
        "tool_mask",
        "old_per_token_logps",
        "sampling_per_token_logps",
        "importance_sampling_ratio",
    }
)
# ... and those that have one row per rollout.
ROW_KEYS = COMPLETION_KEYS | {"prompt_ids", "prompt_mask", "advantages"}
# Entries that belong to the batch as a whole.
BATCH_KEYS = frozenset({"num_items_in_batch"})


def unsupported_entry(batch: dict[str, Any]) -> str | None:
    """Name of an entry of `batch` that cannot be cut by rows, or `None`."""
    for key, value in batch.items():
        if value is not None and key not in ROW_KEYS and key not in BATCH_KEYS:
            return key
    if batch["advantages"].dim() != 1:
        return "advantages"
    return None


def loss_mask(batch: dict[str, Any]) -> torch.Tensor:
    """Which completion tokens of a micro-batch count in the loss, `(B, T)`: those of tools do not."""
    mask = batch["completion_mask"]
    return mask if batch.get("tool_mask") is None else mask * batch["tool_mask"]


def trained_extent(batch: dict[str, Any]) -> torch.Tensor:
    """
    How much of a micro-batch carries a gradient.

    A row does if its advantage is not 0 and a token of it counts in the loss.

    Args:
        batch (`dict`):
            A micro-batch of TRL's `GRPOTrainer` with `advantages` `(B,)`, `completion_mask` `(B, T)` and, possibly,
            `tool_mask` `(B, T)`.

    Returns:
        `torch.Tensor` of shape `(4,)`, int64: rows, rows with a gradient, their tokens that count in the loss, and the
        last column, counted from 1, that holds one of these (0 without any).
    """
    counts = loss_mask(batch) != 0
    counts_and_trains = counts & (batch["advantages"] != 0).unsqueeze(1)
    columns = torch.arange(1, counts.size(1) + 1, device=counts.device)
    return torch.stack(
        [
            torch.full_like(columns[0], len(counts)),
            counts_and_trains.any(1).sum(),
            counts_and_trains.sum(),
            (columns * counts_and_trains.any(0)).amax(),
        ]
    )


def select_rows(batch: dict[str, Any], num_rows: int, length: int, loss_type: str) -> tuple[dict[str, Any], Any]:
    """
    The micro-batch reduced to `num_rows` rows and `length` completion columns.

    Rows with a gradient are kept first; if there are fewer, the shortest of the others fill up. Prompts keep their
    padding, so that what remains is computed exactly as before. Nothing is copied that is not cut by rows.

    Args:
        batch (`dict`):
            Micro-batch with B rows.
        num_rows (`int`):
            Rows to keep, at least the number with a gradient, at most B.
        length (`int`):
            Completion columns to keep, at least up to the last one that `trained_extent` counts.
        loss_type (`str`):
            Key of `LOSS_DENOMINATORS`.

    Returns:
        `tuple` of the reduced micro-batch and the factor for its loss (a `float` or a 0-dim `torch.Tensor`).
    """
    mask = loss_mask(batch)
    total_rows, total_length = mask.shape

    if num_rows == total_rows:
        rows = None
    else:
        carries_gradient = (batch["advantages"] != 0) & (mask != 0).any(1)
        priority = torch.where(carries_gradient, -1, batch["completion_mask"].sum(1))
        rows = torch.argsort(priority, stable=True)[:num_rows].sort().values

    reduced = {}
    for key, value in batch.items():
        if key in ROW_KEYS and value is not None:
            # A sequence-level importance ratio has a single column.
            if key in COMPLETION_KEYS and value.size(1) == total_length:
                value = value[:, :length]
            if rows is not None:
                value = value.index_select(0, rows)
        reduced[key] = value

    denominator = LOSS_DENOMINATORS[loss_type]
    if denominator == "rows":
        return reduced, num_rows / total_rows
    if denominator == "tokens":
        # TRL divides by at least one token.
        return reduced, loss_mask(reduced).sum().clamp(min=1.0) / mask.sum().clamp(min=1.0)
    return reduced, 1.0
