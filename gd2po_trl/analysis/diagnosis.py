"""What is wrong with a set of rewards, and what to do about it.

The advice on methods is that of docs/evidence.md, "When to use which method"; that on scales is measured there too.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..reporting import join, percent, short_number
from .records import Analysis, PairFigures, RewardFigures


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

VERDICTS = {
    "weights_of_0": "Every reward has weight 0: there is nothing to learn from, whatever the method.",
    "nothing_varies": "{subject} within any group: there is nothing to learn from these rollouts, whatever the "
    "method.",
    "noise": "{subject} like noise ({names}): no relation to the prompt, the length of the completion, another reward "
    "or the step of training. No method learns from noise.",
    "one_reward": "There is one reward, {names}: nothing can conflict, and GD²PO equals GDPO.",
    "one_varies": "Of {count} rewards only {names} varies within groups: nothing can conflict, and GD²PO equals GDPO.",
    "opposed": "{first} and {second} are exactly opposed: what one gains the other loses (correlation {correlation} "
    "within groups, after the weights' signs). In GDPO they cancel; GD²PO-Hard drops every rollout on which they "
    "differ. No method can satisfy both.",
    "little_conflict": "The rewards hardly conflict ({share}): GD²PO will train like GDPO, so expect no difference.",
    "some_conflict": "The rewards conflict on {share}: GD²PO will differ little from GDPO, and the difference will be "
    "hard to tell from that between seeds.",
    "conflict": "The rewards conflict on {share}: enough for GD²PO to act on. GD²PO-Hard would train on {kept} of all "
    "rollouts.",
    "too_much_conflict": "The rewards conflict on {share}: so much that GD²PO-Hard would leave only {left} of these "
    "rollouts to learn from.",
}
FINDINGS = {
    "constant": "{name} is {value} for every rollout: it teaches nothing.",
    "saturated": "{name} is the same for all rollouts of a prompt in {silent} of the recent groups, at a mean of "
    "{mean} in {range}: it is saturated and teaches hardly anything more; a harder threshold would bring it back.",
    "never_earned": "{name} is the same for all rollouts of a prompt in {silent} of the recent groups, at a mean of "
    "{mean} in {range}: it is hardly ever earned; partial credit or easier prompts would give it a signal.",
    "no_signal": "{name} is the same for all rollouts of a prompt in {silent} of the groups, which it cannot rank.",
    "noise": "{name} looks like noise: no relation to the prompt, the length of the completion, another reward or the "
    "step. Score the same completions twice to check. Under a filter it vetoes the others.",
    "outliers": "{name} has outliers, up to {outlier} times its spread: they make up much of it. Clip the reward "
    "before using weights of 1 / spread.",
    "dominates": "{name} dominates where the rewards are summed first (GRPO): {summed} of the variance of the sum, "
    "against {normalized} where each is normalized first (GDPO, GD²PO).",
    "duplicate": "{name} and {other} rank the rollouts alike (correlation {correlation}): one reward that counts "
    "twice.",
    "opposed": "{name} and {other} are opposed as well.",
    "one_sided": "{share} of the conflicts between {first} and {second} are rollouts that {name} favors and {other} "
    "disfavors.",
}
NO_METHOD = {
    "nothing_varies": "No method helps. Check the rewards on a few completions by hand; if they are right, sample "
    "more varied completions (a higher temperature, more generations) or take prompts that are neither too easy "
    "nor too hard.",
    "noise": "No method helps. Score the same completions twice: where the values differ, average several scores, or "
    "drop the reward. Where they are equal, the policy does not influence the reward yet.",
    "opposed": "Decide between {} and {}, or make one reward of them with the trade-off that you want. A gate (one "
    "counts only where the other is met) or a threshold from which on one is good enough leaves room for both.",
}


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

    def verdict(kind: str, about: list[str] = names, **values: Any) -> Finding:
        return Finding(kind, about, VERDICTS[kind].format(names=join(about), **values))

    if not rewards:
        return Finding("nothing_varies", [reward.name for reward in analysis.rewards], VERDICTS["weights_of_0"])
    if not varying:
        subject = "No reward varies" if len(rewards) != 1 else f"The only reward, {rewards[0].name}, never varies"
        return verdict("nothing_varies", [reward.name for reward in rewards], subject=subject)
    if all(reward.looks_like_noise for reward in varying):
        subject = "Every reward that varies looks" if len(varying) > 1 else f"The reward {names[0]} looks"
        return verdict("noise", subject=subject)
    if len(varying) == 1:
        return verdict("one_reward" if len(rewards) == 1 else "one_varies", count=len(rewards))
    for pair in analysis.pairs if analysis.groups >= FEW_FOR_CORRELATION else ():
        if (correlation := _signed_correlation(analysis, pair)) < -IDENTICAL:
            about = [pair.first, pair.second]
            return verdict("opposed", about, first=pair.first, second=pair.second, correlation=f"{correlation:+.2f}")
    # Rollouts without any advantage are no evidence of harmony: with them a saturated run would always look peaceful.
    ratio, hard = analysis.conflict_ratio_with_signal, analysis.filters[0]
    kind = (
        "little_conflict"
        if not ratio >= LITTLE_CONFLICT
        else "some_conflict"
        if ratio < SOME_CONFLICT
        else "conflict"
        if hard.kept_ratio_with_signal >= LITTLE_LEFT
        else "too_much_conflict"
    )
    return verdict(
        kind,
        sorted({name for pair in analysis.pairs if pair.conflict_ratio > 0 for name in (pair.first, pair.second)}),
        share=f"{percent(ratio)} of the rollouts to which some reward gives an advantage",
        kept=percent(hard.kept_ratio),
        left=percent(hard.kept_ratio_with_signal),
    )


def _signed_correlation(analysis: Analysis, pair: PairFigures) -> float:
    weights = {reward.name: reward.weight for reward in analysis.rewards}
    product = weights[pair.first] * weights[pair.second]
    return math.copysign(pair.correlation, pair.correlation * product) if product else 0.0


# What else stands out


def _finding(kind: str, name: str, other: str = "", **values: Any) -> Finding:
    text = FINDINGS[kind].format(name=name, other=other, **values)
    return Finding(kind, [name, other] if other else [name], text)


def _per_reward(analysis: Analysis, verdict: Finding) -> Iterable[Finding]:
    for reward in analysis.rewards:
        end = _end(reward)
        if reward.minimum == reward.maximum:
            if verdict.kind != "nothing_varies" or len(analysis.rewards) > 1:
                yield _finding("constant", reward.name, value=short_number(reward.minimum))
        elif reward.recent_groups_without_signal >= SATURATED and end is not None:
            yield _finding(
                end,
                reward.name,
                silent=percent(reward.recent_groups_without_signal),
                mean=short_number(reward.recent_mean),
                range=f"[{short_number(reward.minimum)}, {short_number(reward.maximum)}]",
            )
        elif reward.groups_without_signal >= WITHOUT_SIGNAL:
            yield _finding("no_signal", reward.name, silent=percent(reward.groups_without_signal))
        if reward.looks_like_noise and verdict.kind != "noise":
            yield _finding("noise", reward.name)
        if reward.outlier > OUTLIER:
            yield _finding("outliers", reward.name, outlier=short_number(reward.outlier))
    # A share above 1 is possible, if other rewards go against the sum.
    known = [reward for reward in analysis.rewards if reward.share_sum_then_normalise >= DOMINATING]
    if known and len(analysis.rewards) > 1 and verdict.kind not in ("one_varies", "noise"):
        leader = max(known, key=lambda reward: reward.share_sum_then_normalise)
        yield _finding(
            "dominates",
            leader.name,
            summed=percent(min(leader.share_sum_then_normalise, 1.0)),
            normalized=percent(leader.share_normalise_then_sum),
        )


def _end(reward: RewardFigures) -> str | None:
    """Whether a reward's recent mean is at the good end of its range, at the bad one, or at neither."""
    if reward.minimum == reward.maximum:
        return None
    place = (reward.recent_mean - reward.minimum) / (reward.maximum - reward.minimum)
    place = 1 - place if reward.weight < 0 else place
    return "saturated" if place >= 1 - END_OF_RANGE else "never_earned" if place <= END_OF_RANGE else None


