"""From rollouts to a report: the verdict, its evidence, and what to do."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from ..reporting import join
from .diagnosis import Finding, Recommendation, diagnose, equalizing_weights
from .evidence import Example, find_examples, summarize
from .groups import Groups, find_groups
from .measures import measure, normalize
from .reading import Rollouts, hash_texts, read_rollouts
from .records import Analysis
from .weights import Weights, doubts, find_weights


if TYPE_CHECKING:
    from rich.console import Console

THRESHOLDS = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Report(Analysis):
    """
    What [`analyze`] found: all figures of [`Analysis`], and what they mean.

    Args:
        source (`str`): What was analyzed.
        verdict ([`Finding`]): What matters most; `verdict.kind` is one word, `verdict.text` a sentence.
        findings (`list[Finding]`): What else stands out.
        recommendation ([`Recommendation`]): A method or none, settings to paste, and advice.
        summary (`list[str]`): The evidence in sentences.
        reward_weights (`list[float]`): The weights that counted, one per reward.
        weights_source (`str`): Where they are from.
        scale_rewards (`str`): What divided the rewards.
        equalizing_weights (`list[float]`): The `reward_weights` that make the rewards equally loud under
            `scale_rewards: none`: `1 / spread`.
        examples (`list[Example]`): Rollouts on which the rewards disagree most; `[]` without texts.
    """

    source: str
    verdict: Finding
    findings: list[Finding]
    recommendation: Recommendation
    summary: list[str]
    reward_weights: list[float]
    weights_source: str
    scale_rewards: str
    equalizing_weights: list[float]
    examples: list[Example]

    def print(self, console: "Console | None" = None) -> None:
        """Print the report as `gd2po analyze` does."""
        from .rendering import print_report

        print_report(self, console)

    def save(self, folder: str | Path) -> list[Path]:
        """Write `report.html`, `report.png` and `report.json` into `folder`; the paths written."""
        from .rendering import write_report

        return write_report(Path(folder), self)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        document = asdict(self)
        document["summary"] = [self.verdict.text, *self.summary]
        return document

    def __str__(self) -> str:
        return self.verdict.text

    def _repr_html_(self) -> str:
        from .rendering import render_html

        return render_html(self)


def analyze(
    *sources: str | Path | Iterable[str | Path],
    rewards: Sequence[str] | None = None,
    reward_weights: Sequence[float] | None = None,
    num_generations: int | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Report:
    """
    Analyze the rollouts of runs or files, as `gd2po analyze` does.

    Args:
        sources (`str`, `Path`, or several of them):
            Output folders of runs with logged completions, or parquet, JSONL or CSV files.
        rewards (sequence of `str`, *optional*):
            The columns that hold rewards. Found by themselves where not given.
        reward_weights (sequence of `float`, *optional*):
            One per reward. Where not given, those of the run's `recipe.yaml`, or those that reproduce the total that
            the run logged, or 1 each.
        num_generations (`int`, *optional*):
            Rollouts per group. Found by prompt and step where not given.
        thresholds (sequence of `float`, *optional*, defaults to `(0.2, 0.4, 0.6, 0.8)`):
            Thresholds in [0, 1] at which to judge the SNR filter.

    Returns:
        [`Report`]: `report.verdict.text` is the verdict; `report.print()` shows all, `report.save(folder)` writes it.

    Raises:
        [`UsageError`]: for files that cannot be read or a wrong option.

    Example:

    ```python
    from gd2po_trl.analysis import analyze

    report = analyze("outputs/my_run")
    print(report.verdict.text)
    print(report.recommendation.settings)
    ```
    """
    listed: list[str | Path] = []
    for source in sources:
        listed += [source] if isinstance(source, (str, Path)) else list(source)
    if not listed:
        raise UsageError("There is nothing to analyze. Give the output folder of a run, or files with rollouts.")
    _check(thresholds, reward_weights, num_generations)
    rollouts = read_rollouts(listed, rewards)
    groups = find_groups(rollouts, num_generations)
    weights = find_weights(rollouts, reward_weights)
    return _report(rollouts, groups, weights, thresholds, ", ".join(map(str, listed)))


def analyze_rewards(
    rewards: Any,
    num_generations: int,
    names: Sequence[str] | None = None,
    *,
    reward_weights: Sequence[float] | None = None,
    scale_rewards: str = "group",
    steps: Sequence[int] | None = None,
    completions: Sequence[Any] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Report:
    """
    Analyze rewards in memory.

    Args:
        rewards (array of shape `(B, K)`):
            Reward of each rollout under each of K rewards, NaN where it was not scored; a prompt's rollouts are
            contiguous.
        num_generations (`int`):
            Rollouts per group. B must be a multiple of it.
        names (sequence of `str`, *optional*):
            Names of the rewards; `reward_1` and so on where not given.
        reward_weights (sequence of `float`, *optional*):
            One per reward, 1 each where not given.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            As in [`GD2POConfig`].
        steps (sequence of `int`, *optional*):
            Training step of each rollout.
        completions (sequence, *optional*):
            Completions, by whose length and equality noise is told from rewards.
        thresholds (sequence of `float`, *optional*):
            As in [`analyze`].

    Returns:
        [`Report`]

    Raises:
        [`UsageError`]: for a wrong shape or option.
    """
    if hasattr(rewards, "detach"):
        rewards = rewards.detach().double().cpu().numpy()  # numpy knows no bfloat16
    values = np.asarray(rewards, dtype=np.float64)
    _check(thresholds, reward_weights, num_generations)
    if values.ndim != 2 or not values.size or len(values) % num_generations:
        raise UsageError(
            f"`rewards` has shape {values.shape}; it must be (rollouts, rewards), with whole groups of "
            f"{num_generations} rollouts."
        )
    count, num_rewards = values.shape
    names = [f"reward_{index}" for index in range(1, num_rewards + 1)] if names is None else list(names)
    weights = [1.0] * num_rewards if reward_weights is None else list(reward_weights)
    if len(names) != num_rewards or len(weights) != num_rewards:
        raise UsageError(f"There are {len(names)} names and {len(weights)} weights for {num_rewards} rewards.")
    texts = [""] * count if completions is None else list(completions)
    if len(texts) != count or (steps is not None and len(steps) != count):
        raise UsageError(f"`completions` and `steps` need one entry for each of the {count} rollouts.")
    hashes, lengths = hash_texts(texts)
    rollouts = Rollouts(
        reward_names=names,
        rewards=values,
        step=np.zeros(count, dtype=np.int64) if steps is None else np.asarray(steps, dtype=np.int64),
        prompt=np.repeat(np.arange(count // num_generations, dtype=np.uint64), num_generations),
        completion=hashes,
        length=lengths,
    )
    sizes = np.full(count // num_generations, num_generations)
    groups = Groups(order=np.arange(count), sizes=sizes, steps=rollouts.step[::num_generations], notes=[])
    found = Weights(np.array(weights, dtype=np.float64), "given", scale_rewards)
    return _report(rollouts, groups, found, thresholds, f"{count:,} rollouts in memory")


def _check(thresholds: Sequence[float], reward_weights: Sequence[float] | None, num_generations: int | None) -> None:
    for threshold in thresholds:
        if not 0.0 <= threshold <= 1.0:
            raise UsageError(f"--thresholds has {threshold:g}; a threshold of the SNR filter is in [0, 1].")
    for weight in () if reward_weights is None else reward_weights:
        if not abs(weight) < float("inf"):
            raise UsageError(f"--reward-weights has {weight}; a weight is a finite number.")
    if num_generations is not None and num_generations < 2:
        raise UsageError(f"--num-generations is {num_generations}; a group holds at least 2 rollouts.")


def _report(rollouts: Rollouts, groups: Groups, weights: Weights, thresholds: Sequence[float], source: str) -> Report:
    normalized = normalize(rollouts, groups, weights.values, weights.scale_rewards)
    rollouts.warnings += [*weights.warnings, *doubts(rollouts, groups, normalized)]
    if weights.source not in ("given", "assumed"):
        listed = [f"{weight:g} for {name}" for name, weight in zip(rollouts.reward_names, weights.values, strict=True)]
        rollouts.notes.insert(0, f"The weights are those of {weights.source}: {join(listed)}.")
    if weights.scale_rewards != "group":
        rollouts.notes.append(f"As in the run, `scale_rewards` is {weights.scale_rewards!r}.")
    analysis = measure(rollouts, groups, normalized, weights.values, thresholds)
    (verdict, *findings), recommendation = diagnose(analysis)
    return Report(
        **{field.name: getattr(analysis, field.name) for field in fields(Analysis)},
        source=source,
        verdict=verdict,
        findings=findings,
        recommendation=recommendation,
        summary=summarize(analysis),
        reward_weights=weights.values.tolist(),
        weights_source=weights.source,
        scale_rewards=weights.scale_rewards,
        equalizing_weights=equalizing_weights(analysis),
        examples=find_examples(rollouts, groups, normalized, analysis) if rollouts.files else [],
    )
