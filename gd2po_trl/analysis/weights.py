"""The weights that a run gave its rewards: from its recipe, its log, or a total beside the rewards."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from ..errors import UsageError
from ..run_log import LogHistory, checkpoints_of, read_state


if TYPE_CHECKING:
    from .groups import Groups
    from .measures import Normalized
    from .reading import Rollouts

# Totals within this of the weighted sum of the rewards, relative to their size, agree with it.
TOLERANCE = 1e-3
# Metrics of a run whose weights follow a schedule.
SCHEDULED = "gd2po/reward_weight/"
# A share of rollouts below this may differ: truncated completions that the run masked conflict with nothing there.
TOLERATED_SHARE = 0.01


@dataclass(frozen=True)
class Weights:
    """
    How the rewards count.

    Args:
        values (`np.ndarray` of shape `(K,)`): Weight of each reward.
        source (`str`): Where they are from.
        scale_rewards (`str`): What divides a reward's deviation: `"group"`, `"batch"` or `"none"`.
        warnings (`list[str]`): Why they may be wrong.
    """

    values: np.ndarray
    source: str
    scale_rewards: str
    warnings: list[str] = field(default_factory=list)


def find_weights(rollouts: "Rollouts", given: Sequence[float] | None = None) -> Weights:
    """
    The weights of the run behind `rollouts`.

    In this order: those that are `given`; those of the `recipe.yaml` in the run's folder; those that reproduce the
    totals in its `trainer_state.json`; those that reproduce a column with totals; 1 each.

    Raises:
        [`UsageError`]: if there are more or fewer weights `given` than rewards.
    """
    names = rollouts.reward_names
    runs = dict.fromkeys(map(_run_folder, rollouts.files))
    weights_of_runs, (scale, *_) = zip(*(_recipe_settings(folder, names) for folder in runs), strict=True)
    ones, first = np.ones(len(names)), weights_of_runs[0]
    if given is not None:
        if len(given) != len(names):
            raise UsageError(
                f"--reward-weights has {len(given)} entries for the {len(names)} rewards {', '.join(names)}. Give one "
                "for each, in this order."
            )
        return Weights(np.array(given, dtype=np.float64), "given", scale)
    if first is not None:
        warnings = []
        if any(other not in (None, first) for other in weights_of_runs):
            warnings.append(
                "The runs have different `reward_weights`; those of the first are taken for all. Analyze them apart."
            )
        if any(key.startswith(SCHEDULED) for entry in logged_rewards(rollouts.files[0]) for key in entry):
            warnings.append(
                "The run changed the weights on the way (`reward_weight_schedules`); here its `reward_weights` count "
                "throughout. --reward-weights gives other ones."
            )
        return Weights(np.array(first), "recipe.yaml", scale, warnings)
    values, totals = _logged_means(rollouts)
    fitted = exact_weights(values, totals)
    if fitted is not None:
        return Weights(fitted, "the totals in trainer_state.json", scale)
    if len(totals) and not _agrees(values @ ones, totals):
        warning = (
            f"The weights of the rewards are not known and are taken as 1: the run's log has a total reward of "
            f"{totals[-1]:.3g} where these give {values[-1].sum():.3g}. Pass its --reward-weights, or all of its "
            "--rewards."
        )
        return Weights(ones, "assumed", scale, [warning])
    if "total" not in rollouts.extra:
        return Weights(ones, "the log" if len(totals) else "assumed", scale)
    fitted = exact_weights(np.nan_to_num(rollouts.rewards), rollouts.extra["total"])
    if fitted is None:
        warning = (
            "The column with the total is not a weighted sum of the rewards, which count with weight 1 each. "
            "--reward-weights gives other weights."
        )
        return Weights(ones, "assumed", scale, [warning])
    # What the program did with rewards beyond this total is not known, so that they are looked at nevertheless.
    absent = [name for name, weight in zip(names, fitted, strict=True) if weight == 0]
    warning = (
        f"The column with the total leaves out {', '.join(absent)}: taken with weight 1. If it was only watched, "
        "pass --reward-weights with 0 for it."
    )
    return Weights(np.where(fitted == 0, 1.0, fitted), "the column with the total", scale, [warning] * bool(absent))


def exact_weights(values: np.ndarray, totals: np.ndarray) -> np.ndarray | None:
    """
    The weights, `(K,)`, with which `totals` `(N,)` are sums of `values` `(N, K)`; `None` if there are none, or if more
    than one set of weights would do.
    """
    known = ~np.isnan(totals)
    values, totals = np.nan_to_num(values[known]), totals[known]
    count = values.shape[1]
    if not len(totals):
        return None
    if _agrees(values.sum(1), totals):
        return np.ones(count)
    # One more than there are weights, so that a fit means something.
    if (
        len(np.unique(values, axis=0)) <= count
        or np.linalg.matrix_rank(values, tol=1e-6 * np.abs(values).max()) < count
    ):
        return None
    fitted = np.linalg.lstsq(values, totals, rcond=None)[0]
    rounded = np.array([float(f"{weight:.3g}") for weight in np.where(np.abs(fitted) < 1e-3, 0.0, fitted)])
    for weights in (rounded, fitted):
        if _agrees(values @ weights, totals):
            return weights
    return None


def _agrees(sums: np.ndarray, totals: np.ndarray) -> bool:
    return bool((np.abs(sums - totals) <= TOLERANCE * np.maximum(np.abs(totals).max(), 1e-9)).mean() > 0.95)


def doubts(rollouts: "Rollouts", groups: "Groups", normalized: "Normalized") -> list[str]:
    """Sentences on where the analysis contradicts the conflicts that the run itself logged."""
    logged = rollouts.extra.get("gd2po_conflict")
    if logged is None:
        return []
    logged = logged[groups.order]
    known = ~np.isnan(logged)
    differing = (logged[known] != normalized.conflict[known]).mean() if known.any() else 0.0
    if differing <= TOLERATED_SHARE:
        return []
    return [
        f"The run itself judged conflict differently on {differing:.0%} of the rollouts. It had other "
        "--reward-weights, --rewards or --num-generations, or masked truncated completions."
    ]


# The files of a run


def logged_rewards(file: Path) -> LogHistory:
    """The log entries with rewards that the run of `file` left, or its newest checkpoint; `[]` if there is none."""
    run = _run_folder(file)
    for folder in (run, *checkpoints_of(run)):
        state = read_state(folder) or {"log_history": []}
        entries = [entry for entry in state["log_history"] if isinstance(entry, dict) and "reward" in entry]
        if entries:
            return entries
    return []


def _run_folder(file: Path) -> Path:
    folder = file.resolve().parent
    return folder.parent if folder.name == "completions" else folder


def _recipe_settings(folder: Path, names: list[str]) -> tuple[list[float] | None, str]:
    """Weights of the rewards `names` and `scale_rewards`, as `recipe.yaml` has them; `None` for weights it lacks."""
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        parts = {
            label: (kwargs or {}).get("reward_names") for label, kwargs in (recipe.get("reward_kwargs") or {}).items()
        }
        named = [parts.get(label) or [str(label).rstrip("/").rpartition("/")[2]] for label in recipe["reward_funcs"]]
        labels = [name for names in named for name in names]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None, "group"
    scale = {True: "group", False: "none"}.get(recipe.get("scale_rewards", "group"), recipe.get("scale_rewards"))
    scale = scale if scale in ("group", "batch", "none") else "group"
    weights: Any = recipe.get("reward_weights")
    weights = [1.0] * len(labels) if weights is None else weights
    if not isinstance(weights, list) or len(weights) != len(labels):
        return None, scale
    by_name = dict(zip(labels, weights, strict=True))
    chosen = [by_name.get(name) for name in names]
    is_known = all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in chosen)
    return [float(weight) for weight in chosen if weight is not None] if is_known else None, scale


def _logged_means(rollouts: "Rollouts") -> tuple[np.ndarray, np.ndarray]:
    """The mean reward of each logged step, unscored counting 0 as in the total, `(L, K)`, and the total, `(L,)`."""
    names = rollouts.reward_names
    keys = [f"rewards/{name}/mean" for name in names]
    entries = [
        entry
        for entry in logged_rewards(rollouts.files[0])
        if all(isinstance(entry.get(key), (int, float)) and math.isfinite(entry[key]) for key in [*keys, "reward"])
    ]
    means = [[entry[key] for key in keys] for entry in entries]
    if np.isnan(rollouts.rewards).any():
        # The log's mean is over the scored ones; that over all is in the table of the step.
        by_step = {step: rollouts.rewards[rollouts.step == step] for step in {entry.get("step") for entry in entries}}
        entries = [entry for entry in entries if len(by_step.get(entry.get("step"), ()))]
        means = [np.nan_to_num(by_step[entry.get("step")]).mean(0).tolist() for entry in entries]
    values = np.array(means, dtype=np.float64).reshape(len(entries), len(names))
    return values, np.array([entry["reward"] for entry in entries], dtype=np.float64)
