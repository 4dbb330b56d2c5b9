"""Validation during training: when, how it samples, what it averages, and that training does not notice."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tiny import conversational_dataset, letters_dataset, low_bytes, spread_bytes, text_of, tiny_args

from gd2po_trl import GD2POConfig, GD2POTrainer
from gd2po_trl.errors import UsageError
from gd2po_trl.evaluation.decoding import load_decoder
from gd2po_trl.evaluation.settings import GenerationSettings
from gd2po_trl.recipe import load_recipe
from gd2po_trl.training import load_datasets, run_recipe
from gd2po_trl.validation import _sampling_changes


AS_PUBLISHED = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_on_start": True,
    "eval_on_end": True,
    "eval_temperature": 0.0,
    "num_generations_eval": 1,
    "per_device_eval_batch_size": 4,
}


def place_in_alphabet(prompts, completions, **kwargs):
    """A reward of the prompt alone: its mean over a set is known beforehand."""
    return [float(ord(text_of(prompt).removeprefix("say ")[0]) - ord("a")) for prompt in prompts]


def build(policy, folder, sets, reward_funcs=(low_bytes, spread_bytes), **overrides) -> GD2POTrainer:
    args = tiny_args(folder, max_steps=3, **{**AS_PUBLISHED, **overrides})
    return GD2POTrainer(
        str(policy), list(reward_funcs), args, train_dataset=conversational_dataset(), eval_dataset=sets
    )


def evaluations(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if any(key.startswith("eval_") for key in entry)]


@pytest.fixture(scope="module")
def validated(tiny_policy, tmp_path_factory):
    """A run on two named sets, with sampled training rollouts."""
    folder = tmp_path_factory.mktemp("validated")
    sets = {"five": conversational_dataset(5), "a/b": conversational_dataset(3)}
    rewards = [low_bytes, spread_bytes, place_in_alphabet]
    trainer = build(tiny_policy, folder, sets, rewards, log_completions=True, num_completions_to_print=0)
    trainer.train()
    return trainer


def test_before_the_first_step_every_few_and_at_the_end(validated):
    found = [
        (entry["step"], name)
        for entry in evaluations(validated)
        for name in ("five", "a/b")
        if f"eval_{name}_loss" in entry
    ]
    assert found == [(step, name) for step in (0, 2, 3) for name in ("five", "a/b")]


def test_sets_have_metrics_of_their_own_and_exact_means(validated):
    for entry in evaluations(validated):
        name, rows = ("five", 5) if "eval_five_loss" in entry else ("a/b", 3)
        assert all(key.startswith(f"eval_{name}_") or key in ("epoch", "step") for key in entry)
        # Over batches of 4 and 1 the mean of 0, ..., 4 would be 2.75.
        assert entry[f"eval_{name}_rewards/place_in_alphabet/mean"] == (rows - 1) / 2
        expected = torch.arange(rows).float().std().item()
        assert entry[f"eval_{name}_rewards/place_in_alphabet/std"] == pytest.approx(expected)
        parts = [entry[f"eval_{name}_rewards/{reward}/mean"] for reward in ("low_bytes", "spread_bytes")]
        assert entry[f"eval_{name}_reward"] == pytest.approx(sum(parts) + (rows - 1) / 2)


def test_completions_of_every_set_are_kept(validated):
    folder = tables_of(validated)
    names = sorted(path.name for path in folder.glob("eval_*"))
    assert names == [f"eval_{name}_{step:05d}.parquet" for name in ("a_b", "five") for step in (0, 2, 3)]
    table = pd.read_parquet(folder / "eval_five_00002.parquet")
    assert list(table) == ["step", "prompt", "completion", "low_bytes", "spread_bytes", "place_in_alphabet"]
    assert sorted(table["place_in_alphabet"]) == [0, 1, 2, 3, 4]
    entry = next(entry for entry in evaluations(validated) if entry["step"] == 2 and "eval_five_loss" in entry)
    assert table["low_bytes"].mean() == pytest.approx(entry["eval_five_rewards/low_bytes/mean"])


def tables_of(trainer):
    from pathlib import Path

    return Path(trainer.args.output_dir) / "completions"


def test_greedy_as_gd2po_eval(validated, tiny_policy):
    table = pd.read_parquet(tables_of(validated) / "eval_five_00000.parquet")
    settings = GenerationSettings(str(tiny_policy), max_new_tokens=8)
    with load_decoder(settings) as decoder:
        prompts = [[dict(message) for message in prompt] for prompt in table["prompt"]]
        encoded = decoder.encode(prompts)
        decoder.load_model(max(map(len, encoded)))
        expected = [record["completion"] for record in decoder.complete(encoded)]
    assert [completion[0]["content"] for completion in table["completion"]] == expected


def test_training_does_not_notice(validated, tiny_policy, tmp_path):
    off = {"eval_strategy": "no", "eval_on_start": False, "eval_on_end": False}
    rewards = [low_bytes, spread_bytes, place_in_alphabet]
    plain = build(tiny_policy, tmp_path, None, rewards, **off)
    plain.train()
    assert evaluations(plain) == []
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, validated.model.state_dict()[name]), name
    logged = [entry for entry in validated.state.log_history if "grad_norm" in entry]
    assert [entry["loss"] for entry in logged] == [
        entry["loss"] for entry in plain.state.log_history if "grad_norm" in entry
    ]


def test_a_resumed_run_evaluates_as_the_uninterrupted_one(tiny_policy, tmp_path):
    sets = {"five": conversational_dataset(5)}
    whole = build(tiny_policy, tmp_path / "run", sets, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = build(tiny_policy, tmp_path / "run", sets)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.args.eval_on_start  # not evaluated again, and not forgotten

    def figures(trainer):
        names = ("step", "eval_five_rewards/low_bytes/mean", "eval_five_reward")
        return [[entry[name] for name in names] for entry in evaluations(trainer)]

    assert figures(resumed) == figures(whole) and [row[0] for row in figures(whole)] == [0, 2, 3]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_single_set_keeps_trls_names(tiny_policy, tmp_path):
    """Several completions per prompt, sampled at a temperature of their own, and a reward that scores only some."""

    def second_half(prompts, completions, **kwargs):
        return [None if value < 2 else value for value in place_in_alphabet(prompts, completions)]

    sampled = {"eval_temperature": 0.5, "num_generations_eval": 2, "eval_on_start": False, "eval_steps": 3}
    trainer = build(tiny_policy, tmp_path, letters_dataset(5), [low_bytes, second_half], **sampled)
    trainer.train()
    (entry,) = evaluations(trainer)
    assert entry["eval_rewards/second_half/mean"] == 3.0
    assert trainer.generation_config.do_sample and trainer.generation_config.temperature == trainer.temperature == 1.0
    assert trainer.evaluate(letters_dataset(3), metric_key_prefix="test")["test_loss"] is not None


def test_sampling_is_put_back_after_a_failure(tiny_policy, tmp_path):
    def fails(completions, **kwargs):
        raise ZeroDivisionError("no score")

    trainer = build(tiny_policy, tmp_path, letters_dataset(2), [fails])
    config = trainer.generation_config
    with pytest.raises(Exception, match="no score"):
        trainer.evaluate()
    assert trainer.generation_config is config
    trainer._validation.record([], [], torch.zeros(0, 1))  # outside an evaluation nothing is kept
    assert trainer._validation._rewards == []


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_vllm_gets_the_temperature(temperature):
    engine = SimpleNamespace(temperature=1.0, generation_kwargs={"temperature": 0.9, "seed": 3})
    trainer = SimpleNamespace(use_vllm=True, vllm_generation=engine, temperature=1.0)
    for place, name, value in _sampling_changes(trainer, temperature):
        setattr(place, name, value)
    assert (engine.temperature, engine.generation_kwargs) == (temperature, {"seed": 3})
    assert trainer.temperature == (temperature or 1.0)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "cold"])
def test_a_wrong_temperature_is_named(value):
    with pytest.raises(ValueError, match="`eval_temperature` is"):
        GD2POConfig("x", use_cpu=True, bf16=False, eval_temperature=value)


def test_no_set_to_evaluate_on_at_the_end(tiny_policy, tmp_path):
    with pytest.raises(ValueError, match="eval_on_end"):
        build(tiny_policy, tmp_path, None, eval_strategy="no", eval_on_start=False)


# Recipes


@pytest.fixture
def recipe_file(tmp_path, tiny_policy):
    for name, rows in (("train", 16), ("one", 5), ("two", 3)):
        lines = [json.dumps({"prompt": f"say {chr(97 + row)}"}) for row in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "model_name_or_path": str(tiny_policy),
        "dataset_path": str(tmp_path / "train.jsonl"),
        "eval_dataset": {
            "one": {"name": "prompts", "path": str(tmp_path / "one.jsonl")},
            "two": {"name": "pku_saferlhf", "path": str(tmp_path / "two.jsonl"), "drop_duplicates": "all"},
        },
        "reward_funcs": ["length", "place"],
        "reward_kwargs": {"place": {"type": f"{__name__}.place_in_alphabet"}},
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        **{key: AS_PUBLISHED[key] for key in AS_PUBLISHED if key != "eval_steps"},
        "eval_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "num_generations": 4,
        "max_completion_length": 4,
        "report_to": "none",
        "save_strategy": "no",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(settings))
    return path


def test_a_recipe_with_named_sets(recipe_file, tmp_path):
    trainer = run_recipe(load_recipe(recipe_file))
    assert [entry["step"] for entry in evaluations(trainer)] == [0, 0, 1, 1]
    means = {key: value for entry in evaluations(trainer) for key, value in entry.items()}
    assert means["eval_one_rewards/place/mean"] == 2 and means["eval_two_rewards/place/mean"] == 1
    again = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert again.arguments.eval_datasets() == load_recipe(recipe_file).arguments.eval_datasets()


def test_one_option_switches_validation_off(recipe_file):
    off = load_recipe(recipe_file, ["--eval_strategy", "no"])
    assert not off.training.eval_on_start and not off.training.eval_on_end
    assert load_datasets(off)[1] is None
    start_only = load_recipe(recipe_file, ["--eval_strategy", "no", "--eval_on_start", "true"])
    assert start_only.training.eval_on_start and set(load_datasets(start_only)[1]) == {"one", "two"}


def test_one_set_in_place_of_several(recipe_file, tmp_path):
    single = load_recipe(
        recipe_file, ["--eval_dataset", "prompts", "--eval_dataset_path", str(tmp_path / "one.jsonl")]
    )
    assert len(load_datasets(single)[1]) == 5
    more = {"x": {"name": "prompts", "path": str(tmp_path / "two.jsonl")}, "one": None}
    assert set(load_datasets(load_recipe(recipe_file, ["--eval_dataset", json.dumps(more)]))[1]) == {"x", "two"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--eval_dataset_path", "x.jsonl"], "eval_dataset_path"),
        (["--eval_dataset", '{"three": null}'], "'three'"),
        (["--eval_dataset", '{"one": null, "two": null}'], "`eval_dataset` is not set"),
        (["--eval_dataset", '{"one": "prompts"}'], "'one'"),
        (["--eval_dataset", '{"": {}}'], "''"),
        (["--eval_dataset", '{"one": '], "not valid JSON"),
        (["--eval_dataset", '{"alpacca": {}}'], "did you mean 'alpaca'"),
        (["--eval_dataset", '{"alpaca": {"sizes": 3}}'], "takes no 'sizes'"),
        (["--eval_dataset", "none"], "`eval_dataset` is not set"),
    ],
)
def test_mistakes_in_named_sets(recipe_file, words, message):
    with pytest.raises(UsageError, match=message):
        load_datasets(load_recipe(recipe_file, words))
