"""Resuming: which checkpoint is taken, and that a killed run ends where an uninterrupted one does."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import letters_dataset, low_bytes, spread_bytes, tiny_args

from gd2po_trl import GD2POTrainer
from gd2po_trl.errors import UsageError
from gd2po_trl.run_log import checkpoint_to_resume, find_damage


@pytest.fixture(scope="module")
def finished(tiny_policy, tmp_path_factory):
    """Output of a run with the checkpoints 1 and 2."""
    output = tmp_path_factory.mktemp("finished")
    args = tiny_args(output, save_strategy="steps", save_steps=1)
    GD2POTrainer(str(tiny_policy), [low_bytes, spread_bytes], args, train_dataset=letters_dataset()).train()
    return output


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_the_newest_is_taken(run):
    for word in (True, "true", "latest"):
        assert checkpoint_to_resume(word, run) == str(run / "checkpoint-2")
    named = str(run / "checkpoint-1")
    assert checkpoint_to_resume(named, run) == named


def test_a_fresh_start_meets_no_checkpoints(run):
    for word in (None, False, "false"):
        with pytest.raises(UsageError, match="checkpoints of another run"):
            checkpoint_to_resume(word, run)


def test_the_folder_above_is_no_checkpoint(run):
    with pytest.raises(UsageError, match="is missing"):
        checkpoint_to_resume(str(run), run)


def test_nothing_to_resume(tmp_path):
    for word in ("latest", None, False, "false"):
        assert checkpoint_to_resume(word, tmp_path / "nowhere") is None
    with pytest.raises(UsageError, match="no such folder"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-9"), tmp_path)


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_checkpoint_is_skipped_with_a_warning(run, name, caplog):
    truncate(run / "checkpoint-2" / name)
    with caplog.at_level(logging.WARNING):
        assert checkpoint_to_resume("latest", run) == str(run / "checkpoint-1")
    assert "checkpoint-2" in caplog.text and name in caplog.text
    with pytest.raises(UsageError, match=name):
        checkpoint_to_resume(str(run / "checkpoint-2"), run)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_checkpoint_without_a_file_is_skipped(run, name):
    (run / "checkpoint-2" / name).unlink()
    assert checkpoint_to_resume("latest", run) == str(run / "checkpoint-1")


def test_sharded_weights(run):
    checkpoint = run / "checkpoint-2"
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_damage(checkpoint) == "model-00002-of-00002.safetensors is missing"


@pytest.mark.parametrize("name", ["optimizer.bin", "pytorch_model_fsdp.bin"])
def test_layout_of_fsdp_with_a_full_state_dict(run, name):
    checkpoint = run / "checkpoint-2"
    shutil.copy(checkpoint / "optimizer.pt", checkpoint / "pytorch_model_fsdp.bin")
    (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer.bin")
    assert find_damage(checkpoint) is None
    truncate(checkpoint / name)
    assert find_damage(checkpoint) == f"{name} is truncated"


@pytest.mark.parametrize("step", [3, 4, 6])
def test_prompts_come_in_the_same_order_after_resuming(tiny_policy, tmp_path, step):
    """16 prompts, 4 a step: within the first epoch, at its end, and within the second."""
    seen = {}

    def train(folder, **kwargs):
        def note(prompts, completions, trainer_state, **_):
            seen.setdefault(folder, {})[trainer_state.global_step] = prompts
            return low_bytes(completions)

        sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 10}
        args = tiny_args(tmp_path / "run", save_strategy="steps", save_steps=step, **sizes)
        trainer = GD2POTrainer(str(tiny_policy), [note, spread_bytes], args, train_dataset=letters_dataset(16))
        trainer.train(**kwargs)
        return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}

    expected = train("whole")
    resumed = train("resumed", resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert len({tuple(prompts) for prompts in seen["whole"].values()}) == 10
    assert seen["resumed"] == {at: prompts for at, prompts in seen["whole"].items() if at >= step}
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_finished_run_is_not_trained_further(tiny_policy, tmp_path, lora):
    """Killed after its last checkpoint, and before it wrote the policy."""

    def build():
        args = tiny_args(tmp_path, save_strategy="steps", save_steps=1, lr_scheduler_type="constant")
        return GD2POTrainer(
            str(tiny_policy),
            [low_bytes, spread_bytes],
            args,
            train_dataset=letters_dataset(),
            peft_config=LoraConfig(r=2, target_modules="all-linear") if lora else None,
        )

    whole, again = build(), build()
    whole.train()
    for resume in (str(tmp_path / "checkpoint-2"), True):
        assert again.train(resume_from_checkpoint=resume).global_step == 2
        assert [entry["step"] for entry in again.state.log_history] == [1, 2]
        for (name, value), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
            assert torch.equal(value, other), name


def test_killed_runs_end_like_one_left_alone():
    """A few of the trials of `benchmarks/kill_and_resume.py`."""
    import subprocess

    script = Path(__file__).parent.parent / "benchmarks" / "kill_and_resume.py"
    command = [sys.executable, str(script), "--trials", "3", "--steps", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 runs killed" in done.stdout
    assert "3 have the same weights bit for bit and 3 the same log history" in done.stdout, done.stdout
