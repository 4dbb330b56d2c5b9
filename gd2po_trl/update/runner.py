"""
The update of one trainer: what its overrides of TRL's methods call, and all that they have to remember in between.

TRL splits a generation batch into micro-batches and trains one after the other, each in a *slot* of its training loop.
Here a forward pass serves several whole micro-batches. It runs in the slot of the last of them, where TRL's loss is
computed for each, and one backward pass follows; the slots before only collect. Denominators, KL terms, entropy
bonuses and metrics keep their meaning, since each is still computed over the micro-batch that TRL made.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather
from trl.models.utils import disable_gradient_checkpointing

from .plan import MicroBatch, Window, cost, cost_tables, cut, fill_forwards, join_tables
from .refusals import base_model, reason_not_to_pack, reason_to_train_all_rows
from .rows import (
    RowTable,
    describe_rows,
    join_batches,
    loss_mask,
    order_by_prompt,
    select_rows,
    take_rows,
    tokens_with_gradient,
    unsupported_entry,
)


if TYPE_CHECKING:
    from ..gd2po_trainer import GD2POTrainer


logger = get_logger(__name__)

# Rollouts of the self-check: enough for a prompt with several, few enough to cost nothing.
CHECKED_ROLLOUTS = 4


class Update:
    """
    Runs the update of a [`GD2POTrainer`] over distinct tokens of rollouts with a gradient.

    Args:
        trainer ([`GD2POTrainer`]):
            After its construction by TRL.
        padded_logps (`Callable`):
            TRL's own `_get_per_token_logps_and_entropies`.

    Attributes:
        skipping_off (`str` or `None`):
            Why every rollout is trained, or `None`.
        packing_off (`str` or `None`):
            Why rollouts are padded, or `None`. The self-check at the first use may set it.
    """

    def __init__(self, trainer: "GD2POTrainer", padded_logps: Callable[..., Any]):
        self.trainer = trainer
        self.padded_logps = padded_logps
        self.skipping_off = reason_to_train_all_rows(trainer)
        self.packing_off = reason_not_to_pack(trainer)
        for what, asked, reason in (
            (
                "Rollouts with advantage 0 are not left out of the update",
                "skip_zero_advantage_rows",
                self.skipping_off,
            ),
            ("Rollouts are padded, not packed", "packed_update", self.packing_off),
        ):
            if reason is not None and getattr(trainer.args, asked):
                logger.warning(f"{what}: {reason}.")
        self._checked = False
        # Of the generation batch in TRL's buffer: its micro-batches, or `None` where TRL trains them by itself.
        self._buffer: Any = None
        self._micro_batches: list[MicroBatch] | None = None
        self._stock_tokens = 0  # of a micro-batch as TRL pads it
        self._window: Window | None = None
        self._slots_of_step = 0
        self._only_collects = False
        self._until_backward = ExitStack()
        # Log-probabilities and entropies of the micro-batch whose loss TRL computes.
        self._given: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._postpones_old_logps = self._old_logps_missing = False
        self._preparation_time = self._update_time = 0.0

    @property
    def is_off(self) -> bool:
        """Whether TRL trains all rollouts, padded, by itself."""
        return self.skipping_off is not None and self.packing_off is not None

    # A generation batch

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Around `_prepare_inputs`: old log-probabilities wait until it is known which rollouts need them."""
        started = time.perf_counter()
        trainer = self.trainer
        # vLLM's importance ratio is made of them during generation.
        needed_at_once = trainer.use_vllm and trainer.vllm_importance_sampling_correction
        self._postpones_old_logps = trainer.model.training and self.skipping_off is None and not needed_at_once
        try:
            yield
        finally:
            self._postpones_old_logps = self._old_logps_missing = False
            self._preparation_time = time.perf_counter() - started

    def micro_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The micro-batch of this slot, within [`~Update.preparing`]; `batch` is the one that TRL would train."""
        trainer = self.trainer
        if trainer._buffered_inputs is self._buffer:
            return batch
        self._postpones_old_logps = False
        trainer._buffered_inputs = self._buffer = self._prepare(trainer._buffered_inputs)
        return self._buffer[trainer._step % trainer.args.steps_per_generation]

    def _prepare(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        trainer, args = self.trainer, self.trainer.args
        self._micro_batches = self._window = None
        if self.is_off and not args.keep_prompts_together:
            return batches
        size = len(batches[0]["advantages"])
        obstacle = next((entry for batch in batches if (entry := unsupported_entry(batch)) is not None), None)
        table = None
        if obstacle is None:
            joined = join_batches(batches)
            table = describe_rows(
                joined["prompt_ids"],
                joined["prompt_mask"],
                joined["completion_mask"],
                loss_mask(joined),
                tokens_with_gradient(joined, trainer.loss_type),
            )
        if not self._agree(table is not None and table.is_plain) or table is None:
            logger.warning_once(
                "Rollouts with advantage 0 are not left out of the update, and none are packed, where a batch carries "
                f"{f'`{obstacle}`' if obstacle else 'more than text and one advantage per rollout'}."
            )
            if self._old_logps_missing:
                for batch in batches:
                    self._add_old_logps(batch, torch.arange(size))
            return batches
        if args.keep_prompts_together:
            order = order_by_prompt(table)
            joined, table = take_rows(joined, order), table.select(order)
        self._stock_tokens = size * (joined["prompt_ids"].size(1) + joined["completion_ids"].size(1))
        if self.packing_off is None and not self._checked:
            self._check(trainer.model, joined["prompt_ids"], joined["completion_ids"], table)

        trains = table.trained_tokens > 0 if self.skipping_off is None else torch.ones(len(table), dtype=torch.bool)
        parts = torch.arange(len(table)).split(size)
        counts = torch.stack([trains[part].sum() for part in parts])
        if self.skipping_off is None:
            counts = self._count_trained(counts, table)
        if self._old_logps_missing:
            self._add_old_logps(joined, trains.nonzero().flatten())
        micro_batches = [
            self._micro_batch_of(joined, table, part, trains[part], count)
            for part, count in zip(parts, counts.tolist(), strict=True)
        ]
        if not self.is_off:
            self._micro_batches = micro_batches
        return [micro_batch.batch for micro_batch in micro_batches]

    def _count_trained(self, counts: torch.Tensor, table: RowTable) -> torch.Tensor:
        """Rows of each micro-batch: the most of any process, since metrics of the update gather one value per row."""
        trained_tokens = table.trained_tokens.sum().unsqueeze(0)
        everywhere = self._gather(torch.cat([counts, trained_tokens]))
        all_rows = len(table) * len(everywhere)
        metrics = self.trainer._metrics["train"]
        all_tokens = all_rows * metrics["completions/mean_length"][-1]
        metrics["gd2po/trained_rows"].append(float(everywhere[:, :-1].sum()) / all_rows)
        metrics["gd2po/trained_tokens"].append(float(everywhere[:, -1].sum()) / max(all_tokens, 1))
        return everywhere[:, :-1].amax(0)

    def _micro_batch_of(
        self, joined: dict[str, Any], table: RowTable, part: torch.Tensor, trains: torch.Tensor, num_rows: int
    ) -> MicroBatch:
        batch = take_rows(joined, part)
        if self.skipping_off is not None:
            return MicroBatch(batch, table.select(part), 1.0)
        trainer = self.trainer
        kept = trains.nonzero().flatten()
        multiple = trainer.pad_to_multiple_of or 1
        length = max(int(table.lengths[part[kept]].amax()) if len(kept) else 0, 1)
        length = min(-(-length // multiple) * multiple, batch["completion_ids"].size(1))
        reduced, factor = select_rows(batch, kept, num_rows, length, trainer.loss_type)
        # Rows that fill up are not run; any row can stand for them.
        filled = torch.cat([part[kept], part[:1].expand(num_rows - len(kept))])
        return MicroBatch(reduced, table.select(filled, torch.arange(num_rows) < len(kept)), factor)

    def _add_old_logps(self, batch: dict[str, Any], rows: torch.Tensor) -> None:
        """Give `batch` its old log-probabilities, computed for `rows` alone and 0 elsewhere."""
        trainer = self.trainer
        total, length = batch["completion_ids"].shape
        # Without packing, every process must run the same number of rows.
        count = int(self._gather(torch.tensor([len(rows)])).max())
        others = torch.ones(total, dtype=torch.bool)
        others[rows] = False
        if self.packing_off is not None:
            rows = torch.cat([rows, others.nonzero().flatten()[: count - len(rows)]])
        values = batch["advantages"].new_zeros(total, length)
        if count:
            some = take_rows(batch, rows)
            with (
                torch.no_grad(),
                disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
            ):
                logps, _, _ = trainer._get_per_token_logps_and_entropies(
                    trainer.model,
                    torch.cat([some["prompt_ids"], some["completion_ids"]], dim=1),
                    torch.cat([some["prompt_mask"], some["completion_mask"]], dim=1),
                    length,
                    batch_size=trainer.args.per_device_train_batch_size,
                )
            values[rows.to(values.device)] = logps.to(values.dtype)
        batch["old_per_token_logps"] = values

    # Slots of the training loop

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Around `training_step`: a slot that only collects has no backward pass."""
        started = time.perf_counter()
        accelerator = self.trainer.accelerator
        backward = accelerator.backward
        self._only_collects = False
        accelerator.backward = lambda loss, **kwargs: None if self._only_collects else backward(loss, **kwargs)
        try:
            # Gradient checkpointing runs layers again during the backward pass, by the attention of the forward pass.
            with self._until_backward:
                yield
        finally:
            del accelerator.backward
        if accelerator.device.type != "cpu":
            # Costs nothing: right after this, transformers waits for the loss to look for NaN in it.
            torch.accelerator.synchronize()
        self._update_time += time.perf_counter() - started - self._preparation_time
        self._slots_of_step += 1
        if accelerator.sync_gradients:
            self.trainer._metrics["train"]["gd2po/update_time"].append(self._update_time)
            self._update_time = 0.0
            self._slots_of_step = 0

    def loss(self, model: torch.nn.Module, compute_loss: Callable[[Any, Any], torch.Tensor]) -> torch.Tensor | None:
        """
        The loss of this slot: of all micro-batches whose forward pass is due, by TRL's `compute_loss`, or a 0 without
        gradient where the slot only collects; `None` where TRL trains by itself.
        """
        trainer = self.trainer
        if self._micro_batches is None:
            return None
        slot = trainer._step % trainer.args.steps_per_generation
        window = self._window
        if window is None or not window.first <= slot <= window.ends[-1] or slot == window.first:
            window = self._window = self._plan(slot)
        window.pending.append(slot)
        is_last = trainer.accelerator.sync_gradients
        loss = torch.zeros((), device=trainer.accelerator.device)
        if slot not in window.ends and not is_last:
            self._only_collects = True
            return loss
        due = [self._micro_batches[number] for number in window.pending]
        due = [micro_batch for micro_batch in due if micro_batch.num_rows]
        window.pending = []
        for micro_batch, given in zip(due, self._run(model, due), strict=True):
            self._given = given
            try:
                loss = loss + compute_loss(model, micro_batch.batch) * micro_batch.factor
            finally:
                self._given = None
        if is_last and not due:
            # The optimizer must see the gradients of 0 that a full pass leaves, since it applies its momentum and
            # weight decay to them; and where processes synchronize gradients, each has to run a pass.
            loss = self._run_filler(model)
        self._only_collects = not due and not is_last
        return loss

    def _plan(self, slot: int) -> Window:
        trainer, micro_batches = self.trainer, self._micro_batches or []
        left_of_step = max(trainer.current_gradient_accumulation_steps - self._slots_of_step, 1)
        planned = micro_batches[slot : min(slot + left_of_step, trainer.args.steps_per_generation)]
        tables = [micro_batch.table for micro_batch in planned]
        if self.packing_off is not None:
            ends = list(range(len(planned)))
            tokens = sum(
                part.num_rows * (part.batch["prompt_ids"].size(1) + part.batch["completion_ids"].size(1))
                for part in planned
            )
        elif trainer.accelerator.num_processes == 1:
            budget = self._stock_tokens
            ends = cut(len(planned), lambda i, j: cost(join_tables(tables[i : j + 1]), budget)[0])
            starts = [0, *(end + 1 for end in ends)]
            tokens = sum(cost(join_tables(tables[i : j + 1]), budget)[1] for i, j in zip(starts, ends, strict=False))
        else:
            everywhere = self._gather(cost_tables(tables, self._stock_tokens))
            shares, run = everywhere[:, 0].amax(0), everywhere[:, 1].mean(0)
            ends = cut(len(planned), lambda i, j: float(shares[i, j]))
            starts = [0, *(end + 1 for end in ends)]
            tokens = sum(float(run[i, j]) for i, j in zip(starts, ends, strict=False))
        trainer._metrics["train"]["gd2po/update_tokens"].append(tokens / (len(planned) * self._stock_tokens))
        return Window(slot, [slot + end for end in ends])

    # Forward passes

    def _run(self, model: torch.nn.Module, due: list[MicroBatch]) -> list[Any]:
        """Log-probabilities and entropies of each of `due`, from one forward pass; `None` where TRL computes them."""
        if self.packing_off is not None or not due:
            return [None] * len(due)
        from .packing import Rollouts

        batches = [Rollouts(part.batch["prompt_ids"], part.batch["completion_ids"], part.table) for part in due]
        if any(part.table.lengths.any() for part in due):
            results = self._run_packed(model, batches, self._until_backward)
        else:  # on this process; another one has something to run
            nothing = self._run_filler(model)
            results = [
                (nothing + torch.zeros(batch.completion_ids.shape, device=nothing.device),) * 2 for batch in batches
            ]
        given = []
        for part, (logps, entropies) in zip(due, results, strict=True):
            # Where nothing was run, old log-probabilities stand in: they count nowhere, but must not overflow.
            old = part.batch.get("old_per_token_logps")
            if old is not None:
                columns = torch.arange(logps.size(1), device=logps.device)
                logps = torch.where(columns < part.table.lengths.to(logps.device).unsqueeze(1), logps, old)
            given.append((logps, entropies))
        return given

    def _run_packed(self, model: torch.nn.Module, batches: list[Any], stack: ExitStack) -> list[Any]:
        from .attention import use_packed_attention
        from .packing import run_packed

        base = base_model(self.trainer.accelerator.unwrap_model(model))
        stack.enter_context(use_packed_attention(base))
        with self.trainer.accelerator.autocast():
            return run_packed(model, base, batches)

    def _run_filler(self, model: torch.nn.Module) -> torch.Tensor:
        """A 0 from a forward pass over two tokens, with gradients of 0 for all that a forward pass reaches."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.trainer.accelerator.device)
        logps, _, _ = self.padded_logps(model, ids, torch.ones_like(ids), 1, compute_entropy=True)
        return logps.sum() * 0.0

    def log_probs(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None] | None:
        """What TRL asks `_get_per_token_logps_and_entropies` for, or `None` where TRL has to compute it, padded."""
        if self._given is not None:
            return *self._given, None
        is_text_only = not any(value is not None and value is not False for value in others.values())
        if self._postpones_old_logps and is_text_only:
            self._old_logps_missing = True
            return None, None, None
        if self.packing_off is not None or not is_text_only or torch.is_grad_enabled():
            return None
        prompt_ids, completion_ids = input_ids[:, :-logits_to_keep], input_ids[:, -logits_to_keep:]
        prompt_mask, completion_mask = attention_mask[:, :-logits_to_keep], attention_mask[:, -logits_to_keep:]
        table = describe_rows(prompt_ids, prompt_mask, completion_mask)
        if not self._agree(table.is_plain):
            return None
        if not self._checked:
            self._check(model, prompt_ids, completion_ids, table)
            if self.packing_off is not None:
                return None
        from .packing import Rollouts

        forwards = fill_forwards(table, (batch_size or len(table)) * input_ids.size(1))
        results = []
        for rows in forwards:
            on_device = rows.to(input_ids.device)
            part = Rollouts(prompt_ids[on_device], completion_ids[on_device], table.select(rows))
            with ExitStack() as stack:
                results += self._run_packed(model, [part], stack)
        for _ in range(int(self._gather(torch.tensor([len(forwards)])).max()) - len(forwards)):
            self._run_filler(model)
        logps, entropies = torch.zeros(2, *completion_ids.shape, device=input_ids.device)
        for rows, (some_logps, some_entropies) in zip(forwards, results, strict=True):
            logps[rows.to(logps.device)] = some_logps.float()
            if compute_entropy:
                entropies[rows.to(logps.device)] = some_entropies.float()
        return logps, entropies if compute_entropy else None, None

    def _check(
        self, model: torch.nn.Module, prompt_ids: torch.Tensor, completion_ids: torch.Tensor, table: RowTable
    ) -> None:
        """Compare packed with padded log-probabilities of a few rollouts, and turn packing off if they differ."""
        from .packing import is_rounding

        # Rollouts that share a prompt first, and another prompt beside them.
        shared = (table.prompts.unsqueeze(0) == table.prompts.unsqueeze(1)).sum(1)
        rows = torch.argsort(torch.where(table.lengths > 0, shared * len(table) - table.prompts, -1), descending=True)
        extent = self._gather(torch.tensor([len(rows), int(table.lengths.sum())]))
        if not extent[:, 1].any():  # nothing to compare, and nothing that would be run
            return
        count = int(extent[:, 0].min())
        rows = torch.cat([rows[: CHECKED_ROLLOUTS - 1], rows[-1:]])[:count]
        some = table.select(rows)
        on_device = rows.to(prompt_ids.device)
        prompt_ids, completion_ids = prompt_ids[on_device], completion_ids[on_device]
        was_training = model.training
        problem, values = "", dict[str, float]()
        model.eval()
        try:
            with torch.no_grad(), ExitStack() as stack:
                padded, repadded = self._padded_for_check(model, prompt_ids, completion_ids, some)
                is_scored = torch.arange(completion_ids.size(1)) < some.lengths.unsqueeze(1)
                is_scored = is_scored.to(padded.device)
                from .packing import Rollouts

                try:
                    if not is_scored.any():
                        self._run_filler(model)
                    else:
                        ((packed, _),) = self._run_packed(model, [Rollouts(prompt_ids, completion_ids, some)], stack)
                        same, values = is_rounding(packed[is_scored], padded[is_scored], repadded[is_scored])
                        problem = "" if same else "log-probabilities differ by more than rounding"
                except Exception as error:  # whatever a model makes of inputs that it does not know
                    problem = f"{type(error).__name__}: {error}" if not str(error) else str(error)
        finally:
            model.train(was_training)
        details = ", ".join(f"{name} {value:.1e}" for name, value in values.items())
        self._checked = True
        if not self._agree(not problem):
            self.packing_off = problem or "the self-check failed on another process"
            logger.warning(f"Rollouts are padded, not packed: {self.packing_off}{f' ({details})' if details else ''}.")
        else:
            logger.info(f"Packed rollouts give the log-probabilities of padded ones; differences: {details}.")

    def _padded_for_check(
        self, model: torch.nn.Module, prompt_ids: torch.Tensor, completion_ids: torch.Tensor, table: RowTable
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities by TRL, and the same with more padding."""
        device, results = prompt_ids.device, []
        prompt_width, length = prompt_ids.size(1), completion_ids.size(1)
        is_prompt = torch.arange(prompt_width) >= prompt_width - table.prompt_lengths.unsqueeze(1)
        is_completion = torch.arange(length) < table.lengths.unsqueeze(1)
        for padding in (0, 8):
            left = torch.zeros(len(prompt_ids), padding, dtype=prompt_ids.dtype, device=device)
            mask = torch.cat([left, is_prompt.to(left), is_completion.to(left)], dim=1)
            ids = torch.cat([left, prompt_ids, completion_ids], dim=1)
            results.append(self.padded_logps(model, ids, mask, length, batch_size=1)[0])
        return results[0], results[1]

    # Several processes

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """`values` of all processes on the CPU, one row each."""
        if self.trainer.accelerator.num_processes == 1:
            return values.unsqueeze(0)
        return gather(values.to(self.trainer.accelerator.device).unsqueeze(0)).cpu()

    def _agree(self, opinion: bool) -> bool:
        return bool(self._gather(torch.tensor([opinion])).all())
