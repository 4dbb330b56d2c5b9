"""What a resumed run may change, and the record of the settings with which it ran, from which step on."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..recipe import Recipe
from ..recipe.files import dump_recipe, read_recipe_file
from ..recipe.values import plain
from ..run_log import read_state


logger = logging.getLogger(__name__)

RESOLVED_RECIPE = "recipe.yaml"
HISTORY = "recipe_history.json"
LOCK = "_run.lock"  # the Hub's uploads leave out what starts so

# Keys that a resumed run cannot change: the weights and the optimizer of its checkpoint belong to them ...
FIXED = (
    "model_name_or_path model_revision dtype load_in_4bit load_in_8bit use_peft lora_r lora_alpha lora_dropout "
    "lora_target_modules lora_target_parameters lora_modules_to_save use_rslora use_dora reward_funcs reward_kwargs "
    "reward_gates closed_gate_reward"
).split()
# ... and those whose values it takes from the checkpoint, so that another value would not apply, or only in part.
OF_THE_CHECKPOINT = (
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules "
    "weight_decay adam_beta1 adam_beta2 adam_epsilon"
).split()
# Beginnings of keys that say where and how a run starts, not how it trains.
ABOUT_THE_RUN = (
    *("push_to_hub", "hub_", "report_to", "run_name", "project", "log"),
    *("save_", "disable_tqdm", "dataloader"),
)
NOT_COMPARED = ("resume_from_checkpoint", "output_dir", "trust_remote_code")


class RunRecord:
    """
    The settings of a run, and from which step on they applied.

    Args:
        recipe ([`Recipe`]):
            The recipe as it runs now.
        checkpoint (`str` or `None`):
            The checkpoint that the run resumes from; `None` for a fresh start.

    Raises:
        [`UsageError`]: if `recipe` changes keys that a resumed run cannot change. It names all of them.
    """

    def __init__(self, recipe: Recipe, checkpoint: str | None):
        self.recipe, self.checkpoint = recipe, checkpoint
        self.step = 0 if checkpoint is None else _step_of(Path(checkpoint))
        self.segments: list[dict[str, Any]] = []
        self.changes: list[str] = []
        if checkpoint is None:
            return
        segments = _read_history(Path(checkpoint).resolve().parent)
        self.segments = [segment for segment in segments if segment["from_step"] < max(self.step, 1)]
        if not self.segments:
            logger.warning(
                f"There is no {RESOLVED_RECIPE} beside '{checkpoint}': whether the settings changed is unknown."
            )
            return
        changed = _differences(self.segments[-1]["settings"], plain(recipe.settings), recipe)
        _refuse(changed, checkpoint)
        trained = sorted(key for key in changed if not key.startswith(ABOUT_THE_RUN))
        if trained and 0 < recipe.training.max_steps <= self.step:
            raise UsageError(
                f"'{checkpoint}' is the end of its run (`max_steps: {recipe.training.max_steps}`), so that "
                f"{', '.join(f'`{key}`' for key in trained)} would change nothing. Raise `max_steps` to train on."
            )
        self.changes = [f"{key}: {_short(before)} -> {_short(now)}" for key, (before, now) in changed.items()]

    def announce(self) -> None:
        """Say which settings change, and from which step on."""
        for change in self.changes:
            logger.warning(f"From step {self.step + 1} on, {change}.")

    def write(self) -> Path:
        """
        Write the recipe as it runs, which reproduces the run, and the record of all its settings.

        Returns:
            `Path`: the recipe.
        """
        folder = Path(self.recipe.training.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # A recipe that reproduces the run must not resume it or enable remote code.
        settings = {
            key: value
            for key, value in plain(self.recipe.settings).items()
            if key not in ("resume_from_checkpoint", "trust_remote_code")
        }
        segments = list(self.segments)
        if not segments or self.changes:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            segments.append({"from_step": self.step, "written": now, "changes": self.changes, "settings": settings})
        (folder / HISTORY).write_text(json.dumps(segments, indent=1) + "\n", encoding="utf-8")
        path = folder / RESOLVED_RECIPE
        self.segments = segments
        path.write_text(_header(self.recipe, self.history()) + dump_recipe(settings), encoding="utf-8")
        return path

    def history(self) -> list[str]:
        """One line per change of a setting, such as `"from step 41 on, method: gdpo -> gd2po_snr"`."""
        return [
            f"from step {segment['from_step'] + 1} on, {change}"
            for segment in self.segments
            for change in segment["changes"]
        ]


def write_resolved_recipe(recipe: Recipe) -> Path:
    """Write every key that was set, with its final value, as a recipe that reproduces the run."""
    return RunRecord(recipe, None).write()


@contextmanager
def only_run_in(folder: str | Path) -> Iterator[None]:
    """
    Keep other runs out of `folder`, on the main process, until this one ends.

    Raises:
        [`UsageError`]: if another run is in it.
    """
    from accelerate import PartialState
    from filelock import FileLock, Timeout

    if not PartialState().is_main_process:
        yield
        return
    lock = FileLock(Path(folder) / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"`output_dir` '{folder}' is in use by another run; two runs would mix their checkpoints and logs. "
            "Wait for its end, or give another `output_dir`."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _step_of(checkpoint: Path) -> int:
    return int((read_state(checkpoint) or {}).get("global_step") or 0)


def _read_history(folder: Path) -> list[dict[str, Any]]:
    try:
        segments = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
        return [segment for segment in segments if isinstance(segment["settings"], dict) and "from_step" in segment]
    except (OSError, ValueError, TypeError, KeyError):
        pass  # written by an earlier version, or edited
    if not (folder / RESOLVED_RECIPE).is_file():
        return []
    return [{"from_step": 0, "written": "", "changes": [], "settings": read_recipe_file(folder / RESOLVED_RECIPE)}]


def _differences(before: dict[str, Any], now: dict[str, Any], recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both, where a key that is not set has its default."""
    defaults = {
        item.name: None if item.default is MISSING else plain(item.default)
        for part in (recipe.arguments, recipe.training, recipe.model)
        for item in fields(part)
    }
    changed = {}
    for key in sorted({*before, *now} - {*NOT_COMPARED}):
        old, new = (settings.get(key, defaults.get(key)) for settings in (before, now))
        if _comparable(key, old, before) != _comparable(key, new, now):
            changed[key] = (old, new)
    return changed


