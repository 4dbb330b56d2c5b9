"""The update budget: which rollouts are drawn, how often, and what they count for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gd2po_trl import subsample_advantages
from gd2po_trl.advantages import draw_probabilities, subsample_at


SHARES = st.floats(0.01, 1.0)
SIZES = st.one_of(st.just(0.0), st.floats(1e-3, 1e3), st.sampled_from([1.0, 1e-8, 1e-300, 1e30]))
ADVANTAGES = st.lists(
    st.builds(lambda size, sign: size * sign, SIZES, st.sampled_from([-1, 1])), min_size=1, max_size=40
)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_probabilities(values, share):
    """The largest are drawn for certain, one by one, until what is left to draw fits the others."""
    sizes = [abs(value) for value in values]
    target = min(share * len(sizes), sum(size > 0 for size in sizes))
    certain = set()
    while True:
        rest = math.fsum(size for i, size in enumerate(sizes) if i not in certain)
        scale = (target - len(certain)) / rest if rest > 0 else 0.0
        over = {i for i, size in enumerate(sizes) if i not in certain and scale * size >= 1.0}
        if not over:
            return [1.0 if i in certain else scale * size for i, size in enumerate(sizes)]
        certain |= over


@settings(deadline=None)
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=40), SHARES)
def test_probabilities_are_proportional_and_capped(values, share):
    probability = draw_probabilities(float64(values), share)
    assert probability.tolist() == pytest.approx(plain_probabilities(values, share), rel=1e-9)


@settings(deadline=None)
@given(ADVANTAGES, SHARES)
def test_probabilities_add_up_to_the_budget(values, share):
    values = float64(values)
    probability = draw_probabilities(values, share)
    assert probability.dtype == torch.float64
    assert ((probability >= 0) & (probability <= 1)).all()
    assert torch.equal(probability == 0, values == 0) or values.abs().min() < 1e-200
    assert probability.sum().item() == pytest.approx(min(share * len(values), (values != 0).sum().item()), rel=1e-9)


@settings(deadline=None)
@given(ADVANTAGES, SHARES, st.floats(0, 1, exclude_max=True))
def test_number_drawn_is_within_one_of_the_budget(values, share, uniform):
    values = float64(values)
    drawn = subsample_at(values, share, float64(uniform))
    probability = draw_probabilities(values, share)
    assert abs((drawn != 0).sum() - probability.sum()) < 1 + 1e-9
    assert drawn[(values == 0)].eq(0).all()
    kept = drawn != 0
    assert torch.equal(drawn[kept], (values / probability)[kept])
    assert kept[probability == 1].all()


@settings(deadline=None, max_examples=50)
@given(ADVANTAGES, SHARES)
def test_mean_over_all_draws_is_the_advantage(values, share):
    """Every interval of the random number on which the draw is constant, weighted by its length."""
    values = float64(values)
    probability = draw_probabilities(values, share)
    fractions = torch.where(probability >= 1, 0.0, probability).cumsum(0).remainder(1.0)
    edges = torch.cat([float64([0.0, 1.0]), 1.0 - fractions]).clamp(0, 1).unique()
    middles, lengths = (edges[1:] + edges[:-1]) / 2, edges.diff()
    often = sum(
        length * (subsample_at(values, share, middle) != 0) for length, middle in zip(lengths, middles, strict=True)
    )
    torch.testing.assert_close(often, torch.where(values != 0, probability, 0.0), rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(0, 2**32), st.sampled_from([0.1, 0.25, 0.5, 0.9]))
def test_mean_over_draws_is_within_its_standard_error(seed, share):
    source = generator(seed)
    values = torch.randn(24, dtype=torch.float64, generator=source)
    values[::5] = 0
    draws = torch.stack([subsample_advantages(values, share, generator=source) for _ in range(400)])
    error = draws.std(0) / 400**0.5
    # 24 rollouts, 20 examples: five standard errors, and none where the rollout is always drawn.
    rare = draw_probabilities(values, share) < 0.1  # too few draws for a normal distribution
    assert ((draws.mean(0) - values).abs() <= 5 * error + 1e-12)[~rare].all()


def test_whole_share_returns_the_advantages_bit_for_bit():
    values = torch.randn(100, generator=generator())
    values[::7] = 0
    assert torch.equal(subsample_advantages(values, 1.0, generator=generator()), values)
    assert torch.equal(subsample_advantages(values, 1, generator=generator()), values)
    few = torch.zeros(8)
    few[3] = 0.1
    few[5] = -0.3  # fewer with an advantage than the budget allows
    assert torch.equal(subsample_advantages(few, 0.5, generator=generator()), few)


def test_equal_sizes_are_drawn_in_their_number():
    values = torch.tensor([0.1, -0.1] * 5)
    for seed in range(20):
        drawn = subsample_advantages(values, 0.3, generator=generator(seed))
        assert (drawn != 0).sum() == 3
        torch.testing.assert_close(drawn[drawn != 0].abs(), torch.full((3,), 1 / 3))


def test_dtype_and_device_are_those_of_the_input():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        values = torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=dtype)
        assert subsample_advantages(values, 0.5, generator=generator()).dtype == dtype
    assert subsample_advantages(torch.zeros(0), 0.5, generator=generator()).shape == (0,)
    assert subsample_advantages(torch.zeros(4), 0.5, generator=generator()).eq(0).all()


def test_float32_batches_are_drawn_in_float64():
    """20,000 equal rollouts: a running sum in float32 loses more than a whole one."""
    values = torch.full((20_000,), 0.1)
    assert (subsample_advantages(values, 0.3, generator=generator()) != 0).sum() == 6000


def test_nan_shows_in_the_result():
    assert subsample_advantages(torch.tensor([1.0, torch.nan, 2.0]), 0.5, generator=generator())[1].isnan()


def test_the_same_generator_draws_the_same_rollouts():
    values = torch.randn(64, generator=generator())
    first = subsample_advantages(values, 0.25, generator=generator(3))
    assert torch.equal(first, subsample_advantages(values, 0.25, generator=generator(3)))
    others = [subsample_advantages(values, 0.25, generator=generator(seed)) for seed in range(8)]
    assert any(not torch.equal(first, other) for other in others)


@pytest.mark.parametrize("share", [0, 0.0, -0.5, 1.01, 2, math.nan, math.inf, "0.5", None, True, np.array([0.5])])
def test_other_shares_are_refused(share):
    with pytest.raises(ValueError, match="update_share"):
        subsample_advantages(torch.ones(4), share, generator=generator())


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="advantages"):
        subsample_advantages(torch.ones(4, 2), 0.5, generator=generator())
