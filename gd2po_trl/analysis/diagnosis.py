"""What is wrong with a set of rewards, and what to do about it.

The advice on methods is that of docs/evidence.md, "When to use which method"; that on scales is measured there too.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..reporting import join, percent
from .results import Analysis, PairFigures, RewardFigures
from .wording import number


# Rules of thumb of this report: below the first share of conflicting rollouts, among those with an advantage under
# some reward, GD²PO all but equals GDPO, below the second a difference will drown in the noise between seeds.
LITTLE_CONFLICT = 0.05
SOME_CONFLICT = 0.15
# If GD²PO-Hard keeps less of the rollouts with an advantage than this, there is little left to learn from.
LITTLE_LEFT = 0.35
# From here on one direction of a conflict, or one reward of a sum, is said to prevail.
PREVAILING = 0.7
DOMINATING = 0.75
# ... among two rewards that conflict more often than chance would have it, by this factor.
AGAINST_EACH_OTHER = 1.1
# Fewer groups than this say nothing on the direction of conflicts.
FEW_GROUPS = 30
# A reward without signal in this share of the recent groups is saturated, or never earned.
SATURATED = 0.8
# ... and it is at the end of its range if its mean is within this share of the range of it.
END_OF_RANGE = 0.1
WITHOUT_SIGNAL = 0.5
# Two rewards that correlate more closely than this are one, or one and its negative.
IDENTICAL = 0.999
# ... in at least this many groups.
FEW_FOR_CORRELATION = 5
# Rewards with at most this many values: ties abound, and no method differs from another.
FEW_VALUES = 3
# Spreads further apart than this are on different scales.
SCALES_DIFFER = 2.0
# A deviation of more spreads than this is an outlier that the spread is made of.
OUTLIER = 10.0


@dataclass(frozen=True)
class Finding:
    """
    One thing that stands out.

    Args:
        kind (`str`): `"nothing_varies"`, `"one_reward"`, `"one_varies"`, `"noise"`, `"opposed"`, `"little_conflict"`,
            `"some_conflict"`, `"conflict"`, `"too_much_conflict"` (these can be the verdict), or `"saturated"`,
            `"never_earned"`, `"constant"`, `"no_signal"`, `"dominates"`, `"duplicate"`, `"one_sided"`, `"outliers"`.
        rewards (`list[str]`): The rewards it is about.
        text (`str`): The finding, and what it means.
    """

    kind: str
    rewards: list[str]
    text: str


@dataclass(frozen=True)
class Recommendation:
    """
    What to do.

    Args:
        method (`str` or `None`): One of the four methods, or `None` where none of them helps.
        settings (`dict[str, Any]`): Keys of a recipe, or arguments of [`GD2POConfig`] but for `method`.
        advice (`list[str]`): Why, and what else: a gate, a threshold, a reward to mend.
    """

    method: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)


def diagnose(analysis: Analysis) -> tuple[list[Finding], Recommendation]:
    """The findings, of which the first is the verdict, and the recommendation."""
    verdict = _verdict(analysis)
    of_rewards = list(_per_reward(analysis, verdict))
    findings = [verdict, *of_rewards, *_per_pair(analysis, verdict, of_rewards)]
    return findings, _recommend(analysis, verdict, findings)


def equalizing_weights(analysis: Analysis) -> list[float]:
    """
    The `reward_weights` that make the rewards equally loud under `scale_rewards: none`: `1 / spread`, with the sign of
    the present weight; 0 for a monitor, and the present weight for a reward that never varied.
    """
    weights = []
    for reward in analysis.rewards:
        weight = reward.weight
        if weight != 0 and reward.spread > 0:
            weight = math.copysign(1 / reward.spread, weight)
        weights.append(float(f"{weight:.3g}"))
    return weights


# The verdict


def _verdict(analysis: Analysis) -> Finding:
    rewards = [reward for reward in analysis.rewards if reward.weight != 0]
    varying = [reward for reward in rewards if reward.groups_without_signal < 1]
    names = [reward.name for reward in varying]
    if not rewards:
        return Finding(
            "nothing_varies",
            [reward.name for reward in analysis.rewards],
            "Every reward has weight 0: there is nothing to learn from, whatever the method.",
        )
    if not varying:
        subject = "No reward varies" if len(rewards) != 1 else f"The only reward, {rewards[0].name}, never varies"
        return Finding(
            "nothing_varies",
            [reward.name for reward in rewards],
            f"{subject} within any group: there is nothing to learn from these rollouts, whatever the method.",
        )
    noisy = [reward.name for reward in varying if reward.looks_like_noise]
    if len(noisy) == len(varying):
        subject = "Every reward that varies looks" if len(varying) > 1 else f"The reward {names[0]} looks"
        return Finding(
            "noise",
            names,
            f"{subject} like noise ({join(names)}): no relation to the prompt, the length of the completion, another "
            "reward or the step of training. No method learns from noise.",
        )
    if len(rewards) == 1:
        return Finding(
            "one_reward", names, f"There is one reward, {names[0]}: nothing can conflict, and GD²PO equals GDPO."
        )
    if len(varying) == 1:
        return Finding(
            "one_varies",
            names,
            f"Of {len(rewards)} rewards only {names[0]} varies within groups: nothing can conflict, and GD²PO equals "
            "GDPO.",
        )
    opposed = [pair for pair in analysis.pairs if _signed_correlation(analysis, pair) < -IDENTICAL]
    opposed = opposed if analysis.groups >= FEW_FOR_CORRELATION else []
    if opposed:
        pair = opposed[0]
        return Finding(
            "opposed",
            [pair.first, pair.second],
            f"{pair.first} and {pair.second} are exactly opposed: what one gains the other loses (correlation "
            f"{_signed_correlation(analysis, pair):+.2f} within groups, after the weights' signs). In GDPO they "
            "cancel; GD²PO-Hard drops every rollout on which they differ. No method can satisfy both.",
        )
    return _conflict(analysis)


def _conflict(analysis: Analysis) -> Finding:
    # Rollouts without any advantage are no evidence of harmony: with them a saturated run would always look peaceful.
    ratio = analysis.conflict_ratio_with_signal
    names = sorted({name for pair in analysis.pairs if pair.conflict_ratio > 0 for name in (pair.first, pair.second)})
    share = f"{percent(ratio)} of the rollouts to which some reward gives an advantage"
    if not ratio >= LITTLE_CONFLICT:
        return Finding(
            "little_conflict",
            names,
            f"The rewards hardly conflict ({share}): GD²PO will train like GDPO, so expect no difference.",
        )
    if ratio < SOME_CONFLICT:
        return Finding(
            "some_conflict",
            names,
            f"The rewards conflict on {share}: GD²PO will differ little from GDPO, and the difference will be hard to "
            "tell from that between seeds.",
        )
    hard = analysis.filters[0]
    if hard.kept_ratio_with_signal >= LITTLE_LEFT:
        return Finding(
            "conflict",
            names,
            f"The rewards conflict on {share}: enough for GD²PO to act on. GD²PO-Hard would train on "
            f"{percent(hard.kept_ratio)} of all rollouts.",
        )
    return Finding(
        "too_much_conflict",
        names,
        f"The rewards conflict on {share}: so much that GD²PO-Hard would leave only "
        f"{percent(hard.kept_ratio_with_signal)} of these rollouts to learn from.",
    )


def _signed_correlation(analysis: Analysis, pair: PairFigures) -> float:
    weights = {reward.name: reward.weight for reward in analysis.rewards}
    product = weights[pair.first] * weights[pair.second]
    return pair.correlation * (product > 0) - pair.correlation * (product < 0) if product else 0.0


# What else stands out


def _per_reward(analysis: Analysis, verdict: Finding) -> Iterable[Finding]:
    for reward in analysis.rewards:
        silent = percent(reward.recent_groups_without_signal)
        if reward.minimum == reward.maximum:
            if verdict.kind != "nothing_varies" or len(analysis.rewards) > 1:
                yield Finding(
                    "constant",
                    [reward.name],
                    f"{reward.name} is {number(reward.minimum)} for every rollout: it teaches nothing.",
                )
        elif reward.recent_groups_without_signal >= SATURATED and _end(reward) is not None:
            kind = "saturated" if _end(reward) == "best" else "never_earned"
            meaning = (
                "it is saturated and teaches hardly anything more; a harder threshold would bring it back"
                if kind == "saturated"
                else "it is hardly ever earned; partial credit or easier prompts would give it a signal"
            )
            yield Finding(
                kind,
                [reward.name],
                f"{reward.name} is the same for all rollouts of a prompt in {silent} of the recent groups, at a mean "
                f"of {number(reward.recent_mean)} in [{number(reward.minimum)}, {number(reward.maximum)}]: {meaning}.",
            )
        elif reward.groups_without_signal >= WITHOUT_SIGNAL:
            yield Finding(
                "no_signal",
                [reward.name],
                f"{reward.name} is the same for all rollouts of a prompt in {percent(reward.groups_without_signal)} "
                "of the groups, which it cannot rank.",
            )
        if reward.looks_like_noise and verdict.kind != "noise":
            yield Finding(
                "noise",
                [reward.name],
                f"{reward.name} looks like noise: no relation to the prompt, the length of the completion, another "
                "reward or the step. Score the same completions twice to check. Under a filter it vetoes the others.",
            )
        if reward.outlier > OUTLIER:
            yield Finding(
                "outliers",
                [reward.name],
                f"{reward.name} has outliers, up to {number(reward.outlier)} times its spread: they make up much of "
                "it. Clip the reward before using weights of 1 / spread.",
            )
    dominating = _dominating(analysis)
    if dominating is not None and verdict.kind not in ("one_varies", "noise"):
        yield Finding(
            "dominates",
            [dominating.name],
            f"{dominating.name} dominates where the rewards are summed first (GRPO): "
            f"{percent(min(dominating.share_sum_then_normalise, 1.0))} of the variance of the sum, against "
            f"{percent(dominating.share_normalise_then_sum)} where each is normalized first (GDPO, GD²PO).",
        )


def _end(reward: RewardFigures) -> str | None:
    """Whether a reward's recent mean is at the `"best"` or the `"worst"` end of its range."""
    place = (reward.recent_mean - reward.minimum) / (reward.maximum - reward.minimum)
    place = 1 - place if reward.weight < 0 else place
    return "best" if place >= 1 - END_OF_RANGE else "worst" if place <= END_OF_RANGE else None


