"""Reward weights that change over the optimizer steps: schedules, recipes, training, resuming, evaluation."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import letters_dataset, low_bytes, spread_bytes, tiny_args
from trl import GRPOTrainer

from gd2po_trl import GD2POConfig, GD2POTrainer, compute_advantages
from gd2po_trl.errors import UsageError
from gd2po_trl.recipe import load_recipe
from gd2po_trl.recipe.files import merge_layers
from gd2po_trl.schedules import check_weight_schedules, read_weight_schedules, weights_at


RAMP = {"spread_bytes": {"linear": {0: 0.0, 4: 1.0}}}


def factors(schedule, steps):
    read = read_weight_schedules({"a": schedule})["a"]
    return [read.at(step) for step in steps]


def test_the_three_kinds():
    assert factors(2, (0, 7)) == factors({"constant": 2.0}, (0, 7)) == [2.0, 2.0]
    assert factors({"linear": {0: 0.0, 10: 1.0, 20: 0.5}}, (0, 5, 10, 15, 20, 999)) == [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
    assert factors({"steps": {0: 1.0, 3: 0.25, 5: 0}}, (0, 2, 3, 4, 5, 999)) == [1.0, 1.0, 0.25, 0.25, 0.0, 0.0]


@given(
    values=st.dictionaries(st.integers(1, 10**6), st.floats(0, 1e6), min_size=1, max_size=6),
    first=st.floats(0, 1e6),
    kind=st.sampled_from(["linear", "steps"]),
    step=st.integers(0, 2 * 10**6),
)
def test_a_schedule_meets_its_points_and_stays_between_their_values(values, first, kind, step):
    points = {0: first, **values}
    schedule = read_weight_schedules({"a": {kind: points}})["a"]
    assert all(schedule.at(at) == pytest.approx(value) for at, value in points.items())
    before = max(at for at in points if at <= step)
    after = min((at for at in points if at >= step), default=before)
    between = sorted([points[before], points[after if kind == "linear" else before]])
    assert between[0] * (1 - 1e-9) <= schedule.at(step) <= between[1] * (1 + 1e-9)
    as_json = json.loads(json.dumps({"a": {kind: points}}))
    assert read_weight_schedules(as_json) == read_weight_schedules(json.dumps(as_json)) == {"a": schedule}


@pytest.mark.parametrize(
    "schedule",
    [
        "fast", True, -1, float("nan"), float("inf"), [1, 2], {}, {"cosine": {0: 1, 2: 0}}, {"constant": {0: 1}},
        {"linear": {0: 0.0, 5: 1.0}, "steps": {0: 1.0, 5: 0.0}}, {"linear": 1.0}, {"linear": {0: 1.0}},
        {"linear": {1: 0.0, 5: 1.0}}, {"steps": {0: 1.0, 5: -0.5}}, {"steps": {0: 1.0, 1.5: 0.5}},
        {"steps": {0: 1.0, -3: 0.5}}, {"steps": {0: 1.0, "0": 0.5}}, {"steps": {0: 1.0, 5: None}},
    ],
)  # fmt: skip
def test_a_mistake_names_the_key_and_the_reward(schedule, tmp_path):
    with pytest.raises(ValueError) as error:
        GD2POConfig(str(tmp_path), use_cpu=True, bf16=False, reward_weight_schedules={"brevity": schedule})
    assert "`reward_weight_schedules`" in str(error.value) and "'brevity'" in str(error.value)


def test_rewards_that_are_not_there_and_steps_without_a_reward():
    ramp = read_weight_schedules({"a": {"linear": {0: 0.0, 10: 1.0}}})
    check_weight_schedules(ramp, ["a", "b"], None)
    for names, weights, words in ((["b", "c"], None, ["'a'", "b, c"]), (["a", "b"], [1.0, 0.0], ["step 0"])):
        with pytest.raises(UsageError) as error:
            check_weight_schedules(ramp, names, weights)
        assert all(word in str(error.value) for word in ["`reward_weight_schedules`", *words])
    assert weights_at(5, ramp, ["b", "a"], [-1.0, 4.0]) == [-1.0, 2.0]


def test_in_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model_name_or_path: some/model\nreward_funcs: [correctness, length]\nreward_weights: [1, 2]\n"
        "reward_weight_schedules: {length: {linear: {0: 0.0, 100: 1.0}}, correctness: 1}\n"
    )
    on_cpu = ["--use_cpu", "true", "--bf16", "false"]
    training = load_recipe(path, on_cpu).training
    assert read_weight_schedules(training.reward_weight_schedules)["length"].at(50) == 0.5
    override = [*on_cpu, "--reward_weight_schedules", '{"length": {"steps": {"0": 1, "7": 0.5}}}']
    changed = load_recipe(path, override).training.reward_weight_schedules
    assert changed == {"length": {"steps": {"0": 1, "7": 0.5}}, "correctness": 1}
    assert load_recipe(path, [*on_cpu, "--reward_weight_schedules", "none"]).training.reward_weight_schedules is None
    assert merge_layers({"reward_weight_schedules": {"a": 1}}, {"reward_weight_schedules": {"a": None}}) == {
        "reward_weight_schedules": {"a": None}
    }
    with pytest.raises(UsageError, match="`reward_weight_schedules`"):
        load_recipe(path, [*on_cpu, "--reward_weight_schedules", '{"length": {"cosine": 1}}'])


# Training


@pytest.fixture
def build(tiny_policy, tmp_path):
    def _build(trainer_class=GD2POTrainer, folder="run", **overrides):
        return trainer_class(
            str(tiny_policy),
            [low_bytes, spread_bytes],
            tiny_args(tmp_path / folder, **overrides),
            train_dataset=letters_dataset(),
            eval_dataset=letters_dataset(2) if "eval_strategy" in overrides else None,
        )

    return _build


def spied(trainer):
    """Rewards and advantages of each training generation batch, and the step at which it was made."""
    batches, calculate, generate = [], trainer._calculate_rewards, trainer._generate_and_score_completions

    def calculate_rewards(*args, **kwargs):
        batches.append({"rewards": calculate(*args, **kwargs), "step": trainer.state.global_step})
        return batches[-1]["rewards"]

    def generate_and_score(inputs):
        output = generate(inputs)
        batches[-1].update(
            advantages=output["advantages"], counts=output["completion_mask"].sum(1), trains=trainer.model.training
        )
        return output

    trainer._calculate_rewards, trainer._generate_and_score_completions = calculate_rewards, generate_and_score
    return batches


def history(trainer):
    return [entry for entry in trainer.state.log_history if "gd2po/kept_ratio" in entry]


def test_the_weight_of_the_step_counts_is_logged_and_evaluations_keep_theirs(build):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
    trainer = build(reward_weight_schedules=RAMP, reward_weights=[-1.0, 2.0], max_steps=6, **settings)
    batches = spied(trainer)
    trainer.train()
    training = [batch for batch in batches if batch["trains"]]
    assert [batch["step"] for batch in training] == [0, 1, 2, 3, 4, 5]
    for batch in batches:
        weight = 2.0 * min(batch["step"] / 4, 1.0) if batch["trains"] else 2.0
        expected = compute_advantages(
            batch["rewards"], 4, reward_weights=[-1.0, weight], token_counts=batch["counts"]
        ).advantages
        assert torch.equal(batch["advantages"], expected)
    logged = history(trainer)
    assert [entry["gd2po/reward_weight/spread_bytes"] for entry in logged] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert {entry["gd2po/reward_weight/low_bytes"] for entry in logged} == {-1.0}
    assert logged[0]["gd2po/conflict_ratio"] == 0 < logged[1]["gd2po/conflict_ratio"], "at weight 0 it cannot conflict"
    evaluated = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    for entry in evaluated:
        rewards = [entry[f"eval_rewards/{name}/mean"] for name in ("low_bytes", "spread_bytes")]
        assert entry["eval_reward"] == pytest.approx(-rewards[0] + 2 * rewards[1], rel=1e-5)
    assert len(evaluated) == 3 and trainer.reward_weights.tolist() == [-1.0, 2.0]


def test_several_steps_on_a_generation_batch_have_the_weight_of_its_first(build):
    trainer = build(reward_weight_schedules=RAMP, max_steps=8, steps_per_generation=2, num_iterations=2)
    batches = spied(trainer)
    trainer.train()
    assert [batch["step"] for batch in batches] == [0, 4]
    logged = [entry.get("gd2po/reward_weight/spread_bytes") for entry in trainer.state.log_history[:8]]
    assert logged == [0.0, None, None, None, 1.0, None, None, None]


def test_under_grpo_it_is_the_weight_of_trls_own_advantages(build):
    settings = {"multi_objective_aggregation": "sum_then_normalize", "packed_update": False, "max_steps": 1}
    settings |= {"skip_zero_advantage_rows": False, "keep_prompts_together": False}
    batches, logged = [], []
    for trainer_class, weights in (
        (GD2POTrainer, {"reward_weight_schedules": {"spread_bytes": {"steps": {0: 0.25, 1: 1.0}}}}),
        (GRPOTrainer, {"reward_weights": [1.0, 0.25]}),
    ):
        trainer = build(trainer_class, **weights, **settings)
        batches.append(spied(trainer))
        trainer.train()
        logged.append(trainer.state.log_history[0]["reward"])
    assert torch.equal(batches[0][0]["advantages"], batches[1][0]["advantages"])
    assert logged[0] == logged[1]


def test_a_resumed_run_has_the_same_weights_bit_for_bit(build, tmp_path):
    settings = {"reward_weight_schedules": RAMP, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = build(**settings)
    whole.train()
    resumed = build(folder="resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    key = "gd2po/reward_weight/spread_bytes"
    assert [entry[key] for entry in history(resumed)] == [entry[key] for entry in history(whole)]
    for mine, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_an_unknown_reward_is_found_before_a_model_loads():
    args = tiny_args("unused", reward_weight_schedules={"brevity": 2})
    with pytest.raises(ValueError, match="`reward_weight_schedules` has 'brevity'"):
        GD2POTrainer("no/such-model", [low_bytes], args, train_dataset=letters_dataset())
