"""Reward functions with several named parts: one call, one reward per name."""

import asyncio
import functools
import gc
import json
import math
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tiny import (
    CHAT_TEMPLATE,
    byte_tokenizer,
    conversational_dataset,
    letters_dataset,
    low_bytes,
    spread_bytes,
    tiny_args,
    tiny_settings,
)

from gd2po_trl import GD2POTrainer
from gd2po_trl.analysis.weights import _recipe_settings
from gd2po_trl.cli import main
from gd2po_trl.comparison import compare
from gd2po_trl.comparison.experiment import _weights
from gd2po_trl.errors import UsageError
from gd2po_trl.evaluation.scoring import resolve_rewards, score_labels
from gd2po_trl.recipe import load_recipe
from gd2po_trl.reward_guard import RewardError, RewardGuard
from gd2po_trl.reward_parts import expand_parts, part_names
from gd2po_trl.rewards import resolve_reward, reward_names
from gd2po_trl.training import run_recipe


ROOT = Path(__file__).resolve().parents[1]
NAMES = ["low", "spread"]
CALLS = []


def both(completions, **kwargs):
    CALLS.append(len(completions))
    return {"low": low_bytes(completions), "spread": spread_bytes(completions)}


both.reward_names = NAMES


def undeclared(completions, **kwargs):
    return [{"low": low, "spread": None} for low in low_bytes(completions)]


class Judge:
    """Builds its names itself, and scores one row at a time."""

    def __init__(self, scale=1.0):
        self.scale, self.reward_names = scale, ["low", "long"]

    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        CALLS.append(len(completions))
        return [{"low": self.scale * low, "long": None} for low in low_bytes(completions)]


def score(returned, names=("a", "b")):
    def culprit(completions, **kwargs):
        return returned

    if names:
        culprit.reward_names = list(names)
    return RewardGuard().score(culprit, "culprit", prompts=["p"] * 2, completions=["c"] * 2)


def test_both_forms_and_what_is_not_scored():
    expected = {"a": [1.0, None], "b": [2.0, 3.0]}
    assert score([{"a": 1, "b": 2.0}, {"a": None, "b": True + 2}]) == expected
    assert score(({"b": torch.tensor(2.0), "a": np.float32(1)}, {"a": None, "b": 3})) == expected
    assert score({"a": [1, None], "b": np.array([2.0, 3.0])}) == expected
    assert score(np.array([{"a": 1, "b": 2}, {"a": None, "b": 3}])) == expected
    assert score([None, {"a": 1, "b": 2}]) == {"a": [None, 1.0], "b": [None, 2.0]}
    assert score({"a": None, "b": torch.tensor([2.0, 3.0])}) == {"a": [None, None], "b": [2.0, 3.0]}
    assert math.isnan(score([{"a": math.nan, "b": 2}] * 2)["a"][0])


@pytest.mark.parametrize(
    ("returned", "names", "words"),
    [
        ([{"a": 1, "b": 2}, {"a": 1}], "ab", ["culprit", "without b"]),
        ({"a": [1, 2]}, "ab", ["culprit", "without b"]),
        ([{"a": 1, "b": 2, "c": 3}] * 2, "ab", ["culprit", "with c"]),
        ([{"a": 1, "b": 2, 3: 3}] * 2, "ab", ["culprit", "with 3"]),
        ([1.0, 2.0], "ab", ["culprit", "a, b", "float"]),
        ([{"a": 1, "b": 2}, 1.0], "ab", ["culprit", "a, b", "float"]),
        (None, "ab", ["culprit", "a, b", "NoneType"]),
        ([{"a": 1, "b": 2}], "ab", ["culprit", "1 rewards for 2"]),
        ({"a": [1, 2], "b": [1]}, "ab", ["culprit: b", "1 rewards for 2"]),
        ([{"a": 1, "b": "high"}] * 2, "ab", ["culprit: b", "'high'"]),
        ({"a": [1, {}], "b": [1, 2]}, "ab", ["culprit: a"]),
        ([{"a": 1, "b": 2}] * 2, None, ["culprit", "reward_names = ['a', 'b']", "reward_kwargs"]),
        ([None, {"a": 1}], None, ["culprit", "reward_names = ['a']"]),
        ({"a": [1, 2], "b": [1, 2]}, None, ["culprit", "reward_names = ['a', 'b']"]),
    ],
)
def test_one_error_names_function_part_and_remedy(returned, names, words):
    with pytest.raises(RewardError) as error:
        score(returned, names)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("names", ["ab", [], ["a", "a"], ["a", 1], 3, {"a": 1}])