def _dominating(analysis: Analysis) -> RewardFigures | None:
    if len(analysis.rewards) < 2:
        return None
    # A share above 1 is possible, if other rewards go against the sum.
    known = [reward for reward in analysis.rewards if not math.isnan(reward.share_sum_then_normalise)]
    leader = max(known, key=lambda reward: reward.share_sum_then_normalise, default=None)
    return leader if leader is not None and leader.share_sum_then_normalise >= DOMINATING else None


def _per_pair(analysis: Analysis, verdict: Finding, of_rewards: list[Finding]) -> Iterable[Finding]:
    # The direction of their conflicts says something on these rewards alone.
    kinds = ("noise", "saturated", "never_earned", "no_signal")
    lopsided = [name for finding in of_rewards if finding.kind in kinds for name in finding.rewards]
    for pair in sorted(analysis.pairs, key=lambda pair: -pair.conflict_ratio):
        correlation = _signed_correlation(analysis, pair)
        if analysis.groups < FEW_FOR_CORRELATION:
            return
        if correlation > IDENTICAL:
            yield Finding(
                "duplicate",
                [pair.first, pair.second],
                f"{pair.first} and {pair.second} rank the rollouts alike (correlation {correlation:+.2f}): one reward "
                "that counts twice.",
            )
        elif correlation < -IDENTICAL and [pair.first, pair.second] != verdict.rewards:
            yield Finding("opposed", [pair.first, pair.second], f"{pair.first} and {pair.second} are opposed as well.")
        elif pair.conflict_ratio >= max(LITTLE_CONFLICT, AGAINST_EACH_OTHER * pair.unrelated_ratio) and not (
            {pair.first, pair.second} & set(lopsided)
        ):
            up, down, share = pair.first, pair.second, pair.first_up / pair.conflict_ratio
            if share < 0.5:
                up, down, share = down, up, 1 - share
            if share >= PREVAILING and analysis.groups >= FEW_GROUPS:
                yield Finding(
                    "one_sided",
                    [up, down],
                    f"{percent(share)} of the conflicts between {pair.first} and {pair.second} are rollouts that {up} "
                    f"favors and {down} disfavors.",
                )


