"""`gd2po analyze` as a doctor: verdicts, findings, recommendations, weights, and the callback that gives them."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import yaml
from rollout_files import analyze, command, hand_made_table, write
from tiny import letters_dataset, low_bytes, spread_bytes, tiny_args, tiny_settings
from trl import GRPOConfig, GRPOTrainer

from gd2po_trl import GD2POTrainer
from gd2po_trl.analysis import VerdictCallback, analyze_rewards
from gd2po_trl.analysis.evidence import interval
from gd2po_trl.errors import UsageError
from gd2po_trl.recipe import load_recipe
from gd2po_trl.reporting import percent
from gd2po_trl.reward_gates import parse_gates
from gd2po_trl.training import run_recipe


def diagnosis_of(*columns, size=4, weights=None, names=None, **options):
    values = np.array(columns, dtype=float).T
    return analyze_rewards(
        values, size, names or ["right", "short", "third"][: len(columns)], reward_weights=weights, **options
    )


def kinds_of(report):
    return {finding.kind for finding in report.findings}


def real_values(count=2000, size=4, seed=0):
    """A reward that depends on the prompt, as rewards do."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=count) + np.repeat(generator.normal(size=count // size), size)


RIGHT, OTHER = real_values(), real_values(seed=1)
NOISE = np.random.default_rng(2).normal(size=2000)


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ([[1.0] * 40, [0.5] * 40], "nothing_varies"),
        ([np.repeat(np.arange(10.0), 4), [0.5] * 40], "nothing_varies"),
        ([RIGHT], "one_reward"),
        ([RIGHT, np.ones(2000)], "one_varies"),
        ([NOISE], "noise"),
        ([NOISE, np.random.default_rng(3).integers(0, 2, 2000)], "noise"),
        ([RIGHT, 1 - 0.1 * RIGHT], "opposed"),
        ([RIGHT, 100 * RIGHT], "little_conflict"),
        ([RIGHT, OTHER], "conflict"),
        ([[1, 0, 0, 0] * 500, [-1, 0, 0, -1] * 500], "too_much_conflict"),
    ],
)
def test_verdicts(columns, kind):
    report = diagnosis_of(*columns)
    assert report.verdict.kind == kind
    assert (report.recommendation.method is None) == (
        kind in ("nothing_varies", "one_reward", "one_varies", "noise", "opposed")
    )
    assert report.to_dict()["verdict"]["kind"] == kind
    if kind in ("one_varies", "noise"):
        assert "dominates" not in kinds_of(report)


def test_the_verdict_is_about_rollouts_with_an_advantage():
    # Nine groups of ten are saturated; in the others three of four rollouts are in conflict.
    report = diagnosis_of(([1, 0, 0, 0] + [1] * 36) * 50, ([-1, 0, 0, -1] + [1] * 36) * 50)
    assert report.conflict_ratio == pytest.approx(0.075) and report.verdict.kind == "too_much_conflict"
    # One conflict among ten rollouts with an advantage.
    report = diagnosis_of([1] * 5 + [0] * 5 + [1] * 30, [1] * 6 + [0] * 4 + [1] * 30, size=10)
    assert report.verdict.kind == "some_conflict"


def test_signs_of_the_weights_turn_a_verdict():
    assert diagnosis_of(RIGHT, -RIGHT, weights=[1, -1]).verdict.kind == "little_conflict"
    assert diagnosis_of(RIGHT, RIGHT, weights=[1, -1]).verdict.kind == "opposed"
    # What is only watched opposes nothing.
    assert diagnosis_of(RIGHT, -RIGHT, weights=[1, 0]).verdict.kind == "one_reward"
    assert "duplicate" in kinds_of(diagnosis_of(RIGHT, 3 * RIGHT + 1))


def test_weights_of_0_and_few_groups_are_said_as_they_are():
    report = diagnosis_of(RIGHT, OTHER, weights=[0, 0])
    assert report.verdict.kind == "nothing_varies" and report.recommendation.method is None
    # Two rollouts are always opposed or alike.
    assert diagnosis_of([1, 2], [2, 1], size=2).verdict.kind != "opposed"


def saturated_rewards(value):
    generator = np.random.default_rng(5)
    column = np.full(2000, float(value))
    column[generator.choice(2000, 60, replace=False)] = 1 - value
    return column


