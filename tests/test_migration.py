"""The migration table: every flag and variable of the authors' scripts is in it, and what it names here exists."""

import argparse
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from tiny import letters_dataset, low_bytes, tiny_settings
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from gd2po_trl import GD2POConfig
from gd2po_trl.cli import eval as eval_command
from gd2po_trl.datasets import DATASETS
from gd2po_trl.recipe import RecipeArguments, load_recipe
from gd2po_trl.recipe.catalog import recipe_path
from gd2po_trl.reward_models.in_process import RewardModel
from gd2po_trl.rewards import resolve_reward


ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/migration.md").read_text(encoding="utf-8").partition("## From the authors' verl scripts")[2]
RECIPE_KEYS = {field.name for kind in (RecipeArguments, GD2POConfig, ModelConfig) for field in fields(kind)} | {"base"}
REWARD_KEYS = set(RewardModel.__init__.__annotations__)
ACCELERATE_KEYS = {"fsdp_offload_params", "num_processes", "num_machines"}
# Other things in code spans of the right-hand columns: figures, files, variables, labels of rewards.
OTHER = {"helpful", "harmless", "sum", "mean", "full", "results.json", "TENSORBOARD_LOGGING_DIR"}
OTHER |= {"completions/eval_NAME_STEP.parquet", "accelerate launch"}

# At commit f1ad765 of the authors' repository.
SCRIPTS = """
correctness_length/train_gdpo.sh correctness_length/train_gd2po_hard.sh correctness_length/train_gd2po_snr.sh
correctness_length_format/train_gd2po_hard.sh correctness_length_format/train_gd2po_snr.sh scripts/eval_api_bank.sh
API_Bank/generate_deterministic.py API_Bank/evaluate_reward.py API_Bank/aggregate_leaderboard.py scripts/run_gdpo.sh
scripts/run_gd2po_hard.sh scripts/run_gd2po_snr.sh scripts/run_safe_alignment.sh scripts/eval.sh scripts/eval_metric.py
""".split()
FLAGS = """
actor_rollout_ref.actor.checkpoint.load_contents actor_rollout_ref.actor.entropy_coeff
actor_rollout_ref.actor.fsdp_config.optimizer_offload actor_rollout_ref.actor.fsdp_config.param_offload
actor_rollout_ref.actor.kl_loss_coef actor_rollout_ref.actor.kl_loss_type actor_rollout_ref.actor.optim.lr
actor_rollout_ref.actor.ppo_max_token_len_per_gpu actor_rollout_ref.actor.ppo_micro_batch_size
actor_rollout_ref.actor.ppo_mini_batch_size actor_rollout_ref.actor.ulysses_sequence_parallel_size
actor_rollout_ref.actor.use_dynamic_bsz actor_rollout_ref.actor.use_kl_loss
actor_rollout_ref.model.enable_gradient_checkpointing actor_rollout_ref.model.path
actor_rollout_ref.model.trust_remote_code actor_rollout_ref.model.use_remove_padding
actor_rollout_ref.ref.fsdp_config.param_offload actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu
actor_rollout_ref.rollout.gpu_memory_utilization actor_rollout_ref.rollout.n actor_rollout_ref.rollout.name
actor_rollout_ref.rollout.temperature actor_rollout_ref.rollout.tensor_model_parallel_size
actor_rollout_ref.rollout.top_p algorithm.adv_estimator algorithm.gdpo_filter_ratio_conflict_eps
algorithm.gdpo_filter_ratio_conflict_threshold algorithm.kl_ctrl.kl_coef algorithm.use_kl_in_reward
data.filter_overlong_prompts data.max_prompt_length data.max_response_length data.return_raw_chat
data.train_batch_size data.train_files data.truncation data.val_batch_size data.val_files reward_model.enable
reward_model_harmless.enable reward_model_harmless.max_length reward_model_harmless.micro_batch_size_per_gpu
reward_model_harmless.model.fsdp_config.param_offload reward_model_harmless.model.input_tokenizer
reward_model_harmless.model.path reward_model_harmless.model.trust_remote_code
reward_model_harmless.model.use_align_anything_formatter
reward_model_harmless.model.use_align_anything_reward_model reward_model_harmless.strategy
reward_model_useful.enable reward_model_useful.max_length reward_model_useful.micro_batch_size_per_gpu
reward_model_useful.model.fsdp_config.param_offload reward_model_useful.model.input_tokenizer
reward_model_useful.model.path reward_model_useful.model.trust_remote_code
reward_model_useful.model.use_align_anything_formatter reward_model_useful.model.use_align_anything_reward_model
reward_model_useful.strategy trainer.critic_warmup trainer.default_local_dir trainer.experiment_name trainer.logger
trainer.n_gpus_per_node trainer.nnodes trainer.project_name trainer.resume_mode trainer.rollout_data_dir
trainer.save_freq trainer.test_freq trainer.total_epochs trainer.total_training_steps trainer.val_before_train
trainer.val_only trainer.validation_data_dir
""".split()
VARIABLES = """
API_BANK_DIR API_BANK_SCORE_ROOT BASE_MODEL CM_MODEL_PATH COARSEREWARD CORRECTMAX1 DATA_DIR DATA_ROOT EVAL_OUTPUT
EXPERIMENT_NAME EXP_NAME GPU_MEMORY_UTILIZATION INTERMEDIATEREWARD LENGTH_MAX_POSSIBLE_REWARD
LENGTH_MIN_POSSIBLE_REWARD LENGTH_SCORE_STEP LEVELS MAX1STEP30MAX3 MAX_MODEL_LEN MAX_TOKENS MODEL_FAMILY N_GPUS
OUTPUT_DIR POLICY_MODEL_PATH PROJ_ROOT RAY_DISABLE_DOCKER_CPU_WARNING RAY_USAGE_STATS_ENABLED REFINEDREWARD REPO_ROOT
RM_MODEL_PATH ROLLOUT_TP_SIZE SCHEDULELENGTH SCHEDULEREWARD SCRIPT_DIR SNR_THRESHOLD TAU TENSORBOARD_DIR
TENSOR_PARALLEL_SIZE TRAIN_DATA VAL_DATA VLLM_ATTENTION_BACKEND WITHCORRECT WITHCORRECTNESS WITHFORMAT WITHLENGTH
WORLD_SIZE
""".split()
OPTIONS = """
--model_paths --output_root --seed --max_tokens --tensor_parallel_size --gpu_memory_utilization --levels --resume
--verify_twice --max_model_len --score-root --output --key-mode --events --step
""".split()


