"""
`gd2po train --dry-run`: everything up to the first generation, in seconds, without the policy's weights.

It reads the recipe, the data, the tokenizer and the policy's configuration, scores a handful of completions with the
rewards, and says how long the texts are, how many steps there will be and how much memory they are expected to take.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import RewardError, UsageError
from ..preflight import check_before_loading, check_packages
from ..recipe import Recipe
from ..reward_guard import RewardGuard
from ..run_log import checkpoint_to_resume
from . import _check_reward_kwargs, load_datasets, one_clear_error, resolve_rewards
from .memory import Peak, PolicySize, activations_gb, meta_model, peak, policy_size, weight_bytes
from .policy import check_model, load_tokenizer, model_init_kwargs, whole_model


if TYPE_CHECKING:
    from datasets import Dataset

# Columns that hold a completion as it should be, in the order in which they are looked for.
GOLD_COLUMNS = ("completion", "answer", "solution", "chosen")
NUM_SCORED = 4
NUM_MEASURED = 5000
BINS, BAR = 8, 40
STANDARD_GPUS_GB = (16, 24, 32, 40, 48, 80, 96, 141)
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Where a model is found by its folder or id alone, TRL takes the precision of its configuration.
AUTO = "auto"


@dataclass(frozen=True)
class Batches:
    """
    How the rollouts are divided.

    Args:
        rollouts_per_generation (`int`): `generation_batch_size`, over all processes.
        prompts_per_generation (`int`): Its prompts.
        rollouts_per_step (`int`): Rollouts per optimizer step, over all processes.
        steps_per_epoch (`int`): Optimizer steps per pass over the data.
        total_steps (`int`): Optimizer steps of the run.
    """

    rollouts_per_generation: int
    prompts_per_generation: int
    rollouts_per_step: int
    steps_per_epoch: int
    total_steps: int


def batches(training: Any, rows: int, processes: int = 1) -> Batches:
    """
    The arithmetic of TRL's sampler and transformers' trainer.

    Args:
        training (`GRPOConfig`): Settings.
        rows (`int`): Prompts of the training set.
        processes (`int`): Training processes.
    """
    per_pass = training.per_device_train_batch_size * processes
    prompts = training.generation_batch_size // training.num_generations
    # What does not fill a generation batch is left out.
    passes = rows // prompts * (training.generation_batch_size // per_pass) * training.num_iterations
    steps = math.ceil(passes / training.gradient_accumulation_steps)
    total = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps)
    return Batches(
        rollouts_per_generation=training.generation_batch_size,
        prompts_per_generation=prompts,
        rollouts_per_step=per_pass * training.gradient_accumulation_steps,
        steps_per_epoch=steps,
        total_steps=total,
    )


def dry_run(recipe: Recipe, completions: str | None = None) -> str:
    """
    Everything that training as `recipe` says would do before its first generation. Writes nothing.

    Args:
        recipe ([`Recipe`]):
            From [`load_recipe`].
        completions (`str`, *optional*):
            Parquet, JSON or JSONL file with a column `completion`, to score; other columns in it replace the data's.
            Without it the data's own gold completions are scored, where it has some.

    Returns:
        `str`: The report.

    Raises:
        [`UsageError`]: for whatever training itself would refuse.
    """
    from accelerate import PartialState
    from transformers import AutoConfig

    arguments, training = recipe.arguments, recipe.training
    rewards = resolve_rewards(recipe)
    _check_reward_kwargs(arguments)
    check_packages(training)
    checkpoint = checkpoint_to_resume(training.resume_from_checkpoint, training.output_dir)
    check_model(recipe)
    dataset, evaluation = load_datasets(recipe)
    processes = PartialState().num_processes
    with one_clear_error():
        check_before_loading(
            {"reward_funcs": rewards, "args": training, "train_dataset": dataset, "eval_dataset": evaluation}
        )
    tokenizer = load_tokenizer(recipe, dataset)
    name, revision = whole_model(recipe)
    config = AutoConfig.from_pretrained(name, revision=revision)

    plan = batches(training, len(dataset), processes)
    watch: list[str] = []
    prompt_lengths = _prompt_lengths(dataset, tokenizer, training.chat_template_kwargs)
    gold = _gold_column(dataset)
    gold_lengths = _text_lengths(_measured(dataset, gold), tokenizer) if gold else []
    lines = [f"Policy    {recipe.model.model_name_or_path}"]
    if checkpoint is not None:
        lines.append(f"          goes on from {checkpoint}")
    lines += ["", f"Data      {len(dataset):,} prompts to train on" + _evaluation_rows(evaluation)]
    lines += ["", *_score(rewards, arguments.reward_funcs, dataset, tokenizer, gold, completions)]
    lines += ["", *_lengths("prompts", prompt_lengths, len(dataset))]
    if gold_lengths:
        lines += ["", *_lengths(f"column `{gold}`", gold_lengths, len(dataset))]
    lines += ["", *_batch_lines(training, plan, processes)]
    lines += ["", *_memory_lines(recipe, config, rewards, max(prompt_lengths), processes, watch)]
    watch += _warnings(training, config, prompt_lengths, gold, gold_lengths)
    lines += ["", *([f"Watch     {watch[0]}", *(f"          {entry}" for entry in watch[1:])] if watch else [])]
    return "\n".join(lines).rstrip() + "\n\nNothing was loaded onto a device, generated or written."


def _evaluation_rows(evaluation: "Dataset | None") -> str:
    return "" if evaluation is None else f", {len(evaluation):,} to evaluate on"


# Completions and their scores


def _gold_column(dataset: "Dataset") -> str | None:
    def holds_text(value: Any) -> bool:
        is_message = isinstance(value, list) and value and isinstance(value[-1], dict)
        return isinstance(value, str) or bool(is_message and isinstance(value[-1].get("content"), str))

    return next((name for name in GOLD_COLUMNS if name in dataset.column_names and holds_text(dataset[0][name])), None)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _score(
    rewards: Sequence[Any],
    labels: Sequence[str],
    dataset: "Dataset",
    tokenizer: Any,
    gold: str | None,
    path: str | None,
) -> list[str]:
    """One line per reward with its scores."""
    if path is not None:
        rows, origin = _given_rows(path, dataset)
    elif gold is not None:
        rows = dataset.select(range(min(NUM_SCORED, len(dataset)))).to_list()
        rows, origin = [{**row, "completion": row[gold]} for row in rows], f"the data's column `{gold}`"
    else:
        return ["Rewards   not tried: the data has no gold completions; --completions FILE gives some"]
    inputs = _reward_inputs(rows, tokenizer)
    lines = []
    for label, reward in zip(labels, rewards, strict=True):
        if isinstance(reward, str) or hasattr(reward, "unload"):
            lines.append(f"{label}: not tried, a reward model")
            continue
        try:
            by_name = RewardGuard().score(reward, label, **inputs)
        except RewardError as error:
            raise UsageError(str(error)) from error
        for name, scores in by_name.items():
            shown = ", ".join("None" if score is None else f"{score:.4g}" for score in scores)
            lines.append(f"{name}: {shown}")
    head = f"Rewards   of {len(rows)} completions, {origin}"
    return [head, *(f"          {line}" for line in lines)]


def _given_rows(path: str, dataset: "Dataset") -> tuple[list[dict[str, Any]], str]:
    from ..datasets.sources import Source, load_rows, require_columns

    given, origin = load_rows(Source("completions", remedy="give a file"), path, None)
    require_columns(given, ["completion"], "completions", origin, "rename the column that holds the completions")
    count = min(len(given), len(dataset), 4 * NUM_SCORED)
    rows = zip(dataset.select(range(count)).to_list(), given.select(range(count)).to_list(), strict=True)
    return [{**row, **own} for row, own in rows], origin


def _reward_inputs(rows: list[dict[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """The keyword arguments that TRL's trainer gives to a reward function."""
    from transformers import TrainerState

    texts = [_text(row["completion"]) for row in rows]
    conversational = not isinstance(rows[0]["prompt"], str)
    columns = {name for name in rows[0] if name not in ("prompt", "completion")}
    return {
        "prompts": [row["prompt"] for row in rows],
        "completions": [[{"role": "assistant", "content": text}] if conversational else text for text in texts],
        "completion_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        **{name: [row[name] for row in rows] for name in sorted(columns)},
        "trainer_state": TrainerState(),
        "log_extra": lambda *args: None,
        "log_metric": lambda *args: None,
    }


