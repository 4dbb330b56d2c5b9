"""GD²PO as a drop-in subclass of TRL's `GRPOTrainer`."""

import math
import textwrap
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather, gather_object
from trl import GRPOConfig

from .advantages import AdvantageBreakdown, compute_advantages
from .datasets.prompts import opened_thoughts
from .diagnostics import CollapseWatch, GradientWatch, SilentRewards, batch_numbers, infinite_rewards
from .errors import RewardError
from .estimators import load_estimator
from .gd2po_config import METHODS, GD2POConfig
from .preflight import check_before_loading, check_reward_names, check_trainable, shared_names
from .reward_gates import RewardGates
from .reward_guard import RewardGuard
from .reward_parts import expand_environment_parts, expand_parts, part_names
from .schedules import check_weight_schedules, read_weight_schedules, weights_at
from .trl_workarounds import PatchedGRPOTrainer, fill_missing_columns
from .update.budget import UpdateBudget, budget_metrics, refuse_update_share, trainable_advantages
from .update.rows import loss_mask
from .update.runner import Update
from .validation import Validation


logger = get_logger(__name__)


class GD2POTrainer(PatchedGRPOTrainer):
    """
    Trainer for Group-Dynamic reward-Decoupled Policy Optimization (GD²PO, arXiv 2606.16771).

    The changes with respect to [`~trl.GRPOTrainer`]: the advantages (see [`compute_advantages`]), metrics under
    `gd2po/`, and that the update runs over distinct tokens of rollouts with a gradient (see `gd2po_trl.update`).
    Everything else is inherited unchanged.

    Args:
        model, reward_funcs, train_dataset, eval_dataset, processing_class, callbacks, peft_config, ...:
            As in [`~trl.GRPOTrainer`]. A reward function, or an environment's class, may declare `reward_names`: it
            then returns a mapping of these names per rollout (or of names to lists), and each is a reward of its own.
        args ([`GD2POConfig`] or [`~trl.GRPOConfig`], *optional*):
            Configuration. A plain `GRPOConfig` gets the defaults of GD²PO for all that it lacks.

    Example:

    ```python
    from datasets import load_dataset
    from gd2po_trl import GD2POConfig, GD2POTrainer

    trainer = GD2POTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=[correctness, brevity],
        args=GD2POConfig(output_dir="outputs", conflict_filter="hard"),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```
    """

    reward_funcs: list[Any]
    reward_weights: torch.Tensor
    _buffered_inputs: Any

    _tag_names = ["trl", "gd2po"]
    _name = "GD2PO"
    _paper = {
        "title": "GD2PO: Mitigating Multi-Reward Conflicts via Group-Dynamic reward-Decoupled Policy Optimization",
        "id": "2606.16771",
        "citation": textwrap.dedent("""\
            @article{liu2026gd2po,
                title  = {{GD2PO: Mitigating Multi-Reward Conflicts via Group-Dynamic reward-Decoupled Policy
                          Optimization}},
                author = {Haotian Liu and others},
                year   = 2026,
                eprint = {arXiv:2606.16771},
            }"""),
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *positional: Any,
        **kwargs: Any,
    ):
        is_plain_grpo_config = args is not None and not isinstance(args, GD2POConfig)
        if args is None:
            model_id = model if isinstance(model, str) else model.config._name_or_path
            args = GD2POConfig(f"{model_id.rstrip('/').split('/')[-1] or 'model'}-GD2PO")
        elif is_plain_grpo_config:
            args = GD2POConfig.from_grpo_config(args)
        # By name, since another package may have wrapped TRL's trainer in one that takes `*args`.
        check_before_loading(
            {
                "model": model,
                "reward_funcs": reward_funcs,
                "args": args,
                **dict(zip(("train_dataset", "eval_dataset"), positional, strict=False)),
                **kwargs,
            }
        )

        functions = [] if reward_funcs is None else reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        reward_funcs, weights = expand_parts(functions), args.reward_weights
        if isinstance(classes := kwargs.get("reward_processing_classes"), list) and len(classes) == len(functions):
            pairs = zip(functions, classes, strict=True)
            kwargs["reward_processing_classes"] = [item for func, item in pairs for _ in part_names(func) or [""]]
        given = len(reward_funcs)
        try:
            # TRL takes weights of `reward_funcs` alone, and gives an environment's reward 1.
            args.reward_weights = None if weights is None else weights[:given]
            super().__init__(model, reward_funcs, args, *positional, **kwargs)
        finally:
            args.reward_weights = weights
        expand_environment_parts(self, given, weights)
        check_trainable(self.model)
        check_reward_names(self.reward_func_names)
        self._estimator = load_estimator(args.estimator, args.estimator_kwargs)
        self._weight_schedules = read_weight_schedules(args.reward_weight_schedules)
        check_weight_schedules(self._weight_schedules, self.reward_func_names, self.reward_weights.tolist())

        if is_plain_grpo_config:
            logger.info(f"A plain GRPOConfig was given: GD²PO runs with its defaults, {METHODS['gd2po_hard']}.")
        for message in (*args.ineffective_settings(), *shared_names(self.reward_func_names)):
            logger.warning(message)
        self._validation = Validation(self)
        self.add_callback(self._validation)
        prefill = partial(
            opened_thoughts,
            tokenizer=self.processing_class,
            **{"chat_template": self.chat_template, **self.chat_template_kwargs},
        )
        self._reward_guard = RewardGuard(args.reward_timeout, self.accelerator.num_processes > 1, prefill)
        self.reward_funcs = self._reward_guard.wrap_all(self.reward_funcs, self.reward_func_names)
        gates: Any = args.reward_gates  # a mapping, of which a config may be given the JSON
        self._gates = RewardGates(gates, self.reward_func_names, args.closed_gate_reward)
        self._captured_rewards: torch.Tensor | None = None
        if args.update_share < 1:
            # Versions of TRL without this attribute may have an auxiliary loss.
            refuse_update_share(args, has_auxiliary_loss=getattr(self, "aux_loss_enabled", True))
            self.add_callback(UpdateBudget())
        self._collapse_watch = CollapseWatch(self.reward_func_names)
        self._silent_rewards = SilentRewards(self.reward_func_names)
        self._gradient_watch = GradientWatch()
        self._update = Update(self, super()._get_per_token_logps_and_entropies)

    # Advantages

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._reward_guard.defer:
            self._reward_guard.raise_failures(gather_object)
        fill_missing_columns(self._pending_extra_logs, self._logs["extra"], len(prompts))
        if problem := infinite_rewards(rewards, self.reward_func_names):  # on every process
            raise RewardError(problem)
        if self.model.training:
            for message in self._silent_rewards.after_batch(rewards):
                logger.warning(message)
        self._validation.record(prompts, completions, rewards)
        if self._gates:
            for name, value in self._gates.metrics(rewards).items():
                self._metrics["train" if self.model.training else "eval"][name].append(value)
            for column, values in self._gates.raw_columns(rewards).items():
                self._logs["extra"][column].extend(values)
        # TRL logs these values too, and sums them for GRPO.
        self._captured_rewards = self._gates.apply(rewards)
        return self._captured_rewards

    def _generate_and_score_completions(self, inputs):
        weights = self.reward_weights
        if self._weight_schedules and self.model.training:
            names = self.reward_func_names
            current = weights_at(self.state.global_step, self._weight_schedules, names, weights.tolist())
            # TRL's own advantages use them as well.
            self.reward_weights = weights.new_tensor(current)
            for name, weight in zip(names, current, strict=True):
                self._metrics["train"][f"gd2po/reward_weight/{name}"].append(weight)
        try:
            return self._generate_and_score(inputs)
        finally:
            self.reward_weights = weights

    def _generate_and_score(self, inputs: Any) -> dict[str, Any]:
        self._captured_rewards = None
        output = super()._generate_and_score_completions(inputs)
        rewards, self._captured_rewards = self._captured_rewards, None
        if rewards is None:
            raise RuntimeError(
                "TRL computed advantages without calling `_calculate_rewards`, on which GD²PO depends. This version "
                "of TRL is not supported; install one from the range in the documentation."
            )
        mode = "train" if self.model.training else "eval"
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        is_decoupled = self.multi_objective_aggregation == "normalize_then_sum"

        token_counts = gather(loss_mask(output).sum(1))
        breakdown = compute_advantages(
            rewards,
            num_generations,
            reward_weights=self.reward_weights.to(rewards.device),
            token_counts=token_counts,
            conflict_filter=self.args.conflict_filter if is_decoupled else None,
            snr_threshold=self.args.snr_threshold,
            consensus_weighting=self.args.consensus_weighting,
            whitening=self.args.whitening,
            whitening_shift_mean=self.args.whitening_shift_mean,
            scale_rewards=self.scale_rewards,
            estimator=self._estimator,
        )
        if is_decoupled:
            local = output["advantages"]
            start = self.accelerator.process_index * local.size(0)
            output["advantages"] = breakdown.advantages[start : start + local.size(0)].to(local.dtype)
        self._log_breakdown(mode, rewards, breakdown, token_counts, num_generations, is_decoupled)
        if mode == "train" and self.args.update_share < 1:
            self._draw_rollouts(output)
        return output

    def _draw_rollouts(self, output: dict[str, Any]) -> None:
        """Keep the advantages of about `update_share` of the generation batch, weighted, and set the others to 0."""
        advantages = gather(trainable_advantages(output, self.loss_type))
        # Looked up each time: transformers may replace callbacks when it resumes a run.
        (budget,) = (callback for callback in self.callback_handler.callbacks if isinstance(callback, UpdateBudget))
        drawn = budget.draw(advantages, self.args.update_share, self.args.seed)
        start, size = self.accelerator.process_index * len(output["advantages"]), len(output["advantages"])
        output["advantages"] = drawn[start : start + size]
        self._replace_logged_advantages(drawn)
        for name, value in budget_metrics(advantages, drawn).items():
            self._metrics["train"][f"gd2po/{name}"].append(value)

    def _log_breakdown(
        self,
        mode: str,
        rewards: torch.Tensor,
        breakdown: AdvantageBreakdown,
        token_counts: torch.Tensor,
        num_generations: int,
        is_decoupled: bool,
    ) -> None:
        values, signs = batch_numbers(
            rewards,
            breakdown,
            self.reward_func_names,
            num_generations,
            self.args.snr_threshold,
            token_counts,
            self.reward_weights.to(rewards.device),
        )
        has_gradient, masked_ratio = values.pop("has_gradient") > 0, values.pop("masked_ratio")
        for name, value in values.items():
            if not math.isnan(value):  # nothing to average, such as the agreement of conflicting rollouts without any
                self._metrics[mode][f"gd2po/{name}"].append(value)

        if is_decoupled:
            self._metrics[mode]["frac_reward_zero_std"][-1] = values["frac_groups_without_signal"]
            self._replace_logged_advantages(breakdown.advantages)
            if mode == "train":
                conflict_ratio, masks_truncated = values["conflict_ratio"], self.mask_truncated_completions
                for warning in (
                    self._gradient_watch.after_batch(has_gradient, conflict_ratio, masked_ratio, masks_truncated),
                    self._collapse_watch.update(signs),
                ):
                    if warning:
                        logger.warning(warning)
        for column in ("kept", "conflict", "agreement"):
            self._logs["extra"][f"gd2po_{column}"].extend(getattr(breakdown, column).tolist())

    # Validation

    def evaluation_loop(self, dataloader, *args, **kwargs):
        with self._validation.run(dataloader, kwargs.get("metric_key_prefix", "eval")):
            return super().evaluation_loop(dataloader, *args, **kwargs)

    # The update

    def _prepare_inputs(self, generation_batch):
        with self._update.preparing():
            batch = super()._prepare_inputs(generation_batch)
            return self._update.micro_batch(batch) if self.model.training else batch

    def training_step(self, *args, **kwargs):
        with self._update.slot():
            return super().training_step(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        loss = self._update.loss(model, super()._compute_loss) if self.model.training else None
        return super()._compute_loss(model, inputs) if loss is None else loss

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if self._update.is_off:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        computed = self._update.log_probs(model, *args, **kwargs)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs) if computed is None else computed
