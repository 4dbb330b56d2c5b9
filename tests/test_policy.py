"""What a recipe needs before it trains: a whole model or an adapter, and the packages that its keys ask for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import letters_dataset
from transformers import AutoModelForCausalLM
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from gd2po_trl.cli import main
from gd2po_trl.errors import UsageError
from gd2po_trl.preflight import check_packages
from gd2po_trl.recipe import load_recipe
from gd2po_trl.training import run_recipe
from gd2po_trl.training.sft import load_sft_recipe


@pytest.fixture(scope="module")
def adapter(tiny_policy, tmp_path_factory) -> Path:
    """A LoRA adapter without a tokenizer, whose weights are not those of a new one."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_policy), config).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(adapter, tmp_path) -> dict:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in letters_dataset()))
    return {
        "model_name_or_path": str(adapter),
        "dataset_path": str(data),
        "reward_funcs": ["tiny.spread_bytes", "tiny.low_bytes"],
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def write(settings, tmp_path):
    def _write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**settings, **changes}))
        return path

    return _write


# An adapter as the policy


def test_an_adapter_trains_on(write, adapter, tiny_policy, tmp_path, caplog):
    """Learning rate 0 leaves it as it was; else its own matrices move, and it stays an adapter of the same model."""
    run = tmp_path / "run"
    run_recipe(load_recipe(write(learning_rate=0.0)))
    before, same = load_file(adapter / "adapter_model.safetensors"), load_file(run / "adapter_model.safetensors")
    assert before.keys() == same.keys() and all(torch.equal(value, same[key]) for key, value in before.items())
    shutil.rmtree(run)

    trainer = run_recipe(load_recipe(write(use_peft=True, lora_r=8, lora_target_modules=["q_proj", "v_proj"])))
    trained = load_file(run / "adapter_model.safetensors")
    assert before.keys() == trained.keys() and any(not torch.equal(before[key], trained[key]) for key in before)
    assert trainer.train_dataset.num_rows == 16
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (2, str(tiny_policy))
    # What does not apply is said, and not written down as if it had.
    assert "lora_r: 8" in caplog.text and "lora_target_modules" not in caplog.text
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (written["lora_r"], written["use_peft"]) == (2, True)


def test_a_dry_run_of_an_adapter(write, adapter, capsys):
    assert main(["train", "--config", str(write()), "--dry-run"]) == 0
    assert f"Policy    {adapter}" in capsys.readouterr().out


def test_kl_is_measured_from_the_adapter(write, adapter):
    trainer = run_recipe(load_recipe(write(beta=0.1, learning_rate=0.0)))
    logged = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert logged and all(abs(value) < 1e-6 for value in logged)


def test_after_a_warm_up_with_an_adapter(write, tiny_policy, tmp_path, capsys):
    """`gd2po sft --use_peft`, then the same again from its output, then `gd2po train`."""
    rows = [{"prompt": f"say {letter}: ", "completion": letter} for letter in "abcdefgh"]
    data = tmp_path / "sft.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--use_cpu", "--no_bf16", "--report_to", "none", "--save_strategy", "no", "--max_steps", "1"]
    words += ["--dataset_path", str(data), "--learning_rate", "1e-2", "--gradient_checkpointing", "false"]
    first, second = tmp_path / "sft", tmp_path / "sft2"
    assert (
        main(["sft", "--model_name_or_path", str(tiny_policy), "--use_peft", "--output_dir", str(first), *words]) == 0
    )
    assert main(["sft", "--model_name_or_path", str(first), "--output_dir", str(second), *words]) == 0
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys() and any(not torch.equal(one[key], two[key]) for key in one)
    assert main(["train", "--config", str(write(model_name_or_path=str(second)))]) == 0


@pytest.mark.parametrize("base", ["outputs/no/such/model", None])
def test_an_adapter_without_its_model(write, adapter, tmp_path, capsys, base):
    folder = tmp_path / "lost"
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    assert main(["train", "--config", str(write(model_name_or_path=str(folder)))]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and str(folder) in error and f"adapter of the model '{base}'" in error


def test_a_broken_adapter_is_one_line(write, adapter, tmp_path, capsys):
    folder = tmp_path / "broken"
    shutil.copytree(adapter, folder)
    (folder / "adapter_config.json").write_text("{")
    assert main(["train", "--config", str(write(model_name_or_path=str(folder)))]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and "adapter_config.json" in error


def test_a_folder_of_checkpoints_is_told_from_a_policy(write, tmp_path, capsys):
    (tmp_path / "checkpoints" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-10").mkdir()
    assert main(["train", "--config", str(write(model_name_or_path=str(tmp_path / "checkpoints")))]) == 2
    assert "checkpoint-10." in capsys.readouterr().err


# Packages, optimizers and schedules


def test_a_tracker_that_is_not_installed(write, capsys):
    missing = sorted(set(INTEGRATION_TO_CALLBACK) - set(get_available_reporting_integrations()) - {"kubeflow"})[-1]
    assert main(["train", "--config", str(write(report_to=[missing], model_name_or_path="no/such/policy"))]) == 2
    error = capsys.readouterr().err
    assert f"`report_to` names {missing}" in error and "pip install" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"report_to": "wandbb"}, ["report_to", "wandbb", "wandb"]),
        ({"optim": "grokadamw"}, ["optim", "grokadamw", "install"]),
        ({"optim": "galore_adamw"}, ["optim", "galore_adamw"]),
        ({"optim": "adamw_torch", "optim_args": "momentun=0.9"}, ["optim_args", "momentun"]),
        ({"optim": "sgd", "optim_args": "momentum"}, ["optim_args", "momentum"]),
        ({"gradient_checkpointing_kwargs": {"use_reentrent": False}}, ["Did you mean `use_reentrant`?"]),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, ["lr_scheduler_type", "min_lr"]),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"min_lr": 1e-7}}, ["lr_scheduler_kwargs", "min_lr"]),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 2}}, ["lr_scheduler_kwargs"]),
    ],
    ids=str,
)
def test_what_cannot_be_made_is_refused_before_the_policy_is_looked_for(write, changes, words):
    path = write(model_name_or_path="no/such/policy", **changes)
    for recipe in (load_recipe(path), load_sft_recipe(sft_copy(path))):
        with pytest.raises(UsageError) as error:
            check_packages(recipe.training)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)


def test_misspelt_options_of_generation(write):
    with pytest.raises(UsageError, match="Did you mean `repetition_penalty`"):
        check_packages(load_recipe(write(generation_kwargs={"repetition_penality": 1.2})).training)
    check_packages(load_recipe(write(generation_kwargs={"repetition_penalty": 1.2, "do_sample": True})).training)


def test_options_of_the_model_that_it_does_not_take(write, tiny_policy, capsys):
    path = write(model_name_or_path=str(tiny_policy), model_init_kwargs={"foo": 1})
    assert main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "foo" in error and "model_init_kwargs" in error and "Traceback" not in error


def test_all_linear_as_text(write):
    assert load_recipe(write(lora_target_modules="all-linear")).model.lora_target_modules == "all-linear"


def sft_copy(path: Path) -> Path:
    settings = yaml.safe_load(path.read_text())
    for key in ("reward_funcs", "num_generations", "max_completion_length"):
        del settings[key]
    copy = path.with_name("sft.yaml")
    copy.write_text(yaml.safe_dump(settings))
    return copy


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"])
def test_what_can_be_made_is_taken(write, optim, schedule):
    check_packages(load_recipe(write(optim=optim, lr_scheduler_type=schedule)).training)
