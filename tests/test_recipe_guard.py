"""Every recipe under recipes/ is read, resolved, documented, listed, and trains one real step on tiny stand-ins."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from recipe_stand_ins import save_dataset, save_talking_policy, swap_reward
from safetensors.torch import load_file
from trl import ModelConfig

from gd2po_trl import GD2POConfig
from gd2po_trl.cli import main
from gd2po_trl.errors import UsageError
from gd2po_trl.recipe import Recipe, RecipeArguments, load_recipe
from gd2po_trl.recipe.catalog import files_of, recipe_names, recipe_path, summary
from gd2po_trl.recipe.files import read_recipe_file
from gd2po_trl.reward_models.direction import published_direction, resolve_direction
from gd2po_trl.training import run_recipe
from gd2po_trl.training.resuming import write_resolved_recipe
from gd2po_trl.training.sft import KINDS as SFT_KINDS
from gd2po_trl.training.sft import load_sft_recipe, run_sft


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
NAMES = recipe_names()
RL_KINDS = (RecipeArguments, GD2POConfig, ModelConfig)
ON_CPU = ["--use_cpu", "True"]
# GPUs for which a recipe states its batches.
GPUS = {name: 8 if name.endswith("/full") else 1 for name in NAMES}


def is_warmup(name: str) -> bool:
    return "reward_funcs" not in read_recipe_file(recipe_path(name))


RL_NAMES = [name for name in NAMES if not is_warmup(name)]


@pytest.fixture(scope="module")
def talking_policy(tmp_path_factory) -> Path:
    return save_talking_policy(tmp_path_factory.mktemp("talking_policy"))


def test_every_file_is_a_recipe_or_belongs_to_one():
    used = {file.resolve() for name in NAMES for file in files_of(recipe_path(name))}
    used |= set((RECIPES / "accelerate_configs").glob("*.yaml"))
    assert {file.resolve() for file in RECIPES.rglob("*.y*ml")} == used
    assert not any(file.name.startswith("_") for file in map(recipe_path, NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name):
    assert 20 < len(summary(recipe_path(name))) <= 119
    assert name in recipe_path(name).read_text() or name.startswith("quickstart/")


# Reading with the real sizes


@pytest.mark.parametrize("name", NAMES)
def test_reads_with_its_own_sizes(name):
    path = recipe_path(name)
    recipe = load_sft_recipe(path, ON_CPU) if is_warmup(name) else load_recipe(path, ON_CPU)
    assert recipe.training.output_dir.startswith("outputs/")
    for key in ("model_name_or_path", "dataset_path", "eval_dataset_path"):
        assert not str(recipe.settings.get(key) or "").startswith(("/", "~", "."))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_writes_down_is_the_recipe_again(name, tmp_path):
    load = load_sft_recipe if is_warmup(name) else load_recipe
    accelerator = ["--accelerator_config", '{"split_batches": false}']
    recipe = load(recipe_path(name), [*ON_CPU, *accelerator, "--output_dir", str(tmp_path)])
    assert load(write_resolved_recipe(recipe)).settings == recipe.settings


@pytest.mark.parametrize("name", [name for name in RL_NAMES if name.endswith(("/full", "/lora"))])
def test_batches(name):
    training = load_recipe(recipe_path(name), ON_CPU).training
    per_step = training.per_device_train_batch_size * GPUS[name] * training.gradient_accumulation_steps
    # The paper: 512 prompts x 4 rollouts per generation batch, 128 x 4 per optimizer step; LoRA has a quarter of both.
    paper = (2048, 512)
    assert (training.generation_batch_size, per_step) == (paper if GPUS[name] == 8 else (512, 128))
    assert training.num_generations == 4 and training.beta == 0.0 and training.max_completion_length == 1024
    assert training.learning_rate == (1e-6 if GPUS[name] == 8 else 1e-5)
    recipe = read_recipe_file(recipe_path(name))
    assert recipe["vllm_max_model_length"] == recipe["max_prompt_tokens"] + recipe["max_completion_length"]


def test_table_of_gradient_accumulation_steps():
    text = (RECIPES / "_full.yaml").read_text()
    gpus = [int(word) for word in re.search(r"# +GPUs +([\d ]+)\n", text)[1].split()]
    steps = [int(word) for word in re.search(r"# +gradient_accumulation_steps +([\d ]+) at", text)[1].split()]
    assert [8 * count * step for count, step in zip(gpus, steps, strict=True)] == [512] * len(gpus)


@pytest.mark.parametrize("name", RL_NAMES)
def test_reward_models_point_the_right_way(name):
    """Fails if the sign of a reward is flipped: a cost model in place of a reward model, or the other way round."""
    for label, kwargs in (read_recipe_file(recipe_path(name)).get("reward_kwargs") or {}).items():
        if kwargs.get("type") == "reward_model":
            published = published_direction(kwargs["model"])
            assert published is not None
            assert resolve_direction(published, kwargs["sign"], None, kwargs["model"])[1] == label
            assert kwargs["higher_is"] == label


def validation_of(name: str) -> tuple:
    recipe = load_recipe(recipe_path(name), ON_CPU)
    training = recipe.training
    every = training.eval_steps * training.per_device_train_batch_size * training.gradient_accumulation_steps
    batches = every * GPUS[name] / training.generation_batch_size
    start_and_end = training.eval_on_start and training.eval_on_end
    return start_and_end, batches, training.eval_temperature, training.num_generations_eval


@pytest.mark.parametrize("name", [name for name in RL_NAMES if name.endswith(("/full", "/lora"))])
def test_validation_is_the_published_one(name):
    """Before the first step, every 10 generation batches and at the end; greedy, one completion."""
    training = load_recipe(recipe_path(name), ON_CPU).training
    if name.endswith("/lora"):
        assert training.eval_strategy == "no" and not training.eval_on_start and not training.eval_on_end
    else:
        assert validation_of(name) == (True, 10, 0.0, 1) and training.delta == 3.0
    off = load_recipe(recipe_path(name), [*ON_CPU, "--eval_strategy", "no"]).training
    assert off.eval_strategy == "no" and not off.eval_on_start and not off.eval_on_end


# One real step


def one_step(name: str, folder: Path, policy: Path) -> tuple[Recipe, list[str]]:
    """The recipe with model, data and sizes swapped, and everything else as it is."""
    settings = read_recipe_file(recipe_path(name))
    options = {
        "model_name_or_path": policy,
        "dataset_path": save_dataset(folder, settings["dataset"]),
        "output_dir": folder / "run",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": min(2, settings.get("gradient_accumulation_steps", 1)),
        # A learning rate that rises from 0 is still 0 at the first step.
        "warmup_steps": 0,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if not is_warmup(name):
        labels = settings["reward_funcs"]
        swapped = {label: swap_reward(folder, label, kwargs) for label, kwargs in _reward_kwargs(settings).items()}
        options |= {
            "reward_kwargs": json.dumps(swapped),
            "max_completion_length": 6,
            "num_generations": min(4, settings["num_generations"]),
            "use_vllm": False,
        }
        if "generation_batch_size" in settings:
            # As many optimizer steps per generation batch as the recipe has.
            per_step = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * GPUS[name]
            factor = settings["generation_batch_size"] // per_step
            assert factor == 4
            options["generation_batch_size"] = factor * 4 * options["gradient_accumulation_steps"]
        else:
            options["per_device_train_batch_size"] = 16
        if evaluated := settings.get("eval_dataset"):
            if isinstance(evaluated, dict):
                files = {label: save_dataset(folder, kwargs.get("name", label)) for label, kwargs in evaluated.items()}
                sets = {label: {**kwargs, "path": files[label], "limit": 8} for label, kwargs in evaluated.items()}
                options["eval_dataset"] = json.dumps(sets)
            else:
                options["eval_dataset_path"] = save_dataset(folder, evaluated)
            options |= {"per_device_eval_batch_size": 64, "eval_steps": 1}
        assert set(swapped) <= set(labels)
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    loaded = load_sft_recipe if is_warmup(name) else load_recipe
    return loaded(recipe_path(name), [*ON_CPU, *words]), settings.get("reward_funcs", [])


def _reward_kwargs(settings: dict) -> dict[str, dict]:
    return settings.get("reward_kwargs") or {}


@pytest.mark.parametrize("name", NAMES)
def test_trains_one_step(name, tmp_path, talking_policy, capfd):
    recipe, labels = one_step(name, tmp_path, talking_policy)
    trainer = run_sft(recipe) if is_warmup(name) else run_recipe(recipe)
    assert trainer.state.global_step == 1
    if name.endswith("/full"):  # as published: before the first step and after the last, every set
        sets = recipe.arguments.eval_datasets()
        found = {
            (entry["step"], label, key.rpartition("rewards/")[0].removeprefix("eval_").rstrip("_"))
            for entry in trainer.state.log_history
            for key in entry
            for label in labels
            if key.startswith("eval_") and key.endswith(f"rewards/{label}/mean")
        }
        assert found == {(step, label, data) for step in (0, 1) for label in labels for data in sets}
    logged = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    assert math.isfinite(logged["loss"]) and logged["grad_norm"] > 0
    for label in labels:
        assert math.isfinite(logged[f"rewards/{label}/mean"])
        # Otherwise the step would train nothing of what the recipe is about.
        assert logged[f"rewards/{label}/std"] > 0, label
    assert changed(talking_policy, tmp_path / "run")


def changed(policy: Path, trained: Path) -> bool:
    """Whether training moved a weight; every adapter's B starts at 0."""
    if (trained / "adapter_model.safetensors").is_file():
        adapter = load_file(trained / "adapter_model.safetensors")
        return any(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)
    before, after = (load_file(folder / "model.safetensors") for folder in (policy, trained))
    return any(not torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize("name", [name for name in RL_NAMES if read_recipe_file(recipe_path(name)).get("use_vllm")])
def test_without_vllm_nothing_is_loaded(name, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *rest: None if module == "vllm" else found(module))
    recipe, _ = one_step(name, tmp_path, tmp_path / "no_policy")
    recipe.training.use_vllm = True
    with pytest.raises(UsageError, match="vLLM is not installed"):
        run_recipe(recipe)


# Documentation


TYPED = re.compile(r"# (str|int|float|bool|dict|list\[\w+\]): .*\((no default|default: )")


def comments(file: Path) -> dict[str, str]:
    """The comment block directly above each key of a file, as one line."""
    found, block = {}, []
    for line in file.read_text().splitlines():
        if line.startswith("#"):
            block.append(line)
            continue
        if key := re.match(r"(\w+):", line):
            found[key[1]] = "# " + " ".join(text.lstrip("# ") for text in block)
        block = []
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_documented(name):
    documented = {
        key for file in files_of(recipe_path(name)) for key, text in comments(file).items() if TYPED.match(text)
    }
    assert set(read_recipe_file(recipe_path(name))) - documented == set()


@pytest.mark.parametrize("name", NAMES)
def test_documented_defaults_are_the_real_ones(name):
    defaults = {
        field.name: field.default for kind in (SFT_KINDS if is_warmup(name) else RL_KINDS) for field in fields(kind)
    }
    checked = 0
    for file in files_of(recipe_path(name)):
        for key, text in comments(file).items():
            stated = re.search(r"\(default: ([^,;):]+?)(?=[,;):]| unless| where)", text)
            default = defaults.get(key)
            default = getattr(default, "value", default)
            if stated is None or not isinstance(default, (bool, int, float, str)):
                continue
            value = yaml.safe_load(stated[1])
            if key.endswith("path") or isinstance(value, str) != isinstance(default, str):
                continue
            assert value == default or float(value) == default, f"{key}: {stated[0]} but it is {default!r}"
            checked += 1
    assert checked >= 5


@pytest.mark.parametrize("name", NAMES)
def test_is_in_the_table(name):
    rows = [line for line in (RECIPES / "README.md").read_text().splitlines() if line.startswith("|")]
    assert sum(f"`{name}`" in row for row in rows) == 1


# The command


def test_a_reader_that_has_enough_is_no_error():
    show = [sys.executable, "-m", "gd2po_trl.cli", "recipes", "show", "tool_calling/Qwen2.5-1.5B-Instruct/lora"]
    with subprocess.Popen(show, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


def test_a_copy_is_the_recipe_with_its_bases(tmp_path, monkeypatch, capsys):
    name = "safe_alignment/cpu_demo"
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # files that are there already and the same are no obstacle
        assert main(["recipes", "copy", name]) == 0
    assert read_recipe_file(tmp_path / "recipes" / f"{name}.yaml") == read_recipe_file(recipe_path(name))

    (tmp_path / "recipes" / "_cpu.yaml").write_text("seed: 1\n")
    assert main(["recipes", "copy", name]) == 2
    assert "_cpu.yaml' exists and differs" in capsys.readouterr().err

    assert main(["recipes", "copy", name, str(tmp_path / "recipes" / "_cpu.yaml")]) == 2
    assert "Cannot write to" in capsys.readouterr().err

    monkeypatch.chdir(RECIPES.parent)
    assert main(["recipes", "copy", name]) == 2
    assert "name another folder" in capsys.readouterr().err