def test_what_stands_out_is_named():
    report = diagnosis_of(RIGHT, OTHER, saturated_rewards(1))
    (finding,) = [finding for finding in report.findings if finding.kind == "saturated"]
    assert finding.rewards == ["third"]
    assert "never_earned" in kinds_of(diagnosis_of(RIGHT, OTHER, saturated_rewards(0)))
    # A negative weight turns the good end.
    assert "never_earned" in kinds_of(diagnosis_of(RIGHT, OTHER, saturated_rewards(1), weights=[1, 1, -1]))

    report = diagnosis_of(RIGHT, 100 * OTHER)
    (finding,) = [finding for finding in report.findings if finding.kind == "dominates"]
    assert finding.rewards == ["short"]
    assert "dominates" not in kinds_of(diagnosis_of(RIGHT, 100 * OTHER, weights=[1, 0.01]))

    report = diagnosis_of(RIGHT, OTHER, NOISE)
    assert [finding.rewards for finding in report.findings if finding.kind == "noise"] == [["third"]]
    assert report.recommendation.method == "grpo"  # the scales are alike; no filter, which noise would use as a veto
    assert diagnosis_of(RIGHT, 10 * OTHER, NOISE).recommendation.method == "gdpo"

    half = np.where(np.arange(2000) // 4 % 5 < 3, 0.5, RIGHT)
    assert [one.rewards for one in diagnosis_of(half, OTHER).findings if one.kind == "no_signal"] == [["right"]]
    assert "constant" in kinds_of(diagnosis_of(RIGHT, OTHER, np.ones(2000)))
    spiked = OTHER + 500 * (np.arange(2000) == 7)
    assert [one.rewards for one in diagnosis_of(RIGHT, spiked).findings if one.kind == "outliers"] == [["short"]]

    # One of eight is right, and four of the wrong ones are short.
    first, second = [1, 0, 0, 0, 0, 0, 0, 0] * 250, [-1, 1, 1, 1, 1, -1, -1, -1] * 250
    report = diagnosis_of(first, second, size=8)
    (finding,) = [one for one in report.findings if one.kind == "one_sided"]
    assert finding.rewards == ["short", "right"]
    (advice,) = [text for text in report.recommendation.advice if "reward_gates" in text]
    (line,) = re.findall("`(reward_gates: .*?)`", advice)
    gates = yaml.safe_load(line)["reward_gates"]
    assert gates == {"short": "right >= 1"} and parse_gates(gates) and "unscored" not in advice
    penalty = diagnosis_of(first, np.array(second) - 1, size=8).recommendation.advice
    assert any("closed_gate_reward: unscored" in text for text in penalty)


def test_repeated_completions_tell_noise_from_rewards():
    generator = np.random.default_rng(0)
    texts = [f"answer {number}" for number in generator.integers(0, 12, 800)]
    by_text = {text: value for value, text in enumerate(sorted(set(texts)))}
    # Depends on nothing that is known but on the completion.
    reward = np.array([by_text[text] * 7 % 12 for text in texts], dtype=float)
    report = diagnosis_of(reward, generator.normal(size=800), completions=texts)
    assert [one.looks_like_noise for one in report.rewards] == [False, True]


def test_noise_is_not_claimed_of_rewards_that_follow_something():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 200, 800)
    texts = ["x" * length for length in lengths]
    brevity = 1.0 / lengths + 0.02 * generator.normal(size=800)
    steps = np.repeat(np.arange(20), 40)
    learned = generator.normal(size=800) + 0.1 * steps
    report = diagnosis_of(brevity, learned, completions=texts, steps=steps)
    assert [one.looks_like_noise for one in report.rewards] == [False, False]
    # Few rollouts say nothing.
    assert not analyze_rewards(NOISE[:64, None], 4).rewards[0].looks_like_noise