def _per_pair(analysis: Analysis, verdict: Finding, of_rewards: list[Finding]) -> Iterable[Finding]:
    if analysis.groups < FEW_FOR_CORRELATION:
        return
    # The direction of their conflicts says something on these rewards alone.
    kinds = ("noise", "saturated", "never_earned", "no_signal")
    lopsided = {name for finding in of_rewards if finding.kind in kinds for name in finding.rewards}
    for pair in sorted(analysis.pairs, key=lambda pair: -pair.conflict_ratio):
        up, down = pair.first, pair.second
        correlation = _signed_correlation(analysis, pair)
        expected = max(LITTLE_CONFLICT, AGAINST_EACH_OTHER * pair.unrelated_ratio)
        if correlation > IDENTICAL:
            yield _finding("duplicate", up, down, correlation=f"{correlation:+.2f}")
        elif correlation < -IDENTICAL and [up, down] != verdict.rewards:
            yield _finding("opposed", up, down)
        elif pair.conflict_ratio >= expected and not {up, down} & lopsided and analysis.groups >= FEW_GROUPS:
            share = pair.first_up / pair.conflict_ratio
            if share < 0.5:
                up, down, share = down, up, 1 - share
            if share >= PREVAILING:
                yield _finding("one_sided", up, down, share=percent(share), first=pair.first, second=pair.second)


# The recommendation


