"""Configuration of [`GD2POTrainer`]: what it adds to TRL's `GRPOConfig`, and the four methods as settings of it."""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from trl import GRPOConfig

from .advantages import (
    CONFLICT_FILTERS,
    CONSENSUS_WEIGHTINGS,
    SCALE_REWARDS,
    WHITENINGS,
    check_choice,
    check_snr_threshold,
    check_update_share,
)
from .field_help import help_from_docstring
from .reward_gates import CLOSED_GATE_REWARDS, parse_gates
from .schedules import read_weight_schedules
from .update.budget import refuse_update_share
from .update.rows import LOSS_DENOMINATORS
from .user_input import as_mapping, check_ranges, is_number


if TYPE_CHECKING:
    EstimatorOrPath = Callable[..., torch.Tensor] | str
else:  # what a recipe and a command line can give
    EstimatorOrPath = str

# The four methods that one trainer covers. Every preset sets the same fields, so that switching leaves nothing behind.
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {
        "multi_objective_aggregation": "sum_then_normalize",
        "conflict_filter": None,
        "consensus_weighting": None,
    },
    "gdpo": {
        "multi_objective_aggregation": "normalize_then_sum",
        "conflict_filter": None,
        "consensus_weighting": None,
    },
    "gd2po_hard": {
        "multi_objective_aggregation": "normalize_then_sum",
        "conflict_filter": "hard",
        "consensus_weighting": "before_whitening",
    },
    "gd2po_snr": {
        "multi_objective_aggregation": "normalize_then_sum",
        "conflict_filter": "snr",
        "consensus_weighting": "before_whitening",
    },
}


