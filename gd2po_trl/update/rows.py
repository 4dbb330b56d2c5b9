"""
Which rollouts of a micro-batch have a gradient, and the micro-batch without the others.

A rollout whose advantage is exactly 0, or of which no token counts in the loss, adds nothing to the gradient of the
policy loss. Leaving it out changes the denominator of some losses, which a factor makes up for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


# What the denominator of each loss counts in its micro-batch: rollouts ("rows"), their trained tokens ("tokens"), or
# nothing (None). The loss over the rollouts with a gradient, times the share of what is counted, is the loss over all.
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
        "ref_per_token_logps",
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


def tokens_with_gradient(batch: dict[str, Any], loss_type: str) -> torch.Tensor:
    """
    Which completion tokens of a micro-batch have a gradient of the policy loss.

    Args:
        batch (`dict`):
            A micro-batch of TRL's `GRPOTrainer`, with `advantages` `(B,)` and `completion_mask` `(B, T)`.
        loss_type (`str`):
            Key of `LOSS_DENOMINATORS`. All losses but `"vespo"` are multiplied by vLLM's importance sampling ratio.

    Returns:
        `torch.Tensor` of shape `(B, T)`, bool.
    """
    counts = (loss_mask(batch) != 0) & (batch["advantages"] != 0).unsqueeze(1)
    ratio = batch.get("importance_sampling_ratio")
    return counts if ratio is None or loss_type == "vespo" else counts & (ratio != 0)


@dataclass(frozen=True)
class RowTable:
    """
    What planning needs to know of the B rollouts of a batch. All tensors are of shape `(B,)` and on the CPU.

    Args:
        prompts (`torch.Tensor`, int64):
            Number of the prompt; rollouts with equal unpadded prompt ids have equal numbers.
        prompt_lengths (`torch.Tensor`, int64):
            Tokens of the prompt.
        lengths (`torch.Tensor`, int64):
            Tokens of the completion that have to be run, which are those up to the last one that is used; 0 for a
            rollout that does not have to be run at all.
        trained_tokens (`torch.Tensor`, int64):
            Completion tokens with a gradient of the policy loss.
        is_plain (`bool`):
            Whether prompts are padded on the left, completions on the right, and neither has gaps.
    """

    prompts: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor
    trained_tokens: torch.Tensor
    is_plain: bool

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: torch.Tensor, run: torch.Tensor | None = None) -> "RowTable":
        """The table of `rows` (int64 indices); where `run` (bool) is given, the others are not run."""
        return RowTable(
            self.prompts[rows],
            self.prompt_lengths[rows],
            self.lengths[rows] if run is None else torch.where(run, self.lengths[rows], 0),
            self.trained_tokens[rows],
            self.is_plain,
        )


def describe_rows(
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_mask: torch.Tensor,
    counts: torch.Tensor | None = None,
    trained: torch.Tensor | None = None,
) -> RowTable:
    """
    The [`RowTable`] of a batch. It waits for the device, once.

    Args:
        prompt_ids (`torch.Tensor` of shape `(B, P)`):
            Padded prompts.
        prompt_mask (`torch.Tensor` of shape `(B, P)`):
            1 for a token, 0 for padding.
        completion_mask (`torch.Tensor` of shape `(B, T)`):
            The same of the completions.
        counts (`torch.Tensor` of shape `(B, T)`, *optional*):
            Tokens whose log-probability is used. By default all tokens.
        trained (`torch.Tensor` of shape `(B, T)`, *optional*):
            From [`tokens_with_gradient`].
    """
    _, prompts = torch.unique(prompt_ids.masked_fill(prompt_mask == 0, -1), dim=0, return_inverse=True)
    counts = completion_mask if counts is None else counts
    used = (torch.arange(1, counts.size(1) + 1, device=counts.device) * counts.ne(0)).amax(1)
    # Padding without gaps: the sides on which the first and the last column would differ.
    plain = (prompt_mask.diff(dim=1) >= 0).all(1) & (completion_mask.diff(dim=1) <= 0).all(1) & prompt_mask.any(1)
    columns = [prompts, prompt_mask.ne(0).sum(1), used, used if trained is None else trained.sum(1), plain.long()]
    table = torch.stack(columns).cpu()
    return RowTable(table[0], table[1], table[2], table[3], bool(table[4].all()))


def order_by_prompt(table: RowTable) -> torch.Tensor:
    """
    Row indices that bring the rollouts of a prompt together, `(B,)` int64.

    Prompts come in the order of their first rollout, rollouts of a prompt in the order they had. TRL has shuffled the
    rollouts with torch's global generator by then, so that the order of the prompts is random, and a resumed run
    repeats it.
    """
    is_same = table.prompts.unsqueeze(0) == table.prompts.unsqueeze(1)
    first = is_same.int().argmax(1)
    return torch.argsort(first, stable=True)


def take_rows(batch: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """`batch` with the rows of the indices `rows` alone, in their order; what has no rows is kept."""
    return {
        key: value.index_select(0, rows.to(value.device)) if key in ROW_KEYS and value is not None else value
        for key, value in batch.items()
    }


def join_batches(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Micro-batches of one generation batch as one batch: the inverse of TRL's `split_tensor_dict`."""
    return {
        key: torch.cat([batch[key] for batch in batches]) if key in ROW_KEYS and value is not None else value
        for key, value in batches[0].items()
    }


def select_rows(
    batch: dict[str, Any], rows: torch.Tensor, num_rows: int, length: int, loss_type: str
) -> tuple[dict[str, Any], Any]:
    """
    The micro-batch reduced to `rows` and `length` completion columns.

    Metrics of the update gather one value per row, so that all processes must have the same number of rows: where
    `rows` are fewer than `num_rows`, rows whose completion is masked as a whole fill up. They have no gradient and
    count in no denominator of a token mean.

    Args:
        batch (`dict`):
            Micro-batch with B rows.
        rows (`torch.Tensor`, int64):
            Indices of the rows with a gradient.
        num_rows (`int`):
            Rows to return, at least `len(rows)` and at most B.
        length (`int`):
            Completion columns to keep, at least up to the last token with a gradient.
        loss_type (`str`):
            Key of `LOSS_DENOMINATORS`.

    Returns:
        `tuple` of the reduced micro-batch and the factor for its loss (a `float` or a 0-dim `torch.Tensor`).
    """
    mask = loss_mask(batch)
    total_rows, total_length = mask.shape
    is_left_out = torch.ones(total_rows, dtype=torch.bool)
    is_left_out[rows] = False
    filling = is_left_out.nonzero().flatten()[: num_rows - len(rows)]

    if len(rows) == total_rows:
        reduced = dict(batch)
    else:
        reduced = take_rows(batch, torch.cat([rows, filling]))
    for key in COMPLETION_KEYS & reduced.keys():
        # A sequence-level importance ratio has a single column.
        if reduced[key] is not None and reduced[key].size(1) == total_length:
            reduced[key] = reduced[key][:, :length]
    if len(filling):
        is_real = (torch.arange(num_rows, device=mask.device) < len(rows)).unsqueeze(1)
        reduced["completion_mask"] = reduced["completion_mask"] * is_real
        reduced["advantages"] = reduced["advantages"] * is_real.squeeze(1)

    denominator = LOSS_DENOMINATORS[loss_type]
    if denominator == "rows":
        return reduced, num_rows / total_rows
    if denominator == "tokens":
        # TRL divides by at least one token.
        return reduced, loss_mask(reduced).sum().clamp(min=1.0) / mask.sum().clamp(min=1.0)
    return reduced, 1.0
