"""`gd2po train --dry-run`: what it says is what training does, and it loads, generates and writes nothing."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from tiny import conversational_dataset, letters_dataset, low_bytes, spread_bytes, tiny_args, tiny_settings
from transformers import Qwen2Config

from gd2po_trl import GD2POTrainer
from gd2po_trl.cli import main
from gd2po_trl.errors import UsageError
from gd2po_trl.recipe import load_recipe
from gd2po_trl.recipe.catalog import recipe_path
from gd2po_trl.training.dry_run import batches, dry_run
from gd2po_trl.training.memory import activations_gb, peak, policy_size


ROOT = Path(__file__).resolve().parents[1]
QWEN = {"max_position_embeddings": 32_768, "vocab_size": 151_936, "tie_word_embeddings": True}
SHAPES = {
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"vocab_size": 152_064, "tie_word_embeddings": False, "num_key_value_heads": 4},
}


def qwen(shape: str) -> Qwen2Config:
    return Qwen2Config(**{**QWEN, "num_key_value_heads": 2, **SHAPES[shape]})


@pytest.fixture
def weightless_policy(tiny_policy, tmp_path) -> Path:
    """A policy whose weights are missing: whoever loads them fails."""
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy, folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture
def write_recipe(weightless_policy, tmp_path):
    def write(rows: list[dict], **keys) -> Path:
        data = tmp_path / "data.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        settings = {
            **tiny_settings(tmp_path / "out"),
            "model_name_or_path": str(weightless_policy),
            "dataset_path": str(data),
            "reward_funcs": ["tiny.low_bytes", "tiny.spread_bytes"],
            **keys,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


ROWS = [{"prompt": f"say {letter}", "answer": letter * 3} for letter in "abcdefghijkl"]


def test_says_what_would_happen_and_leaves_nothing(write_recipe, tmp_path, capsys):
    recipe = write_recipe(ROWS, max_steps=-1, num_train_epochs=2)
    assert main(["train", "--config", str(recipe), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "12 prompts" in said
    # "aaa", "bbb", ... have one distinct character, and 3 of 4 below "n".
    assert "tiny.low_bytes: 0.75, 0.75, 0.75, 0.75" in said and "tiny.spread_bytes: 1, 1, 1, 1" in said
    assert "2 prompts x 4 = 8 rollouts" in said
    assert "12 optimizer steps: 2 epochs of 6" in said
    assert not (tmp_path / "out").exists()


def test_given_completions_are_scored_in_the_place_of_gold(write_recipe, tmp_path, capsys):
    given = tmp_path / "given.jsonl"
    given.write_text('{"completion": "zz"}\n{"completion": "abcd"}\n')
    recipe = write_recipe(ROWS)
    assert main(["train", "--config", str(recipe), "--dry_run", "--completions", str(given)]) == 0
    said = capsys.readouterr().out
    assert "tiny.low_bytes: 0, 0.8" in said and "tiny.spread_bytes: 1, 4" in said


def test_a_logged_table_can_be_given(write_recipe, tmp_path):
    table = tmp_path / "completions_00001.parquet"
    pd.DataFrame({"step": [1], "prompt": ["say a"], "completion": ["ab"], "answer": ["x"]}).to_parquet(table)
    assert "tiny.spread_bytes: 2" in dry_run(load_recipe(write_recipe(ROWS)), str(table))


def test_data_without_gold_says_so(write_recipe):
    assert "--completions" in dry_run(load_recipe(write_recipe([{"prompt": "say a"}] * 4)))


def test_messages_are_scored_as_messages(write_recipe, tiny_policy):
    rows = [{**row, "answer": "abc"} for row in conversational_dataset(4).to_list()]
    assert "tiny.low_bytes: 0.75" in dry_run(load_recipe(write_recipe(rows)))


def test_async_rewards_and_unscored_completions(write_recipe, tmp_path, monkeypatch):
    module = tmp_path / "slow_rewards.py"
    module.write_text("async def half(completions, **kwargs):\n    return [0.5, None] * (len(completions) // 2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = dry_run(load_recipe(write_recipe(ROWS, reward_funcs=["slow_rewards.half"])))
    assert "slow_rewards.half: 0.5, None, 0.5, None" in said


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("raise KeyError('x')", "KeyError"),
        ("return [1.0]", r"returned 1 \w+ for 4"),
        ("return ['good'] * len(completions)", "'good'"),
        ("raise SystemExit(0)", "SystemExit"),
    ],
)
def test_a_reward_that_fails_is_one_error(write_recipe, tmp_path, monkeypatch, body, named):
    name = f"bad_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"def reward(completions, **kwargs):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=named) as caught:
        dry_run(load_recipe(write_recipe(ROWS, reward_funcs=[f"{name}.reward"])))
    assert f"{name}.reward" in str(caught.value)


def test_what_training_refuses_is_refused(write_recipe, tmp_path):
    with pytest.raises(UsageError, match="answer"):
        dry_run(load_recipe(write_recipe([{"prompt": "say a"}] * 4, reward_funcs=["correctness"])))
    with pytest.raises(UsageError, match="per_device_train_batch_size"):
        dry_run(load_recipe(write_recipe(ROWS[:1])))
    (tmp_path / "policy" / "config.json").unlink()
    with pytest.raises(UsageError, match="model_name_or_path"):
        dry_run(load_recipe(write_recipe(ROWS)))


def test_completions_without_a_dry_run_are_refused(write_recipe, capsys):
    assert main(["train", "--config", str(write_recipe(ROWS)), "--completions", "x.jsonl"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_warnings(write_recipe):
    said = dry_run(load_recipe(write_recipe([{"prompt": "say a", "answer": "a" * 20}] * 4)))
    assert "100% of column `answer` are longer than `max_completion_length` = 8" in said
    said = dry_run(load_recipe(write_recipe([{"prompt": "a" * 8190}] * 4)))
    assert "longest prompt + `max_completion_length` = 8,198 tokens" in said
    assert "Watch" not in dry_run(load_recipe(write_recipe(ROWS)))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_train_epochs": 3},
        {"num_train_epochs": 1.5, "gradient_accumulation_steps": 3, "generation_batch_size": 24},
        {"num_train_epochs": 2, "num_iterations": 2, "steps_per_generation": 2},
        {"num_train_epochs": 1, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
        {"max_steps": 5},
    ],
)
def test_steps_are_those_of_the_trainer(tiny_policy, tmp_path, settings):
    args = tiny_args(tmp_path, **{"max_steps": -1, "learning_rate": 0.0, **settings})
    dataset = letters_dataset(15)
    expected = batches(args, len(dataset)).total_steps
    trainer = GD2POTrainer(str(tiny_policy), [low_bytes, spread_bytes], args, train_dataset=dataset)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == expected


def test_every_gpu_recipe_has_the_memory_that_its_table_says():
    """The figures of recipes/README.md are those of `gd2po_trl.training.memory`."""
    from trl import get_peft_config

    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    row = r"\| `tool_calling/Qwen2\.5-([\d.]+B)-Instruct/(full|lora)` \| \w+ \| (\d) × (\d+) GB \| ≈ (\d+) \|"
    found = re.findall(row, page)
    assert len(found) == 6
    for shape, kind, gpus, gpu_gb, stated in found:
        recipe = load_recipe(recipe_path(f"tool_calling/Qwen2.5-{shape}-Instruct/{kind}"), ["--use_cpu", "True"])
        training = recipe.training
        size = policy_size(
            qwen(shape),
            bytes_per_weight={"float32": 4, "bfloat16": 2}[recipe.model.dtype],
            peft_config=get_peft_config(recipe.model),
        )
        tokens = training.per_device_train_batch_size * training.vllm_max_model_length
        expected = peak(
            size,
            activations=activations_gb(size, tokens, checkpointing=training.gradient_checkpointing),
            vllm_share=training.vllm_gpu_memory_utilization,
            weights_split_over=int(gpus),
            optimizer_split_over=int(gpus),
        )
        assert expected.on(float(gpu_gb)) == pytest.approx(float(stated), abs=0.6), (shape, kind)


def test_sizes_without_weights():
    from peft import LoraConfig

    lora = LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM")
    size = policy_size(qwen("1.5B"), bytes_per_weight=2, peft_config=lora)
    assert size.parameters == 1_543_714_304
    assert size.trained == 36_929_536
    assert size.cache_bytes_per_token == 2 * 28 * 2 * 128 * 2
    full = policy_size(qwen("1.5B"), bytes_per_weight=4)
    assert (full.weights_gb, full.optimizer_gb, full.gradients_gb) == pytest.approx((6.175, 12.35, 6.175), abs=0.01)
    four_bit = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    quantised = policy_size(qwen("1.5B"), bytes_per_weight=2, peft_config=lora, quantization=four_bit)
    # The embedding, which is the output layer too, stays in bfloat16.
    assert quantised.weights_gb == pytest.approx((151_936 * 1536 * 2 + 1_310e6 * 4.127 / 8) / 1e9, abs=0.01)
