"""`gd2po analyze`: its figures against a second, naive computation, and what the report says."""

import html.parser
import itertools
import json
import math
import random
import statistics
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_files import analyze, command, hand_made_table, write
from tiny import conversational_dataset, letters_dataset, low_bytes, spread_bytes, text_of, tiny_args, tiny_settings
from trl import GRPOConfig, GRPOTrainer

from gd2po_trl import GD2POTrainer, compute_advantages
from gd2po_trl.cli import main as gd2po
from gd2po_trl.diagnostics import conflict_metrics


@pytest.fixture
def hand_made() -> pd.DataFrame:
    return hand_made_table()


# A second computation: one group, one rollout and one reward at a time, in plain Python.


def naive_pushes(group, weights):
    """Normalized and weighted rewards of a group, `None` for not scored."""
    columns = []
    for values, weight in zip(zip(*group, strict=True), weights, strict=True):
        known = [value for value in values if value is not None]
        mean = statistics.fmean(known) if known else 0.0
        std = statistics.stdev(known) if len(known) > 1 else 0.0
        flat = 1e-6 * max((abs(value) for value in known), default=0.0)
        columns.append(
            [
                0.0 if value is None or abs(value - mean) <= flat else weight * (value - mean) / (std + 1e-6)
                for value in values
            ]
        )
    return list(zip(*columns, strict=True))


def naive_figures(groups, weights, thresholds=(0.2, 0.8)):
    """Figures of a list of groups, each a list of rollouts, each a list of K rewards."""
    num_rewards = len(weights)
    pushed = [
        (rollout, push) for group in groups for rollout, push in zip(group, naive_pushes(group, weights), strict=True)
    ]
    scored = [(rollout, push) for rollout, push in pushed if any(value is not None for value in rollout)]
    conflict = [max(push) > 1e-8 and min(push) < -1e-8 for _, push in scored]
    figures = {
        "rollouts": len(scored),
        "conflict_ratio": sum(conflict) / len(scored),
        "cancellation": 1
        - sum(abs(sum(push)) for _, push in scored) / (sum(sum(map(abs, p)) for _, p in scored) or 1),
        "groups_without_signal": sum(
            all(abs(value) <= 1e-8 for push in naive_pushes(group, weights) for value in push) for group in groups
        )
        / len(groups),
        "silent": [
            sum(all(abs(push[k]) <= 1e-8 for push in naive_pushes(group, [1] * num_rewards)) for group in groups)
            / len(groups)
            for k in range(num_rewards)
        ],
        "first_up": {},
        "second_up": {},
    }
    for a, b in itertools.combinations(range(num_rewards), 2):
        figures["first_up"][a, b] = sum(push[a] > 1e-8 and push[b] < -1e-8 for _, push in scored) / len(scored)
        figures["second_up"][a, b] = sum(push[b] > 1e-8 and push[a] < -1e-8 for _, push in scored) / len(scored)
    net = sum(abs(sum(push)) for _, push in scored)
    figures["kept_push"] = sum(abs(sum(p)) for c, (_, p) in zip(conflict, scored, strict=True) if not c) / (net or 1)
    figures["kept"] = {
        threshold: sum(
            not (clash and (threshold is None or abs(sum(push) / (sum(map(abs, push)) + 1e-8)) < threshold))
            for clash, (_, push) in zip(conflict, scored, strict=True)
        )
        / len(scored)
        for threshold in (None, *thresholds)
    }
    return figures


def assert_equal_figures(analysis, expected):
    assert analysis.rollouts == expected["rollouts"]
    assert analysis.conflict_ratio == pytest.approx(expected["conflict_ratio"])
    assert analysis.groups_without_signal == pytest.approx(expected["groups_without_signal"])
    if not math.isnan(analysis.cancellation):
        assert analysis.cancellation == pytest.approx(expected["cancellation"], abs=1e-9)
    assert [one.groups_without_signal for one in analysis.rewards] == pytest.approx(expected["silent"])
    index = {one.name: k for k, one in enumerate(analysis.rewards)}
    for pair in analysis.pairs:
        key = index[pair.first], index[pair.second]
        assert pair.first_up == pytest.approx(expected["first_up"][key])
        assert pair.second_up == pytest.approx(expected["second_up"][key])
        assert pair.conflict_ratio == pytest.approx(pair.first_up + pair.second_up)
    assert {one.threshold: one.kept_ratio for one in analysis.filters} == pytest.approx(expected["kept"])
    if not math.isnan(analysis.filters[0].kept_push):
        assert analysis.filters[0].kept_push == pytest.approx(expected["kept_push"])


