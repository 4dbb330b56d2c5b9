"""The pure functions of row skipping: which rows of a micro-batch stay, and what the loss is multiplied by."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_row_skipping import LOSS_TYPES, random_batch

from gd2po_trl.update.rows import (
    LOSS_DENOMINATORS,
    describe_rows,
    loss_mask,
    order_by_prompt,
    select_rows,
    tokens_with_gradient,
    unsupported_entry,
)


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
    table = describe_rows(
        batch["prompt_ids"],
        batch["prompt_mask"],
        batch["completion_mask"],
        loss_mask(batch),
        tokens_with_gradient(batch, "dapo"),
    )
    return batch, table, draw(st.integers(0, rows - int((table.trained_tokens > 0).sum())))


@given(micro_batches(), st.sampled_from(LOSS_TYPES))
@settings(deadline=None, max_examples=300)
def test_reduced_batch_keeps_all_that_trains(case, loss_type):
    batch, table, filling = case
    assert unsupported_entry(batch) is None and table.is_plain
    mask = loss_mask(batch)
    contribution = (batch["advantages"].unsqueeze(1) * mask).abs()
    trained = (contribution.sum(1) > 0).nonzero().flatten()
    assert torch.equal(table.trained_tokens, (contribution > 0).sum(1))

    num_rows = len(trained) + filling
    length = max([int(table.lengths[row]) for row in trained], default=1)
    reduced, factor = select_rows(batch, trained, num_rows, length, loss_type)
    assert reduced["completion_ids"].shape == (num_rows, length)
    assert torch.equal(reduced["completion_ids"][: len(trained)], batch["completion_ids"][trained, :length])
    # Every token that trains is there, and rows that fill up count nowhere.
    assert (reduced["advantages"].unsqueeze(1) * loss_mask(reduced)).count_nonzero() == table.trained_tokens.sum()
    assert loss_mask(reduced)[len(trained) :].sum() == 0 and reduced["advantages"][len(trained) :].abs().sum() == 0

    # The mean over the reduced batch times the factor is the mean over all: a token is worth `value` in the loss.
    value = batch["advantages"].unsqueeze(1) * mask
    kept_value = reduced["advantages"].unsqueeze(1) * loss_mask(reduced)
    divisors = {"rows": lambda m: len(m), "tokens": lambda m: m.sum().clamp(min=1), None: lambda m: 7.0}
    divide_by = divisors[LOSS_DENOMINATORS[loss_type]]
    if num_rows > 0:
        expected = value.sum() / divide_by(mask)
        assert torch.isclose(kept_value.sum() / divide_by(loss_mask(reduced)) * factor, expected, atol=1e-6)


def test_rows_with_an_importance_ratio_of_0_have_no_gradient():
    batch = random_batch(zeros=(1,), empty=(2,))
    for columns in (12, 1):
        ratio = torch.ones(8, columns)
        ratio[3] = 0.0
        weighted = {**batch, "importance_sampling_ratio": ratio}
        assert tokens_with_gradient(weighted, "dapo").any(1).tolist() == [n not in (1, 2, 3) for n in range(8)]
        assert tokens_with_gradient(weighted, "vespo").any(1).tolist() == [n not in (1, 2) for n in range(8)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
@settings(deadline=None)
def test_prompts_are_brought_together_in_the_order_of_their_first_rollout(prompts):
    ids = torch.tensor(prompts).unsqueeze(1) + 5
    table = describe_rows(ids, torch.ones_like(ids), torch.ones(len(prompts), 3))
    order = order_by_prompt(table).tolist()
    assert sorted(order) == list(range(len(prompts)))
    firsts = list(dict.fromkeys(prompts))
    assert [prompts[row] for row in order] == sorted(prompts, key=firsts.index)
    assert all(a < b for a, b in itertools.pairwise(order) if prompts[a] == prompts[b])


def test_masks_with_gaps_are_noticed():
    ids = torch.ones(2, 4, dtype=torch.long)
    whole, gap = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1]])
    assert describe_rows(ids, whole, whole.flip(1)).is_plain
    assert not describe_rows(ids, gap, whole.flip(1)).is_plain
    assert not describe_rows(ids, whole, gap.flip(1)).is_plain
    assert not describe_rows(ids, whole.flip(1), whole.flip(1)).is_plain


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_is_copied_where_every_row_trains(loss_type):
    batch = random_batch(zeros=())
    reduced, factor = select_rows(batch, torch.arange(8), 8, 12, loss_type)
    assert factor == 1.0
    for key, value in batch.items():
        assert reduced[key].data_ptr() == value.data_ptr()


def test_entries_that_cannot_be_cut_are_named():
    batch = random_batch()
    assert unsupported_entry({**batch, "num_images": [1] * 8}) == "num_images"
    assert unsupported_entry({**batch, "num_images": None}) is None
    assert unsupported_entry({**batch, "advantages": torch.zeros(8, 12)}) == "advantages"
