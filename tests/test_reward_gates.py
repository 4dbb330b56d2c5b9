"""Gates: rewards that count only where another one meets a threshold."""

import json
import math

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import letters_dataset, low_bytes, spread_bytes, tiny_args

from gd2po_trl import GD2POConfig, GD2POTrainer, compute_advantages
from gd2po_trl.comparison.curves import read_curves
from gd2po_trl.recipe.files import merge_layers
from gd2po_trl.reward_gates import OPERATORS, Condition, RewardGates, parse_gates


NAN = math.nan
NAMES = ["correct", "length", "format"]


def gated(rewards, gates, closed="zero"):
    return RewardGates(gates, NAMES, closed).apply(torch.tensor(rewards, dtype=torch.float32))


def same(actual, expected):
    return torch.equal(actual.nan_to_num(-99), torch.tensor(expected).nan_to_num(-99))


@given(
    name=st.text(st.characters(exclude_characters="<>=!", exclude_categories=["Z", "C"]), min_size=1),
    sign=st.sampled_from(list(OPERATORS)),
    threshold=st.floats(allow_nan=False, allow_infinity=False),
    spaces=st.text(" ", max_size=2),
)
def test_a_condition_reads_back(name, sign, threshold, spaces):
    text = f"{spaces}{name}{spaces}{sign}{spaces}{threshold!r}{spaces}"
    assert parse_gates({"length": text}) == {"length": [Condition(name, sign, threshold)]}


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        assert parse_gates({"length": text})
    except ValueError as error:
        assert "reward_gates" in str(error)


@pytest.mark.parametrize(
    "gate",
    ["correct", "correct >= ", ">= 3", "correct => 3", "correct >= high", "correct >= nan", "correct >= 1e999", 3, [],
     "correct >= 3 and format >= 1", "__import__('os').system('true') or 1", {"reward": "correct", "min": 3}, [3]],
)  # fmt: skip
def test_what_is_no_condition_is_refused(gate, tmp_path):
    with pytest.raises(ValueError, match="reward_gates"):
        tiny_args(tmp_path, reward_gates={"length": gate})


def test_closed_is_zero_or_unscored_and_the_input_stays():
    rewards = torch.tensor([[3.0, 0.5, 1.0], [2.9, 0.7, 0.0]])
    before = rewards.clone()
    gates = {"length": "correct >= 3"}
    assert same(RewardGates(gates, NAMES, "zero").apply(rewards), [[3.0, 0.5, 1.0], [2.9, 0.0, 0.0]])
    assert same(RewardGates(gates, NAMES, "unscored").apply(rewards), [[3.0, 0.5, 1.0], [2.9, NAN, 0.0]])
    assert torch.equal(rewards, before)
    assert RewardGates(None, NAMES, "zero").apply(rewards) is rewards


@pytest.mark.parametrize("sign", OPERATORS)
def test_an_unscored_condition_is_not_met_and_an_unscored_reward_stays_so(sign):
    assert same(gated([[NAN, 0.5, 1.0]], {"length": f"correct {sign} 0"}), [[NAN, 0.0, 1.0]])
    assert same(gated([[9.0, NAN, 1.0]], {"length": "correct < 0"}), [[9.0, NAN, 1.0]])


