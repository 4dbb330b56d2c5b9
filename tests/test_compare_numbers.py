"""The numbers of `gd2po compare`: statistics over seeds, curves, and the report made of them."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from gd2po_trl.comparison.curves import (
    AXES,
    Curves,
    counted_rewards,
    mean_between,
    observed_ranges,
    quantity_values,
    read_curves,
)
from gd2po_trl.comparison.figures import draw_curves
from gd2po_trl.comparison.presentation import markdown, print_results, write_results
from gd2po_trl.comparison.results import choose_learning_rates, evaluate
from gd2po_trl.comparison.running import Outcome, Run
from gd2po_trl.comparison.seed_statistics import (
    holm,
    mean_interval,
    paired_test,
    sign_flip_test,
    smallest_sign_flip_p,
)
from gd2po_trl.comparison.variants import Contrast, Variant
from gd2po_trl.errors import UsageError


FIVE = st.lists(st.floats(-10, 10), min_size=5, max_size=5)


# Statistics


@settings(deadline=None)
@given(FIVE)
def test_interval_is_students_t(values):
    interval = mean_interval(values)
    assert interval.count == 5
    assert interval.mean == pytest.approx(np.mean(values))
    if np.std(values) > 1e-6:
        low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
        assert (interval.low, interval.high) == pytest.approx((low, high))
        assert interval.half_width == pytest.approx((high - low) / 2)


def test_interval_of_too_few_values():
    assert mean_interval([3.0]).mean == 3.0
    assert math.isnan(mean_interval([3.0]).low)
    assert math.isnan(mean_interval([]).mean)


@settings(deadline=None)
@given(FIVE, FIVE)
def test_paired_t_test_agrees_with_scipy(values, baseline):
    if np.std(np.subtract(values, baseline)) > 1e-3:
        expected = stats.ttest_rel(values, baseline).pvalue
        assert paired_test(values, baseline).p_t == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=6))
def test_sign_flip_test_agrees_with_scipy(differences):
    pairs = (np.array(differences), np.zeros(len(differences), dtype=int))
    exact = stats.permutation_test(pairs, lambda x, y: np.sum(x - y), permutation_type="samples")
    assert sign_flip_test(differences) == pytest.approx(exact.pvalue)


def test_sign_flip_by_hand():
    # 1 + 2 - 3 = 0: every pattern reaches it. 1 + 2 + 4 = 7: only the two extreme ones do.
    assert sign_flip_test([1.0, 2.0, -3.0]) == 1.0
    assert sign_flip_test([1.0, 2.0, 4.0]) == 2 / 8
    # Too many for all patterns: the random ones come close to the t-test of normal data.
    many = np.random.default_rng(1).normal(0.4, 1.0, size=30)
    assert sign_flip_test(many) == pytest.approx(stats.ttest_1samp(many, 0.0).pvalue, abs=0.01)


def test_equal_values_are_no_difference():
    test = paired_test([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (test.difference.mean, test.p_t, test.p_sign_flip) == (0.0, 1.0, 1.0)


def test_without_spread_there_is_no_t_test():
    test = paired_test([1.5, 2.5], [1.0, 2.0])
    assert (test.difference.mean, test.p_sign_flip) == (0.5, 0.5)
    assert math.isnan(test.p_t)
    # The differences are 0.2 - 0.1 and 0.3 - 0.2, equal but for rounding; or all rounding.
    assert math.isnan(paired_test([0.2, 0.3], [0.1, 0.2]).p_t)
    assert paired_test([0.3, 1.0], [0.1 + 0.2, 1.0]).p_t == 1.0


def test_a_missing_value_has_no_p_value():
    test = paired_test([math.nan, 1.0, 1.0], [0.0, 0.0, 0.0])
    assert math.isnan(test.p_t) and math.isnan(test.p_sign_flip)
    assert math.isnan(sign_flip_test([math.nan] * 20))


@pytest.mark.parametrize("count", [2, 5, 14, 15, 20])
def test_smallest_sign_flip_p(count):
    found, smallest = sign_flip_test([1.0] * count), smallest_sign_flip_p(count)
    # Of 2^15 patterns, more than one of the 20,000 random ones may be extreme.
    assert smallest <= found <= 4 * smallest and (count > 14 or found == pytest.approx(smallest))


def test_pairs_must_match():
    with pytest.raises(ValueError):
        paired_test([1.0, 2.0], [1.0])


def test_holm_by_hand():
    corrected = holm([0.04, 0.01, math.nan, 0.03])
    assert corrected[:2] == pytest.approx([0.06, 0.03])
    assert math.isnan(corrected[2])
    assert corrected[3] == pytest.approx(0.06)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_only_raises_and_keeps_the_order(p_values):
    corrected = holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    by_p = [c for _, c in sorted(zip(p_values, corrected, strict=True))]
    assert by_p == sorted(by_p)


# Curves


def trainer_state(a: list[float | None], b: list[float], every: int = 1, share: float = 1.0) -> dict:
    entries = [
        {
            "step": every * (index + 1),
            "step_time": 2.0,
            "gd2po/update_time": 0.5,
            "completions/mean_length": 10.0,
            "gd2po/trained_tokens": share,
            "gd2po/trained_rows": share,
            "rewards/a/mean": x,
            "rewards/b/mean": y,
        }
        for index, (x, y) in enumerate(zip(a, b, strict=True))
    ]
    return {"log_history": [*entries, {"step": entries[-1]["step"], "train_runtime": 9.0}]}


def curves_of(a: list[float | None], b: list[float], share: float = 1.0) -> Curves:
    return read_curves(trainer_state(a, b, share=share), ["a", "b"], rollouts_per_step=4, held_out=False)


def test_curves_are_placed_where_their_rollouts_were_sampled():
    curves = read_curves(trainer_state([1, 2], [3, 4], every=5, share=0.5), ["a"], rollouts_per_step=4, held_out=False)
    assert curves.rewards["a"].tolist() == [1, 2]
    # The first entry averages the rollouts of steps 1 to 5, sampled after 0 to 4 updates: 2 in the middle.
    assert curves.spent["steps"].tolist() == [2, 7]
    # 4 rollouts of 10 tokens a step, half of them trained.
    assert curves.total == {"steps": 10, "tokens": 200, "update seconds": 5, "seconds": 20}
    assert curves.trained_rows == 0.5


def test_held_out_rewards_are_placed_at_their_step():
    state = trainer_state([1, 2], [3, 4], every=5)
    state["log_history"] += [{"step": 0, "eval_rewards/a/mean": 7.0}, {"step": 10, "eval_rewards/a/mean": 8.0}]
    curves = read_curves(state, ["a"], rollouts_per_step=4, held_out=True)
    assert curves.rewards["a"].tolist() == [7, 8]
    assert curves.spent["tokens"].tolist() == [0, 400]
    values = quantity_values(curves, {"a": (0, 10)}, {"a": 1.0}, {"steps": 10})
    assert values["steps"] == {
        "final": {"a": 8, "sum": 0.8, "worst": 0.8},
        "area": {"a": 7.5, "sum": 0.75, "worst": 0.75},
    }
    with pytest.raises(UsageError, match="eval_strategy"):
        read_curves(state, ["b"], rollouts_per_step=4, held_out=True)


def test_entries_without_a_generation_cost_what_the_last_one_said():
    # Each batch is trained on for two logged steps, and the second entry knows nothing of its rollouts.
    state = trainer_state([1, 0, 2, 0], [3, 0, 4, 0], share=0.5)
    for entry in state["log_history"][1:4:2]:
        for key in [key for key in entry if key not in ("step", "step_time", "gd2po/update_time")]:
            del entry[key]
    state["log_history"][2]["completions/mean_length"] = 20.0
    curves = read_curves(state, ["a", "b"], rollouts_per_step=4, held_out=False)
    assert curves.rewards["a"].tolist() == [1, 2]
    assert curves.rewards["b"].tolist() == [3, 4]
    assert curves.spent["steps"].tolist() == [0, 2]
    assert curves.spent["tokens"].tolist() == [0, 40]
    assert curves.total == {"steps": 4, "tokens": 2 * 20 + 2 * 40, "update seconds": 2, "seconds": 8}
    assert (curves.trained_rows, curves.completion_length) == (0.5, 20)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("missing", [None, math.nan])
def test_points_that_a_reward_did_not_score_are_interpolated(held_out, missing):
    state = trainer_state([missing, 0.2, missing, 0.4], [0, 1, 2, 3])
    if held_out:
        for entry in list(state["log_history"][:4]):
            evaluated = {f"eval_{key}": value for key, value in entry.items() if key.startswith("rewards/")}
            state["log_history"].append({"step": entry["step"], **evaluated})
    curves = read_curves(state, ["a", "b"], rollouts_per_step=4, held_out=held_out)
    assert curves.rewards["a"] == pytest.approx([0.2, 0.2, 0.3, 0.4])
    assert curves.rewards["b"].tolist() == [0, 1, 2, 3]
    assert observed_ranges([curves]) == {"a": (0.2, 0.4), "b": (0, 3)}
    with pytest.raises(UsageError, match="no value of the reward a"):
        read_curves(trainer_state([missing] * 2, [0, 1]), ["a", "b"], rollouts_per_step=4, held_out=False)


def test_mean_between_is_the_area_over_the_width():
    spent, values = np.array([0.0, 2.0, 4.0]), np.array([0.0, 2.0, 2.0])
    assert mean_between(spent, values, 0, 4) == pytest.approx((2 + 4) / 4)
    assert mean_between(spent, values, 1, 3) == pytest.approx((1.5 + 2) / 2)
    assert mean_between(spent, values, 0, 8) == pytest.approx((2 + 12) / 8)  # the last value holds on
    assert mean_between(spent, values, 1, 1) == 1


def test_sum_and_worst_refer_to_ranges_and_weights():
    curves = curves_of([0, 5, 10, 10, 10], [1, 1, 1, 1, 1])
    ranges, budgets = {"a": (0, 20), "b": (0, 2)}, {"steps": 4, "tokens": 160}
    values = quantity_values(curves, ranges, {"a": 1.0, "b": 1.0}, budgets)
    assert values["steps"]["final"] == pytest.approx({"a": 10, "b": 1, "sum": 1.0, "worst": 0.5})
    assert values["steps"]["area"]["a"] == pytest.approx((2.5 + 7.5 + 10 + 10) / 4)
    assert values["steps"]["area"]["worst"] == pytest.approx((0.125 + 0.375 + 0.5 + 0.5) / 4)
    assert values["tokens"] == values["steps"]
    # A monitor is in neither; a negative weight makes low values good.
    assert quantity_values(curves, ranges, {"a": 0.0, "b": 1.0}, budgets)["steps"]["final"]["sum"] == 0.5
    turned = quantity_values(curves, {**ranges, "a": (0, 40)}, {"a": -1.0, "b": 1.0}, budgets)["steps"]["final"]
    assert (turned["sum"], turned["worst"]) == pytest.approx((0.75 + 0.5, 0.5))


def test_a_reward_that_is_the_same_in_all_runs_is_in_neither_sum_nor_worst():
    curves = curves_of([0, 5, 10], [1, 1, 1])
    for weight in (1.0, -1.0):
        weights, ranges = {"a": 1.0, "b": weight}, {"a": (0, 20), "b": (1, 1)}
        final = quantity_values(curves, ranges, weights, {"steps": 3})["steps"]["final"]
        assert final == pytest.approx({"a": 10, "b": 1, "sum": 0.5, "worst": 0.5})
    # The mean of equal values is rounded, differently for every number of them.
    nearly = curves_of([0, 5, 10], [0.1, 0.1 + 2e-9, 0.1])
    ranges = observed_ranges([nearly])
    assert counted_rewards(ranges, {"a": 1.0, "b": 1.0}) == ["a"]
    final = quantity_values(curves, {"a": (1, 1), "b": (1, 1)}, weights, {"steps": 3})["steps"]["final"]
    assert (final["sum"], final["worst"]) == (0, 0)


# Results


def make_run(tmp_path: Path, name: str, seed: int, command: tuple[str, ...] = (), **settings) -> Run:
    return Run(Variant(name, name), seed, tmp_path / name / f"seed-{seed}", command, settings)


def finished(run: Run, offset: float, share: float = 1.0) -> tuple[Outcome, Curves]:
    return Outcome(run, {}, seconds=1.0), curves_of([0, 1, 2 + offset], [0, 2, 3 + offset], share)


def test_a_failed_seed_is_shown_and_its_pair_left_out(tmp_path):
    outcomes = {
        "gdpo": [finished(make_run(tmp_path, "gdpo", seed), 0.1 * seed) for seed in (1, 2, 3)],
        "gd2po_hard": [
            finished(make_run(tmp_path, "gd2po_hard", 1), 0.6, share=0.5),
            (Outcome(make_run(tmp_path, "gd2po_hard", 2), None, "ended with status 1: out of memory"), None),
            finished(make_run(tmp_path, "gd2po_hard", 3), 0.4, share=0.5),
        ],
    }
    variants = [Variant("gdpo", "gdpo"), Variant("gd2po_hard", "gd2po_hard")]
    contrast = Contrast("the method", "gd2po_hard", "gdpo")
    results = evaluate(
        outcomes,
        variants,
        [1, 2, 3],
        baseline="gdpo",
        weights={"a": 1.0, "b": 1.0},
        ranges={"b": (0.0, 10.0)},
        contrasts=[contrast, Contrast("absent", "nowhere", "gdpo")],
    )
    assert results.budgets == {"steps": 3, "tokens": 60, "update seconds": 1.5, "seconds": 6}
    assert results.ranges == {"a": (0, 2.6), "b": (0, 10)}
    row = results.tables["steps", "final"][0]
    assert (row.variant, row.quantity, row.test.difference.count) == ("gd2po_hard", "a", 2)
    # Every seed's last point lies at 2 of 3 steps: seed 1 differs by 0.5, seed 3 by 0.1.
    assert row.test.difference.mean == pytest.approx(0.3)
    assert [c.label for c in results.contrasts] == ["the method", "the method"]
    # At the tokens that Hard needs for its whole run, GDPO is only half way.
    at_tokens = results.interval("gdpo", "tokens", "final", "a").mean
    assert at_tokens < results.interval("gdpo", "steps", "final", "a").mean

    text = markdown(results, "gd2po compare")
    assert "1 of 6 runs failed" in text
    assert "gd2po_hard, seed 2: ended with status 1: out of memory" in text
    assert "| gd2po_hard | 2 | FAILED |" in text
    assert "| gd2po_hard | 3 (1 failed) |" in text
    write_results(tmp_path / "results.json", results, "gd2po compare")
    document = json.loads((tmp_path / "results.json").read_text())
    assert [run["failure"] for run in document["runs"]].count("") == 5


def test_a_run_without_gain_is_marked(tmp_path):
    run = make_run(tmp_path, "gdpo", 1)
    flat = (Outcome(run, {}), curves_of([1, 2, 1], [1, 2, 0.5]))
    results = evaluate({"gdpo": [flat]}, [run.variant], [1], baseline="gdpo", weights={"a": 1.0, "b": 1.0}, ranges={})
    assert not results.runs["gdpo"][0].gained
    assert "finished, no gain" in markdown(results, "")


def evaluate_pairs(tmp_path, curves, weights, seeds=(1, 2, 3), ranges=None):
    """Results of variants with the given curves per seed."""
    outcomes = {
        name: [(Outcome(make_run(tmp_path, name, seed), {}), one) for seed, one in zip(seeds, some, strict=True)]
        for name, some in curves.items()
    }
    variants = [Variant(name, name) for name in outcomes]
    return evaluate(outcomes, variants, seeds, baseline="gdpo", weights=weights, ranges=ranges or {})


def test_a_reward_with_gaps_is_compared_and_drawn(tmp_path):
    weights = {"a": 1.0, "b": 1.0}
    curves = {
        "gdpo": [curves_of([None, 0.2, 0.3 + 0.01 * seed], [0, 1, 2 + seed]) for seed in (1, 2, 3)],
        "gd2po_hard": [curves_of([0.1, None, 0.7 + 0.02 * seed], [0, 1, 3 + seed**2]) for seed in (1, 2, 3)],
    }
    results = evaluate_pairs(tmp_path, curves, weights)
    assert results.ranges["a"] == pytest.approx((0.1, 0.76))
    assert "nan" not in markdown(results, "")
    draw_curves(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_the_report_says_what_sum_and_worst_hold(tmp_path):
    def some(constant):
        return [
            read_curves(
                {
                    "log_history": [
                        {**entry, "rewards/c/mean": constant, "rewards/d/mean": entry["step"]}
                        for entry in trainer_state([0, 1, 2 + seed], [0, 2, 3 + seed])["log_history"]
                    ]
                },
                ["a", "b", "c", "d"],
                rollouts_per_step=4,
                held_out=False,
            )
            for seed in (1, 2)
        ]

    weights = {"a": 1.0, "b": -1.0, "c": 1.0, "d": 0.0}
    results = evaluate_pairs(tmp_path, {"gdpo": some(0.5), "gd2po_hard": some(0.5)}, weights, seeds=(1, 2))
    text = markdown(results, "")
    assert "(a 0 to 4; b 0 to 5, lower is better)" in text
    assert "Left out of both: c (the same in all runs), d (weight 0)." in text


def test_differences_without_spread_have_no_star(tmp_path):
    curves = {
        "gdpo": [curves_of([0, 1, 2], [0, 1, 1]) for _ in (1, 2)],
        "gd2po_hard": [curves_of([0, 1, 3], [0, 1, 1]) for _ in (1, 2)],
    }
    results = evaluate_pairs(tmp_path, curves, {"a": 1.0, "b": 1.0}, seeds=(1, 2))
    text = markdown(results, "")
    assert "| gd2po_hard | a | +1.000 [+1.000, +1.000] | – | 0.500 | – | 2 |" in text
    assert "\\* [" not in text
    write_results(tmp_path / "results.json", results, "")
    document = json.loads((tmp_path / "results.json").read_text())
    assert [row["p_t"] for row in document["differences"] if row["quantity"] == "a"] == [None] * 8


def test_budget_table_and_what_is_corrected_together(tmp_path):
    curves = {
        name: [curves_of([0, 1, 2 + gain + 0.1 * seed], [0, 2, 3 + gain + 0.2 * seed]) for seed in range(3)]
        for name, gain in (("gdpo", 0.0), ("grpo", 0.1), ("gd2po_hard", 1.0))
    }
    curves["gd2po_hard"][0] = curves_of([0, 1, 3.05], [0, 2, 4.1])
    results = evaluate_pairs(tmp_path, curves, {"a": 1.0, "b": 1.0})
    text = markdown(results, "")
    table = text.split("**At equal budget")[1].split("\n\n")
    header, _, first, second, *_ = table[1].splitlines()
    assert header == "| budget | method | final sum | final worst | area sum | area worst |"
    assert first.startswith("| 3 steps | gdpo | ")
    row = next(row for row in results.tables["steps", "final"] if (row.variant, row.quantity) == ("grpo", "sum"))
    mean = results.interval("grpo", "steps", "final", "sum").mean
    assert second.startswith(f"|  | grpo | {mean:.3f} ({row.test.difference.mean:+.3f}")
    assert "hold only for a machine without other work" in table[2]
    # 2 methods in 2 rewards, sum and worst.
    assert "over the 8 differences" in text
    assert len(results.tables["tokens", "area"]) == 8
    assert "cannot give less than 0.25" in text


def test_the_smallest_p_of_many_seeds_is_that_of_the_random_patterns(tmp_path):
    seeds = range(1, 21)
    curves = {"gdpo": [curves_of([0, 1, seed], [0, 2, seed]) for seed in seeds]}
    results = evaluate_pairs(tmp_path, curves, {"a": 1.0, "b": 1.0}, seeds=seeds)
    assert "cannot give less than 5e-05" in markdown(results, "")


def test_a_comparison_in_which_everything_failed_is_reported(tmp_path):
    run = make_run(tmp_path, "gdpo", 1)
    outcomes = {"gdpo": [(Outcome(run, None, "ended with status 1"), None)]}
    results = evaluate(outcomes, [run.variant], [1], baseline="gdpo", weights={"a": 1.0}, ranges={})
    assert "1 of 1 runs failed" in markdown(results, "")
    write_results(tmp_path / "results.json", results, "")
    json.loads((tmp_path / "results.json").read_text())


def test_learning_rates_that_fail_are_not_chosen(tmp_path):
    good, better = curves_of([0, 1, 1], [0, 1, 1]), curves_of([0, 2, 2], [0, 2, 2])
    curves = {"gdpo": {1e-3: [good, good], 1e-2: [better, better], 1e-1: [better, None]}}
    weights = {"a": 1.0, "b": 1.0}
    results = evaluate_pairs(tmp_path, {"gdpo": [better]}, weights, seeds=(1,))
    results.learning_rates, search = choose_learning_rates(curves, weights, {})
    assert results.learning_rates == {"gdpo": 1e-2}
    assert not any(entry["at_edge"] for entry in search)
    text = markdown(results, "", search)
    assert "| gdpo | 1.000 | **2.000** | failed |" in text and "At the edge" not in text
    del curves["gdpo"][1e-3]
    _, search = choose_learning_rates(curves, weights, {})
    assert "At the edge of what was tried: gdpo" in markdown(results, "", search)


# Verdict and terminal


def compared(values: dict[str, list[float]]):
    """Results of runs whose one reward stays at a value; NaN is a failed run."""
    variants = [Variant(name, name) for name in values]
    seeds = list(range(1, 1 + max(map(len, values.values()))))
    outcomes = {
        variant.name: [
            (
                Outcome(Run(variant, seed, Path("x"), (), {}), None if math.isnan(value) else {}, "it broke"),
                None if math.isnan(value) else flat_curves(value),
            )
            for seed, value in zip(seeds, values[variant.name], strict=True)
        ]
        for variant in variants
    }
    return evaluate(
        outcomes, variants, seeds, baseline=variants[0].name, weights={"reward": 1.0}, ranges={"reward": (0.0, 1.0)}
    )


def flat_curves(value: float) -> Curves:
    spent = {axis: np.array([1.0, 2.0]) for axis in AXES}
    return Curves(
        rewards={"reward": np.array([value, value])},
        spent=spent,
        total=dict.fromkeys(AXES, 2.0),
        trained_rows=1.0,
        completion_length=3.0,
        final_share=0.1,
    )


def test_the_verdict_names_what_differs_or_that_nothing_does():
    noise = [0.5, 0.52, 0.49, 0.51, 0.5]
    assert compared({"gdpo": noise, "b": noise[::-1]}).verdict.startswith("No method differs from gdpo with 5 seeds")
    assert "with so few" in compared({"gdpo": noise[:2], "b": noise[1:3]}).verdict
    better = compared({"gdpo": noise, "up": [value + 0.3 + index / 1000 for index, value in enumerate(noise)]})
    assert "Different from gdpo" in better.verdict and "up: reward higher (+0.302)" in better.verdict
    assert "One seed" in compared({"gdpo": [0.5], "b": [0.9]}).verdict
    assert "nothing to compare it with" in compared({"gdpo": noise}).verdict
    assert "1 of 4" in compared({"gdpo": [0.5, 0.4], "b": [0.5, math.nan]}).verdict
    assert compared({"gdpo": [math.nan], "b": [math.nan]}).verdict == "All 2 runs failed: it broke"


def test_results_are_a_frame():
    frame = compared({"gdpo": [0.5, 0.52, 0.49], "b": [0.7, 0.71, 0.75]}).to_frame()
    row = frame[(frame.method == "b") & (frame.quantity == "reward")].iloc[0]
    assert row["mean"] == pytest.approx(0.72) and row.difference == pytest.approx(0.72 - 0.503333, abs=1e-5)
    assert row.difference_low < row.difference < row.difference_high and row.seeds == 3
    assert frame[frame.method == "gdpo"].difference.isna().all()


@pytest.mark.parametrize("count", [2, 4, 9])
def test_the_tables_fit_a_terminal_of_80_columns(count):
    values = {f"variant_{index}_of_several": [0.5 + index / 9, 0.61, 0.7] for index in range(count)}
    results = compared(values)
    results.folder, results.written = Path("outputs/comparison"), ["report.md"]
    screen = Console(file=io.StringIO(), width=80, markup=False)
    print_results(results, screen)
    shown = screen.file.getvalue()
    assert shown.strip().startswith(results.verdict.split(".")[0][:60])
    assert max(map(len, shown.splitlines())) <= 80
    for name in values:
        assert name in shown  # not broken