def test_what_declares_no_names(names):
    def culprit(**kwargs):
        pass

    culprit.reward_names = names
    with pytest.raises(ValueError, match="reward_names"):
        expand_parts([culprit])


def test_where_names_are_found():
    assert part_names(functools.partial(both, x=1)) == part_names(both) == NAMES
    assert part_names(Judge()) == ["low", "long"]
    assert (
        part_names(low_bytes) is None and part_names("org/model") is None and part_names(torch.nn.Linear(1, 1)) is None
    )


def test_one_call_per_batch_whoever_asks_in_between():
    def counting(completions, **kwargs):
        calls.append(completions)
        return {"a": [len(calls)], "b": [-len(calls)]}

    calls = []
    counting.reward_names = ["a", "b"]
    a, b = expand_parts([counting])
    train, evaluation = ["x"], ["x"]
    assert (a(completions=train), b(completions=train)) == ([1], [-1])
    assert (a(completions=train), b(completions=train)) == ([2], [-2])  # the same list is scored anew
    assert (a(completions=train), a(completions=evaluation), b(completions=evaluation)) == ([3], [4], [-4])
    assert len(calls) == 4


def test_a_failure_is_one_call_too_and_nothing_is_held():
    class Batch(list):
        pass

    def failing(completions, **kwargs):
        calls.append(1)
        raise ZeroDivisionError

    calls = []
    failing.reward_names = ["a", "b"]
    batch = Batch(["x"])
    for part in expand_parts([failing]):
        with pytest.raises(ZeroDivisionError):
            part(completions=batch)
    assert calls == [1]
    watched = weakref.ref(batch)
    del batch
    gc.collect()
    assert watched() is None


def test_async_parts_share_a_call_also_from_several_loops():
    CALLS.clear()
    low, long = expand_parts([Judge()])
    low.shared_call.func = RewardGuard().wrap(low.shared_call.func, "judge")
    batch = ["abz"] * 3
    given = {"prompts": ["p"] * 3, "completions": batch}

    async def together():
        return await asyncio.gather(low(**given), long(**given))

    assert asyncio.run(together()) == [low_bytes(batch), [None] * 3] and CALLS == [3]
    assert asyncio.run(low(**given)) == low_bytes(batch)
    assert asyncio.run(long(**given)) == [None] * 3 and CALLS == [3, 3]


def test_on_several_processes_a_failure_is_kept_once():
    def failing(completions, **kwargs):
        raise ZeroDivisionError

    failing.reward_names = ["a", "b"]
    guard = RewardGuard(defer=True)
    parts = expand_parts([failing])
    parts[0].shared_call.func = guard.wrap(failing, "failing")
    batch = ["x", "y"]
    assert [part(prompts=batch, completions=batch) for part in parts] == [[None, None]] * 2
    with pytest.raises(RewardError) as error:
        guard.raise_failures(list)
    assert str(error.value).count("The reward function 'failing' raised ZeroDivisionError") == 1


# Training


def test_parts_train_beside_other_rewards_and_run_once_per_batch(tiny_policy, tmp_path):
    CALLS.clear()
    functions = [spread_bytes, both, Judge(2.0)]
    with pytest.raises(ValueError, match="'low' is a part"):
        GD2POTrainer("no/model", functions, tiny_args(tmp_path), train_dataset=letters_dataset())
    with pytest.raises(ValueError, match=r"2 entries.*3 reward"):
        GD2POTrainer(
            "no/model", [both, low_bytes], tiny_args(tmp_path, reward_weights=[1, 1]), train_dataset=letters_dataset()
        )
    args = tiny_args(
        tmp_path, reward_weights=[0.0, 1.0, -0.5], log_completions=True, num_completions_to_print=0,
        eval_on_start=True, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer = GD2POTrainer(
        str(tiny_policy), [spread_bytes, both], args, train_dataset=letters_dataset(), eval_dataset=letters_dataset(2)
    )
    assert functions[1] is both and trainer.reward_func_names == ["spread_bytes", "low", "spread"]
    trainer.train()
    assert CALLS == [8, 8, 8, 8]  # before the first step, two steps, and after them
    entry = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert entry["rewards/spread/mean"] == entry["rewards/spread_bytes/mean"] > 0
    assert "gd2po/conflict_ratio/low_vs_spread" in entry
    assert entry["reward"] == pytest.approx(entry["rewards/low/mean"] - 0.5 * entry["rewards/spread/mean"], abs=1e-5)
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert table["spread"].tolist() == table["spread_bytes"].tolist() and table["low"].nunique() > 1
    assert "| `spread` | -0.5 |" in _card(trainer)


def _card(trainer):
    trainer.create_model_card()
    return (Path(trainer.args.output_dir) / "README.md").read_text()


def test_async_parts_train(tiny_policy, tmp_path):
    CALLS.clear()
    args = tiny_args(tmp_path, max_steps=1)
    trainer = GD2POTrainer(str(tiny_policy), [Judge(), spread_bytes], args, train_dataset=letters_dataset())
    trainer.train()
    assert CALLS == [8] and trainer.reward_func_names == ["low", "long", "spread_bytes"]


TOOL_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ '<|'",
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}"
    "{% endfor %}{{ '<|'",
    1,
)


