"""The estimator against the reference outputs, against a plain-Python version, and on its edges."""

import json
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gd2po_trl import compute_advantages
from gd2po_trl.diagnostics import conflict_metrics


FILTERS = {"gdpo": None, "gd2po_hard": "hard", "gd2po_snr": "snr"}


def golden_settings(case):
    return {
        "conflict_filter": FILTERS[case["method"]],
        "snr_threshold": 0.8 if case["tau"] is None else case["tau"],
        "whitening": "token" if case["whiten"] else None,
        "scale_rewards": "group" if case["normalize_by_std"] else "none",
    }


def test_golden_cases(shared_dir):
    cases = json.loads((shared_dir / "golden" / "advantages.json").read_text())
    assert len(cases) == 60
    for case in cases:
        breakdown = compute_advantages(
            torch.tensor(case["rewards"], dtype=torch.float32),
            case["num_generations"],
            token_counts=torch.tensor(case["lengths"]),
            **golden_settings(case),
        )
        assert torch.allclose(breakdown.advantages, torch.tensor(case["advantages"]), atol=1e-4, rtol=0), case["name"]
        if case["conflict_ratio"] is not None:
            assert breakdown.conflict.float().mean().item() == pytest.approx(case["conflict_ratio"], abs=1e-6)
            assert breakdown.kept.float().mean().item() == pytest.approx(case["keep_ratio"], abs=1e-6)


def plain_advantages(rewards, group, weights, tokens, conflict_filter, tau, consensus, whitening, shift, scale):
    """The method once more, in loops over Python floats."""
    size, num_rewards = len(rewards), len(rewards[0])
    is_scored = [[not math.isnan(value) for value in row] for row in rewards]
    matrix = [[0.0] * num_rewards for _ in range(size)]
    for k in range(num_rewards):
        whole = [rewards[i][k] for i in range(size) if is_scored[i][k]]
        for start in range(0, size, group):
            members = [i for i in range(start, start + group) if is_scored[i][k]]
            if not members:
                continue
            values = [rewards[i][k] for i in members]
            mean, top = math.fsum(values) / len(values), max(map(abs, values))
            spread = {"group": values, "batch": whole, "none": None}[scale]
            divisor = 1.0
            if spread is not None:
                divisor = (statistics.stdev(spread) if len(spread) > 1 else 0.0) + 1e-6
            for i in members:
                deviation = rewards[i][k] - mean
                if abs(deviation) > 1e-6 * top:
                    matrix[i][k] = weights[k] * deviation / divisor
    kept, combined, conflicts = [], [], []
    for i in range(size):
        row = matrix[i]
        total, push = sum(row), sum(map(abs, row))
        conflict = max(row) > 1e-8 and min(row) < -1e-8 and tokens[i] > 0
        dropped = conflict and (
            conflict_filter == "hard" or (conflict_filter == "snr" and abs(total / (push + 1e-8)) < tau)
        )
        kept.append(any(is_scored[i]) and not dropped)
        combined.append(total)
        conflicts.append(conflict)
    share = []
    for start in range(0, size, group):
        members = range(start, start + group)
        scored = sum(any(is_scored[i]) for i in members)
        share += [sum(kept[i] for i in members) / max(scored, 1)] * group
    trained = [kept[i] and tokens[i] > 0 for i in range(size)]
    values = [combined[i] if trained[i] else 0.0 for i in range(size)]
    if consensus == "before_whitening":
        values = [value * q for value, q in zip(values, share, strict=True)]
    if whitening is not None:
        counts = [(tokens[i] if whitening == "token" else 1) if trained[i] else 0 for i in range(size)]
        total = sum(counts)
        if total <= 1:
            values = [0.0] * size
        else:
            mean = sum(n * v for n, v in zip(counts, values, strict=True)) / total if shift else 0.0
            variance = sum(n * (v - mean) ** 2 for n, v in zip(counts, values, strict=True)) / (total - 1)
            values = [
                (v - mean) / math.sqrt(variance + 1e-8) if n else 0.0 for n, v in zip(counts, values, strict=True)
            ]
    if consensus == "after_whitening":
        values = [value * q for value, q in zip(values, share, strict=True)]
    return values, conflicts, kept


