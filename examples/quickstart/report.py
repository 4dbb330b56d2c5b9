"""The end of the quickstart: curves of the rewards, and completions from before and after the training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gd2po_trl.run_log import LogHistory, reward_names, series


if TYPE_CHECKING:
    from rich.console import Console

CURVES_FILE = "curves.png"
REPORT_FILE = "report.txt"


def plot_curves(log: LogHistory, path: Path) -> Path:
    """Draws every reward, in training and on held-out prompts, and the conflict ratio, over the steps, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = reward_names(log)
    figure, axes = pyplot.subplots(1, len(names) + 1, figsize=(3.4 * (len(names) + 1), 3.2), layout="constrained")
    for axis, name in zip(axes, names, strict=False):
        axis.plot(*series(log, f"rewards/{name}/mean"), color="tab:blue", alpha=0.6, label="training")
        axis.plot(*series(log, f"eval_rewards/{name}/mean"), color="tab:orange", marker="o", label="held out")
        axis.set_title(f"{name} (mean)")
        axis.legend(frameon=False)
    axes[-1].plot(*series(log, "gd2po/conflict_ratio"), color="tab:red", label="conflicting")
    axes[-1].plot(*series(log, "gd2po/kept_ratio"), color="tab:green", label="kept")
    axes[-1].set_title("share of rollouts")
    axes[-1].set_ylim(0, 1)
    axes[-1].legend(frameon=False)
    for axis in axes:
        axis.set_xlabel("optimizer step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def sample_completions(folder: str | Path, prompts: Sequence[str], max_new_tokens: int, seed: int = 0) -> list[str]:
    """
    One completion per prompt from the policy in `folder`, sampled at temperature 1 as in training.

    Args:
        folder (`str` or `Path`): Folder for `from_pretrained`.
        prompts (`Sequence[str]`): Plain prompts.
        max_new_tokens (`int`): Longest completion, in tokens.
        seed (`int`, *optional*, defaults to `0`): Seed of the sampling.

    Returns:
        `list[str]`: The completions, special tokens left out.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        output = policy.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
        )
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def print_samples(
    rows: Sequence[dict[str, str]],
    completions: dict[str, Sequence[str]],
    rewards: dict[str, Callable],
    console: "Console",
) -> None:
    """
    Prints completions of the same prompts side by side with their rewards.

    Args:
        rows (`Sequence[dict[str, str]]`): The prompts, with their `answer`.
        completions (`dict[str, Sequence[str]]`): Completions of all rows by what to call them.
        rewards (`dict[str, Callable]`): Reward functions by name.
        console (`rich.console.Console`): Where to print.
    """
    from gd2po_trl.progress import print_sample
    from gd2po_trl.reward_guard import RewardGuard

    prompts, answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    scores: dict[str, dict[str, list[float | None]]] = {label: {} for label in completions}
    for label, texts in completions.items():
        for name, func in rewards.items():
            arguments = {"prompts": prompts, "completions": list(texts), "answer": answers}
            scores[label] |= RewardGuard().score(func, name, **arguments)
    for index, prompt in enumerate(prompts):
        headings = {
            label: ", ".join(f"{name} {values[index]:.2f}" for name, values in scores[label].items())
            for label in completions
        }
        print_sample(
            f"Held-out prompt {index + 1}",
            prompt,
            {f"{label} ({headings[label]})": texts[index] for label, texts in completions.items()},
            console,
        )
