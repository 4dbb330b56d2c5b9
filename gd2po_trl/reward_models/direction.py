"""Which way a reward model points: what published scores mean, and a check on pairs whose order nobody disputes."""

import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError


DIRECTIONS = ("helpful", "harmless", "harmful")
_OPPOSITE = {"harmful": "harmless", "harmless": "harmful", "helpful": "unhelpful"}

# Name of the published model -> what a higher raw score means. Measured on the 8,211 test pairs of PKU-SafeRLHF:
# the CM of Qwen2.5-7B-SafeRLHF agrees with the safer response 0.784 of the time, beaver-7b-v3.0-cost 0.317.
_PUBLISHED = (
    (re.compile(r"qwen[\w.]*-\d+b-saferlhf-rm$", re.IGNORECASE), "helpful"),
    (re.compile(r"qwen[\w.]*-\d+b-saferlhf-cm$", re.IGNORECASE), "harmless"),
    (re.compile(r"beaver-7b-.*reward$", re.IGNORECASE), "helpful"),
    (re.compile(r"beaver-7b-.*cost$", re.IGNORECASE), "harmful"),
)

# Pairs of responses whose order nobody disputes, as (prompt, better response, worse response).
_PAIRS = json.loads(Path(__file__).with_name("direction_pairs.json").read_text(encoding="utf-8"))
HARMLESS_PAIRS, HELPFUL_PAIRS = (
    tuple((pair["prompt"], pair["better"], pair["worse"]) for pair in _PAIRS[kind]) for kind in ("harmless", "helpful")
)


def is_safe_rlhf(config: Any) -> bool:
    """Whether a config is that of a safe-rlhf score model (`LlamaForScore`, in old ones `LlamaModelForScore`)."""
    return any(name.endswith("ForScore") for name in getattr(config, "architectures", None) or [])


def published_direction(model: str, config: Any = None) -> str | None:
    """
    What a higher raw score of a known model means: `"helpful"`, `"harmless"` or `"harmful"`; `None` for an unknown
    one.

    Known are Qwen2.5-7B-SafeRLHF-RM and -CM and beaver-7b-*-reward and -cost by the last part of `model`, and any
    safe-rlhf checkpoint by `score_type` in its config.
    """
    name = re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    for pattern, direction in _PUBLISHED:
        if pattern.search(name):
            return direction
    if is_safe_rlhf(config):
        return {"reward": "helpful", "cost": "harmful"}.get(getattr(config, "score_type", ""))
    return None


def resolve_direction(
    published: str | None, sign: int | None, higher_is: str | None, model: str
) -> tuple[int, str | None]:
    """
    The sign to apply and what the resulting reward means.

    Args:
        published (`str`, *optional*): From [`published_direction`].
        sign (`int`, *optional*): 1 or -1. `None` takes -1 for a model that is known to score harm, else 1.
        higher_is (`str`, *optional*): The meaning of a higher reward, after the sign, as the user declares it.

    Raises:
        [`UsageError`]: for a wrong value, or a declaration that contradicts what is known of the model.
    """
    if sign not in (None, 1, -1):
        raise UsageError(f"sign={sign!r} of reward model {model!r} must be 1 or -1.")
    if higher_is is not None and higher_is not in DIRECTIONS:
        raise UsageError(f"higher_is={higher_is!r} of reward model {model!r} must be one of {', '.join(DIRECTIONS)}.")
    if sign is None:
        wants_harm = higher_is == "harmful"
        sign = -1 if published == "harmful" and not wants_harm else 1
    known = published if sign == 1 else _OPPOSITE.get(published or "")
    if higher_is is not None and known == _OPPOSITE[higher_is]:
        raise UsageError(
            f"reward model {model!r} is known to score higher for {published} responses, so with sign={sign} its "
            f"reward is higher for {known} ones, not {higher_is} as higher_is declares. Set sign={-sign}, or leave "
            "it out."
        )
    if higher_is is None and known in ("harmful", "unhelpful"):
        warnings.warn(
            f"reward model {model!r} with sign={sign} rewards {known} responses. Unless its reward weight is "
            "negative, leave sign out.",
            stacklevel=3,
        )
    return sign, higher_is or (known if known in DIRECTIONS else None)


def check_direction(
    score: Callable[[list[str], list[str]], Sequence[float | None]], higher_is: str, name: str, model: str
) -> float:
    """
    Compares a reward with its declared direction on built-in pairs, and warns if it looks inverted.

    Args:
        score (`Callable`): Prompts and responses in, rewards (after the sign) out.
        higher_is (`str`): One of [`DIRECTIONS`].

    Returns:
        `float`: The share of pairs in the declared order; ties count as half.
    """
    pairs = HELPFUL_PAIRS if higher_is == "helpful" else HARMLESS_PAIRS
    prompts = [prompt for prompt, _, _ in pairs for _ in range(2)]
    responses = [response for _, better, worse in pairs for response in (better, worse)]
    rewards = score(prompts, responses)
    right = 0.0
    for better, worse in zip(rewards[::2], rewards[1::2], strict=True):
        if better is not None and worse is not None:
            right += 0.5 if better == worse else float((better > worse) == (higher_is != "harmful"))
    agreement = right / len(pairs)
    if agreement < 0.5:
        warnings.warn(
            f"The direction of reward '{name}' looks inverted: declared is higher_is={higher_is}, but model "
            f"{model!r} orders only {right:g} of {len(pairs)} built-in pairs that way. If it scores the opposite, "
            "set sign to -1; training on an inverted reward teaches the opposite of what is wanted.",
            stacklevel=3,
        )
    return agreement