# The recommendation


def _recommend(analysis: Analysis, verdict: Finding, findings: list[Finding]) -> Recommendation:
    kinds = {finding.kind for finding in findings}
    if all(reward.weight == 0 for reward in analysis.rewards):
        return Recommendation(None, advice=["Give at least one reward a weight other than 0."])
    if verdict.kind == "nothing_varies":
        return Recommendation(
            None,
            advice=[
                "No method helps. Check the rewards on a few completions by hand; if they are right, sample more "
                "varied completions (a higher temperature, more generations) or take prompts that are neither too "
                "easy nor too hard."
            ],
        )
    if verdict.kind == "noise":
        return Recommendation(
            None,
            advice=[
                "No method helps. Score the same completions twice: where the values differ, average several scores, "
                "or drop the reward. Where they are equal, the policy does not influence the reward yet."
            ],
        )
    if verdict.kind == "opposed":
        first, second = verdict.rewards
        return Recommendation(
            None,
            advice=[
                f"Decide between {first} and {second}, or make one reward of them with the trade-off that you want. A "
                "gate (one counts only where the other is met) or a threshold from which on one is good enough leaves "
                "room for both."
            ],
        )
    rewards = [reward for reward in analysis.rewards if reward.weight != 0 and reward.groups_without_signal < 1]
    method: str | None
    settings: dict[str, Any]
    if len(rewards) == 1:
        advice = ["Any method will do: with one reward that varies they hardly differ."]
        method, settings = None, {}
    else:
        method, settings, advice = _method(analysis, verdict, rewards, kinds)
        settings = {"method": method, **settings, **_scale(analysis, rewards, kinds, advice)}
        advice += _gates(findings)
    saturated = [name for finding in findings if finding.kind == "saturated" for name in finding.rewards]
    if saturated:
        advice.append(
            f"Keep {join(saturated)}, or the policy may unlearn {'it' if len(saturated) == 1 else 'them'}; a harder "
            "threshold would teach more."
        )
    silent = [name for one in findings if one.kind in ("constant", "never_earned") for name in one.rewards]
    if silent:
        advice.append(f"Change what it takes to earn {join(silent)}, or watch it with weight 0.")
    return Recommendation(method, settings, advice)