def groups_of(table: pd.DataFrame, names, size):
    """Groups of a TRL table, by position alone."""
    values = [[None if math.isnan(x) else x for x in row] for row in table[names].to_numpy(dtype=float).tolist()]
    return [values[start : start + size] for start in range(0, len(values), size)]


# Runs


def long_words(completions, log_extra=None, **kwargs):
    """Contradicts `low_bytes`, leaves out every fifth completion, and logs a number that is no reward."""
    log_extra("characters", [len(text_of(completion)) for completion in completions])
    return [None if index % 5 == 4 else -low_bytes([c])[0] + 0.1 * index for index, c in enumerate(completions)]


@pytest.fixture(scope="module")
def stock_run(tiny_policy, tmp_path_factory):
    """A run of TRL's own trainer, without a line of this package."""
    folder = tmp_path_factory.mktemp("stock_run")
    settings = {**tiny_settings(folder), "per_device_train_batch_size": 16, "max_steps": 3, "log_completions": True}
    trainer = GRPOTrainer(
        str(tiny_policy),
        [low_bytes, long_words],
        args=GRPOConfig(**settings),
        train_dataset=conversational_dataset(),
    )
    trainer.train()
    trainer.save_state()
    return folder


def test_stock_grpo_run(stock_run, tmp_path, capsys):
    assert command(stock_run, "--output", tmp_path / "report", "--thresholds", "0.2", "0.8") == 0
    printed = capsys.readouterr().out
    assert "low_bytes and long_words disagree on" in " ".join(printed.split())
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [reward["name"] for reward in report["rewards"]] == ["low_bytes", "long_words"]  # not `characters`

    tables = [pd.read_parquet(file) for file in sorted((stock_run / "completions").glob("*.parquet"))]
    assert len(tables) == 3
    groups = [group for table in tables for group in groups_of(table, ["low_bytes", "long_words"], 4)]
    expected = naive_figures(groups, [1.0, 1.0])
    assert report["groups"] == len(groups) == 12
    assert 0 < report["conflict_ratio"] < 1
    assert report["conflict_ratio"] == pytest.approx(expected["conflict_ratio"])
    assert report["cancellation"] == pytest.approx(expected["cancellation"])
    assert {one["threshold"]: one["kept_ratio"] for one in report["filters"]} == pytest.approx(expected["kept"])
    assert report["rewards"][1]["scored"] == pytest.approx(1 - 9 / 48)
    assert report["over_steps"]["step"] == [1, 2, 3]
    assert 1 < len({example["prompt"] for example in report["examples"]}) == len(report["examples"])
    for example in report["examples"]:
        assert example["advantages"][example["favoured_by"]] > 0 > example["advantages"][example["penalised_by"]]
        (row,) = [
            row
            for row in tables[example["step"] - 1].to_dict("records")
            if (row["prompt"][0]["content"], row["completion"][0]["content"])
            == (example["prompt"], example["completion"])
        ]
        assert example["rewards"]["low_bytes"] == row["low_bytes"]


