"""A resumed run tells the truth: what it may change, what it refuses, what it writes down, and who else is there."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from tiny import letters_dataset, low_bytes

from gd2po_trl.cli import main
from gd2po_trl.errors import UsageError
from gd2po_trl.recipe import load_recipe
from gd2po_trl.reward_guard import RewardError
from gd2po_trl.training import run_recipe
from gd2po_trl.training.resuming import HISTORY, LOCK, RunRecord, only_run_in


LATEST = ["--resume_from_checkpoint", "latest"]


def write_recipe(folder: Path, policy: Path, **changes) -> Path:
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in letters_dataset()))
    settings = {
        "model_name_or_path": str(policy),
        "dataset_path": str(data),
        "method": "gd2po_hard",
        "reward_funcs": ["spread", "low"],
        "reward_kwargs": {"spread": {"type": "tiny.spread_bytes"}, "low": {"type": "tiny.low_bytes"}},
        "use_peft": True,
        "lora_r": 2,
        "lora_target_modules": ["q_proj", "v_proj"],
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "gradient_checkpointing": False,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "output_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return path


@pytest.fixture(scope="module")
def first_run(tiny_policy, tmp_path_factory):
    """Folder of a run of two steps with the checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("first")
    assert main(["train", "--config", str(write_recipe(folder, tiny_policy))]) == 0
    return folder


