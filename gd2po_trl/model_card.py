"""The parts of a model card that describe a training run with GD²PO."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .gd2po_config import METHODS, GD2POConfig
from .reward_gates import Condition, parse_gates


METHOD_TITLES = {"grpo": "GRPO", "gdpo": "GDPO", "gd2po_hard": "GD²PO-Hard", "gd2po_snr": "GD²PO-SNR"}

# In the order of the method's steps.
SETTINGS = (
    "multi_objective_aggregation",
    "scale_rewards",
    "estimator",
    "estimator_kwargs",
    "reward_weight_schedules",
    "conflict_filter",
    "snr_threshold",
    "consensus_weighting",
    "whitening",
    "whitening_shift_mean",
    "update_share",
    "num_generations",
    "generation_batch_size",
    "loss_type",
    "beta",
    "learning_rate",
    "max_completion_length",
    "temperature",
)


def method_title(args: GD2POConfig) -> str:
    """Name of the method that the settings of `args` amount to, "a variant of ..." where they refine a preset."""
    for name, preset in METHODS.items():
        if args.estimator is None and all(getattr(args, key) == value for key, value in preset.items()):
            return METHOD_TITLES[name]
    decoupled = args.multi_objective_aggregation == "normalize_then_sum"
    if not decoupled:
        return METHOD_TITLES["grpo"]
    decoupled_methods = [name for name in METHODS if name != "grpo"]
    closest = next(name for name in decoupled_methods if METHODS[name].get("conflict_filter") == args.conflict_filter)
    return f"a variant of {METHOD_TITLES[closest]}"


def training_section(
    args: GD2POConfig, reward_names: Sequence[str], reward_weights: Sequence[float], changes: Sequence[str] = ()
) -> str:
    """
    Markdown section with the method, the rewards and the settings of a run.

    Args:
        args ([`GD2POConfig`]):
            Settings of the run.
        reward_names (sequence of `str`):
            Names of the rewards.
        reward_weights (sequence of `float`):
            Their weights, in the same order.
        changes (sequence of `str`, *optional*):
            Settings that changed when the run was resumed, and from which step on.

    Returns:
        `str`: the section, starting with its heading.
    """
    declared: Any = args.reward_gates or {}
    gates = parse_gates(declared)
    rewards = "\n".join(
        f"| `{name}` | {weight:g} | {_counts_where(gates.get(name, []), args.closed_gate_reward)} |"
        for name, weight in zip(reward_names, reward_weights, strict=True)
    )
    values = {**vars(args), "estimator": args.estimator_name()}
    settings = "\n".join(f"| `{name}` | `{values[name]}` |" for name in SETTINGS)
    return (
        "## Rewards and method\n\n"
        f"Trained with {method_title(args)} by `gd2po_trl` "
        "([arXiv 2606.16771](https://arxiv.org/abs/2606.16771)).\n\n"
        f"| reward | weight | counts |\n| --- | --- | --- |\n{rewards}\n\n"
        f"| setting | value |\n| --- | --- |\n{settings}\n{_changes(changes)}"
    )


def _counts_where(conditions: Sequence[Condition], closed: str) -> str:
    texts = [f"`{one.reward} {one.operator} {one.threshold:g}`" for one in conditions]
    return f"where {' and '.join(texts)}, else {closed}" if texts else "everywhere"


def _changes(changes: Sequence[str]) -> str:
    if not changes:
        return ""
    lines = "\n".join(f"- {change}" for change in changes)
    return f"\nThese are the settings at the end. The run was resumed with other ones:\n\n{lines}\n"


# The longest prompt of the training data that is shown, in characters.
PROMPT_LENGTH = 1500
QUICK_START = re.compile(r"## Quick start\n.*?(?=^## )", re.DOTALL | re.MULTILINE)
UNNAMED_BASE = "[None](https://huggingface.co/None)"


def with_use_of(card: str, trainer: Any) -> str:
    """
    TRL's model card with the base model named, and with code that runs: a prompt of the kind trained on, the adapter.

    TRL's card names a local base model "None", loads "None" if the run was not pushed to the Hub, and has the same
    example prompt for every model.

    Args:
        card (`str`): What TRL wrote.
        trainer (`GRPOTrainer`): Whose card it is.

    Returns:
        `str`: the card.
    """
    base = base_model_of(trainer)
    card = card.replace(UNNAMED_BASE, f"`{base}`" if base else "a model that was given as an object")
    return QUICK_START.sub(lambda _: _quick_start(trainer, base), card, count=1)


def base_model_of(trainer: Any) -> str | None:
    """Hub id or folder of the model that was trained, of an absolute path only its last part; `None` if unknown."""
    name = getattr(trainer.accelerator.unwrap_model(trainer.model).config, "_name_or_path", None)
    if not name:
        return None
    return Path(name).name if os.path.isabs(name) else str(name)


def _quick_start(trainer: Any, base: str | None) -> str:
    model = trainer.hub_model_id or trainer.args.output_dir
    model = Path(model).name if os.path.isabs(model) else model
    prompt = _example_prompt(trainer.train_dataset)
    length = trainer.args.max_completion_length
    code = (
        "from transformers import pipeline\n\n"
        f"prompt = {prompt}\n"
        f'generator = pipeline("text-generation", model={model!r})\n'
        f"output = generator(prompt, max_new_tokens={length}, return_full_text=False)[0]\n"
        'print(output["generated_text"])\n'
    )
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", code)), default=0))
    section = f"## Quick start\n\n{fence}python\n{code}{fence}\n\n"
    if getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", None):
        section += (
            f"This is a PEFT adapter of {f'`{base}`' if base else 'its base model'}, which is loaded with it "
            "(`pip install peft`). To merge it into the weights of that model, so that it loads anywhere:\n\n"
            f"```bash\ngd2po merge {model}\n```\n\n"
        )
    return section


def _example_prompt(dataset: Any) -> str:
    """The first prompt that was trained on, as Python source."""
    from datasets import Dataset

    prompt = dataset[0]["prompt"] if isinstance(dataset, Dataset) and len(dataset) else None
    if isinstance(prompt, (list, tuple)):
        prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    source = repr(prompt)
    if prompt is None or len(source) > PROMPT_LENGTH:
        messages = isinstance(prompt, list)
        return '[{"role": "user", "content": "..."}]' if messages else '"..."  # as those in the training data'
    return source