def test_spread_and_the_weights_that_make_rewards_equally_loud(tmp_path, capsys):
    # Groups: one of variance 4, one of variance 16, one in which the first reward does not vary.
    first = [1.0, 1.0 + 2 * 2**0.5, 0.0, 4 * 2**0.5, 5.0, 5.0]
    second = [0.0, 0.2, 0.0, 0.2, 0.0, 0.2]
    report = diagnosis_of(first, second, size=2, weights=[2.0, -1.0], names=["a", "b"])
    assert [one.spread for one in report.rewards] == pytest.approx([np.sqrt((4 + 16) / 2), np.sqrt(0.02)])
    assert report.equalizing_weights == pytest.approx([1 / np.sqrt(10), -1 / np.sqrt(0.02)], rel=1e-2)
    report = diagnosis_of(first, [1.0] * 6, size=2, weights=[0.0, 3.0])
    assert report.equalizing_weights == [0.0, 3.0]

    table = pd.DataFrame({"prompt": np.arange(2000) // 4, "completion": "x", "right": RIGHT, "short": 30 * OTHER})
    assert command(write(table.astype({"prompt": str}), tmp_path / "a.parquet")) == 0
    printed = capsys.readouterr().out
    pasted = printed[printed.index("Recommended settings:\n") :].partition("\n")[2].partition("\n\n")[0]
    settings = yaml.safe_load(pasted)
    assert list(settings) == ["method", "scale_rewards", "reward_weights"]
    assert settings["scale_rewards"] == "none"
    # Under these, both are equally loud.
    scaled = np.stack([RIGHT, 30 * OTHER], axis=1) * settings["reward_weights"]
    assert [one.spread for one in analyze_rewards(scaled, 4).rewards] == pytest.approx([1, 1], rel=0.01)


def test_recommended_methods_follow_the_table():
    many = [real_values(seed=seed) for seed in range(5)]
    report = analyze_rewards(np.stack(many, axis=1), 4)
    assert report.recommendation.method == "gd2po_snr"
    threshold = report.recommendation.settings["snr_threshold"]
    kept = {one.threshold: one.kept_ratio_with_signal for one in report.filters}
    assert kept[threshold] >= 0.35 and all(kept[other] < 0.35 for other in kept if other and other > threshold)
    assert analyze_rewards(np.stack(many[:2], axis=1), 4).recommendation.method == "gdpo"
    agreeing = np.stack([many[0] + 0.7 * other for other in many[1:4]], axis=1)
    assert analyze_rewards(agreeing, 4).recommendation.method == "gd2po_hard"
    assert analyze_rewards(agreeing, 4, reward_weights=[1, 1, 0.2]).recommendation.method == "gdpo"
    assert analyze_rewards(np.sign(agreeing), 4).recommendation.method == "gdpo"


def test_an_interval_of_a_share_stays_a_share():
    for share, error in ((0.03, 0.031), (0.97, 0.05), (0.5, 0.01)):
        low, high = interval(share, error)
        assert 0 <= low < share < high <= 1
    assert interval(0.5, 0.01) == pytest.approx((0.4804, 0.5196), abs=1e-3)
    assert interval(0.0, 0.0) == (0.0, 0.0)
    assert [percent(share) for share in (0.0, 0.00001, 0.012, 0.5, 0.99999, 1.0)] == [
        "0%",
        "0.1%",
        "1.2%",
        "50%",
        "99.9%",
        "100%",
    ]


# Weights


def run_folder(folder, rewards, weights, *, recipe=None, totals=True):
    """A finished run of 4 steps with logged completions, and its log."""
    names = [f"reward_{index}" for index in range(rewards.shape[1])]
    (folder / "completions").mkdir(parents=True)
    history = []
    for step, values in enumerate(np.split(rewards, 8), 1):
        table = pd.DataFrame(values, columns=names).assign(
            step=step, prompt=[f"p{row // 4}" for row in range(len(values))]
        )
        write(table.assign(completion="x"), folder / "completions" / f"completions_0000{step}.parquet")
        means = np.nanmean(values, axis=0)
        entry = {"step": step, "reward": float((np.nan_to_num(values) @ weights).mean())}
        history.append(entry | {f"rewards/{name}/mean": float(mean) for name, mean in zip(names, means, strict=True)})
    if totals:
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    if recipe is not None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"reward_funcs": names, **recipe}))
    return folder


def three_rewards():
    return np.stack([real_values(256, seed=seed) for seed in range(3)], axis=1)


@pytest.mark.parametrize("missing", [False, True])
def test_weights_are_fitted_to_the_logged_totals(tmp_path, missing):
    rewards = three_rewards()
    if missing:
        rewards[::7, 1] = np.nan
    report = analyze(run_folder(tmp_path, rewards, [1.0, 2.0, 0.5]))
    assert report.reward_weights == [1.0, 2.0, 0.5]
    assert report.weights_source == "the totals in trainer_state.json"
    assert report.warnings == []
    # The second, with twice the weight, makes up 4 / 5.25 of the variance of the sum.
    assert report.rewards[1].share_sum_then_normalise == pytest.approx(4 / 5.25, abs=0.1)


def test_the_recipe_says_more_than_the_log(tmp_path):
    folder = run_folder(
        tmp_path, three_rewards(), [1, 2, 0.5], recipe={"reward_weights": [3.0, 1, 0], "scale_rewards": "none"}
    )
    report = analyze(folder)
    assert (report.reward_weights, report.weights_source, report.scale_rewards) == (
        [3.0, 1.0, 0.0],
        "recipe.yaml",
        "none",
    )
    assert analyze(folder, reward_weights=[1, 1, 1]).weights_source == "given"
    with pytest.raises(UsageError, match="2 entries for the 3 rewards"):
        analyze(folder, reward_weights=[1, 1])


@pytest.mark.parametrize(
    "recipe",
    [{}, {"reward_weights": [1.0]}, {"reward_weights": ["x", 1, 1]}, {"reward_funcs": 3}, {"reward_funcs": ["other"]}],
)
def test_a_recipe_that_does_not_say_is_no_obstacle(tmp_path, recipe):
    report = analyze(run_folder(tmp_path, three_rewards(), [1, 2, 0.5], recipe=recipe))
    assert report.reward_weights == ([1, 1, 1] if recipe == {} else [1, 2, 0.5])