class Room:
    """An environment without tools, whose reward has two parts."""

    reward_names = ("door", "key")
    made = 0

    def __init__(self):
        Room.made += 1
        self.number = Room.made

    def reset(self, **kwargs):
        return None

    def get_reward(self):
        return {"door": float(self.number % 3), "key": None if self.number == 1 else float(self.number % 2)}


@pytest.mark.parametrize("weights", [None, [2.0], [2.0, 1.0, -1.0]])
def test_an_environment_has_a_column_per_part(tiny_policy, tmp_path, weights):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    gates = {"key": "door >= 1"}
    args = tiny_args(tmp_path, max_steps=1, reward_weights=weights, reward_gates=gates)
    make = functools.partial(
        GD2POTrainer, str(tiny_policy), low_bytes, train_dataset=conversational_dataset(), processing_class=tokenizer,
        environment_factory=Room,
    )  # fmt: skip
    trainer = make(args)
    assert trainer.reward_func_names == ["low_bytes", "door", "key"] and args.reward_weights == weights
    assert trainer.reward_weights.tolist() == {None: [1, 1, 1], 1: [2, 1, 1], 3: [2, 1, -1]}[weights and len(weights)]
    if weights is None:
        trainer.train()
        entry = trainer.state.log_history[0]
        assert entry["rewards/door/std"] > 0 and "gd2po/gate_open/key" in entry
        with pytest.raises(ValueError, match="reward_weights"):
            make(tiny_args(tmp_path, reward_weights=[1.0, 1.0]))


# Recipes and commands


@pytest.fixture
def recipe(tiny_policy, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({**row, "completion": "abz0"}) + "\n" for row in letters_dataset())
    )

    def write(**changes):
        settings = tiny_settings(tmp_path / "run") | {
            "model_name_or_path": str(tiny_policy),
            "dataset_path": str(tmp_path / "prompts.jsonl"),
            "method": "gd2po_hard",
            "reward_funcs": ["judge"],
            "reward_kwargs": {"judge": {"type": "test_reward_parts.undeclared", "reward_names": NAMES}},
            "max_steps": 1,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**settings, **changes}))
        return path

    return write


def test_names_in_a_recipe(recipe):
    kwargs = load_recipe(recipe(reward_weights=[1.0, 0.0])).arguments.reward_kwargs
    reward = resolve_reward("judge", kwargs["judge"])
    assert part_names(reward) == NAMES and part_names(undeclared) is None
    assert RewardGuard().score(reward, "judge", prompts=["p"], completions=["az"])["spread"] == [None]
    assert reward_names(["judge", "length"], kwargs) == [*NAMES, "length"]
    own = {"own": {"type": "test_reward_parts.Judge", "scale": 2.0}}
    assert reward_names(["test_reward_parts.both", "own"], own) == [*NAMES, "low", "long"]
    assert part_names(resolve_reward("own", own["own"])) == ["low", "long"]
    for wrong in ("low", ["low", "low"]):
        with pytest.raises(UsageError, match=r"'judge'.*reward_names"):
            resolve_reward("judge", {**kwargs["judge"], "reward_names": wrong})
    with pytest.raises(UsageError, match="3 entries for 2 rewards"):
        load_recipe(recipe(reward_weights=[1.0, 1.0, 1.0]))


