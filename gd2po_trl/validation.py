"""Validation during training: its own sampling, means over a whole set, and several sets side by side."""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import GenerationConfig, TrainerCallback


class Validation(TrainerCallback):
    """
    What [`GD2POTrainer`] changes about TRL's evaluation, besides the advantages.

    - Completions are sampled at `eval_temperature`, greedily at 0, where TRL takes the training's temperature.
    - The means of the rewards are over the rows of the set, each once. TRL averages over batches, so that the last,
      smaller one weighs as much as a full one, and on several processes it counts the rows that fill it up.
    - With a dictionary of sets, metrics carry the set's name after `eval_`, as transformers names the loss. With
      `log_completions` the completions of each set are written to a file of its own.
    - The training's random numbers are left as they were: a run with validation trains as one without.
    - `eval_on_end` evaluates after the last step, and a resumed run does not repeat the evaluation of
      `eval_on_start`.

    Args:
        trainer ([`GD2POTrainer`]): The trainer.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._is_running = False
        self._name = ""
        self._rewards: list[torch.Tensor] = []
        self._texts: list[tuple[list[Any], list[Any]]] = []
        self._waits_for_first_step = False

    # When an evaluation runs

    def on_train_begin(self, args, state, control, **kwargs):
        if args.eval_on_start and state.global_step > 0:  # transformers looks at it right after this
            args.eval_on_start, self._waits_for_first_step = False, True

    def on_step_begin(self, args, state, control, **kwargs):
        if self._waits_for_first_step:
            args.eval_on_start, self._waits_for_first_step = True, False

    def on_step_end(self, args, state, control, **kwargs):
        if args.eval_on_end and args.eval_strategy != "epoch" and state.global_step >= state.max_steps:
            control.should_evaluate = True

    # How it runs

    @contextmanager
    def run(self, dataloader: Any, metric_key_prefix: str) -> Iterator[None]:
        """Surrounds the completion and scoring of one set, before its metrics are logged."""
        trainer = self.trainer
        self._name = metric_key_prefix.removeprefix("eval_") if metric_key_prefix.startswith("eval_") else ""
        self._rewards, self._texts, self._is_running = [], [], True
        # Data loaders draw random numbers too when they start.
        device = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            with torch.random.fork_rng(devices=device), self._sampling():
                yield
        finally:
            self._is_running = False
        metrics = trainer._metrics["eval"]
        if self._rewards:
            raw = torch.cat(self._rewards)[: _number_of_rows(dataloader, trainer.num_generations_eval)]
            gates = trainer._gates
            rewards, weights = gates.apply(raw), trainer.reward_weights.to(raw)
            statistics = {**_statistics(rewards, weights, trainer), **gates.metrics(raw)}
            metrics.update({key: [value] for key, value in statistics.items()})
            self._write_table(rewards, gates.raw_columns(raw))
        if self._name:
            named = {f"{self._name}_{key}": values for key, values in metrics.items()}
            metrics.clear()
            metrics.update(named)
        self._rewards, self._texts = [], []

    def record(self, prompts: Sequence[Any], completions: Sequence[Any], rewards: torch.Tensor) -> None:
        """
        Keeps what an evaluation scored; does nothing outside one.

        Args:
            prompts, completions (sequences of length `B` / processes): Of this process.
            rewards (`torch.Tensor` of shape `(B, K)`): Of all processes, in their order, before any gate.
        """
        if not self._is_running:
            return
        self._rewards.append(rewards.detach().double().cpu())
        if self._name and self.trainer.log_completions:
            self._texts.append((gather_object(list(prompts)), gather_object(list(completions))))

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        temperature = self.trainer.args.eval_temperature
        if temperature is None:
            yield
            return
        changes = _sampling_changes(self.trainer, temperature)
        before = [(place, name, getattr(place, name)) for place, name, _ in changes]
        try:
            for place, name, value in changes:
                setattr(place, name, value)
            yield
        finally:
            for place, name, value in before:
                setattr(place, name, value)

    def _write_table(self, rewards: torch.Tensor, extra: dict[str, list[float]]) -> None:
        trainer = self.trainer
        if not self._texts or not trainer.accelerator.is_main_process:
            return
        import pandas as pd

        prompts, completions = ([text for part in parts for text in part] for parts in zip(*self._texts, strict=True))
        table = {
            "step": [trainer.state.global_step] * len(rewards),
            "prompt": prompts[: len(rewards)],
            "completion": completions[: len(rewards)],
            **dict(zip(trainer.reward_func_names, rewards.T.tolist(), strict=True)),
            **extra,
        }
        folder = Path(trainer.args.output_dir) / "completions"
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.-]+", "_", self._name)
        pd.DataFrame(table).to_parquet(folder / f"eval_{name}_{trainer.state.global_step:05d}.parquet")


def _sampling_changes(trainer: Any, temperature: float) -> list[tuple[Any, str, Any]]:
    """Object, attribute and new value of everything that sets the temperature of TRL's generation."""
    changes: list[tuple[Any, str, Any]] = []
    if trainer.use_vllm:
        engine = trainer.vllm_generation
        given = {key: value for key, value in engine.generation_kwargs.items() if key != "temperature"}
        changes += [(engine, "temperature", temperature), (engine, "generation_kwargs", given)]
    else:
        settings: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            settings["temperature"] = temperature
        else:  # what only sampling reads is left at its default, or transformers would warn of it
            settings |= {
                name: getattr(GenerationConfig(), name) for name in ("temperature", "top_p", "top_k", "min_p")
            }
        config = copy.deepcopy(trainer.generation_config)
        config.update(**settings)
        changes += [
            (trainer, "generation_config", config),
            (trainer, "generation_kwargs", {**trainer.generation_kwargs, **settings}),
        ]
    if temperature > 0:  # by which the log-probabilities of the loss are scaled
        changes.append((trainer, "temperature", temperature))
    return changes


def _number_of_rows(dataloader: Any, num_generations: int) -> int | None:
    """Rollouts of one pass over the set; several processes complete the first rows again to fill their last batch."""
    try:
        return len(dataloader.dataset) * num_generations
    except (AttributeError, TypeError):  # a stream
        return None


def _statistics(rewards: torch.Tensor, weights: torch.Tensor, trainer: Any) -> dict[str, float]:
    """TRL's metrics of the rewards, of shape `(N, K)`, over all rows. NaN (unscored) is left out."""
    total = (rewards * weights).nansum(1)
    total[rewards.isnan().all(1)] = torch.nan
    columns = {f"rewards/{name}/": column for name, column in zip(trainer.reward_func_names, rewards.T, strict=True)}
    statistics = {}
    for key, values in columns.items():
        statistics[f"{key}mean"], statistics[f"{key}std"] = _mean_and_std(values)
    statistics["reward"], statistics["reward_std"] = _mean_and_std(total)
    return statistics


def _mean_and_std(values: torch.Tensor) -> tuple[float, float]:
    scored = values[~values.isnan()]
    mean = scored.mean().item() if len(scored) > 0 else math.nan
    return mean, scored.std().item() if len(scored) > 1 else math.nan
