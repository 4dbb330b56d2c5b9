"""Rollouts on which the rewards disagree most, to be read by a person."""

from dataclasses import dataclass

import numpy as np

from ..advantages import SIGN_EPS
from ..terminal import shorten
from .groups import Groups
from .reading import Rollouts, read_texts
from .results import Analysis
from .statistics import RECENT, Normalized


# Texts are cut in the middle to this many characters.
TEXT_LENGTH = 4000


@dataclass(frozen=True)
class Example:
    """
    A rollout on which two rewards disagree.

    Args:
        favoured_by, penalised_by (`str`): The two rewards.
        step (`int`): Training step.
        rewards, advantages (`dict[str, float]`): Value of each reward, and its normalized, weighted advantage.
        agreement (`float`): Signed share of the advantages on which all rewards agree.
        prompt, completion (`str`): The texts, cut in the middle if they are long.
    """

    favoured_by: str
    penalised_by: str
    step: int
    rewards: dict[str, float]
    advantages: dict[str, float]
    agreement: float
    prompt: str
    completion: str


def find_examples(
    rollouts: Rollouts, groups: Groups, normalized: Normalized, analysis: Analysis, count: int = 6
) -> list[Example]:
    """
    The strongest conflicts of the most conflicting pairs of rewards, each from another prompt, from recent steps: the
    completions of today say more than those of an untrained policy.

    Args:
        rollouts ([`Rollouts`]), groups ([`Groups`]), normalized ([`Normalized`]), analysis ([`Analysis`]):
            The data and its figures.
        count (`int`, *optional*, defaults to 6):
            How many to return at most.
    """
    directions = []
    for pair in analysis.pairs:
        directions += [(pair.first_up, pair.first, pair.second), (pair.second_up, pair.second, pair.first)]
    directions = [direction for direction in sorted(directions, reverse=True)[:count] if direction[0] > 0]
    if not directions:
        return []
    names = rollouts.reward_names
    row_step: np.ndarray = np.repeat(groups.steps, groups.sizes)
    recent = row_step >= np.quantile(np.unique(groups.steps), 1 - RECENT)
    prompt = rollouts.prompt[groups.order] if rollouts.layout.prompt is not None else normalized.group
    per_direction = max(count // len(directions), 1)
    chosen: list[tuple[int, str, str]] = []
    seen: set[int] = set()
    for _, up, down in directions:
        strength = np.minimum(normalized.weighted[:, names.index(up)], -normalized.weighted[:, names.index(down)])
        candidates = np.flatnonzero(recent & (strength > SIGN_EPS))
        if len(candidates) == 0:
            candidates = np.flatnonzero(strength > SIGN_EPS)
        # More than enough of the strongest to find some of different prompts; the latest of equals first.
        strongest = candidates[np.lexsort((-row_step[candidates], -strength[candidates]))][: 64 * count]
        found = 0
        for row in strongest.tolist():
            if found == per_direction:
                break
            if int(prompt[row]) not in seen:
                seen.add(int(prompt[row]))
                chosen.append((row, up, down))
                found += 1
    texts = read_texts(rollouts, [int(groups.order[row]) for row, _, _ in chosen])
    return [
        Example(
            favoured_by=up,
            penalised_by=down,
            step=int(row_step[row]),
            rewards=dict(zip(names, rollouts.rewards[groups.order[row]].tolist(), strict=True)),
            advantages=dict(zip(names, normalized.weighted[row].tolist(), strict=True)),
            agreement=float(normalized.agreement[row]),
            prompt=shorten(prompt_text, TEXT_LENGTH),
            completion=shorten(completion, TEXT_LENGTH),
        )
        for (row, up, down), (prompt_text, completion) in zip(chosen, texts, strict=True)
    ]
