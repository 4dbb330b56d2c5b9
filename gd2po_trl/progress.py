"""The output of a training run on a terminal: a line of rewards, a rollout now and then, and the change at the end."""

import random
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .errors import UsageError
from .messages import conversation_text
from .reporting import make_table
from .run_log import LogHistory, ends, held_out_change, reward_names, series, training_change
from .terminal import duration, fill, make_console, number, printable, shorten


if TYPE_CHECKING:
    from rich.console import Console

# Rollouts are shown at the first log entry, and then as often as this over the run.
SAMPLE_TIMES = 10
PROMPT_LENGTH, COMPLETION_LENGTH = 400, 1200
# Metrics that are shown for a run without rewards, such as a supervised one.
OTHER_METRICS = {"loss": "loss", "mean_token_accuracy": "token accuracy"}


class RewardProgress(ProgressCallback):
    """
    Shows each reward's mean and the conflict ratio of the newest log entry, and rollouts with their rewards.

    On a terminal the figures are below a bar with the time left and are updated in place. Elsewhere (a file, a
    notebook) there is one line per log entry. All other metrics are in `trainer_state.json`.

    ```python
    RewardProgress().attach(trainer)
    trainer.train()
    ```

    Args:
        num_samples (`int`, *optional*, defaults to 1):
            Rollouts to show each time, at the first log entry and then ten times over the run; 0 shows none.
        console (`rich.console.Console`, *optional*):
            Where to print. By default the terminal.
    """

    def __init__(self, num_samples: int = 1, console: "Console | None" = None):
        super().__init__()
        self.num_samples = num_samples
        self.console = console or make_console()
        self.trainer: Any = None
        self._live: Any = None
        self._bar: Any = None
        self._figures: list[str] = []
        self._samples_shown = 0

    def attach(self, trainer: Any) -> None:
        """Show the training of `trainer`, in the place of its own bar, table of metrics and table of completions."""
        for callback in (DEFAULT_PROGRESS_CALLBACK, ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(self)
        trainer.num_completions_to_print = 0
        self.trainer = trainer

    def close(self) -> None:
        """Give the terminal back; at the end of a `with` block also after an error."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> "RewardProgress":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # Callbacks

    def on_train_begin(self, args, state, control, **kwargs):
        self._started, self._first_step = time.monotonic(), state.global_step
        self._samples_shown = _part_of(state)
        if state.is_world_process_zero and self.console.is_terminal:
            self._show_bar(state)

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(0, completed=state.global_step)

    def on_prediction_step(self, args, state, control, **kwargs):
        return  # transformers would show a second bar here, and close it after the evaluation

    on_evaluate = on_predict = on_prediction_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if figures := _figures(logs, "eval_"):
            self._print(fill([f"held out, step {state.global_step}:", *figures], self.console.width))
        elif figures := _figures(logs):
            self._figures = figures
            if self._live is None:
                done, left = f"step {state.global_step}/{state.max_steps}", self._time_left(state)
                self._print(["  ".join([done, *figures, *left])])
            part = _part_of(state)
            if part > self._samples_shown:
                self._samples_shown = part
                if self._live is not None:
                    self._print(["", *fill([f"step {state.global_step}:", *figures], self.console.width)])
                self._print_samples(state)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    # What is shown

    def _show_bar(self, state: Any) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as TimeLeft
        from rich.text import Text

        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeLeft(),
            TextColumn("left"),
            console=self.console,
            expand=True,
        )
        self._bar.add_task("", total=state.max_steps, completed=state.global_step)

        class Figures:
            def __rich__(_) -> Group:
                lines = fill(self._figures, self.console.width)
                return Group(self._bar, *(Text(line, no_wrap=True) for line in lines))

        self._live = Live(Figures(), console=self.console, refresh_per_second=4)
        self._live.start()

    def _time_left(self, state: Any) -> list[str]:
        done = state.global_step - self._first_step
        if not 0 < done < state.max_steps - self._first_step:
            return []
        seconds = (time.monotonic() - self._started) / done * (state.max_steps - state.global_step)
        return [f"{duration(seconds)} left"]

    def _print(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.console.print(line, soft_wrap=True)

    def _print_samples(self, state: Any) -> None:
        logs = getattr(self.trainer, "_logs", None)
        if not logs:
            return
        count = len(logs["prompt"])
        # Drawn from the step: the random numbers of the training stay as they were.
        chosen = random.Random(state.global_step).sample(range(count), min(self.num_samples, count))
        for index in sorted(chosen):
            rewards = {name: values[index] for name, values in logs["rewards"].items() if index < len(values)}
            fate = ""
            if "gd2po_conflict" in logs["extra"] and logs["extra"]["gd2po_conflict"][index]:
                fate = f"; in conflict, {'kept' if logs['extra']['gd2po_kept'][index] else 'left out'}"
            print_sample(
                f"Rollout of step {state.global_step}",
                conversation_text(logs["prompt"][index]),
                {f"completion ({_scores(rewards)}{fate})": conversation_text(logs["completion"][index])},
                self.console,
            )


def print_sample(title: str, prompt: str, completions: Mapping[str, str], console: "Console") -> None:
    """Print a prompt and what was written for it, each completion under its own heading."""
    from rich.text import Text

    # Lines in a file are not wrapped.
    style = {"soft_wrap": not console.is_terminal}
    console.print()
    console.print(Text(printable(title), style="bold"), **style)
    console.print(Text(printable(shorten(prompt.strip("\n"), PROMPT_LENGTH)), style="dim"), **style)
    for heading, completion in completions.items():
        console.print()
        console.print(Text(printable(heading), style="bold"), **style)
        console.print(Text(printable(shorten(completion.strip("\n"), COMPLETION_LENGTH))), **style)


def print_change(log: LogHistory, console: "Console") -> None:
    """Print each reward's mean before and after, on held-out prompts if there were evaluations, and the conflicts."""
    names = reward_names(log)
    if not names:
        return
    try:
        changes, title, ends_called = held_out_change(log), "Mean reward on held-out prompts", ["before", "after"]
    except UsageError:  # there were no evaluations
        changes, title = training_change(log), "Mean reward of the training rollouts, by step"
        ends_called = ["first tenth", "last tenth"]
    rows = [
        [name, number(before), number(after), number(after - before, "+")] for name, (before, after) in changes.items()
    ]
    if rows:
        console.print(make_table(title, ["reward", *ends_called, "change"], rows))
    _, conflict = series(log, "gd2po/conflict_ratio")
    if conflict and len(names) > 1:
        first, last = ends(conflict)
        console.print(
            f"Rollouts on which the rewards disagreed: {first:.0%} in the first tenth of the steps, {last:.0%} in the "
            f"last, {sum(conflict) / len(conflict):.0%} over all.\n"
        )


def _figures(logs: Mapping[str, Any], prefix: str = "") -> list[str]:
    figures = [
        f"{name} {number(value)}"
        for name in reward_names([{key.removeprefix(prefix): 0 for key in logs if key.startswith(prefix)}])
        if (value := logs.get(f"{prefix}rewards/{name}/mean")) is not None
    ]
    conflict = logs.get(f"{prefix}gd2po/conflict_ratio")
    if figures and conflict is not None and len(figures) > 1 and not prefix:
        figures.append(f"conflict {conflict:.0%}")
    if not figures and "train_runtime" not in logs:
        figures = [
            f"{label} {number(logs[prefix + key])}" for key, label in OTHER_METRICS.items() if prefix + key in logs
        ]
    return figures


def _scores(rewards: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {'–' if value != value else number(value)}" for name, value in rewards.items())


def _part_of(state: Any) -> int:
    """The part of the run, of `SAMPLE_TIMES` equal ones, that a step is in, from 1 on; 0 before the first step."""
    return -(-SAMPLE_TIMES * state.global_step // max(state.max_steps, 1))