# Lengths


def _measured(dataset: "Dataset", column: str) -> list[Any]:
    count = len(dataset)
    if count > NUM_MEASURED:
        dataset = dataset.select(range(0, count, math.ceil(count / NUM_MEASURED)))
    return list(dataset[column])


def _prompt_lengths(dataset: "Dataset", tokenizer: Any, chat_template_kwargs: dict[str, Any] | None) -> list[int]:
    from ..datasets.prompts import count_prompt_tokens

    return count_prompt_tokens(_measured(dataset, "prompt"), tokenizer, chat_template_kwargs)


def _text_lengths(values: list[Any], tokenizer: Any) -> list[int]:
    texts = [_text(value) for value in values]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _lengths(what: str, lengths: list[int], rows: int) -> list[str]:
    import numpy as np

    middle, high = np.percentile(lengths, [50, 90])
    part = f" of {len(lengths):,} of {rows:,} rows" if len(lengths) < rows else ""
    lines = [
        f"Tokens    {what}{part}: mean {np.mean(lengths):,.0f}, median {middle:,.0f}, 90 % below {high:,.0f}, longest "
        f"{max(lengths):,}"
    ]
    counts, edges = np.histogram(lengths, bins=min(BINS, max(lengths) - min(lengths) + 1))
    for count, low, up in zip(counts, edges, edges[1:], strict=False):
        bar = "#" * math.ceil(BAR * count / counts.max())
        lines.append(f"          {low:7,.0f} to {up:7,.0f} {count:7,} {bar}")
    return lines