def _recommend(analysis: Analysis, verdict: Finding, findings: list[Finding]) -> Recommendation:
    if all(reward.weight == 0 for reward in analysis.rewards):
        return Recommendation(None, advice=["Give at least one reward a weight other than 0."])
    if verdict.kind in NO_METHOD:
        return Recommendation(None, advice=[NO_METHOD[verdict.kind].format(*verdict.rewards)])
    rewards = [reward for reward in analysis.rewards if reward.weight != 0 and reward.groups_without_signal < 1]
    method: str | None = None
    settings: dict[str, Any] = {}
    if len(rewards) == 1:
        advice = ["Any method will do: with one reward that varies they hardly differ."]
    else:
        kinds = {finding.kind for finding in findings}
        method, settings, why = _method(analysis, verdict, rewards, kinds)
        settings, advice = {"method": method, **settings}, [why]
        has_few_values = all(reward.distinct_values <= FEW_VALUES for reward in rewards)
        if not has_few_values and not kinds & {"noise", "outliers"}:
            settings |= {"scale_rewards": "none", "reward_weights": equalizing_weights(analysis)}
            advice.append(
                "Real-valued rewards did better without the division by each group's spread: `scale_rewards: none` "
                "with weights of 1 / spread, which make them equally loud; multiply by how much each shall matter."
            )
    if method and (one_sided := [finding.rewards for finding in findings if finding.kind == "one_sided"]):
        by_name = {reward.name: reward for reward in analysis.rewards}
        advice.append(_gate(*(by_name[name] for name in one_sided[0])))
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


def _gate(up: RewardFigures, down: RewardFigures) -> str:
    """To let `up` count only where `down` is met: a line for a recipe, or, from its braces on, for a command line."""
    is_best = down.distinct_values <= FEW_VALUES
    best, compare = (down.maximum, ">=") if down.weight >= 0 else (down.minimum, "<=")
    # In full: a rounded best value may be one that is never reached.
    threshold = f"{best!r}".removesuffix(".0") if is_best else f"{down.recent_mean:.3g}"
    gate = json.dumps({up.name: f"{down.name} {compare} {threshold}"})
    # A closed gate gives 0, which of a penalty is the best there is.
    penalty = ", with `closed_gate_reward: unscored`, since 0 is the best value of it"
    return (
        f"If {down.name} is the goal, let {up.name} count only where it is met, since most of their conflicts "
        f"are rollouts that earn {up.name} without {down.name}: `reward_gates: {gate}`"
        f"{penalty if up.weight * (up.maximum if up.weight >= 0 else up.minimum) <= 0 else ''}. The threshold is the "
        f"{'best value' if is_best else 'recent mean'} of {down.name}."
    )


def _method(
    analysis: Analysis, verdict: Finding, rewards: list[RewardFigures], kinds: set[str]
) -> tuple[str, dict[str, Any], str]:
    """The method, its settings, and why."""
    spreads = [abs(reward.weight) * reward.spread for reward in rewards]
    weights = [abs(reward.weight) for reward in rewards]
    scales_differ = max(spreads) > SCALES_DIFFER * min(spreads)
    hard, *milder = analysis.filters
    if "noise" in kinds:
        method = "gdpo" if scales_differ else "grpo"
        return method, {}, f"`{method}` and no filter: a noisy reward vetoes the others under a filter."
    if verdict.kind == "little_conflict":
        why = "the scales differ, so that `grpo` would let one decide" if scales_differ else "`grpo` will do as well"
        return "gdpo", {}, f"`gdpo`: a filter has next to nothing to drop, and {why}."
    if max(weights) > SCALES_DIFFER * min(weights):
        why = (
            "`gdpo`, if the unequal weights mean that one matters less: a filter judges signs and overrules them. "
            "`gd2po_snr` is a compromise."
        )
    elif all(reward.distinct_values <= FEW_VALUES for reward in rewards):
        why = "`gdpo`: with rewards of few values no method differed by more than 2 %; take the simplest."
    elif len(rewards) == 2:
        why = (
            "`gdpo`: with two rewards the filters bought no better balance in what was measured. `gd2po_hard` is "
            f"worth it where the update costs you: it trains on {percent(hard.kept_ratio)} of the rollouts."
        )
    elif verdict.kind == "too_much_conflict":
        enough = [one for one in milder if one.kept_ratio_with_signal >= LITTLE_LEFT]
        chosen = max(enough, key=lambda one: one.threshold or 0.0, default=analysis.filters[-1])
        threshold = 0.4 if chosen.threshold is None else chosen.threshold
        why = (
            f"`gd2po_snr` at a threshold of {threshold:g}, which keeps {percent(chosen.kept_ratio_with_signal)} "
            "of the rollouts with an advantage; compare it with `gdpo` over several seeds (`gd2po compare`)."
        )
        return "gd2po_snr", {"snr_threshold": threshold}, why
    else:
        why = (
            "`gd2po_hard` if one reward falls behind the others: a better balance and cheaper updates are what it can "
            "buy, not a higher total. Compare it with `gdpo` over several seeds (`gd2po compare`)."
        )
        return "gd2po_hard", {}, why
    return "gdpo", {}, why