def rows() -> list[tuple[str, str]]:
    """First column and the others of every table row."""
    table = [line.strip("| ") for line in PAGE.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [(line.partition(" | ")[0], line.partition(" | ")[2]) for line in table]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("what", ["SCRIPTS", "FLAGS", "VARIABLES", "OPTIONS"])
def test_nothing_of_the_scripts_is_missing(what):
    named = []
    for first, _ in rows():
        folder = ""
        for span in spans(first):
            name = re.split(r"[ =]", span)[0]
            if name.endswith((".sh", ".py")):  # the later ones of a cell are in the folder of the first
                folder = Path(name).parent.name or folder
                name = f"{folder}/{Path(name).name}"
            named.append(name)
    missing = [name for name in globals()[what] if name not in named]
    assert missing == []


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    found = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                found |= options_of(sub)
    return found


def named_here() -> list[str]:
    return sorted(
        {span for _, others in rows() for span in spans(others)}
        - {span for first, _ in rows() for span in spans(first) if span.isupper()}
    )


EVAL_OPTIONS = options_of(eval_command._parser())


@pytest.mark.parametrize("span", named_here())
def test_what_is_named_exists(span):
    if span in OTHER or re.fullmatch(r"[A-Z0-9_]+(=1)?", span):
        return
    if span.startswith(("gd2po ", "--")):
        for option in re.findall(r"--([\w-]+)", span):
            assert f"--{option}" in EVAL_OPTIONS | {f"--{key}" for key in RECIPE_KEYS | ACCELERATE_KEYS} | {"--config"}
        for recipe in re.findall(r"recipes/(\S+)\.yaml", span):
            assert recipe_path(recipe).is_file()
        return
    content = yaml.safe_load(span)
    key, value = next(iter(content.items())) if isinstance(content, dict) else (content, None)
    if key in ("correctness", "format", "length"):
        resolve_reward(key, value)  # raises for an unknown argument or value
        return
    assert key in RECIPE_KEYS | REWARD_KEYS | ACCELERATE_KEYS | set(DATASETS), key
    if value is not None and key in RECIPE_KEYS:
        words = [f"--{key}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
        words = [f"--{key}", *value] if isinstance(value, list) else words
        load_recipe(recipe_path("tool_calling/Qwen2.5-1.5B-Instruct/full"), ["--use_cpu", "True", *words])


def test_the_full_recipes_are_the_published_runs():
    """Every setting of the table for which `full` is said to have it."""
    common = {
        "learning_rate": 1e-6, "weight_decay": 0.01, "max_grad_norm": 1.0, "num_iterations": 1, "epsilon": 0.2,
        "delta": 3.0, "loss_type": "dapo", "beta": 0.0, "entropy_coef": 0.0, "generation_batch_size": 2048,
        "num_generations": 4, "max_completion_length": 1024, "top_p": 1.0, "lr_scheduler_type": "constant",
        "eval_steps": 40, "eval_on_start": True, "eval_on_end": True, "eval_temperature": 0.0, "use_vllm": True,
        "num_generations_eval": 1, "scale_rewards": "group", "whitening": "token", "shuffle_dataset": True,
    }  # fmt: skip
    tasks = {
        "tool_calling/Qwen2.5-1.5B-Instruct/full": {"temperature": 1.0, "num_train_epochs": 30, "max_steps": -1},
        "safe_alignment/Qwen2.5-7B-Instruct/full": {"temperature": 0.7, "max_steps": 400},
    }
    prompts = {"tool_calling": (2048, "drop"), "safe_alignment": (512, "truncate_left")}
    for name, own in tasks.items():
        recipe = load_recipe(recipe_path(name), ["--use_cpu", "True"])
        for key, value in {**common, **own}.items():
            assert getattr(recipe.training, key) == value, (name, key)
        arguments = recipe.arguments
        assert (arguments.max_prompt_tokens, arguments.long_prompts) == prompts[name.split("/")[0]]
    assert (
        arguments.reward_kwargs["helpful"]["max_length"] == arguments.reward_kwargs["harmless"]["max_length"] == 2048
    )
    assert all(kwargs["truncation_side"] == "right" for kwargs in arguments.reward_kwargs.values())
    assert recipe.model.model_name_or_path == "Qwen/Qwen2.5-7B-Instruct"


def test_delta_is_the_dual_clip_of_verl(tiny_policy, tmp_path):
    """TRL's loss with `delta: 3.0` against verl's formula with `clip_ratio_c=3.0`, at ratios from 0.05 to 20."""
    settings = {**tiny_settings(tmp_path), "delta": 3.0, "epsilon": 0.2, "loss_type": "dapo", "beta": 0.0}
    trainer = GRPOTrainer(str(tiny_policy), low_bytes, GRPOConfig(**settings), train_dataset=letters_dataset())
    generator = torch.Generator().manual_seed(0)
    prompts, completions = (torch.randint(5, 260, (8, length), generator=generator) for length in (3, 40))
    advantages = torch.randn(8, generator=generator) * 2
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    with torch.no_grad():
        logits = model(torch.cat([prompts, completions], 1)).logits[:, 2:-1]
        log_probs = logits.log_softmax(-1).gather(2, completions.unsqueeze(2)).squeeze(2)
    log_ratio = (torch.rand(8, 40, generator=generator) * 2 - 1) * 3
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": advantages,
        "old_per_token_logps": log_probs - log_ratio,
        "num_items_in_batch": torch.tensor(completions.numel()),
    }
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model, inputs)

    push, ratio = -advantages.unsqueeze(1), log_ratio.exp()
    clipped = torch.maximum(push * ratio, push * ratio.clamp(0.8, 1.2))
    bounded = torch.where(push > 0, torch.minimum(push * 3.0, clipped), clipped)
    assert loss.item() == pytest.approx(bounded.mean().item(), abs=1e-5)
    assert abs(clipped.mean() - bounded.mean()) > 0.1  # the bound acts on this batch