def test_dry_run_evaluation_and_comparison_know_the_parts(recipe, tmp_path, capsys):
    path = recipe(reward_weights=[1.0, 0.5], reward_gates={"low": "spread > 3"})
    assert main(["train", str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "low: 0.6, 0.6" in printed and "spread: None, None" in printed
    assert main(["train", str(path), "--dry-run", "--reward_gates", '{"judge": "low > 1"}']) == 2
    assert "'judge'" in capsys.readouterr().err

    assert _weights(load_recipe(path)) == {"low": 1.0, "spread": 0.5}
    gated = {"g": {"method": "gdpo", "reward_gates": {"length": "low > 1"}}}
    with pytest.raises(UsageError, match="'length'"):
        compare(path, ["gdpo"], variants=gated, output=tmp_path / "compared")

    rewards = resolve_rewards({"both": {"type": "test_reward_parts.both"}, "length": {}}, columns=True)
    assert score_labels(rewards) == [*NAMES, "length"]
    with pytest.raises(UsageError, match="'low'"):
        resolve_rewards({"both": {"type": "test_reward_parts.both"}, "low": {"type": "tiny.low_bytes"}})

    CALLS.clear()
    predictions = tmp_path / "predictions.jsonl"
    rows = [{"id": f"prompts/{index}", "completion": "abz"} for index in range(16)]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--predictions", str(predictions), "--data", str(tmp_path / "prompts.jsonl")]
    kwargs = {"both": {"type": "test_reward_parts.both"}}
    path = recipe(reward_funcs=["both"], reward_kwargs=kwargs, reward_weights=[1.0, 2.0])
    output = tmp_path / "eval"
    assert main(["eval", "rewards", *words, "--config", str(path), "--output", str(output)]) == 0
    (results,) = json.loads((output / "results.json").read_text())["datasets"].values()
    means = {name: figures["mean"] for name, figures in results["rewards"].items()}
    assert means == pytest.approx({"low": 0.5, "spread": 3.0, "sum": 6.5}) and CALLS == [16]


def test_a_run_records_the_names_of_parts(recipe, tmp_path, capsys):
    path = recipe(
        reward_funcs=["both"], reward_kwargs={"both": {"type": "test_reward_parts.both"}}, reward_weights=[1.0, 2.0],
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    assert main(["train", str(path)]) == 0
    recorded = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recorded["reward_kwargs"] == {"both": {"type": "test_reward_parts.both", "reward_names": NAMES}}
    # An analysis imports nobody's code.
    assert _recipe_settings(tmp_path / "run", ["spread", "low"])[0] == [2.0, 1.0]
    resumed = ["train", str(path), "--resume_from_checkpoint", "latest", "--max_steps", "2"]
    for key, value in (
        ("reward_gates", {"low": "spread > 1"}),
        ("reward_kwargs", {"both": {"reward_names": ["spread", "low"]}}),
    ):
        assert main([*resumed, f"--{key}", json.dumps(value)]) == 2
        assert key in capsys.readouterr().err


# The ten lines


@pytest.fixture(scope="module")
def ten_lines(tmp_path_factory):
    """Overrides that make the example a matter of seconds, in a working directory that is the clone."""
    from gd2po_trl.quickstart.prepare import HELD_OUT_FILE, POLICY_FOLDER, TRAIN_FILE, prepare

    folder = tmp_path_factory.mktemp("quickstart")
    prepare(folder, num_warmup_steps=2)
    places = {"model_name_or_path": POLICY_FOLDER, "dataset_path": TRAIN_FILE, "eval_dataset_path": HELD_OUT_FILE}
    words = [word for key, name in places.items() for word in (f"--{key}", str(folder / name))]
    sizes = {
        "per_device_train_batch_size": 16, "max_steps": 4, "eval_strategy": "no", "learning_rate": 1e-2,
        "save_strategy": "steps", "save_steps": 2, "log_completions": "false", "disable_tqdm": "true",
    }  # fmt: skip
    return [*words, *(word for key, value in sizes.items() for word in (f"--{key}", str(value)))]


def test_the_ten_lines_train_and_resume_bit_for_bit(ten_lines, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / "examples" / "named_parts" / "recipe.yaml"
    assert len(path.read_text().splitlines()) == 10
    whole = run_recipe(load_recipe(path, [*ten_lines, "--output_dir", str(tmp_path / "run")]))
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    resumed = run_recipe(
        load_recipe(path, [*ten_lines, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "latest"])
    )
    for (name, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), name
    logs = [
        [
            {key: value for key, value in entry.items() if "time" not in key and "per_second" not in key}
            for entry in log
        ]
        for log in ([e for e in trainer.state.log_history if "reward" in e] for trainer in (whole, resumed))
    ]
    assert len(logs[0]) == 4 and logs[0] == logs[1]
    entry = logs[0][2]
    assert {f"rewards/{name}/mean" for name in ("correct", "structure", "thinking", "brief")} <= set(entry)
    assert {"gd2po/gate_open/thinking", "gd2po/gate_open/brief", "gd2po/reward_weight/brief"} <= set(entry)
    assert entry["gd2po/reward_weight/brief"] == pytest.approx(0.5 * 2 / 20)
    card = (tmp_path / "run" / "README.md").read_text()
    assert (
        "| `thinking` | 0.5 | where `correct >= 3`, else zero |" in card and "| `correct` | 1 | everywhere |" in card
    )