def test_figures_equal_those_that_the_trainer_logs(tiny_policy, tmp_path, capsys):
    args = tiny_args(
        tmp_path,
        reward_weights=[1.0, -0.5],
        log_completions=True,
        num_iterations=2,
        per_device_train_batch_size=16,
        max_steps=6,
        conflict_filter="snr",
        snr_threshold=0.6,
    )
    trainer = GD2POTrainer(str(tiny_policy), [low_bytes, spread_bytes], args=args, train_dataset=letters_dataset())
    trainer.train()
    trainer.save_state()
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "gd2po/conflict_ratio" in entry}
    assert sorted(logged) == [1, 3, 5]  # every batch is trained on, and logged, twice

    analysis = analyze(tmp_path, reward_weights=[1.0, -0.5], thresholds=[0.6])
    over = analysis.over_steps
    assert over.step == sorted(logged)
    assert any("repeat the table" in note for note in analysis.notes)
    for name, series in {
        "gd2po/conflict_ratio": over.conflict_ratio,
        "gd2po/cancellation": over.cancellation,
        "gd2po/frac_groups_without_signal": over.groups_without_signal,
        "gd2po/conflict_ratio/low_bytes_vs_spread_bytes": over.pair_conflict_ratio["low_bytes_vs_spread_bytes"],
    }.items():
        assert series == pytest.approx([logged[step][name] for step in over.step], abs=1e-6)
    kept = [logged[step]["gd2po/kept_ratio"] for step in over.step]
    assert analysis.filters[1].kept_ratio == pytest.approx(statistics.fmean(kept), abs=1e-6)

    # Without being told, the weights are found in the log; wrong ones contradict it, which is said at the top.
    found = analyze(tmp_path)
    assert (found.reward_weights, found.weights_source) == ([1.0, -0.5], "the totals in trainer_state.json")
    assert found.warnings == []
    assert command(tmp_path, "--reward-weights", "1", "1") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "The run itself judged conflict differently" in printed[: printed.index("What to do")]


def test_quickstart_run(tmp_path):
    options = {
        "output": tmp_path,
        "warmup-steps": 15,
        "max_steps": 4,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "eval_steps": 2,
        "log_completions": "true",
        "num_completions_to_print": 0,
    }
    assert gd2po(["quickstart", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]) == 0
    analysis = analyze(tmp_path / "trained")
    tables = [
        pd.read_parquet(tmp_path / "trained" / "completions" / f"completions_0000{step}.parquet") for step in (1, 3)
    ]
    names = ["correctness", "format", "length"]
    groups = [group for table in tables for group in groups_of(table, names, 8)]
    assert [reward.name for reward in analysis.rewards] == names
    assert analysis.over_steps.step == [1, 3]  # evaluations took the tables of steps 2 and 4
    assert any("are alone with their prompt and step" in note for note in analysis.notes)
    assert_equal_figures(analysis, naive_figures(groups, [1, 1, 1]))
    history = json.loads((tmp_path / "trained" / "trainer_state.json").read_text())["log_history"]
    logged = [entry["gd2po/conflict_ratio"] for entry in history if entry["step"] in (1, 3) and "loss" in entry]
    assert analysis.over_steps.conflict_ratio == pytest.approx(logged)


