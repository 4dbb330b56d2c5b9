"""The figures of a report, as plain data."""

from dataclasses import dataclass


# Bounds of the kept share of a group: none, up to a quarter, ..., below all, all.
CONSENSUS_BINS = ("0", "0 to 1/4", "1/4 to 1/2", "1/2 to 3/4", "3/4 to 1", "1")


@dataclass(frozen=True)
class RewardFigures:
    """
    One reward. Shares are in [0, 1]; values are in the reward's own unit, before its weight.

    Args:
        name (`str`): Its column.
        weight (`float`): Its weight in the sum.
        scored (`float`): Share of the rollouts that it scored.
        mean, std, minimum, maximum (`float`): Over all scored rollouts.
        std_within_groups (`float`): Root of the mean variance within groups.
        spread (`float`): The same over the groups in which the reward varies, each counted once; NaN if there is none.
            `1 / spread` is the weight that makes rewards equally loud where nothing else divides them.
        groups_without_signal (`float`): Share of groups in which it gives all rollouts the same value, or none.
        recent_groups_without_signal, recent_mean (`float`): The same share, and the mean, in the last third of the
            steps.
        distinct_values (`int`): How many different values it gave.
        outlier (`float`): The largest deviation from a group's mean, in units of `spread`.
        looks_like_noise (`bool`): Whether nothing that is known of the rollouts has to do with it: neither the prompt,
            nor the length of the completion, nor another reward, nor the step of training; or it gave the same
            completion different values.
        share_sum_then_normalise (`float`):
            Its share of the squared GRPO advantage, `sum w dev_k dev_S / sum dev_S^2` averaged over groups, where `S`
            is the weighted sum of rewards. The shares of all rewards sum to 1; one is negative if the sum goes
            against the reward.
        share_normalise_then_sum (`float`): The same under decoupled normalization (GDPO, GD²PO without its filter).
    """

    name: str
    weight: float
    scored: float
    mean: float
    std: float
    minimum: float
    maximum: float
    std_within_groups: float
    spread: float
    groups_without_signal: float
    recent_groups_without_signal: float
    recent_mean: float
    distinct_values: int
    outlier: float
    looks_like_noise: bool
    share_sum_then_normalise: float
    share_normalise_then_sum: float


@dataclass(frozen=True)
class PairFigures:
    """
    Two rewards. Ratios are over the rollouts that some reward scored.

    Args:
        first, second (`str`): Their names.
        conflict_ratio (`float`): Share of rollouts that they push in opposite directions.
        first_up, second_up (`float`): The part of it in which the first, or the second, is the one that normalized up.
        unrelated_ratio (`float`):
            What `conflict_ratio` would be on average if each reward's values were shuffled within their groups.
        correlation (`float`): Of the values within groups; groups in which either is constant do not count.
    """

    first: str
    second: str
    conflict_ratio: float
    first_up: float
    second_up: float
    unrelated_ratio: float
    correlation: float


@dataclass(frozen=True)
class FilterFigures:
    """
    What a conflict filter would keep.

    Args:
        name (`str`): `"hard"` or `"snr"`.
        threshold (`float` or `None`): Of the SNR filter.
        kept_ratio (`float`): Share of the scored rollouts.
        kept_ratio_with_signal (`float`): Share of the rollouts on which some reward normalized at all.
        kept_push (`float`): Share of the net push, `sum |sum_k A_k|`.
        emptied_groups (`float`): Share of the groups with signal that keep no rollout.
        consensus_mean (`float`): Mean over groups of the kept share of the group.
        consensus_distribution (`list[float]`): Share of groups in each of `CONSENSUS_BINS`.
    """

    name: str
    threshold: float | None
    kept_ratio: float
    kept_ratio_with_signal: float
    kept_push: float
    emptied_groups: float
    consensus_mean: float
    consensus_distribution: list[float]

    @property
    def label(self) -> str:
        return "GD²PO-Hard" if self.threshold is None else f"GD²PO-SNR {self.threshold:g}"


@dataclass(frozen=True)
class StepFigures:
    """
    The course over training: lists with one entry per logged step.

    Args:
        step (`list[int]`): Training step.
        rollouts (`list[int]`): Scored rollouts.
        conflict_ratio, unrelated_ratio, cancellation, groups_without_signal (`list[float]`): As in [`Analysis`].
        pair_conflict_ratio (`dict[str, list[float]]`): Per pair, keyed `"<first>_vs_<second>"`.
        reward_mean (`dict[str, list[float]]`): Per reward.
    """

    step: list[int]
    rollouts: list[int]
    conflict_ratio: list[float]
    unrelated_ratio: list[float]
    cancellation: list[float]
    groups_without_signal: list[float]
    pair_conflict_ratio: dict[str, list[float]]
    reward_mean: dict[str, list[float]]


@dataclass(frozen=True)
class Analysis:
    """
    All figures of a report. Ratios are over the rollouts that some reward scored, NaN where there is none.

    Args:
        rollouts, groups, steps (`int`): Grouped and scored rollouts, groups, logged steps.
        group_size (`int`): The most frequent size of a group.
        conflict_ratio (`float`): Share of rollouts with a positive advantage under one reward and a negative one under
            another.
        conflict_ratio_error (`float`): Its standard error, with groups as the independent units.
        conflict_ratio_with_signal (`float`): The same among rollouts with an advantage under some reward.
        unrelated_ratio (`float`): What it would be on average if each reward were shuffled within its groups.
        cancellation (`float`): `1 - sum |sum_k A_k| / sum |A_k|`.
        groups_without_signal (`float`): Share of groups in which no reward varies.
        agreement_distribution (`list[float]`): Share of conflicting rollouts by |agreement|, equal bins over [0, 1].
        rewards, pairs, filters, over_steps: Figures per reward, pair, filter and step.
        warnings (`list[str]`): What may make the figures wrong.
        notes (`list[str]`): What a reader has to know about the data.
    """

    rollouts: int
    groups: int
    group_size: int
    steps: int
    conflict_ratio: float
    conflict_ratio_error: float
    conflict_ratio_with_signal: float
    unrelated_ratio: float
    cancellation: float
    groups_without_signal: float
    agreement_distribution: list[float]
    rewards: list[RewardFigures]
    pairs: list[PairFigures]
    filters: list[FilterFigures]
    over_steps: StepFigures
    warnings: list[str]
    notes: list[str]
