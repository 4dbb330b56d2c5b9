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
from ..messages import completion_text
from ..preflight import check_before_loading, check_packages
from ..recipe import Recipe
from ..reward_guard import RewardGuard
from ..run_log import checkpoint_to_resume
from . import load_datasets, one_clear_error, resolve_rewards
from .memory import Peak, activations_gb, meta_model, peak, policy_size, weight_bytes
from .policy import check_model, load_tokenizer, model_init_kwargs, whole_model


if TYPE_CHECKING:
    from datasets import Dataset

# Columns that may hold gold completions, in order of preference.
GOLD_COLUMNS = ("completion", "answer", "solution", "chosen")
NUM_SCORED = 4
NUM_MEASURED = 5000
BINS, BAR = 8, 40
STANDARD_GPUS_GB = (16, 24, 32, 40, 48, 80, 96, 141)
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Batches:
    """
    How the rollouts are divided, over all processes.

    Args:
        rollouts_per_generation (`int`): `generation_batch_size`.
        prompts_per_generation (`int`): Its prompts.
        rollouts_per_step (`int`): Rollouts per optimizer step.
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
    # Prompts that do not fill a generation batch are left out.
    passes = rows // prompts * (training.generation_batch_size // per_pass) * training.num_iterations
    steps = math.ceil(passes / training.gradient_accumulation_steps)
    return Batches(
        rollouts_per_generation=training.generation_batch_size,
        prompts_per_generation=prompts,
        rollouts_per_step=per_pass * training.gradient_accumulation_steps,
        steps_per_epoch=steps,
        total_steps=training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps),
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
    check_packages(training)
    checkpoint = checkpoint_to_resume(training.resume_from_checkpoint, training.output_dir)
    check_model(recipe)
    dataset, evaluation = load_datasets(recipe)
    with one_clear_error():
        check_before_loading(
            {"reward_funcs": rewards, "args": training, "train_dataset": dataset, "eval_dataset": evaluation}
        )
    tokenizer = load_tokenizer(recipe, dataset)
    name, revision = whole_model(recipe)
    config = AutoConfig.from_pretrained(name, revision=revision)
    processes = PartialState().num_processes

    from ..datasets.prompts import count_prompt_tokens

    prompt_lengths = count_prompt_tokens(_measured(dataset, "prompt"), tokenizer, training.chat_template_kwargs)
    gold = _gold_column(dataset)
    lengths = {"prompts": prompt_lengths}
    if gold is not None:
        texts = [completion_text(value) for value in _measured(dataset, gold)]
        lengths[f"column `{gold}`"] = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    memory, watch = _memory(recipe, config, rewards, max(prompt_lengths), processes)
    watch += _warnings(training, config, lengths)
    evaluated = "" if evaluation is None else f", {len(evaluation):,} to evaluate on"
    blocks = [
        ("Policy", [recipe.model.model_name_or_path, *([f"goes on from {checkpoint}"] if checkpoint else [])]),
        ("Data", [f"{len(dataset):,} prompts to train on{evaluated}"]),
        ("Rewards", _score(rewards, arguments.reward_funcs, dataset, tokenizer, gold, completions)),
        *(("Tokens", _histogram(what, counts, len(dataset))) for what, counts in lengths.items()),
        ("Batches", _division(training, batches(training, len(dataset), processes), processes)),
        ("Memory", memory),
        ("Watch", watch),
    ]
    texts = [
        "\n".join(f"{'' if row else title:<10}{line}" for row, line in enumerate(lines)) for title, lines in blocks
    ]
    return "\n\n".join([*filter(None, texts), "Nothing was loaded onto a device, generated or written."])


# Completions and their scores


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion_text(completion)


def _gold_column(dataset: "Dataset") -> str | None:
    def holds_text(value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and bool(completion_text(value)))

    return next((name for name in GOLD_COLUMNS if name in dataset.column_names and holds_text(dataset[0][name])), None)


def _score(
    rewards: Sequence[Any],
    labels: Sequence[str],
    dataset: "Dataset",
    tokenizer: Any,
    gold: str | None,
    path: str | None,
) -> list[str]:
    """What was scored, and one line per reward with its scores."""
    if path is None and gold is None:
        return ["not tried: the data has no gold completions; --completions FILE gives some"]
    count, origin = min(NUM_SCORED, len(dataset)), f"the data's column `{gold}`"
    if path is not None:
        from ..datasets.sources import Source, load_rows, require_columns

        given, origin = load_rows(Source("completions", remedy="give a file"), path, None)
        require_columns(given, ["completion"], "completions", origin, "rename the column that holds the completions")
        count = min(len(given), len(dataset), 4 * NUM_SCORED)
    rows = dataset.select(range(count)).to_list()
    if path is not None:
        rows = [{**row, **own} for row, own in zip(rows, given.select(range(count)).to_list(), strict=True)]
    else:
        rows = [{**row, "completion": row[gold]} for row in rows]
    inputs = _reward_inputs(rows, tokenizer)
    lines = [f"of {len(rows)} completions, {origin}"]
    for label, reward in zip(labels, rewards, strict=True):
        if isinstance(reward, str) or hasattr(reward, "unload"):
            lines.append(f"{label}: not tried, a reward model")
            continue
        try:
            by_name = RewardGuard().score(reward, label, **inputs)
        except RewardError as error:
            raise UsageError(str(error)) from error
        for name, scores in by_name.items():
            lines.append(f"{name}: " + ", ".join("None" if score is None else f"{score:.4g}" for score in scores))
    return lines


def _reward_inputs(rows: list[dict[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """The keyword arguments that TRL's trainer gives to a reward function."""
    from transformers import TrainerState

    texts = [_text(row["completion"]) for row in rows]
    conversational = not isinstance(rows[0]["prompt"], str)
    return {
        "prompts": [row["prompt"] for row in rows],
        "completions": [[{"role": "assistant", "content": text}] if conversational else text for text in texts],
        "completion_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        **{name: [row[name] for row in rows] for name in sorted({*rows[0]} - {"prompt", "completion"})},
        "trainer_state": TrainerState(),
        "log_extra": lambda *args: None,
        "log_metric": lambda *args: None,
    }