def test_conditions_are_on_raw_rewards_so_that_chains_and_circles_are_defined():
    rewards = [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]
    chain = {"length": "correct >= 1", "format": "length >= 1"}
    assert same(gated(rewards, chain), [[1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    circle = {"length": "correct >= 1", "correct": "length >= 1"}
    assert same(gated(rewards, circle), [[1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])


def test_several_conditions_all_have_to_hold():
    gates = {"length": ["correct >= 1", "format != 0"]}
    assert same(gated([[1.0, 5.0, 1.0], [1.0, 5.0, 0.0], [0.0, 5.0, 1.0]], gates)[:, 1], [5.0, 0.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_threshold_is_met_by_the_reward_of_the_same_number(dtype):
    """As float64, the float32 that TRL makes of 0.7 is below 0.7."""
    rewards = torch.tensor([[0.7, 1.0, 0.0]], dtype=torch.float32).to(dtype)
    for condition, expected in (("correct >= 0.7", 1.0), ("correct == 0.7", 1.0), ("correct > 0.7", 0.0)):
        assert RewardGates({"length": condition}, NAMES, "zero").apply(rewards)[0, 1] == expected


def test_json_nulls_and_layers(tmp_path):
    config = tiny_args(tmp_path, reward_gates=json.dumps({"length": "correct >= 3", "format": None}))
    assert config.reward_gates == {"length": "correct >= 3"}
    below = {"reward_gates": {"a": "b > 1", "c": "b > 2"}}
    assert merge_layers(below, {"reward_gates": '{"a": null}'})["reward_gates"] == {"a": None, "c": "b > 2"}
    with pytest.raises(ValueError, match="closed_gate_reward"):
        tiny_args(tmp_path, closed_gate_reward="minus one")
    assert any(
        "closed_gate_reward" in text
        for text in GD2POConfig("x", use_cpu=True, bf16=False, closed_gate_reward="unscored").ineffective_settings()
    )


def test_names_are_checked_before_a_model_is_loaded(tmp_path):
    for gates, name in (({"length": "low_bytes > 0"}, "length"), ({"low_bytes": "correct > 0"}, "correct")):
        args = tiny_args(tmp_path, reward_gates=gates)
        with pytest.raises(ValueError, match=rf"reward_gates.*'{name}'"):
            GD2POTrainer("no/such-model", [low_bytes, spread_bytes], args, train_dataset=letters_dataset())


@pytest.fixture(scope="module")
def runs(tiny_policy, tmp_path_factory):
    """The same first batch without a gate, with both kinds of closed gates, and one for GRPO."""
    made = {}
    for name, overrides in {
        "none": {"reward_gates": None},
        "zero": {},
        "unscored": {"closed_gate_reward": "unscored"},
        "grpo": {"multi_objective_aggregation": "sum_then_normalize"},
    }.items():
        settings = {"max_steps": 1, "log_completions": True, "num_completions_to_print": 0}
        settings |= {"reward_gates": {"spread_bytes": "low_bytes >= 0.4"}, **overrides}
        folder = tmp_path_factory.mktemp(name)
        trainer = GD2POTrainer(
            str(tiny_policy),
            [low_bytes, spread_bytes],
            tiny_args(folder, **settings),
            train_dataset=letters_dataset(),
        )
        trainer.train()
        table = pd.read_parquet(folder / "completions" / "completions_00001.parquet")
        made[name] = (list(trainer.state.log_history), table)
        if name == "unscored":
            figures = trainer.evaluate({"held": letters_dataset(4)})
            made["evaluation"] = (figures, pd.read_parquet(folder / "completions" / "eval_held_00001.parquet"))
    return made


def test_the_gated_rewards_train_and_the_table_has_both(runs):
    raw = torch.tensor(runs["none"][1][["low_bytes", "spread_bytes"]].to_numpy())
    is_open = raw[:, 0].float() >= 0.4
    assert 0 < is_open.sum() < len(raw)
    for name, value in (("zero", 0.0), ("unscored", NAN)):
        log, table = runs[name]
        expected = raw.clone()
        expected[~is_open, 1] = value
        assert same(torch.tensor(table[["low_bytes", "spread_bytes"]].to_numpy()), expected.tolist())
        assert table["gd2po_raw_spread_bytes"].tolist() == raw[:, 1].tolist()
        assert log[0]["gd2po/gate_open/spread_bytes"] == pytest.approx(is_open.double().mean().item())
        assert log[0]["gd2po/raw/spread_bytes"] == pytest.approx(raw[:, 1].mean().item())
        assert log[0]["rewards/spread_bytes/mean"] == pytest.approx(expected[:, 1].nanmean().item())
        breakdown = compute_advantages(expected, 4, conflict_filter="hard")
        assert table["gd2po_conflict"].tolist() == breakdown.conflict.tolist()
        assert table["gd2po_kept"].tolist() == breakdown.kept.tolist()
    assert "gd2po_raw_spread_bytes" not in runs["none"][1] and "gd2po/raw/spread_bytes" not in runs["none"][0][0]


def test_grpo_sums_the_gated_rewards(runs):
    table = runs["grpo"][1]
    sums = torch.tensor((table["low_bytes"] + table["spread_bytes"]).to_numpy()).view(-1, 4)
    expected = (sums - sums.mean(1, keepdim=True)) / (sums.std(1, keepdim=True) + 1e-4)
    assert torch.tensor(table["advantage"].to_numpy()).tolist() == pytest.approx(expected.flatten().tolist(), abs=1e-4)
    assert (table["spread_bytes"] == 0).any()


def test_evaluation_is_gated_too_and_counts_every_row_once(runs):
    figures, table = runs["evaluation"]
    is_open = table["low_bytes"] >= 0.4
    assert figures["eval_held_gd2po/gate_open/spread_bytes"] == pytest.approx(is_open.mean())
    assert figures["eval_held_gd2po/raw/spread_bytes"] == pytest.approx(table["gd2po_raw_spread_bytes"].mean())
    assert figures["eval_held_rewards/spread_bytes/mean"] == pytest.approx(table["spread_bytes"].mean())
    assert table["spread_bytes"].isna().tolist() == (~is_open).tolist()


def test_a_comparison_reads_rewards_before_their_gate(runs):
    for name in ("none", "zero", "unscored"):
        state = {"log_history": runs[name][0]}
        curves = read_curves(state, ["low_bytes", "spread_bytes"], 8, held_out=False)
        expected = read_curves({"log_history": runs["none"][0]}, ["low_bytes", "spread_bytes"], 8, held_out=False)
        assert curves.rewards["spread_bytes"].tolist() == pytest.approx(expected.rewards["spread_bytes"].tolist())
