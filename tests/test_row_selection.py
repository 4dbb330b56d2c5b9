"""The pure functions of row skipping: which rows of a micro-batch stay, and what the loss is multiplied by."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_row_skipping import LOSS_TYPES, random_batch

from gd2po_trl.row_skipping import LOSS_DENOMINATORS, loss_mask, select_rows, trained_extent, unsupported_entry


@st.composite
def micro_batches(draw):
    rows, length = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    bits = st.lists(st.booleans(), min_size=rows, max_size=rows)
    signs = torch.tensor(draw(bits))
    batch = {
        "prompt_ids": torch.arange(rows).unsqueeze(1).expand(rows, 3),
        "prompt_mask": torch.ones(rows, 3, dtype=torch.long),
        "completion_ids": torch.arange(rows * length).view(rows, length),
        "completion_mask": (torch.arange(length) < torch.tensor(lengths).unsqueeze(1)).long(),
        "advantages": torch.where(signs, torch.linspace(-1.0, 1.5, rows), 0.0),
        "num_items_in_batch": torch.tensor(float(sum(lengths))),
        "old_per_token_logps": None,
    }
    if draw(st.booleans()):
        flat = st.lists(st.integers(0, 1), min_size=rows * length, max_size=rows * length)
        batch["tool_mask"] = torch.tensor(draw(flat)).view(rows, length)
    extent = trained_extent(batch).tolist()
    extra = draw(st.integers(0, rows - extent[1]))
    return batch, extent, extent[1] + extra


@given(micro_batches(), st.sampled_from(LOSS_TYPES))
@settings(deadline=None, max_examples=300)
def test_reduced_batch_keeps_all_that_trains(case, loss_type):
    batch, (rows, trained_rows, trained_tokens, last), num_rows = case
    assert unsupported_entry(batch) is None
    mask = loss_mask(batch)
    contribution = (batch["advantages"].unsqueeze(1) * mask).abs()
    assert rows == len(mask)
    assert trained_rows == (contribution.sum(1) > 0).sum()
    assert trained_tokens == (contribution > 0).sum()

    length = max(last, 1)
    reduced, factor = select_rows(batch, num_rows, length, loss_type)
    kept = reduced["prompt_ids"][:, 0]
    assert len(kept) == num_rows and kept.tolist() == sorted(set(kept.tolist()))
    assert reduced["completion_ids"].shape == (num_rows, length)
    assert torch.equal(reduced["completion_ids"], batch["completion_ids"][kept, :length])
    # Every token that trains is there, and the rows that fill up are the shortest of the others.
    assert (reduced["advantages"].unsqueeze(1) * loss_mask(reduced)).count_nonzero() == trained_tokens
    filling = [row for row in kept.tolist() if contribution[row].sum() == 0]
    left_out = set(range(rows)) - set(kept.tolist())
    widths = batch["completion_mask"].sum(1)
    assert max((widths[row] for row in filling), default=0) <= min((widths[row] for row in left_out), default=99)

    # The mean over the reduced batch times the factor is the mean over all: a token is worth `value` in the loss.
    value = batch["advantages"].unsqueeze(1) * mask
    kept_value = reduced["advantages"].unsqueeze(1) * loss_mask(reduced)
    divisors = {"rows": lambda m: len(m), "tokens": lambda m: m.sum().clamp(min=1), None: lambda m: 7.0}
    divide_by = divisors[LOSS_DENOMINATORS[loss_type]]
    if num_rows > 0:
        expected = value.sum() / divide_by(mask)
        assert torch.isclose(kept_value.sum() / divide_by(loss_mask(reduced)) * factor, expected, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_is_copied_where_every_row_trains(loss_type):
    batch = random_batch(zeros=())
    reduced, factor = select_rows(batch, 8, 12, loss_type)
    assert factor == 1.0
    for key, value in batch.items():
        assert reduced[key].data_ptr() == value.data_ptr()


def test_entries_that_cannot_be_cut_are_named():
    batch = random_batch()
    assert unsupported_entry({**batch, "num_images": [1] * 8}) == "num_images"
    assert unsupported_entry({**batch, "num_images": None}) is None
    assert unsupported_entry({**batch, "advantages": torch.zeros(8, 12)}) == "advantages"