# Lengths, batches and steps


def _measured(dataset: "Dataset", column: str) -> list[Any]:
    step = math.ceil(len(dataset) / NUM_MEASURED)
    return list(dataset.select(range(0, len(dataset), step))[column])


def _histogram(what: str, lengths: list[int], rows: int) -> list[str]:
    import numpy as np

    middle, high = map(float, np.percentile(lengths, [50, 90]))
    part = f" of {len(lengths):,} of {rows:,} rows" if len(lengths) < rows else ""
    lines = [
        f"{what}{part}: mean {np.mean(lengths):,.0f}, median {middle:,.0f}, 90 % below {high:,.0f}, longest "
        f"{max(lengths):,}"
    ]
    counts, edges = np.histogram(lengths, bins=min(BINS, max(lengths) - min(lengths) + 1))
    for count, low, up in zip(counts, edges, edges[1:], strict=False):
        lines.append(f"{low:7,.0f} to {up:7,.0f} {count:7,} {'#' * math.ceil(BAR * count / counts.max())}")
    return lines


def _division(training: Any, plan: Batches, processes: int) -> list[str]:
    epochs = f"{training.num_train_epochs:g} epochs of {plan.steps_per_epoch:,}"
    return [
        f"{plan.prompts_per_generation:,} prompts x {training.num_generations} = {plan.rollouts_per_generation:,} "
        "rollouts per generation batch",
        f"{training.per_device_train_batch_size} rollouts x {processes} processes x "
        f"{training.gradient_accumulation_steps} passes = {plan.rollouts_per_step:,} rollouts per optimizer step",
        f"{plan.total_steps:,} optimizer steps: {'`max_steps`' if training.max_steps > 0 else epochs}",
    ]


def _warnings(training: Any, config: Any, lengths: dict[str, list[int]]) -> list[str]:
    found, limit = [], training.max_completion_length
    longest = max(lengths["prompts"]) + limit
    context, key = getattr(config.get_text_config(), "max_position_embeddings", None), "the policy's context"
    if training.use_vllm and training.vllm_max_model_length is not None:
        context, key = training.vllm_max_model_length, "`vllm_max_model_length`"
    if context is not None and longest > context:
        found.append(
            f"longest prompt + `max_completion_length` = {longest:,} tokens, and {key} is {context:,}: lower "
            "`max_prompt_tokens`"
        )
    for what, gold in lengths.items():
        beyond = sum(length > limit for length in gold)
        if what != "prompts" and beyond:
            found.append(f"{beyond / len(gold):.0%} of {what} are longer than `max_completion_length` = {limit:,}")
    return found