@st.composite
def batches(draw):
    group = draw(st.sampled_from([1, 2, 3, 4, 8]))
    groups = draw(st.integers(1, 4))
    num_rewards = draw(st.sampled_from([1, 2, 3, 8]))
    value = st.one_of(
        st.sampled_from([0.0, 1.0, -3.0, 3.0, 0.1, float("nan")]),
        st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3),
    )
    rewards = draw(
        st.lists(
            st.lists(value, min_size=num_rewards, max_size=num_rewards),
            min_size=group * groups,
            max_size=group * groups,
        )
    )
    weights = draw(st.lists(st.sampled_from([1.0, 0.5, 2.0, 0.0, -1.0]), min_size=num_rewards, max_size=num_rewards))
    tokens = draw(st.lists(st.integers(0, 50), min_size=group * groups, max_size=group * groups))
    return rewards, group, weights, tokens


options = {
    "conflict_filter": st.sampled_from(["hard", "snr", None]),
    "tau": st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    "consensus": st.sampled_from(["before_whitening", "after_whitening", None]),
    "whitening": st.sampled_from(["token", "sequence", None]),
    "shift": st.booleans(),
    "scale": st.sampled_from(["group", "batch", "none"]),
}


def breakdown_of(batch, dtype, conflict_filter, tau, consensus, whitening, shift, scale):
    rewards, group, weights, tokens = batch
    return compute_advantages(
        torch.tensor(rewards, dtype=dtype),
        group,
        reward_weights=weights,
        token_counts=tokens,
        conflict_filter=conflict_filter,
        snr_threshold=tau,
        consensus_weighting=consensus,
        whitening=whitening,
        whitening_shift_mean=shift,
        scale_rewards=scale,
    )


@settings(max_examples=300, deadline=None)
@given(batch=batches(), **options)
def test_equals_the_plain_version(batch, conflict_filter, tau, consensus, whitening, shift, scale):
    rewards, group, weights, tokens = batch
    breakdown = breakdown_of(batch, torch.float64, conflict_filter, tau, consensus, whitening, shift, scale)
    if conflict_filter == "snr" and (breakdown.agreement.abs() - tau).abs().min() < 1e-9:
        return  # on the threshold itself, the order of summation decides
    expected, conflicts, kept = plain_advantages(
        rewards, group, weights, tokens, conflict_filter, tau, consensus, whitening, shift, scale
    )
    assert breakdown.conflict.tolist() == conflicts
    assert breakdown.kept.tolist() == kept
    assert torch.allclose(breakdown.advantages, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(batch=batches(), **options)
def test_invariants(batch, conflict_filter, tau, consensus, whitening, shift, scale):
    rewards, _, weights, tokens = batch
    breakdown = breakdown_of(batch, torch.float32, conflict_filter, tau, consensus, whitening, shift, scale)
    for tensor in (breakdown.advantages, breakdown.per_reward, breakdown.combined, breakdown.agreement):
        assert tensor.dtype == torch.float32 and torch.isfinite(tensor).all()
    assert (breakdown.advantages[~breakdown.kept] == 0).all()
    assert (breakdown.advantages[torch.tensor(tokens) == 0] == 0).all()
    assert breakdown.agreement.abs().max() <= 1 + 1e-6
    assert ((breakdown.consensus >= 0) & (breakdown.consensus <= 1)).all()
    if conflict_filter == "hard":
        assert not (breakdown.kept & breakdown.conflict).any()
    if conflict_filter is None or (conflict_filter == "snr" and tau == 0):
        assert breakdown.kept.tolist() == [not all(map(math.isnan, row)) for row in rewards]
    if len(weights) == 1:
        assert not breakdown.conflict.any()


@pytest.mark.parametrize("constant", [0.1, 1 / 3, -2.7, 1e-3, 3e4, 0.0])
@pytest.mark.parametrize("group", [2, 3, 5, 6, 7, 16])
def test_a_constant_reward_has_no_sign(constant, group):
    """Rewards arrive as float32, where the mean of equal values can differ from them."""
    torch.manual_seed(0)
    rewards = torch.stack([torch.full((group * 3,), constant), torch.rand(group * 3)], dim=1)
    breakdown = compute_advantages(rewards, group)
    assert (breakdown.per_reward[:, 0] == 0).all()
    assert not breakdown.conflict.any() and breakdown.kept.all()


def test_a_reward_equal_to_its_group_mean_is_neutral():
    """0.1, 0.2 and 0.3 in float32: the middle one is off the mean by rounding alone."""
    rewards = torch.tensor([[0.1, 0.0], [0.2, 1.0], [0.3, 0.0]])
    breakdown = compute_advantages(rewards, 3)
    assert breakdown.per_reward[1, 0] == 0
    assert breakdown.conflict.tolist() == [False, False, True]


def test_monitor_and_negative_weight():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert compute_advantages(rewards, 2).conflict.all()
    assert not compute_advantages(rewards, 2, reward_weights=[1.0, 0.0]).conflict.any()
    assert not compute_advantages(rewards, 2, reward_weights=[1.0, -1.0]).conflict.any()


def test_everything_dropped_or_unscored():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    breakdown = compute_advantages(rewards, 2)
    assert (breakdown.advantages == 0).all() and not breakdown.kept.any() and (breakdown.consensus == 0).all()
    unscored = compute_advantages(torch.full((4, 2), torch.nan), 2)
    assert (unscored.advantages == 0).all() and not unscored.kept.any() and not unscored.conflict.any()


def test_one_kept_token_gives_zero():
    rewards = torch.tensor([[2.0, 2.0], [1.5, 0.0], [0.0, 1.5], [0.5, 0.5]])
    breakdown = compute_advantages(rewards, 4, token_counts=[1, 9, 9, 0])
    assert breakdown.kept.tolist() == [True, False, False, True]
    assert (breakdown.advantages == 0).all()


def test_unscored_rollouts_count_in_neither_number_of_the_consensus():
    nan = float("nan")
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0], [nan, nan], [nan, nan]])
    breakdown = compute_advantages(rewards, 4)
    assert breakdown.kept.tolist() == [True, True, False, False]
    assert (breakdown.consensus == 1).all()