# Batches and steps


def _batch_lines(training: Any, plan: Batches, processes: int) -> list[str]:
    epochs = f"{training.num_train_epochs:g} epochs of {plan.steps_per_epoch:,}"
    steps = f"{plan.total_steps:,} optimizer steps: {'`max_steps`' if training.max_steps > 0 else epochs}"
    return [
        f"Batches   {plan.prompts_per_generation:,} prompts x {training.num_generations} = "
        f"{plan.rollouts_per_generation:,} rollouts per generation batch",
        f"          {training.per_device_train_batch_size} rollouts x {processes} processes x "
        f"{training.gradient_accumulation_steps} passes = {plan.rollouts_per_step:,} rollouts per optimizer step",
        f"Steps     {steps}",
    ]


def _warnings(
    training: Any,
    config: Any,
    prompt_lengths: list[int],
    gold: str | None,
    gold_lengths: list[int],
) -> list[str]:
    found = []
    longest = max(prompt_lengths) + training.max_completion_length
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    key = "the policy's context"
    if training.use_vllm and training.vllm_max_model_length is not None:
        context, key = training.vllm_max_model_length, "`vllm_max_model_length`"
    if context is not None and longest > context:
        found.append(
            f"longest prompt + `max_completion_length` = {longest:,} tokens, and {key} is {context:,}: lower "
            "`max_prompt_tokens`"
        )
    beyond = sum(length > training.max_completion_length for length in gold_lengths)
    if beyond:
        found.append(
            f"{beyond / len(gold_lengths):.0%} of column `{gold}` are longer than `max_completion_length` = "
            f"{training.max_completion_length:,}"
        )
    return found


# Memory


