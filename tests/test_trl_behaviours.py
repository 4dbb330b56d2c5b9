"""
GD2POTrainer stands in for GRPOTrainer: the behaviors of TRL's own trainer, one by one, on tiny local models.

Not here: real vLLM (`make test-vllm`), quantized policies (`test_quantized.py`), and Liger kernels, which need Triton.
"""

import inspect
import json
from dataclasses import fields
from importlib.resources import files
from importlib.util import find_spec

import pytest
import torch
import transformers
from datasets import DatasetDict, IterableDataset
from packaging.version import Version
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from tiny import byte_tokenizer, conversational_dataset, letters_dataset, low_bytes, spread_bytes, text_of, tiny_args
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from gd2po_trl import GD2POTrainer, compute_advantages


REWARDS = [low_bytes, spread_bytes]
TRANSFORMERS = Version(transformers.__version__)
NEEDS_TOOLS = pytest.mark.skipif(
    TRANSFORMERS < Version("5.13") and find_spec("jmespath") is None,
    reason="TRL's tools need the package jmespath where transformers is below 5.13",
)


@pytest.fixture
def build(tiny_policy, tmp_path):
    def _build(model=None, reward_funcs=None, dataset=None, trainer_kwargs=None, **overrides):
        return GD2POTrainer(
            str(tiny_policy) if model is None else model,
            REWARDS if reward_funcs is None else reward_funcs,
            tiny_args(tmp_path / "run", **overrides),
            train_dataset=letters_dataset() if dataset is None else dataset,
            **(trainer_kwargs or {}),
        )

    return _build


def train_and_compare(trainer):
    """Names of the parameters that training moved; all parameters must stay finite."""
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.isfinite(value).all() for value in after.values())
    return [name for name, value in after.items() if not torch.equal(value, before[name])]


def test_the_signature_is_that_of_trl():
    ours = inspect.signature(GD2POTrainer.__init__).parameters
    theirs = list(inspect.signature(GRPOTrainer.__init__).parameters)
    assert list(ours)[:4] == theirs[:4]
    assert {parameter.kind for parameter in list(ours.values())[4:]} == {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"])
def test_loss_types(build, loss_type):
    assert train_and_compare(build(loss_type=loss_type))


@pytest.mark.parametrize(
    "overrides",
    [
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"epsilon_high": 0.4, "delta": 2.0},
        {"entropy_coef": 0.01},
        {"use_adaptive_entropy": True, "entropy_target": 1.0},
        {"top_entropy_quantile": 0.5},
        {"off_policy_mask_threshold": 0.5, "num_iterations": 2},
        {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
        {"beta": 0.1, "use_bias_correction_kl": False},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
        {"generation_kwargs": {"do_sample": True, "no_repeat_ngram_size": 2}},
        {"shuffle_dataset": False},
        {"pad_to_multiple_of": 8},
        {"gradient_checkpointing": True},
        {"max_grad_norm": 0.1, "lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 0.5},
        {"cast_lm_head_to_fp32": True},
        {"ds3_gather_for_generation": False},
        {"log_unique_prompts": True, "log_completions": True, "num_completions_to_print": 1},
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2},
        {"reward_weights": [0.7, 0.3]},
        {"generation_batch_size": 16},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_settings_of_trl(build, overrides):
    missing = set(overrides) - {item.name for item in fields(GRPOConfig)}
    if missing:
        pytest.skip(f"this version of TRL does not have {', '.join(missing)}")
    assert train_and_compare(build(**overrides))


@pytest.mark.skipif(TRANSFORMERS < Version("5.8"), reason="TRL's continuous batching needs transformers 5.8")
def test_continuous_batching(build):
    trainer = build(use_transformers_continuous_batching=True)
    try:
        moved = train_and_compare(trainer)
    except Exception as error:
        stock = GRPOTrainer(
            trainer.model, REWARDS, trainer.args, letters_dataset(), processing_class=trainer.processing_class
        )
        with pytest.raises(type(error)):
            stock.train()
        pytest.skip(f"stock GRPOTrainer cannot do it here either: {type(error).__name__}: {error}")
    assert moved


# Models


def test_lora_on_all_linear_layers_and_dora(build):
    for config in (
        LoraConfig(r=2, target_modules="all-linear"),
        LoraConfig(r=2, target_modules="all-linear", use_dora=True),
    ):
        moved = train_and_compare(build(trainer_kwargs={"peft_config": config}))
        assert moved and all("lora_" in name for name in moved)


def test_peft_model_instance_and_reference_by_disabling_it(build, tiny_policy):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_policy), LoraConfig(target_modules="all-linear"))
    trainer = build(model=model, beta=0.1)
    assert trainer.ref_model is None and train_and_compare(trainer)


def test_prompt_tuning_as_in_trl(build, tiny_policy, tmp_path):
    """Whatever stock TRL does with prompt tuning, ours does too."""
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4, tokenizer_name_or_path=str(tiny_policy)
    )
    outcomes = []
    for trainer_class in (GRPOTrainer, GD2POTrainer):
        trainer = trainer_class(str(tiny_policy), REWARDS, tiny_args(tmp_path), letters_dataset(), peft_config=config)
        try:
            outcomes.append(train_and_compare(trainer))
        except Exception as error:
            outcomes.append(type(error).__name__)
    assert outcomes[0] == outcomes[1]