def test_scaling_without_shift_leaves_groups_without_signal_at_zero():
    rewards = torch.tensor([[1.0], [0.0], [0.0], [0.0], [5.0], [5.0], [5.0], [5.0]])
    counts = [1, 9, 9, 9, 5, 5, 5, 5]
    shifted = compute_advantages(rewards, 4, token_counts=counts)
    scaled = compute_advantages(rewards, 4, token_counts=counts, whitening_shift_mean=False)
    assert (shifted.advantages[4:] != 0).all()
    assert (scaled.advantages[4:] == 0).all()
    assert torch.equal(scaled.advantages.sign()[:4], torch.tensor([1.0, -1.0, -1.0, -1.0]))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0, 3.0]), st.sampled_from([0.0, 1.0])), min_size=8, max_size=8),
    st.sampled_from(["token", "sequence"]),
)
def test_scaling_without_shift_is_bounded(rows, whitening):
    """Also where the values that are left are all alike, and have no spread about their mean."""
    counts = torch.tensor([50] * 8)
    breakdown = compute_advantages(
        torch.tensor(rows), 4, token_counts=counts, whitening=whitening, whitening_shift_mean=False
    )
    # Of N values with a mean square of at most 1 none is above sqrt(N).
    assert breakdown.advantages.abs().max() <= 8**0.5
    alike = torch.tensor([[3.0, 1.0], [0.0, 1.0], [3.0, 0.0], [3.0, 0.0]])
    alone = compute_advantages(alike, 4, token_counts=[50] * 4, whitening_shift_mean=False).advantages
    assert alone[0].abs() <= 1.01 and (alone[1:] == 0).all()


def test_rounding_of_the_mean_gives_no_advantage():
    """Without a filter and with equal lengths the mean is 0, but not its sum in floating point."""
    torch.manual_seed(0)
    signal = torch.rand(64, 8, 3)
    signal[::2] = 0.5  # every second group carries no signal
    breakdown = compute_advantages(signal.view(-1, 3), 8, conflict_filter=None, whitening="sequence")
    advantages = breakdown.advantages.view(64, 8)
    assert (advantages[::2] == 0).all() and (advantages[1::2] != 0).all()