def _memory_lines(
    recipe: Recipe, config: Any, rewards: Sequence[Any], longest_prompt: int, processes: int, watch: list[str]
) -> list[str]:
    training = recipe.training
    size = _policy_size(recipe, config)
    kind = "trained"
    if size.trained < size.parameters:
        kind = f"in all, {size.trained / 1e6:,.1f} M trained (LoRA)"
    lines = [f"Memory    {size.parameters / 1e6:,.1f} M parameters {kind}"]
    weights_over, rest_over = _split_over(processes)
    tokens = training.per_device_train_batch_size * (longest_prompt + training.max_completion_length)
    half = training.bf16 or training.fp16 or BYTES.get(_dtype(recipe, config), 4) == 2
    activations = activations_gb(
        size, tokens, checkpointing=training.gradient_checkpointing, bytes_per_value=2 if half else 4
    )
    reward_gb, unknown = _reward_models_gb(rewards)
    colocated = training.use_vllm and training.vllm_mode == "colocate"
    share = training.vllm_gpu_memory_utilization if colocated else 0.0
    cached = 0
    if not training.use_vllm:
        # transformers generates for the whole generation batch of a process at once.
        cached = training.generation_batch_size // processes * (longest_prompt + training.max_completion_length)
    expected = peak(
        size,
        activations=activations,
        reward_models_gb=reward_gb,
        vllm_share=share,
        cached_tokens=cached,
        weights_split_over=weights_over,
        optimizer_split_over=rest_over,
    )
    vllm = f" + {share:g} of the GPU for vLLM" if share else ""
    lines.append(f"          generating ≈ {expected.generating:.1f} GB{vllm}, training ≈ {expected.training:.1f} GB")
    lines.append(
        f"          weights {size.weights_gb / weights_over:.1f}, optimizer {size.optimizer_gb / rest_over:.1f}, "
        f"gradients {size.gradients_gb / rest_over:.1f}, activations {activations:.1f} (of {tokens:,} tokens), "
        f"reward models {reward_gb:.1f}"
    )
    lines += [f"          without the reward {label}, whose size is not known here" for label in unknown]
    lines.append(f"          {_against_the_gpu(expected, training, watch)}")
    return lines


def _against_the_gpu(expected: Peak, training: Any, watch: list[str]) -> str:
    import torch

    needed = expected.smallest_gpu()
    if torch.cuda.is_available() and not training.use_cpu:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found = properties.total_memory / 1e9
        if expected.on(found) > found:
            watch.append(f"≈ {expected.on(found):.1f} GB are expected, and the GPU has {found:.1f} GB")
        return f"≈ {expected.on(found):.1f} GB of the {found:.1f} GB of {properties.name}"
    if training.use_cpu:
        return f"≈ {max(expected.generating, expected.training):.1f} GB of this machine's memory"
    fitting = next((gpu for gpu in STANDARD_GPUS_GB if gpu >= needed), None)
    size = f"one of {fitting} GB" if fitting else "none; split the run over several (docs/scaling.md)"
    return f"no GPU found here; ≈ {needed:.1f} GB are needed, so {size} would do"


def _dtype(recipe: Recipe, config: Any) -> str:
    dtype = model_init_kwargs(recipe)["dtype"] or "float32"
    if dtype == AUTO:
        dtype = config.dtype or "float32"
    return str(dtype).removeprefix("torch.")


def _policy_size(recipe: Recipe, config: Any) -> PolicySize:
    from trl import get_peft_config, get_quantization_config

    quantization = get_quantization_config(recipe.model)
    with one_clear_error():
        return policy_size(
            config,
            bytes_per_weight=BYTES.get(_dtype(recipe, config), 4),
            peft_config=get_peft_config(recipe.model),
            quantization=None if quantization is None else quantization.to_dict(),
            optimizer_bytes_per_value=_optimizer_bytes(
                str(getattr(recipe.training.optim, "value", recipe.training.optim))
            ),
        )


def _optimizer_bytes(name: str) -> float:
    """State per value: two in float32 for Adam and all that is not known better."""
    if "8bit" in name:
        return 2.0
    return 0.0 if name in ("sgd", "adafactor") else 8.0


def _split_over(processes: int) -> tuple[int, int]:
    """Over how many processes `accelerate launch` splits the weights, and gradients and optimizer state."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return processes, processes
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        return processes if stage == 3 else 1, processes if stage >= 1 else 1
    return 1, 1


def _reward_models_gb(rewards: Sequence[Any]) -> tuple[float, list[str]]:
    """Weights of the reward models in this process, and the rewards whose size cannot be told."""
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    total, unknown = 0.0, []
    for reward in rewards:
        if isinstance(reward, str):
            config = AutoConfig.from_pretrained(reward)
            module, dtype, quantization = meta_model(config, AutoModelForSequenceClassification), config.dtype, None
        elif hasattr(reward, "unload"):
            if reward.offload:
                # In CPU memory, and on the GPU for the time of its call.
                unknown.append(reward.__name__)
                continue
            module, dtype, quantization = meta_model(reward.config, AutoModel), reward.dtype, reward.quantization
        else:
            continue
        bytes_per_weight = 4 if dtype is None else dtype.itemsize
        total += weight_bytes(module, bytes_per_weight, quantization) / 1e9
    return total, unknown