@help_from_docstring
@dataclass
class GD2POConfig(GRPOConfig):
    r"""
    Configuration class for [`GD2POTrainer`].

    Only the parameters that GD²PO adds, or whose default it changes, are listed here. For all others see
    [`~trl.GRPOConfig`].

    Args:
        multi_objective_aggregation (`str`, *optional*, defaults to `"normalize_then_sum"`):
            `"normalize_then_sum"` normalizes each reward within its group before summing (GDPO, GD²PO).
            `"sum_then_normalize"` leaves TRL's GRPO advantages untouched: then the filter, the consensus weight and
            the whitening below do not apply.
        conflict_filter (`str` or `None`, *optional*, defaults to `"hard"`):
            Which rollouts to drop among those on which the rewards disagree in sign: `"hard"` all of them, `"snr"`
            those whose agreement is below `snr_threshold`, `None` none (GDPO).
        snr_threshold (`float`, *optional*, defaults to `0.8`):
            Threshold of the SNR filter, in [0, 1]. 0 drops nothing.
        consensus_weighting (`str` or `None`, *optional*, defaults to `"before_whitening"`):
            Where a query's advantages are multiplied by the share of its rollouts that the filter kept:
            `"before_whitening"` (the authors' released code), `"after_whitening"` (their paper) or `None`.
        whitening (`str` or `None`, *optional*, defaults to `"token"`):
            Whitening over the kept rollouts of the generation batch, each counted by its trained tokens (`"token"`)
            or once (`"sequence"`), or `None`.
        whitening_shift_mean (`bool`, *optional*, defaults to `True`):
            Whether whitening also subtracts the mean. It gives rollouts of groups without signal a small non-zero
            advantage; `False` only scales, by the spread about 0.
        estimator (`Callable`, `str` or `None`, *optional*, defaults to `None`):
            What takes the place of the sum over the rewards: a function `(per_reward, num_generations, ...)`, see
            [`compute_advantages`], or its dotted path. `None` is the sum. It has to give the same numbers on every
            process and after a resume. A checkpoint keeps the name alone.
        estimator_kwargs (`dict` or `None`, *optional*, defaults to `None`):
            Keyword arguments of the estimator.
        reward_weight_schedules (`dict` or `None`, *optional*, defaults to `None`):
            Factors of `reward_weights` over the optimizer steps, by name of the reward: a number,
            `{"linear": {0: 0.0, 100: 1.0}}` or `{"steps": {0: 1.0, 100: 0.5}}`, constant beyond the last step. A
            generation batch is weighted by the optimizer steps done before it; evaluations by `reward_weights` alone.
        update_share (`float`, *optional*, defaults to `1.0`):
            Share of the rollouts of a generation batch to train, in (0, 1]. Below 1, rollouts are drawn with
            probability proportional to |advantage| and weighted so that the expected gradient stays the same (see
            [`subsample_advantages`]); its variance grows. Cannot be combined with `beta`, an entropy bonus,
            `top_entropy_quantile` or the auxiliary loss of a mixture of experts.
        skip_zero_advantage_rows (`bool`, *optional*, defaults to `True`):
            Whether rollouts with advantage 0 are left out of the forward and backward pass. The gradient is the same
            (with dropout, for other random masks). Metrics of the update (`entropy`, `clip_ratio/*`) then cover the
            trained rollouts alone; `gd2po/trained_rows` and `gd2po/trained_tokens` are their share of the batch.
        packed_update (`bool`, *optional*, defaults to `True`):
            Whether the update, and every pass that computes log-probabilities, runs each prompt once for all its
            rollouts and no padding, in forward passes that never cost more than a padded micro-batch. The gradient is
            the same to rounding. Models and adapters for which it would not be are padded, which the log says.
            `gd2po/update_tokens` is the share of TRL's padded tokens that the update runs.
        keep_prompts_together (`bool`, *optional*, defaults to `True`):
            Whether the rollouts of a prompt are trained next to each other, as far as the batch sizes allow. `False`
            leaves the order to TRL, which shuffles single rollouts over the micro-batches of a generation batch.
        reward_gates (`dict` or `None`, *optional*, defaults to `None`):
            Rewards that count only where another one meets a threshold, such as `{"length": "correctness >= 3"}`. The
            operators are `>=`, `>`, `<=`, `<`, `==` and `!=`; of a list of conditions all have to hold. Conditions are
            judged on what the reward functions returned, before any gate, and an unscored reward meets none.
        closed_gate_reward (`str`, *optional*, defaults to `"zero"`):
            What a reward is worth where its gate is closed: `"zero"` (as in GDPO, arXiv 2601.05242), which enters the
            mean and the standard deviation of its group, or `"unscored"`, which enters no statistic.
        reward_timeout (`float` or `None`, *optional*, defaults to `None`):
            Seconds after which a call of a reward function ends the run with an error that names it. `None` waits
            forever. Reward models that the trainer itself evaluates are not covered.
        eval_temperature (`float` or `None`, *optional*, defaults to `None`):
            Sampling temperature of evaluations; 0 is greedy decoding. `None` is `temperature`, as in TRL. The number
            of completions per prompt is TRL's `num_generations_eval`.
        eval_on_end (`bool`, *optional*, defaults to `False`):
            Whether to evaluate after the last step as well, if `eval_strategy` does not ask for it anyway.
    """

    multi_objective_aggregation: str = "normalize_then_sum"
    conflict_filter: str | None = "hard"
    snr_threshold: float = 0.8
    consensus_weighting: str | None = "before_whitening"
    whitening: str | None = "token"
    whitening_shift_mean: bool = True
    estimator: EstimatorOrPath | None = None
    estimator_kwargs: dict | str | None = None
    reward_weight_schedules: dict | str | None = None
    update_share: float = 1.0
    skip_zero_advantage_rows: bool = True
    packed_update: bool = True
    keep_prompts_together: bool = True
    reward_gates: dict | str | None = None
    closed_gate_reward: str = "zero"
    reward_timeout: float | None = None
    eval_temperature: float | None = None
    eval_on_end: bool = False

    def __post_init__(self):
        for name in ("conflict_filter", "consensus_weighting", "whitening", "estimator"):
            # A command line has no null.
            if isinstance(getattr(self, name), str) and getattr(self, name).lower() in ("none", "null"):
                setattr(self, name, None)
        check_choice("conflict_filter", self.conflict_filter, CONFLICT_FILTERS)
        check_choice("consensus_weighting", self.consensus_weighting, CONSENSUS_WEIGHTINGS)
        check_choice("whitening", self.whitening, WHITENINGS)
        gates = as_mapping("reward_gates", self.reward_gates)
        self.reward_gates = {name: gate for name, gate in gates.items() if gate is not None} or None
        parse_gates(gates)
        check_choice("closed_gate_reward", self.closed_gate_reward, CLOSED_GATE_REWARDS)
        check_snr_threshold(self.snr_threshold)
        check_update_share(self.update_share)
        read_weight_schedules(self.reward_weight_schedules)
        if self.reward_weight_schedules is not None:
            self.reward_weight_schedules = as_mapping("reward_weight_schedules", self.reward_weight_schedules)
        check_choice(
            "multi_objective_aggregation",
            self.multi_objective_aggregation,
            ("normalize_then_sum", "sum_then_normalize"),
        )
        self._check_estimator()
        for name in (
            "whitening_shift_mean",
            "skip_zero_advantage_rows",
            "packed_update",
            "keep_prompts_together",
            "eval_on_end",
        ):
            check_choice(name, getattr(self, name), (True, False))
        timeout = self.reward_timeout
        if timeout is not None and (not is_number(timeout) or timeout <= 0):
            raise ValueError(f"`reward_timeout` is {timeout!r}; it must be a positive number of seconds or null.")
        # TRL refuses these after the first generation, or with an error that does not name the field.
        check_choice("loss_type", self.loss_type, tuple(LOSS_DENOMINATORS))
        check_choice("importance_sampling_level", self.importance_sampling_level, ("token", "sequence"))
        names = ["num_iterations", "per_device_train_batch_size", "gradient_accumulation_steps"]
        check_ranges({name: getattr(self, name) for name in [*names, "temperature", "learning_rate"]})
        if self.num_generations < 2:
            raise ValueError(f"`num_generations` is {self.num_generations}; it must be at least 2, to be compared.")
        warmth = self.eval_temperature
        if warmth is not None and (not is_number(warmth) or not 0 <= warmth < float("inf")):
            raise ValueError(f"`eval_temperature` is {warmth!r}; it must be a number of at least 0, or null.")
        super().__post_init__()
        check_choice("scale_rewards", self.scale_rewards, SCALE_REWARDS)
        refuse_update_share(self)

    def _check_estimator(self) -> None:
        self.estimator_kwargs = as_mapping("estimator_kwargs", self.estimator_kwargs) or None
        if self.estimator is None:
            if self.estimator_kwargs:
                raise ValueError("`estimator_kwargs` is set and `estimator`, which they belong to, is not.")
            return
        if not isinstance(self.estimator, str) and not callable(self.estimator):
            raise ValueError(f"`estimator` is {self.estimator!r}; it must be a function or its dotted path.")
        if self.multi_objective_aggregation == "sum_then_normalize":
            raise ValueError(
                "`estimator` takes the place of the sum of normalized rewards, which `sum_then_normalize` (method "
                "grpo) does not have: leave one of them out."
            )

    def estimator_name(self) -> str | None:
        """The dotted path of the estimator, or what one of no module of its own is called."""
        estimator: Any = self.estimator
        while isinstance(estimator, functools.partial):
            estimator = estimator.func
        if estimator is None or isinstance(estimator, str):
            return estimator
        named = estimator if hasattr(estimator, "__qualname__") else type(estimator)
        return f"{named.__module__}.{named.__qualname__}"

    def to_dict(self) -> dict[str, Any]:
        """For trackers and `str`, as transformers', with the estimator by its name."""
        return {**super().to_dict(), "estimator": self.estimator_name()}

    def __getstate__(self) -> dict[str, Any]:
        # For the `training_args.bin` of a checkpoint: not every function can be pickled.
        return {**self.__dict__, "estimator": self.estimator_name()}

    def __copy__(self) -> "GD2POConfig":  # which would take the state from above
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "GD2POConfig":
        copied = copy.copy(self)
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    @classmethod
    def from_grpo_config(cls, config: GRPOConfig) -> "GD2POConfig":
        """A copy of `config` with the defaults of GD²PO for every field that a plain `GRPOConfig` does not have."""
        # Not rebuilt from its fields: `__post_init__` has resolved them, and would refuse some of the resolved values.
        converted = object.__new__(cls)
        converted.__dict__.update(config.__dict__)
        for new_field in GD2PO_FIELDS:
            setattr(converted, new_field.name, new_field.default)
        return converted

    def ineffective_settings(self) -> list[str]:
        """One sentence for every setting that was changed but cannot act, given the others."""
        defaults = {new_field.name: new_field.default for new_field in GD2PO_FIELDS}

        def changed(name: str) -> bool:
            return getattr(self, name) != defaults[name]

        messages = []
        if self.update_share < 1 and not self.skip_zero_advantage_rows:
            messages.append(
                f"`update_share={self.update_share}` saves nothing with `skip_zero_advantage_rows=False`: rollouts "
                "that are not drawn are run all the same."
            )
        if not self.reward_gates and changed("closed_gate_reward"):
            messages.append("`closed_gate_reward` has no effect without `reward_gates`.")
        if self.multi_objective_aggregation == "sum_then_normalize":
            return [
                *messages,
                "`multi_objective_aggregation='sum_then_normalize'` trains on TRL's own GRPO advantages: "
                "`conflict_filter`, `snr_threshold`, `consensus_weighting` and `whitening` do not apply.",
            ]
        if self.conflict_filter != "snr" and changed("snr_threshold"):
            messages.append(
                f"`snr_threshold={self.snr_threshold}` has no effect with `conflict_filter={self.conflict_filter!r}`."
            )
        if self.conflict_filter is None and self.consensus_weighting == "after_whitening":
            messages.append("`consensus_weighting` has no effect without a conflict filter: every rollout is kept.")
        if self.whitening is None and not self.whitening_shift_mean:
            messages.append("`whitening_shift_mean` has no effect with `whitening=None`.")
        if self.whitening is None and self.consensus_weighting == "after_whitening":
            messages.append("Without whitening, `consensus_weighting='after_whitening'` equals 'before_whitening'.")
        return messages


# What GD2POConfig has beyond GRPOConfig, and the one field whose default it changes.
GD2PO_FIELDS = [
    own_field for own_field in fields(GD2POConfig) if own_field.name in inspect.get_annotations(GD2POConfig)
]
