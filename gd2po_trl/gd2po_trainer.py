"""GD²PO as a drop-in subclass of TRL's `GRPOTrainer`."""

import copy
import inspect
import math
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather, gather_object
from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from .advantages import AdvantageBreakdown, compute_advantages
from .completions_table import fill_missing_columns, make_writable
from .diagnostics import conflict_metrics
from .gd2po_config import METHODS, GD2POConfig
from .model_card import training_section
from .preflight import check_before_loading, check_progress, check_reward_names, check_trainable
from .prompt_order import PromptOrder
from .rewards.guard import RewardError, RewardGuard
from .row_skipping import LOSS_DENOMINATORS, loss_mask, select_rows, trained_extent, unsupported_entry


logger = get_logger(__name__)


class GD2POTrainer(GRPOTrainer):
    """
    Trainer for Group-Dynamic reward-Decoupled Policy Optimization (GD²PO, arXiv 2606.16771).

    The changes with respect to [`~trl.GRPOTrainer`]: the advantages (see [`compute_advantages`]), metrics under
    `gd2po/`, and that rollouts with advantage 0 are left out of the update. Everything else is inherited unchanged.

    Args:
        model, reward_funcs, train_dataset, eval_dataset, processing_class, callbacks, peft_config, ...:
            As in [`~trl.GRPOTrainer`].
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
    _buffered_inputs: Any
    _logs: Any

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
        check_before_loading(inspect.signature(GRPOTrainer).bind(model, reward_funcs, args, *positional, **kwargs))

        self._prompt_order = PromptOrder()
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        check_trainable(self.model)
        check_reward_names(self.reward_func_names)

        if is_plain_grpo_config:
            logger.info(f"A plain GRPOConfig was given: GD²PO runs with its defaults, {METHODS['gd2po_hard']}.")
        for message in args.ineffective_settings():
            logger.warning(message)
        if len(set(self.reward_func_names)) < len(self.reward_func_names):
            logger.warning(
                f"Several reward functions share a name ({', '.join(self.reward_func_names)}): TRL mixes their "
                "columns in the log and in the completions table. Give each a `__name__` of its own."
            )

        self.add_callback(self._prompt_order)
        self._reward_guard = RewardGuard(timeout=args.reward_timeout, defer=self.accelerator.num_processes > 1)
        self.reward_funcs = [
            func if isinstance(func, nn.Module) else self._reward_guard.wrap(func, name)
            for func, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        self._captured_rewards: torch.Tensor | None = None
        self._empty_logs = copy.deepcopy(self._logs)
        self._logs_of_mode = {"train": self._logs, "eval": copy.deepcopy(self._logs)}
        self._batches_without_gradient = 0
        self._skipping_off = self._reason_to_train_all_rows()
        if self._skipping_off is not None and args.skip_zero_advantage_rows:
            logger.warning(f"Rollouts with advantage 0 are not left out of the update: {self._skipping_off}.")
        self._reduced_inputs: Any = None
        self._postpones_old_logps = self._old_logps_missing = False
        self._preparation_time = self._update_time = 0.0
        # Trainable parameters that a forward pass does not use, known after the first one.
        self._unreached_parameters: set[nn.Parameter] | None = None

    # Advantages

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._reward_guard.defer:
            self._reward_guard.raise_failures(gather_object)
        fill_missing_columns(self._pending_extra_logs, self._logs["extra"], len(prompts))
        infinite = torch.isinf(rewards).sum(0).tolist()  # identical on every process, so all raise or none
        if any(infinite):
            culprits = [name for name, count in zip(self.reward_func_names, infinite, strict=True) if count]
            raise RewardError(
                f"The reward function{'s' if len(culprits) > 1 else ''} {', '.join(map(repr, culprits))} returned "
                f"{sum(infinite):.0f} infinite rewards in a batch of {len(rewards)}. Return a finite number, or None "
                "for a completion that cannot be scored."
            )
        self._captured_rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs):
        self._use_table_of_mode()
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

        breakdown = compute_advantages(
            rewards,
            num_generations,
            reward_weights=self.reward_weights.to(rewards.device),
            token_counts=gather(loss_mask(output).sum(1)),
            conflict_filter=self.args.conflict_filter if is_decoupled else None,
            snr_threshold=self.args.snr_threshold,
            consensus_weighting=self.args.consensus_weighting,
            whitening=self.args.whitening,
            whitening_shift_mean=self.args.whitening_shift_mean,
            scale_rewards=self.scale_rewards,
        )
        if is_decoupled:
            local = output["advantages"]
            start = self.accelerator.process_index * local.size(0)
            output["advantages"] = breakdown.advantages[start : start + local.size(0)].to(local.dtype)
        self._log_breakdown(mode, rewards, breakdown, num_generations, is_decoupled)
        return output

    def _log_breakdown(
        self,
        mode: str,
        rewards: torch.Tensor,
        breakdown: AdvantageBreakdown,
        num_generations: int,
        is_decoupled: bool,
    ) -> None:
        metrics = conflict_metrics(rewards, breakdown, self.reward_func_names, num_generations)
        metrics["has_gradient"] = (breakdown.advantages != 0).any()
        names, values = list(metrics), torch.stack([value.float() for value in metrics.values()])
        # The only wait for the device: all numbers in one copy.
        values = dict(zip(names, values.tolist(), strict=True))
        has_gradient = values.pop("has_gradient") > 0
        for name, value in values.items():
            if not math.isnan(value):  # nothing to average, such as the agreement of conflicting rollouts without any
                self._metrics[mode][f"gd2po/{name}"].append(value)

        if is_decoupled:
            self._metrics[mode]["frac_reward_zero_std"][-1] = values["frac_groups_without_signal"]
            logged = self._logs["advantages"]
            for _ in range(min(len(logged), len(rewards))):
                logged.pop()
            logged.extend(breakdown.advantages.tolist())
            if mode == "train":
                self._warn_if_nothing_is_learned(has_gradient, values["conflict_ratio"])
        for column in ("kept", "conflict", "agreement"):
            self._logs["extra"][f"gd2po_{column}"].extend(getattr(breakdown, column).tolist())

    def _use_table_of_mode(self) -> None:
        """TRL keeps the last rollouts for its completions table, of training or evaluation; here each has its own."""
        self._logs = self._logs_of_mode["train" if self.model.training else "eval"]

    def evaluation_loop(self, *args, **kwargs):
        self._logs_of_mode["eval"] = copy.deepcopy(self._empty_logs)
        return super().evaluation_loop(*args, **kwargs)

    def log(self, *args, **kwargs):
        self._use_table_of_mode()
        make_writable(self._logs)
        super().log(*args, **kwargs)

    def _warn_if_nothing_is_learned(self, has_gradient: bool, conflict_ratio: float) -> None:
        self._batches_without_gradient = 0 if has_gradient else self._batches_without_gradient + 1
        if self._batches_without_gradient in (1, 10, 100, 1000):
            logger.warning(
                f"No rollout of {self._batches_without_gradient} generation batch(es) in a row has an advantage: "
                "nothing is learned from them. "
                + (
                    "No reward scored any of them."
                    if math.isnan(conflict_ratio)
                    else f"The rewards disagree on {conflict_ratio:.0%} of the last one. Where they conflict, "
                    "`conflict_filter='snr'` with a low `snr_threshold` keeps more rollouts; where they do not, no "
                    "reward tells the rollouts of a prompt apart."
                )
            )

    # Model card

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        card = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and card.is_file():
            section = training_section(self.args, self.reward_func_names, self.reward_weights.tolist())
            card.write_text(f"{card.read_text(encoding='utf-8').rstrip()}\n\n{section}", encoding="utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self.create_model_card(model_name=Path(self.args.output_dir).name)

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        state = Path(checkpoint or "") / TRAINER_STATE_NAME
        if checkpoint and state.is_file() and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            reached = TrainerState.load_from_json(str(state))
            if 0 < self.args.max_steps <= reached.global_step:
                # transformers would train one step more than asked for.
                self._load_from_checkpoint(checkpoint)
                self.state = reached
                return TrainOutput(reached.global_step, math.nan, {})
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        check_progress(self.state.global_step)
        return output

    def _get_train_sampler(self, *args, **kwargs):
        self._prompt_order.sampler = super()._get_train_sampler(*args, **kwargs)
        return self._prompt_order.sampler

    # Rows without a gradient

    def _reason_to_train_all_rows(self) -> str | None:
        """Why leaving out rows without advantage would not give the same gradient, or `None` where it does."""
        if not self.args.skip_zero_advantage_rows:
            return "`skip_zero_advantage_rows` is off"
        if self.beta != 0.0:
            return "`beta` is not 0, so that the KL term trains every rollout"
        if getattr(self, "_entropy_bonus_enabled", False):
            return "the entropy bonus trains every rollout"
        if self.top_entropy_quantile < 1.0:
            return "`top_entropy_quantile` ranks the tokens of every rollout"
        if getattr(self, "aux_loss_enabled", False):
            return "the load-balancing loss of a mixture-of-experts model covers every rollout"
        if getattr(self.args, "use_liger_kernel", False) and hasattr(self, "compute_liger_loss"):
            return "this version of TRL computes the Liger loss on another path"
        if self.loss_type not in LOSS_DENOMINATORS:
            return f"the loss type {self.loss_type!r} is unknown"
        return None

    def _prepare_inputs(self, generation_batch):
        started = time.perf_counter()
        if self._skipping_off is not None or not self.model.training:
            batch = super()._prepare_inputs(generation_batch)
        else:
            batch = self._prepare_trained_rows(generation_batch)
        self._preparation_time = time.perf_counter() - started
        return batch

    def _prepare_trained_rows(self, generation_batch):
        self._old_logps_missing = False
        # vLLM's importance ratio is made of them during generation.
        self._postpones_old_logps = not (self.use_vllm and self.vllm_importance_sampling_correction)
        try:
            super()._prepare_inputs(generation_batch)
        finally:
            self._postpones_old_logps = False
        if self._buffered_inputs is not self._reduced_inputs:
            self._reduced_inputs = self._buffered_inputs = self._reduce_to_trained_rows(self._buffered_inputs)
            if self._old_logps_missing:
                for batch in self._buffered_inputs:
                    self._add_old_logps(batch)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        # TRL asks for old log-probabilities before the advantages are known; later, fewer rows need them.
        is_text_only = all(value is None for name, value in kwargs.items() if name != "batch_size")
        if self._postpones_old_logps and is_text_only:
            self._old_logps_missing = True
            return None, None, None
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _add_old_logps(self, batch: dict[str, Any]) -> None:
        if len(batch["advantages"]) == 0:
            return
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            batch["old_per_token_logps"], _, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].size(1),
            )

    def _reduce_to_trained_rows(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        obstacle = next((entry for batch in batches if (entry := unsupported_entry(batch)) is not None), None)
        if obstacle is None:
            extents = torch.stack([trained_extent(batch) for batch in batches])
        else:
            extents = torch.full((len(batches), 4), -1, device=self.accelerator.device)
        # The one gather, and the one wait for the device, of a generation batch: (processes, micro-batches, extent)
        everywhere = gather(extents.unsqueeze(0)).cpu()
        if (everywhere < 0).any():
            logger.warning_once(
                "Rollouts with advantage 0 are not left out of the update where a batch carries "
                f"{f'`{obstacle}`' if obstacle else 'more than text and one advantage per rollout'}."
            )
            return batches
        all_rows, trained_rows, trained_tokens, _ = everywhere.sum((0, 1)).tolist()
        all_tokens = all_rows * self._metrics["train"]["completions/mean_length"][-1]
        self._metrics["train"]["gd2po/trained_rows"].append(trained_rows / all_rows)
        self._metrics["train"]["gd2po/trained_tokens"].append(trained_tokens / max(all_tokens, 1))

        # Metrics of the update gather one value per row, so that every process must run the same number of rows.
        rows = everywhere[:, :, 1].amax(0).clamp(min=0 if self._may_skip_forward() else 1).tolist()
        lengths = everywhere[self.accelerator.process_index, :, 3].clamp(min=1).tolist()
        multiple = self.pad_to_multiple_of or 1
        reduced = []
        for batch, row_count, length in zip(batches, rows, lengths, strict=True):
            small, factor = select_rows(batch, row_count, math.ceil(length / multiple) * multiple, self.loss_type)
            reduced.append({**small, "gd2po_loss_factor": factor})
        return reduced

    def _may_skip_forward(self) -> bool:
        """Whether a micro-batch may do without a forward pass, because nothing waits for this process to run one."""
        is_alone = self.accelerator.num_processes == 1 and not self.is_deepspeed_enabled and not self.is_fsdp_enabled
        return is_alone and self._unreached_parameters is not None

    def training_step(self, *args, **kwargs):
        started = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.device.type != "cpu":
            # Costs nothing: right after this, transformers waits for the loss to look for NaN in it.
            torch.accelerator.synchronize()
        self._update_time += time.perf_counter() - started - self._preparation_time
        if self._step % self.current_gradient_accumulation_steps == 0:  # where TRL logs `step_time`
            self._metrics["train"]["gd2po/update_time"].append(self._update_time)
            self._update_time = 0.0
        if self._unreached_parameters is None:
            self._unreached_parameters = {parameter for parameter in self.model.parameters() if parameter.grad is None}
        return loss

    def _compute_loss(self, model, inputs):
        factor = inputs.get("gd2po_loss_factor", 1.0)
        if len(inputs["advantages"]) > 0:
            return super()._compute_loss(model, inputs) * factor
        # Nothing to learn from. The optimizer must still see the gradients of 0 that a full pass leaves (and none
        # where such a pass leaves none): it applies its momentum and weight decay to them.
        unreached = self._unreached_parameters or set()
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None and parameter not in unreached:
                parameter.grad = torch.zeros_like(parameter)
        return torch.zeros((), device=self.accelerator.device, requires_grad=True)