@pytest.fixture
def run(first_run, tmp_path):
    """A copy of the run that may be changed, and the recipe that leads there."""
    folder = Path(shutil.copytree(first_run / "run", tmp_path / "run"))
    recipe = yaml.safe_load((first_run / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "output_dir": str(folder)}))
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != LOCK}


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["--lora_r", "4"], ["lora_r"]),
        (["--no_use_peft"], ["use_peft"]),
        (["--dtype", "bfloat16"], ["dtype"]),
        (["--reward_funcs", "low", "spread"], ["reward_funcs"]),
        (["--reward_kwargs", '{"low": {"type": "tiny.spread_bytes"}}'], ["reward_kwargs"]),
        (["--learning_rate", "1e-3"], ["learning_rate", "0.01", "0.001"]),
        (["--lr_scheduler_type", "linear"], ["lr_scheduler_type"]),
        (["--warmup_steps", "2", "--weight_decay", "0.1"], ["warmup_steps", "weight_decay"]),
        (["--optim", "sgd"], ["optim"]),
    ],
    ids=str,
)
def test_what_cannot_change_is_refused_and_nothing_is_touched(run, words, keys, capsys):
    before = contents(run)
    assert main(["train", "--config", str(run / "recipe.yaml"), *LATEST, "--max_steps", "3", *words]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and "checkpoint-2" in error and all(key in error for key in keys), error
    assert contents(run) == before
    # The documented way to resume still works.
    recipe = load_recipe(run / "run" / "recipe.yaml", [*LATEST, "--max_steps", "3"])
    assert RunRecord(recipe, str(run / "run" / "checkpoint-2")).changes == ["max_steps: 2 -> 3"]


def test_another_policy_is_refused(run, tiny_policy, tmp_path, capsys):
    other = shutil.copytree(tiny_policy, tmp_path / "other")
    words = [*LATEST, "--max_steps", "3", "--model_name_or_path"]
    assert main(["train", "--config", str(run / "recipe.yaml"), *words, str(other)]) == 2
    assert "model_name_or_path" in capsys.readouterr().err


def test_what_changes_is_said_and_kept(run, caplog):
    words = ["--max_steps", "3", "--method", "gd2po_snr", "--reward_weights", "1", "0.5", "--save_steps", "1"]
    run_recipe(load_recipe(run / "recipe.yaml", [*LATEST, *words]))
    said = [record.message for record in caplog.records if record.message.startswith("From step 3 on, ")]
    expected = {
        'conflict_filter: "hard" -> "snr"',
        "max_steps: 2 -> 3",
        'method: "gd2po_hard" -> "gd2po_snr"',
        "reward_weights: null -> [1.0, 0.5]",
    }
    assert {message.removeprefix("From step 3 on, ").rstrip(".") for message in said} == expected

    text = (run / "run" / "recipe.yaml").read_text()
    assert all(f"#   from step 3 on, {change}" in text for change in expected)
    assert load_recipe(run / "run" / "recipe.yaml").training.conflict_filter == "snr"
    history = json.loads((run / "run" / HISTORY).read_text())
    assert [(segment["from_step"], segment["settings"]["method"]) for segment in history] == [
        (0, "gd2po_hard"),
        (2, "gd2po_snr"),
    ]
    card = (run / "run" / "README.md").read_text()
    assert all(change in card for change in expected)

    # Resumed from before the change, the change never was.
    again = load_recipe(
        run / "recipe.yaml", ["--resume_from_checkpoint", str(run / "run/checkpoint-1"), "--save_steps", "9"]
    )
    record = RunRecord(again, str(run / "run" / "checkpoint-1"))
    assert (record.step, record.changes, record.history()) == (1, ["save_steps: 1 -> 9"], [])
    # And from after it, once more the same.
    after = RunRecord(load_recipe(run / "run" / "recipe.yaml"), str(run / "run" / "checkpoint-3"))
    assert (after.changes, len(after.history())) == ([], 4)


def test_resuming_unchanged_says_nothing(run, caplog):
    run_recipe(load_recipe(run / "run" / "recipe.yaml", ["--resume_from_checkpoint", str(run / "run/checkpoint-1")]))
    assert "From step" not in caplog.text
    assert len(json.loads((run / "run" / HISTORY).read_text())) == 1


def test_the_other_spelling_of_the_same_settings_is_no_change(run, tiny_policy, monkeypatch):
    monkeypatch.chdir(tiny_policy.parent)
    words = ["--model_name_or_path", tiny_policy.name, "--reward_weights", "1", "1", "--report_to", "none"]
    words += ["--reward_kwargs", '{"unused": {"type": "tiny.low_bytes"}}']
    assert RunRecord(load_recipe(run / "recipe.yaml", words), str(run / "run" / "checkpoint-1")).changes == []


def test_a_checkpoint_of_another_folder_is_compared_with_its_own_run(run, tmp_path, capsys):
    words = ["--output_dir", str(tmp_path / "elsewhere"), "--resume_from_checkpoint", str(run / "run/checkpoint-1")]
    assert main(["train", "--config", str(run / "recipe.yaml"), *words, "--learning_rate", "1"]) == 2
    assert "learning_rate" in capsys.readouterr().err
    assert main(["train", "--config", str(run / "recipe.yaml"), *words]) == 0
    assert (tmp_path / "elsewhere" / "recipe.yaml").is_file()


def test_a_finished_run_cannot_be_said_to_have_trained_otherwise(run, capsys):
    before = contents(run)
    assert main(["train", "--config", str(run / "recipe.yaml"), *LATEST, "--method", "gdpo"]) == 2
    assert "max_steps" in capsys.readouterr().err
    assert contents(run) == before


def test_a_run_of_an_earlier_version_has_its_recipe_alone(run):
    (run / "run" / HISTORY).unlink()
    recipe = load_recipe(run / "recipe.yaml", ["--method", "gdpo", "--max_steps", "9"])
    changes = RunRecord(recipe, str(run / "run" / "checkpoint-2")).changes
    assert 'method: "gd2po_hard" -> "gdpo"' in changes
    with pytest.raises(UsageError, match="learning_rate"):
        RunRecord(load_recipe(run / "recipe.yaml", ["--learning_rate", "1"]), str(run / "run" / "checkpoint-2"))


def test_a_checkpoint_that_does_not_load_leaves_the_recipe(run, monkeypatch):
    before = (run / "run" / "recipe.yaml").read_bytes()
    import torch

    torch.save({"state": {}, "param_groups": []}, run / "run" / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(ValueError, match="param"):
        run_recipe(load_recipe(run / "recipe.yaml", [*LATEST, "--max_steps", "3", "--seed", "5"]))
    assert (run / "run" / "recipe.yaml").read_bytes() == before


# Two runs in one folder


def test_a_second_run_in_the_same_folder_is_refused(run, capsys):
    before = contents(run)
    with FileLock(run / "run" / LOCK):
        assert main(["train", "--config", str(run / "recipe.yaml"), *LATEST, "--max_steps", "3"]) == 2
    error = capsys.readouterr().err
    assert "in use by another run" in error and str(run / "run") in error and "Traceback" not in error
    assert contents(run) == before


def test_a_folder_is_free_after_a_run_however_it_ended(tmp_path):
    for error in (ValueError, KeyboardInterrupt, None):
        try:
            with only_run_in(tmp_path):
                with pytest.raises(UsageError), only_run_in(tmp_path):
                    pass
                if error is not None:
                    raise error
        except (ValueError, KeyboardInterrupt):
            pass


# What ends a training


def fails_in_step_2(completions, trainer_state, **kwargs):
    if trainer_state.global_step == 1:
        raise ZeroDivisionError("no good")
    return low_bytes(completions)


def interrupts_in_step_2(completions, trainer_state, **kwargs):
    if trainer_state.global_step == 1:
        signal.raise_signal(signal.SIGINT)
    return low_bytes(completions)


def rewards(function) -> dict:
    return {"reward_kwargs": {"spread": {"type": "tiny.spread_bytes"}, "low": {"type": f"{__name__}.{function}"}}}


def test_a_reward_that_raises_tells_where_and_how_to_go_on(tiny_policy, tmp_path, capsys):
    path = write_recipe(tmp_path, tiny_policy, **rewards("fails_in_step_2"))
    assert main(["train", "--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert "'low' raised ZeroDivisionError: no good" in error
    assert f'{Path(__file__).name}", line' in error and 'raise ZeroDivisionError("no good")' in error
    assert "guard.py" not in error and "site-packages" not in error and "Traceback (most" not in error
    assert "in step 2 of 2" in error
    assert f"gd2po train --config {tmp_path}/run/recipe.yaml --resume_from_checkpoint latest" in error
    # Python has it in the traceback.
    with pytest.raises(RewardError) as raised:
        run_recipe(load_recipe(path, LATEST))
    assert any("--resume_from_checkpoint latest" in note for note in raised.value.__notes__)


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tiny_policy, tmp_path, capsys):
    path = write_recipe(tmp_path, tiny_policy, **rewards("fails_in_step_2"), save_steps=10)
    assert main(["train", "--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert "in step 2 of 2" in error and "no checkpoint yet" in error and "--resume_from" not in error


def test_ctrl_c_tells_how_to_go_on(tiny_policy, tmp_path, capsys):
    path = write_recipe(tmp_path, tiny_policy, **rewards("interrupts_in_step_2"))
    assert main(["train", "--config", str(path)]) == 130
    error = capsys.readouterr().err
    assert "interrupted in step 2 of 2" in error and "--resume_from_checkpoint latest" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3: file write failed"),
    ],
    ids=["OSError", "torch"],
)
def test_a_full_disk_is_said(tiny_policy, tmp_path, monkeypatch, capsys, error):
    from transformers import Trainer

    save = Trainer._save_checkpoint

    def save_or_not(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise error
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_save_checkpoint", save_or_not)
    assert main(["train", "--config", str(write_recipe(tmp_path, tiny_policy))]) == 2
    said = capsys.readouterr().err
    assert "disk" in said and "full" in said and "--resume_from_checkpoint latest" in said and "Traceback" not in said


def test_a_killed_run_leaves_the_folder_free(tiny_policy, tmp_path):
    """The lock is the process's, not the file's."""
    code = (
        "import sys, time; from gd2po_trl.training.resuming import only_run_in\n"
        f"with only_run_in({str(tmp_path)!r}):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == "held"
        with pytest.raises(UsageError, match="another run"), only_run_in(tmp_path):
            pass
        process.kill()
    time.sleep(0.1)
    with only_run_in(tmp_path):
        pass