def test_weights_that_nobody_knows_are_a_warning(tmp_path):
    rewards = np.tile(three_rewards()[:32], (8, 1))  # the same means at every step
    report = analyze(run_folder(tmp_path, rewards, [1.0, 2.0, 0.5]))
    assert (report.reward_weights, report.weights_source) == ([1.0, 1.0, 1.0], "assumed")
    assert any("taken as 1" in warning for warning in report.warnings)


def test_runs_with_different_weights_are_a_warning(tmp_path):
    for name, weights in (("a", [1.0, 1.0, 1.0]), ("b", [1.0, 2.0, 1.0])):
        run_folder(tmp_path / name, three_rewards(), weights, recipe={"reward_weights": weights})
    report = analyze(tmp_path / "a", tmp_path / "b")
    assert report.reward_weights == [1.0, 1.0, 1.0] and len(report.warnings) == 1


# In Python and during training


def test_the_report_is_an_object(tmp_path, capsys):
    file = write(hand_made_table(), tmp_path / "a.jsonl")
    report = analyze([file])
    assert str(report) == report.verdict.text
    assert "<table>" in report._repr_html_()
    assert [path.name for path in report.save(tmp_path / "out")] == ["report.html", "report.png", "report.json"]
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["conflict_ratio"] == report.conflict_ratio
    assert document["recommendation"]["method"] == report.recommendation.method
    report.print()
    assert capsys.readouterr().out.strip().startswith(report.verdict.text[:40])


@pytest.mark.parametrize(
    ("rewards", "size", "options", "message"),
    [
        ([1.0, 2.0], 2, {}, "shape"),
        ([[1.0], [2.0], [3.0]], 2, {}, "whole groups"),
        ([[1.0], [2.0]], 1, {}, "at least 2"),
        ([[1.0], [2.0]], 2, {"names": ["a", "b"]}, "2 names"),
        ([[1.0], [2.0]], 2, {"reward_weights": [float("nan")]}, "finite"),
        ([[1.0], [2.0]], 2, {"thresholds": [2.0]}, r"in \[0, 1\]"),
        ([[1.0], [2.0]], 2, {"completions": ["x"]}, "one entry for each"),
    ],
)
def test_wrong_arrays_are_one_clear_error(rewards, size, options, message):
    with pytest.raises(UsageError, match=message):
        analyze_rewards(rewards, size, **options)


@pytest.mark.parametrize("stock", [True, False])
def test_the_callback_says_the_same_as_the_log(tiny_policy, tmp_path, stock):
    options = {
        "log_completions": True,
        "max_steps": 4,
        "per_device_train_batch_size": 16,
        "reward_weights": [1.0, 0.5],
    }
    if stock:
        args = GRPOConfig(**{**tiny_settings(tmp_path), **options})
        trainer = GRPOTrainer(str(tiny_policy), [low_bytes, spread_bytes], args=args, train_dataset=letters_dataset())
    else:
        args = tiny_args(tmp_path, **options)
        trainer = GD2POTrainer(str(tiny_policy), [low_bytes, spread_bytes], args=args, train_dataset=letters_dataset())
    callback = VerdictCallback(trainer, steps=[2])
    trainer.add_callback(callback)
    trainer.train()
    assert sorted(callback.reports) == [2, 4]
    logged = analyze(tmp_path, reward_weights=[1.0, 0.5])
    last = callback.reports[4]
    assert last.rollouts == logged.rollouts
    assert last.conflict_ratio == pytest.approx(logged.conflict_ratio)
    assert last.verdict == logged.verdict
    assert callback.reports[2].rollouts < last.rollouts
    with pytest.raises(ValueError, match="every"):
        VerdictCallback(trainer, every=0)


def test_a_recipe_asks_for_the_verdict(tiny_policy, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"prompt {row % 4}"}) + "\n" for row in range(16)))
    settings = tiny_settings(tmp_path / "out") | {
        "model_name_or_path": str(tiny_policy),
        "dataset_path": str(prompts),
        "reward_funcs": ["tiny.low_bytes", "tiny.spread_bytes"],
        "reward_weights": [1.0, 0.5],
        "verdict_steps": 2,
        "max_steps": 3,
        "log_completions": True,
        "num_completions_to_print": 0,
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    trainer = run_recipe(load_recipe(file))
    (callback,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, VerdictCallback)]
    assert sorted(callback.reports) == [2, 3]
    # The run's own recipe tells the weights afterwards.
    report = analyze(tmp_path / "out")
    assert (report.weights_source, report.reward_weights) == ("recipe.yaml", [1.0, 0.5])
    assert report.conflict_ratio == pytest.approx(callback.reports[3].conflict_ratio)
    with pytest.raises(UsageError, match="verdict_steps"):
        file.write_text(yaml.safe_dump(settings | {"verdict_steps": 0}))
        load_recipe(file)