def test_freezing_part_of_the_model(build, tiny_policy):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    model.model.embed_tokens.requires_grad_(False)
    moved = train_and_compare(
        build(model=model, trainer_kwargs={"processing_class": AutoTokenizer.from_pretrained(tiny_policy)})
    )
    assert moved and "model.embed_tokens.weight" not in moved


# Rewards


def test_reward_model_instance_with_its_own_tokenizer(build, tiny_reward_model):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reward_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_model)
    trainer = build(
        reward_funcs=[model, low_bytes],
        dataset=conversational_dataset(),
        trainer_kwargs={"reward_processing_classes": [tokenizer, None]},
    )
    assert train_and_compare(trainer)


def test_columns_state_and_logging_reach_the_rewards(build, tmp_path):
    import pandas as pd

    seen = {}

    def watches(prompts, completions, completion_ids, hint, trainer_state, log_extra, log_metric, **kwargs):
        seen.update(step=trainer_state.global_step, hint=hint, ids=len(completion_ids))
        log_extra("hint", list(hint))
        log_metric("hint_length", float(len(hint[0])))
        return low_bytes(completions)

    dataset = letters_dataset().add_column("hint", ["abc"] * 16)
    trainer = build(
        reward_funcs=[watches, spread_bytes], dataset=dataset, log_completions=True, num_completions_to_print=1
    )
    train_and_compare(trainer)
    assert seen == {"step": 1, "hint": ["abc"] * 8, "ids": 8}
    table = pd.read_parquet(sorted((tmp_path / "run" / "completions").glob("*"))[0])
    assert {"hint", "gd2po_kept", "gd2po_conflict", "gd2po_agreement"} <= set(table.columns)
    assert trainer.state.log_history[0]["hint_length"] == 3


def test_callable_class_and_partial(build):
    import functools

    class Brevity:
        def __call__(self, completions, **kwargs):
            return [-float(len(text_of(c))) for c in completions]

    def scaled(completions, factor, **kwargs):
        return [factor * value for value in low_bytes(completions)]

    trainer = build(reward_funcs=[Brevity(), functools.partial(scaled, factor=2.0)])
    assert trainer.reward_func_names == ["Brevity", "scaled"] and train_and_compare(trainer)


# Data


def test_iterable_and_eval_datasets(build):
    def rows():
        for row in letters_dataset(64):
            yield dict(row)

    assert train_and_compare(build(dataset=IterableDataset.from_generator(rows)))
    trainer = build(
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
        trainer_kwargs={"eval_dataset": {"one": letters_dataset(2), "two": letters_dataset(3)}},
    )
    train_and_compare(trainer)
    keys = {key for entry in trainer.state.log_history for key in entry}
    assert {"eval_one_reward", "eval_two_gd2po/kept_ratio"} & keys or {"eval_reward", "eval_gd2po/kept_ratio"} & keys


def test_callbacks_see_our_metrics(build):
    seen = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    train_and_compare(build(trainer_kwargs={"callbacks": [Watch()]}))
    assert any("gd2po/conflict_ratio" in logs for logs in seen)


# Rollouts with tools and environments


