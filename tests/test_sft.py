"""`gd2po sft`: the warm-up trains on completions, leaves long examples out, and refuses what cannot work by name."""

import json

import pytest
import yaml
from dataset_files import write
from recipe_stand_ins import GOLD, save_dataset

from gd2po_trl.cli import main
from gd2po_trl.training.sft import load_sft_recipe, run_sft


@pytest.fixture
def settings(tmp_path, tiny_policy) -> dict:
    return {
        "model_name_or_path": str(tiny_policy),
        "dataset": "rlla_sft",
        "dataset_path": save_dataset(tmp_path, "rlla_sft"),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


@pytest.fixture
def recipe_file(tmp_path, settings):
    def _write(**changes):
        path = tmp_path / "sft.yaml"
        path.write_text(yaml.safe_dump({**settings, **changes}))
        return path

    return _write


def test_learns_the_demonstrations(recipe_file, tmp_path, capsys):
    path = recipe_file(max_steps=12, logging_steps=1, dataset_kwargs={"limit": 4})
    assert main(["sft", "--config", str(path), "--learning_rate", "1e-2"]) == 0
    run = tmp_path / "run"
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    assert (run / "model.safetensors").is_file()
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (written["learning_rate"], written["dataset_kwargs"]) == (1e-2, {"limit": 4})


def test_only_completions_are_learned_and_long_examples_are_left_out(recipe_file, tmp_path, caplog):
    rows = [
        {"instruction": "Tools: f", "input": word * length, "output": GOLD}
        for word, length in (("a", 10), ("b", 20), ("c", 2000))
    ]
    path = recipe_file(dataset_path=write(tmp_path / "rows.json", rows), max_length=400)
    trainer = run_sft(load_sft_recipe(path))
    assert "1 of 3 examples are longer than 400 tokens" in caplog.text
    assert len(trainer.train_dataset) == 2
    batch = trainer.data_collator([trainer.train_dataset[0]])
    learned = batch["input_ids"][batch["labels"] != -100]
    assert trainer.processing_class.decode(learned).startswith(GOLD)


def test_the_end_of_a_plain_example_is_counted(recipe_file, tmp_path):
    """TRL adds the end token, so the example that fills `max_length` without it would be cut."""
    rows = [{"prompt": "say ", "completion": "a" * length} for length in (3, 4)]
    path = recipe_file(dataset="prompts", dataset_path=write(tmp_path / "rows.jsonl", rows), max_length=8)
    trainer = run_sft(load_sft_recipe(path))
    assert [row["input_ids"][-1] for row in trainer.train_dataset] == [trainer.processing_class.eos_token_id]
    assert len(trainer.train_dataset[0]["input_ids"]) == 8


def test_trains_an_adapter(recipe_file, tmp_path):
    run_sft(load_sft_recipe(recipe_file(use_peft=True, lora_target_modules=["q_proj", "v_proj"])))
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": "rlla"}, ["rlla", "completion"]),
        ({"max_length": 8}, ["64 examples", "8 tokens", "max_length"]),
        ({"reward_funcs": ["length"]}, ["reward_funcs"]),
        ({"learning_rat": 1}, ["learning_rat", "Did you mean `learning_rate`"]),
        ({"model_name_or_path": "outputs/nowhere/at/all"}, ["outputs/nowhere/at/all"]),
        ({"dataset_path": "nowhere.json"}, ["nowhere.json"]),
        ({"max_steps": "ten"}, ["max_steps", "ten"]),
    ],
    ids=str,
)
def test_one_error_line(recipe_file, tmp_path, changes, words, capsys):
    if changes.get("dataset") == "rlla":
        changes = {**changes, "dataset_path": save_dataset(tmp_path, "rlla")}
    assert main(["sft", "--config", str(recipe_file(**changes))]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gd2po sft: ")]
    assert len(error) == 1 and all(word in error[0] for word in words), error


def test_help(capsys):
    assert main(["sft", "--help"]) == 0 and "--max_length" in capsys.readouterr().out
    assert main(["sft", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert "--max_length" in text and "--reward_funcs" not in text
    assert main(["sft"]) == 2