# Memory


def _memory(
    recipe: Recipe, config: Any, rewards: Sequence[Any], longest_prompt: int, processes: int
) -> tuple[list[str], list[str]]:
    """The expected memory, and what to watch in it."""
    from trl import get_peft_config, get_quantization_config

    training = recipe.training
    # For a model that is given by name, "auto" is the precision in its configuration.
    dtype = model_init_kwargs(recipe)["dtype"] or "float32"
    dtype = str(config.dtype or "float32" if dtype == "auto" else dtype).removeprefix("torch.")
    quantization = get_quantization_config(recipe.model)
    optim = str(getattr(training.optim, "value", training.optim))
    with one_clear_error():
        size = policy_size(
            config,
            bytes_per_weight=BYTES.get(dtype, 4),
            peft_config=get_peft_config(recipe.model),
            quantization=None if quantization is None else quantization.to_dict(),
            # Two values in float32 for Adam, and for what is not known better.
            optimizer_bytes_per_value=2.0 if "8bit" in optim else 8.0 * (optim not in ("sgd", "adafactor")),
        )
    weights_over, rest_over = _split_over(processes)
    length = longest_prompt + training.max_completion_length
    tokens = training.per_device_train_batch_size * length
    half = training.bf16 or training.fp16 or BYTES.get(dtype, 4) == 2
    activations = activations_gb(
        size, tokens, checkpointing=training.gradient_checkpointing, bytes_per_value=2 if half else 4
    )
    reward_gb, unknown = _reward_models_gb(rewards)
    share = training.vllm_gpu_memory_utilization if training.use_vllm and training.vllm_mode == "colocate" else 0.0
    expected = peak(
        size,
        activations=activations,
        reward_models_gb=reward_gb,
        vllm_share=share,
        # transformers generates for the whole generation batch of a process at once.
        cached_tokens=0 if training.use_vllm else training.generation_batch_size // processes * length,
        weights_split_over=weights_over,
        optimizer_split_over=rest_over,
    )
    kind = "trained" if size.trained >= size.parameters else f"in all, {size.trained / 1e6:,.1f} M trained (LoRA)"
    vllm = f" + {share:g} of the GPU for vLLM" if share else ""
    gpu, watch = _against_the_gpu(expected, training)
    return [
        f"{size.parameters / 1e6:,.1f} M parameters {kind}",
        f"generating ≈ {expected.generating:.1f} GB{vllm}, training ≈ {expected.training:.1f} GB",
        f"weights {size.weights_gb / weights_over:.1f}, optimizer {size.optimizer_gb / rest_over:.1f}, "
        f"gradients {size.gradients_gb / rest_over:.1f}, activations {activations:.1f} (of {tokens:,} tokens), "
        f"reward models {reward_gb:.1f}",
        *(f"without the reward {label}, whose size is not known here" for label in unknown),
        gpu,
    ], watch


def _against_the_gpu(expected: Peak, training: Any) -> tuple[str, list[str]]:
    import torch

    needed = expected.smallest_gpu()
    if training.use_cpu:
        return f"≈ {max(expected.generating, expected.training):.1f} GB of this machine's memory", []
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        found, needed = gpu.total_memory / 1e9, expected.on(gpu.total_memory / 1e9)
        watch = [f"≈ {needed:.1f} GB are expected, and the GPU has {found:.1f} GB"] if needed > found else []
        return f"≈ {needed:.1f} GB of the {found:.1f} GB of {gpu.name}", watch
    fitting = next((gpu for gpu in STANDARD_GPUS_GB if gpu >= needed), None)
    size = f"one of {fitting} GB" if fitting else "none; split the run over several (docs/scaling.md)"
    return f"no GPU found here; ≈ {needed:.1f} GB are needed, so {size} would do", []


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
        elif not hasattr(reward, "unload"):
            continue
        elif reward.offload:  # in CPU memory, and on the GPU for the time of its call
            unknown.append(reward.__name__)
            continue
        else:
            module, dtype, quantization = meta_model(reward.config, AutoModel), reward.dtype, reward.quantization
        total += weight_bytes(module, 4 if dtype is None else dtype.itemsize, quantization) / 1e9
    return total, unknown