@pytest.fixture
def tool_tokenizer():
    """A byte tokenizer with a chat template that TRL ships and can parse tool calls of."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (files("trl") / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    return tokenizer


def scripted_turns(trainer, tokenizer, turns):
    """Replace sampling: the n-th call of the policy answers with `turns[n]`."""
    calls = []

    def generate(prompt_ids, *args, **kwargs):
        text = turns[min(len(calls), len(turns) - 1)]
        calls.append(len(prompt_ids))
        ids = [tokenizer(f"{text}{'!' * (index % 3)}<|im_end|>")["input_ids"] for index in range(len(prompt_ids))]
        return ids, None

    trainer._generate_single_turn = generate
    return calls


TOOL_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


def tool_model(tiny_policy, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


def check_tool_run(trainer):
    outputs, rewards = [], []
    generate, calculate = trainer._generate_and_score_completions, trainer._calculate_rewards

    def keep_output(inputs):
        outputs.append(generate(inputs))
        return outputs[-1]

    def keep_rewards(*args, **kwargs):
        rewards.append(calculate(*args, **kwargs))
        return rewards[-1]

    trainer._generate_and_score_completions, trainer._calculate_rewards = keep_output, keep_rewards
    assert train_and_compare(trainer)
    for output, reward in zip(outputs, rewards, strict=True):
        trained = output["completion_mask"] * output["tool_mask"]
        assert trained.sum() < output["completion_mask"].sum()  # the tool's answers are not trained
        expected = compute_advantages(reward, 4, token_counts=trained.sum(1))
        assert torch.equal(output["advantages"], expected.advantages)


def add(a: int, b: int) -> int:
    """
    Adds two numbers.

    Args:
        a: first number
        b: second number

    Returns:
        Their sum.
    """
    return a + b


@NEEDS_TOOLS
def test_tools(build, tiny_policy, tool_tokenizer):
    answers = []

    def answered(completions, **kwargs):
        answers.extend(completions)
        return low_bytes([completion[-1]["content"] for completion in completions])

    trainer = build(
        model=tool_model(tiny_policy, tool_tokenizer),
        reward_funcs=[answered, lambda completions, **kw: [float(len(str(c))) for c in completions]],
        dataset=conversational_dataset(),
        max_completion_length=512,
        trainer_kwargs={"tools": [add], "processing_class": tool_tokenizer},
    )
    calls = scripted_turns(trainer, tool_tokenizer, [TOOL_CALL, "five", TOOL_CALL, "it is five"])
    check_tool_run(trainer)
    assert len(calls) == 4
    assert any(message["role"] == "tool" and message["content"] == "5" for message in answers[0])


@NEEDS_TOOLS
def test_environment_with_its_own_reward(build, tiny_policy, tool_tokenizer):
    class Counter:
        def reset(self, **kwargs):
            self.count = 0

        def add(self, a: int, b: int) -> int:
            """
            Adds two numbers.

            Args:
                a: first number
                b: second number

            Returns:
                Their sum.
            """
            self.count += 1
            return a + b

        def get_reward(self):
            return float(self.count)

    if "environment_factory" not in inspect.signature(GRPOTrainer.__init__).parameters:
        pytest.skip("this version of TRL has no environments")
    trainer = build(
        model=tool_model(tiny_policy, tool_tokenizer),
        reward_funcs=[lambda completions, **kw: [float(len(str(c))) for c in completions]],
        dataset=conversational_dataset(),
        max_completion_length=512,
        trainer_kwargs={"environment_factory": Counter, "processing_class": tool_tokenizer},
    )
    scripted_turns(trainer, tool_tokenizer, [TOOL_CALL, "five", TOOL_CALL, "five"])
    check_tool_run(trainer)
    names = trainer.reward_func_names
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    if len(names) == 2:  # TRL versions whose environments bring a reward of their own
        assert history[0][f"rewards/{names[1]}/mean"] == 1


def test_rollout_func_with_extra_columns(build):
    def rollouts(prompts, trainer):
        ids = [[5 + 7 * index % 250, 9 + index, 40 + index] for index in range(len(prompts))]
        tokens = trainer.processing_class(prompts)["input_ids"]
        return {
            "prompt_ids": tokens,
            "completion_ids": ids,
            "logprobs": None,
            "luck": [float(i % 3) for i in range(len(prompts))],
        }

    def lucky(completions, luck, **kwargs):
        return luck

    trainer = build(reward_funcs=[lucky, low_bytes], trainer_kwargs={"rollout_func": rollouts})
    assert train_and_compare(trainer)


def test_resumed_state_is_json(build, tmp_path):
    trainer = build(save_strategy="steps", save_steps=1)
    train_and_compare(trainer)
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert "gd2po/conflict_ratio" in state["log_history"][0]


def test_a_dataset_with_splits_is_refused_as_in_trl(tiny_policy, tmp_path):
    splits = DatasetDict(train=letters_dataset())
    errors = []
    for trainer_class in (GRPOTrainer, GD2POTrainer):
        with pytest.raises((TypeError, ValueError, KeyError)) as error:
            trainer_class(str(tiny_policy), REWARDS, tiny_args(tmp_path), train_dataset=splits).train()
        errors.append((type(error.value), str(error.value)))
    assert errors[0] == errors[1]