def _method(
    analysis: Analysis, verdict: Finding, rewards: list[RewardFigures], kinds: set[str]
) -> tuple[str, dict[str, Any], list[str]]:
    spreads = [abs(reward.weight) * reward.spread for reward in rewards]
    scales_differ = max(spreads) > SCALES_DIFFER * min(spreads)
    if "noise" in kinds:
        method = "gdpo" if scales_differ else "grpo"
        return method, {}, [f"`{method}` and no filter: a noisy reward vetoes the others under a filter."]
    if verdict.kind == "little_conflict":
        why = "the scales differ, so that `grpo` would let one decide" if scales_differ else "`grpo` will do as well"
        return "gdpo", {}, [f"`gdpo`: a filter has next to nothing to drop, and {why}."]
    weights = [abs(reward.weight) for reward in rewards]
    if max(weights) > SCALES_DIFFER * min(weights):
        return (
            "gdpo",
            {},
            [
                "`gdpo`, if the unequal weights mean that one matters less: a filter judges signs and overrules them. "
                "`gd2po_snr` is a compromise."
            ],
        )
    if all(reward.distinct_values <= FEW_VALUES for reward in rewards):
        return (
            "gdpo",
            {},
            ["`gdpo`: with rewards of few values no method differed by more than 2 %; take the simplest."],
        )
    if len(rewards) == 2:
        hard = analysis.filters[0]
        return (
            "gdpo",
            {},
            [
                "`gdpo`: with two rewards the filters bought no better balance in what was measured. `gd2po_hard` is "
                f"worth it where the update costs you: it trains on {percent(hard.kept_ratio)} of the rollouts."
            ],
        )
    if verdict.kind == "too_much_conflict":
        mild = [one for one in analysis.filters[1:] if one.kept_ratio_with_signal >= LITTLE_LEFT]
        chosen = max(mild, key=lambda one: one.threshold or 0.0, default=analysis.filters[-1])
        threshold = 0.4 if chosen.threshold is None else chosen.threshold
        return (
            "gd2po_snr",
            {"snr_threshold": threshold},
            [
                f"`gd2po_snr` at a threshold of {threshold:g}, which keeps {percent(chosen.kept_ratio_with_signal)} "
                "of the rollouts with an advantage; compare it with `gdpo` over several seeds (`gd2po compare`)."
            ],
        )
    return (
        "gd2po_hard",
        {},
        [
            "`gd2po_hard` if one reward falls behind the others: a better balance and cheaper updates are what it can "
            "buy, not a higher total. Compare it with `gdpo` over several seeds (`gd2po compare`)."
        ],
    )


def _gates(findings: list[Finding]) -> list[str]:
    one_sided = [finding for finding in findings if finding.kind == "one_sided"]
    return [
        f"If {down} is the goal, let {up} count only where {down} is met (a gate): most of their conflicts are "
        f"rollouts that earn {up} without {down}."
        for up, down in (finding.rewards for finding in one_sided[:1])
    ]


def _scale(analysis: Analysis, rewards: list[RewardFigures], kinds: set[str], advice: list[str]) -> dict[str, Any]:
    if all(reward.distinct_values <= FEW_VALUES for reward in rewards) or kinds & {"noise", "outliers"}:
        return {}
    advice.append(
        "Real-valued rewards did better without the division by each group's spread: `scale_rewards: none` with "
        "weights of 1 / spread, which make them equally loud; multiply by how much each shall matter."
    )
    return {"scale_rewards": "none", "reward_weights": equalizing_weights(analysis)}