def _comparable(key: str, value: Any, settings: dict[str, Any]) -> Any:
    if key == "reward_kwargs":
        return {label: (value or {}).get(label) or {} for label in settings.get("reward_funcs") or []}
    if key == "reward_weights" and value is not None and all(weight == 1 for weight in value):
        return None
    if key.endswith("_path") and isinstance(value, str) and Path(value).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    if key == "report_to" and value == "none":
        return None
    return value or None if isinstance(value, (dict, list)) else value


def _refuse(changed: dict[str, tuple[Any, Any]], checkpoint: str) -> None:
    def listed(keys: Sequence[str]) -> str:
        return "; ".join(
            f"`{key}` was {_short(changed[key][0])} and is now {_short(changed[key][1])}"
            for key in keys
            if key in changed
        )

    start = f"start a new run from it (`model_name_or_path: {checkpoint}`, with an `output_dir` of its own)"
    if fixed := listed(FIXED):
        raise UsageError(
            f"Cannot resume from '{checkpoint}': {fixed}. A run keeps its policy, adapter and rewards. Resume with "
            f"the old values, or {start}."
        )
    if overridden := listed(OF_THE_CHECKPOINT):
        raise UsageError(
            f"Cannot resume from '{checkpoint}': {overridden}. The checkpoint brings its own optimizer and schedule, "
            f"so the new values would not apply. Resume with the old values, or {start}."
        )


def _header(recipe: Recipe, changes: list[str]) -> str:
    import platform

    import torch
    import transformers
    import trl

    from .._version import __version__

    now = datetime.now(UTC).isoformat(timespec="seconds")
    header = (
        f"# Written {now} by gd2po_trl {__version__}: the recipe as it ran.\n"
        f"# trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}\n"
    )
    if recipe.settings.get("trust_remote_code"):
        header += "# It ran with --trust_remote_code, which a recipe cannot set.\n"
    if changes:
        header += f"# Its settings changed when it was resumed ({HISTORY} has all of them):\n"
        header += "".join(f"#   {' '.join(change.split())}\n" for change in changes)
    return header


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else f"{text[:197]}..."