def test_consensus_weight_before_and_after_whitening():
    rewards = torch.tensor(
        [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [3.0, 3.0], [0, 0]]
    )
    before = compute_advantages(rewards, 4)
    after = compute_advantages(rewards, 4, consensus_weighting="after_whitening")
    plain = compute_advantages(rewards, 4, consensus_weighting=None)
    assert before.consensus.tolist() == [1.0] * 4 + [0.5] * 4
    assert torch.allclose(after.advantages, plain.advantages * after.consensus)
    assert not torch.allclose(before.advantages, after.advantages)


def test_empty_batch_and_integer_rewards():
    assert compute_advantages(torch.zeros(0, 2), 4).advantages.shape == (0,)
    breakdown = compute_advantages(torch.tensor([[1], [0]]), 2)
    assert breakdown.advantages.dtype == torch.float32 and (breakdown.advantages != 0).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rewards": torch.zeros(4)}, ["rewards", "(4,)"]),
        ({"num_generations": 3}, ["num_generations", "3", "4 rollouts"]),
        ({"num_generations": 0}, ["num_generations", "0"]),
        ({"reward_weights": [1.0]}, ["reward_weights", "2 reward functions"]),
        ({"token_counts": [1]}, ["token_counts", "4 rollouts"]),
        ({"conflict_filter": "soft"}, ["conflict_filter", "'soft'", "'hard', 'snr', None"]),
        ({"consensus_weighting": True}, ["consensus_weighting", "True"]),
        ({"whitening": "batch"}, ["whitening", "'batch'"]),
        ({"scale_rewards": "std"}, ["scale_rewards", "'std'"]),
        ({"snr_threshold": 1.5}, ["snr_threshold", "1.5", "[0, 1]"]),
        ({"snr_threshold": float("nan")}, ["snr_threshold", "nan"]),
        ({"snr_threshold": "0.8"}, ["snr_threshold", "'0.8'"]),
    ],
)
def test_errors_name_the_argument(arguments, words):
    arguments = {"rewards": torch.zeros(4, 2), "num_generations": 2, **arguments}
    with pytest.raises(ValueError) as error:
        compute_advantages(**arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_metrics_of_a_hand_made_batch():
    nan = float("nan")
    rewards = torch.tensor(
        [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [2.0, 2.0], [2.0, 2.0], [2.0, 2.0], [nan, nan]]
    )
    breakdown = compute_advantages(rewards, 4)
    metrics = {name: value.item() for name, value in conflict_metrics(rewards, breakdown, ["a", "b"], 4).items()}
    assert metrics["conflict_ratio"] == pytest.approx(2 / 7)
    assert metrics["kept_ratio"] == pytest.approx(5 / 7)
    assert (metrics["consensus/min"], metrics["consensus/max"]) == (0.5, 1.0)
    assert metrics["consensus/mean"] == pytest.approx(0.75)
    assert metrics["conflict_agreement"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["cancellation"] == pytest.approx(0.5)
    assert metrics["frac_groups_without_signal"] == pytest.approx(0.5)
    assert metrics["conflict_ratio/a_vs_b"] == pytest.approx(2 / 7)


def test_a_rollout_without_tokens_conflicts_in_no_pair():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    breakdown = compute_advantages(rewards, 4, token_counts=[0, 0, 5, 5])
    metrics = conflict_metrics(rewards, breakdown, ["a", "b"], 4)
    assert metrics["conflict_ratio"] == metrics["conflict_ratio/a_vs_b"] == 0.5


def test_metrics_of_an_unscored_batch_are_nan_not_infinite():
    rewards = torch.full((4, 2), torch.nan)
    metrics = conflict_metrics(rewards, compute_advantages(rewards, 2), ["a", "b"], 2)
    assert not any(torch.isinf(value) for value in metrics.values())
    assert torch.isnan(metrics["consensus/min"]) and torch.isnan(metrics["conflict_ratio"])
