"""The statistics that the published runs log as `adv/gdpo_*`, recomputed rollout by rollout."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gd2po_trl import compute_advantages
from gd2po_trl.diagnostics import conflict_metrics


@given(st.integers(0, 10_000), st.sampled_from(["hard", "snr", None]), st.sampled_from([0.2, 0.8, 1.0]))
def test_statistics_of_conflict(seed, conflict_filter, threshold):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 4, (12, 2), generator=generator).float()
    breakdown = compute_advantages(rewards, 4, conflict_filter=conflict_filter, snr_threshold=threshold)
    metrics = {
        name: value.item()
        for name, value in conflict_metrics(rewards, breakdown, ["a", "b"], 4, snr_threshold=threshold).items()
    }

    agreements, kept = [], []
    for first, second in breakdown.per_reward.tolist():
        rho = (first + second) / (abs(first) + abs(second) + 1e-8)
        is_conflict = min(first, second) < -1e-8 and max(first, second) > 1e-8
        agreements += [rho] if is_conflict else []
        true = is_conflict and abs(rho) < threshold
        kept.append({"hard": not is_conflict, "snr": not true, None: True}[conflict_filter])
    shares = [statistics.mean(kept[start : start + 4]) for start in range(0, 12, 4)]
    true = [rho for rho in agreements if abs(rho) < threshold]

    assert metrics["consensus/std"] == pytest.approx(statistics.pstdev(shares), abs=1e-6)
    assert metrics["true_conflict_ratio"] == pytest.approx(len(true) / 12)
    if agreements:
        assert metrics["conflict_agreement/signed_mean"] == pytest.approx(statistics.mean(agreements), abs=1e-6)
        assert metrics["conflict_agreement/median"] == pytest.approx(statistics.median_low(agreements), abs=1e-6)
        assert metrics["true_conflict_ratio/of_conflicts"] == pytest.approx(len(true) / len(agreements))
    else:
        for name in (
            "conflict_agreement/signed_mean",
            "conflict_agreement/median",
            "true_conflict_ratio/of_conflicts",
        ):
            assert metrics[name] != metrics[name]  # NaN: there is nothing to average
    if conflict_filter == "snr":  # then a true conflict is a dropped rollout
        assert metrics["true_conflict_ratio"] == pytest.approx(1 - metrics["kept_ratio"])


def test_a_group_that_nothing_scored_enters_no_consensus():
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0], [float("nan")] * 2, [float("nan")] * 2, [1.0, 1.0], [0.0, 0.0]])
    metrics = conflict_metrics(rewards, compute_advantages(rewards, 2), ["a", "b"], 2)
    assert metrics["consensus/std"] == 0.5 and metrics["true_conflict_ratio"] == 0.5