def test_neither_trl_nor_a_model_library_is_loaded(stock_run):
    code = (
        "import sys; from gd2po_trl.cli import main; assert main(['analyze', sys.argv[1]]) == 0;"
        "assert not {'trl', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(stock_run)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


# Hand-made files


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_hand_made_file(hand_made, tmp_path, suffix):
    analysis = analyze(write(hand_made, tmp_path / f"rollouts{suffix}"))
    assert (analysis.rollouts, analysis.groups, analysis.group_size, analysis.steps) == (12, 3, 4, 2)
    assert analysis.conflict_ratio == pytest.approx(4 / 12)
    assert analysis.conflict_ratio_with_signal == pytest.approx(4 / 8)
    # Groups of one size: the standard error of a mean over groups.
    assert analysis.conflict_ratio_error == pytest.approx(np.std([1 / 2, 0, 1 / 2], ddof=1) / np.sqrt(3))
    assert analysis.groups_without_signal == pytest.approx(1 / 3)
    assert analysis.over_steps.step == [1, 2]
    assert analysis.over_steps.conflict_ratio == pytest.approx([2 / 8, 2 / 4])
    assert analysis.over_steps.reward_mean["correctness"] == pytest.approx([1.5, 0.0])
    (pair,) = analysis.pairs
    assert (pair.first_up, pair.second_up) == (pytest.approx(2 / 12), pytest.approx(2 / 12))
    # Deviations from the mean in the first and the last group.
    first, second = np.array([3, 3, -3, -3]), np.array([-0.15, 0.15, 0.25, -0.25])
    third, fourth = np.array([1, -1, 1, -1]), np.array([0, 0, -0.2, 0.2])
    correlations = [np.corrcoef(first, second)[0, 1], np.corrcoef(third, fourth)[0, 1]]
    assert pair.correlation == pytest.approx(np.mean(correlations), abs=1e-5)

    hard, snr_high, snr_low = analysis.filters
    assert [hard.threshold, snr_high.threshold, snr_low.threshold] == [None, 0.8, 0.2]
    assert hard.kept_ratio == pytest.approx(8 / 12)
    assert hard.kept_ratio_with_signal == pytest.approx(4 / 8)
    assert hard.consensus_distribution == pytest.approx([0, 0, 2 / 3, 0, 0, 1 / 3])
    assert hard.consensus_mean == pytest.approx(2 / 3)
    assert hard.emptied_groups == 0
    assert snr_high.kept_ratio == pytest.approx(8 / 12)
    expected = naive_figures(groups_of(hand_made, ["correctness", "length"], 4), [1, 1])
    assert_equal_figures(analysis, expected)

    shares = [reward.share_sum_then_normalise for reward in analysis.rewards]
    totals = [first + second, third + fourth]
    by_hand = [
        np.mean([(part * total).sum() / (total**2).sum() for part, total in zip(parts, totals, strict=True)])
        for parts in ([first, third], [second, fourth])
    ]
    assert shares == pytest.approx(by_hand)
    assert sum(shares) == pytest.approx(1)
    assert sum(reward.share_normalise_then_sum for reward in analysis.rewards) == pytest.approx(1)


def test_conflict_of_unrelated_rewards_is_the_mean_over_all_shuffles(tmp_path):
    # In each reward two of the four are at the mean, so that a shuffled rollout may have no push at all.
    rewards = [[-1.0, 0.1, 2.0], [0.0, 0.3, 2.0], [1.0, 0.3, 1.0], [0.0, 0.5, 3.0]]
    table = pd.DataFrame(rewards, columns=["a", "b", "c"]).assign(prompt="p", completion="x")
    analysis = analyze(write(table, tmp_path / "a.parquet"))
    columns = list(zip(*naive_pushes(rewards, [1, 1, 1]), strict=True))
    ratios, pair_ratios = [], []
    for second in itertools.permutations(columns[1]):
        for third in itertools.permutations(columns[2]):
            rows = list(zip(columns[0], second, third, strict=True))
            ratios.append(statistics.fmean(max(row) > 1e-8 and min(row) < -1e-8 for row in rows))
            pair_ratios.append(statistics.fmean(row[0] * row[1] < -1e-16 for row in rows))
    assert analysis.unrelated_ratio == pytest.approx(statistics.fmean(ratios))
    assert analysis.pairs[0].unrelated_ratio == pytest.approx(statistics.fmean(pair_ratios))


def test_groups_of_different_size_and_groups_that_are_emptied(tmp_path):
    groups = [[[1.0, 0.0], [0.0, 5.0]], [[1.0, 0.0], [0.0, 0.2], [1.0, 0.4], [0.0, 0.2]], [[0.0, 0.0], [0.0, 0.0]]]
    rows = [(f"p{index}", *rollout) for index, group in enumerate(groups) for rollout in group]
    table = pd.DataFrame(rows, columns=["prompt", "a", "b"]).assign(completion="x")
    analysis = analyze(write(table, tmp_path / "a.jsonl"))
    assert_equal_figures(analysis, naive_figures(groups, [1, 1]))
    hard = analysis.filters[0]
    assert hard.emptied_groups == pytest.approx(1 / 2)  # the first of the two with signal
    assert hard.consensus_distribution == pytest.approx([1 / 3, 0, 0, 1 / 3, 0, 1 / 3])
    # Sums of the first group: 1 and 5; of the second: 1, .2, 1.4, .2. They count by their degrees of freedom, 1 and 3.
    shares = []
    for group in groups[:2]:
        deviation = np.array(group) - np.mean(group, axis=0)
        total = deviation.sum(1)
        shares.append(deviation.T @ total / (total @ total))
    expected = (1 * shares[0] + 3 * shares[1]) / 4
    assert [reward.share_sum_then_normalise for reward in analysis.rewards] == pytest.approx(expected)


reward_value = st.one_of(st.none(), st.sampled_from([0.0, 0.1, 1.0, -3.0]), st.floats(-100, 100, width=32))
random_groups = st.integers(1, 3).flatmap(
    lambda num_rewards: st.lists(
        st.lists(st.lists(reward_value, min_size=num_rewards, max_size=num_rewards), min_size=2, max_size=6),
        min_size=1,
        max_size=5,
    )
)


@settings(max_examples=60, deadline=None)
@given(groups=random_groups, seed=st.integers(0, 99), data=st.data())
def test_figures_equal_a_naive_computation(groups, seed, data, tmp_path_factory):
    names = [f"r{k}" for k in range(len(groups[0][0]))]
    weights = [data.draw(st.sampled_from([1.0, 0.5, 0.0, -2.0])) for _ in names]
    if any(all(rollout[k] is None for group in groups for rollout in group) for k in range(len(names))):
        return  # a reward without a value is left out, which the naive computation does not do
    rows = [
        {
            "step": 3 * (index % 2),
            "prompt": f"prompt {index}",
            "completion": "",
            **dict(zip(names, rollout, strict=True)),
        }
        for index, group in enumerate(groups)
        for rollout in group
    ]
    random.Random(seed).shuffle(rows)
    file = tmp_path_factory.mktemp("random") / "rollouts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert_equal_figures(analyze(file, rewards=names, reward_weights=weights), naive_figures(groups, weights))


def test_figures_equal_the_metrics_of_the_trainer(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 3, (40, 3), generator=generator).double()
    rewards[torch.rand(40, 3, generator=generator) < 0.1] = torch.nan
    metrics = conflict_metrics(rewards, compute_advantages(rewards, 8), ["a", "b", "c"], 8)
    table = pd.DataFrame(rewards.numpy(), columns=["a", "b", "c"])
    table.insert(0, "prompt", [f"p{row // 8}" for row in range(40)])
    analysis = analyze(write(table.assign(completion="x"), tmp_path / "a.csv"))
    assert analysis.conflict_ratio == pytest.approx(metrics["conflict_ratio"].item())
    assert analysis.filters[0].kept_ratio == pytest.approx(metrics["kept_ratio"].item())
    assert analysis.filters[0].consensus_mean == pytest.approx(metrics["consensus/mean"].item())
    assert analysis.cancellation == pytest.approx(metrics["cancellation"].item())
    for pair in analysis.pairs:
        assert pair.conflict_ratio == pytest.approx(metrics[f"conflict_ratio/{pair.first}_vs_{pair.second}"].item())


# What the report says


def test_hostile_content_stays_text(tmp_path, capsys):
    hostile = (
        "</pre><script>alert(1)</script><img src=x onerror=alert(1)>&lt; [bold red]x[/] \x1b[2J\u202e\x00 \ud800 $x_"
    )
    reward = r"$\frac{<b>[red]r"
    rows = [
        {
            "prompt": [{"role": "user", "content": hostile}],
            "completion": hostile,
            reward: sign,
            "other": -sign,
            "step": 1,
        }
        for sign in (1, -1)
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert command(file, "--output", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x00" not in printed and "\u202e" not in printed
    assert "[bold red]x[/]" in printed and "<script>" in printed

    tags = []

    class Tags(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append((tag, dict(attrs)))

    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    Tags().feed(page)
    assert not [tag for tag, _ in tags if tag in ("script", "b", "link", "iframe")]
    assert [attrs["src"][:22] for tag, attrs in tags if tag == "img"] == ["data:image/png;base64,"]
    assert not [name for _, attrs in tags for name in attrs if name.startswith("on")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    example = json.loads((tmp_path / "out" / "report.json").read_text())["examples"][0]
    assert example["completion"] == hostile
    assert {example["favoured_by"], example["penalised_by"]} == {reward, "other"}
