"""Training runs as processes of their own: started, watched, recognised when they are already done."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import psutil

from ..errors import UsageError
from ..terminal import duration
from .variants import Variant, mask_secrets


RECORD = "run.json"
LOG = "train.log"
POLL_SECONDS = 0.2
# The line of progress that `gd2po train` writes to a file, and how many bytes from the end it is looked for in.
STEP = re.compile(rb"^step (\d+)/(\d+) ", re.MULTILINE)
LOG_TAIL = 8192
# `gd2po` ends with this status when the user's input is wrong, so that no other run can succeed either.
USAGE_STATUS = 2


@dataclass(frozen=True)
class Run:
    """
    One training.

    Args:
        variant ([`Variant`]): What is trained.
        seed (`int`): Its seed.
        folder (`Path`): Its `output_dir`.
        command (`tuple[str, ...]`): The command line that trains it.
        settings (`dict`): All settings of its recipe that make the result what it is; JSON types.
    """

    variant: Variant
    seed: int
    folder: Path
    command: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """
    How a run ended.

    Args:
        run ([`Run`]): The run.
        state (`dict` or `None`): Content of its `trainer_state.json`; `None` if it failed.
        failure (`str`): Why it failed, or "".
        seconds (`float` or `None`): How long its process took; `None` if that is not known.
    """

    run: Run
    state: dict[str, Any] | None
    failure: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Progress:
    """
    How far `run_all` is.

    Args:
        done (`int`), total (`int`): Runs that have ended, of those that were to be trained.
        seconds (`float`): Since the start.
        active (`list` of `tuple[str, int, int]`): Label, step and number of steps of every run at work; 0 where a run
            has not said them yet.
    """

    done: int
    total: int
    seconds: float
    active: list[tuple[str, int, int]]

    @property
    def seconds_left(self) -> float | None:
        """An estimate from what is done so far; `None` where nothing is."""
        done = self.done + sum(step / steps for _, step, steps in self.active if steps)
        return self.seconds / done * (self.total - done) if done else None


def train_command(
    config: Path, variant: Variant, seed: int, folder: Path, overrides: Sequence[str], launch: Sequence[str] = ()
) -> tuple[str, ...]:
    """
    The command line of a run; a run that was killed goes on from its newest checkpoint, if it has any.

    With words for `accelerate launch` it starts the run's processes, on a free port, since several runs may train at
    the same time.
    """
    own = ("--method", variant.method, "--seed", str(seed), "--output_dir", str(folder))
    resume = ("--resume_from_checkpoint", "latest")
    words = (*overrides, *variant.overrides, *own, *resume)
    train = ("-m", "gd2po_trl.cli", "train", "--config", str(config), *words)
    if not launch:
        return (sys.executable, *train)
    port = () if "--main_process_port" in launch else ("--main_process_port", "0")
    return (sys.executable, "-m", "accelerate.commands.launch", *port, *launch, *train)


def launched_processes(launch: Sequence[str]) -> int:
    """
    How many processes train together when `accelerate launch` is given these words; 1 for none.

    Raises:
        [`UsageError`]: if it does not take them, or its configuration file is missing.
    """
    if not launch:
        return 1
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        with redirect_stderr(StringIO()) as said:
            arguments = launch_command_parser().parse_args([*launch, "script.py"])
    except SystemExit as error:
        reason = said.getvalue().strip().splitlines()[-1:] or ["it takes no script"]
        raise UsageError(f"--launch: `accelerate launch` does not take '{shlex.join(launch)}': {reason[0]}") from error
    if arguments.training_script_args or arguments.module:
        raise UsageError(f"--launch '{shlex.join(launch)}' names a script; the comparison adds its own.")
    if arguments.num_processes is not None:
        return arguments.num_processes
    if arguments.config_file is None:
        raise UsageError("--launch: say how many processes: --num_processes N, or --config_file FILE.")
    try:
        return load_config_from_file(arguments.config_file).num_processes
    except (OSError, ValueError) as error:
        raise UsageError(f"--launch: '{arguments.config_file}' cannot be read: {error}") from error


def run_all(
    runs: Sequence[Run],
    *,
    jobs: int = 1,
    devices: Sequence[str] = (),
    report: Callable[[str], None] = print,
    watch: Callable[["Progress"], None] | None = None,
) -> list[Outcome]:
    """
    Train every run that is not finished yet.

    Args:
        runs (sequence of [`Run`]):
            What to train. A failed run is tried again; a finished one is not repeated.
        jobs (`int`, *optional*, defaults to `1`):
            How many runs to train at the same time.
        devices (sequence of `str`, *optional*):
            CUDA device ids. If given, each has one run at a time, which sees no other device, and `jobs` is not used.
        report (callable, *optional*):
            Called with one line about every run.
        watch (callable, *optional*):
            Called several times a second with the [`Progress`].

    Returns:
        `list` of [`Outcome`], in the order of `runs`.

    Raises:
        [`UsageError`]: if a folder holds a run with other settings, or a run ended because its input is wrong.
    """
    for run in runs:
        _check_settings(run)
    free: list[str | None] = list(devices) or [None] * jobs
    waiting = [run for run in runs if finished_state(run) is None]
    total, done, started = len(waiting), 0, time.monotonic()
    if total < len(runs):
        report(f"{len(runs) - total} of {len(runs)} runs are already finished.")
    active: list[_Process] = []
    try:
        while waiting or active:
            while waiting and free:
                active.append(_Process(waiting.pop(0), free.pop(0)))
            time.sleep(POLL_SECONDS)
            if watch is not None:
                watch(Progress(done, total, time.monotonic() - started, [_part_of(process.run) for process in active]))
            for process in [process for process in active if process.has_ended()]:
                active.remove(process)
                free.append(process.device)
                done += 1
                left = (time.monotonic() - started) / done * (total - done)
                rest = f", about {duration(left)} left" if done < total else ""
                report(f"[{done}/{total}{rest}] {process.run.label}: {process.conclude()}")
    finally:
        for process in active:
            process.stop()
    return [outcome_of(run) for run in runs]


def finished_state(run: Run) -> dict[str, Any] | None:
    """Content of `trainer_state.json`, which a run writes when all its steps are done; `None` before that."""
    record = _read_record(run)
    if record.get("settings") != run.settings or record.get("exit_code"):
        return None
    try:
        state = json.loads((run.folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and state.get("log_history") else None


def outcome_of(run: Run) -> Outcome:
    """How `run` ended, from what is in its folder."""
    record, state = _read_record(run), finished_state(run)
    if state is not None:
        return Outcome(run, state, seconds=record.get("seconds"))
    code = record.get("exit_code")
    ending = "was not trained" if code is None else f"ended with status {code}"
    if code == 0:
        ending = "ended without a trainer_state.json"
    return Outcome(run, None, f"{ending}: {_last_line(run)}".removesuffix(": "), record.get("seconds"))


class _Process:
    """A run's process: a new one, or the one that a comparison left behind when it was killed."""

    def __init__(self, run: Run, device: str | None):
        self.run, self.device = run, device
        self.started = time.monotonic()
        self.left_behind = _process_left_behind(run)
        self.child: subprocess.Popen | None = None
        if self.left_behind is not None:
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "trainer_state.json").unlink(missing_ok=True)
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with (run.folder / LOG).open("ab") as log:
            self.child = subprocess.Popen(
                run.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        _write_record(run, pid=self.child.pid)

    def has_ended(self) -> bool:
        if self.child is not None:
            return self.child.poll() is not None
        try:
            return not self.left_behind.is_running() or self.left_behind.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:  # it ended between the two questions
            return True

    def conclude(self) -> str:
        """Record how the run ended, and say it in a few words."""
        if self.child is None:
            return "finished by an earlier comparison" if finished_state(self.run) else "left unfinished"
        seconds = time.monotonic() - self.started
        _write_record(self.run, exit_code=self.child.returncode, seconds=round(seconds, 1))
        outcome = outcome_of(self.run)
        if self.child.returncode == USAGE_STATUS:
            raise UsageError(f"{self.run.label}: {_last_line(self.run)}")
        return f"{seconds:.0f} s" if not outcome.failure else f"FAILED after {seconds:.0f} s, {outcome.failure}"

    def stop(self) -> None:
        if self.child is None or self.child.poll() is not None:
            return
        # `accelerate launch` does not always end what it started.
        process = psutil.Process(self.child.pid)
        family = [*process.children(recursive=True), process]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for member in alive:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self.child.wait()


def _process_left_behind(run: Run) -> psutil.Process | None:
    """The process that still trains `run` although the comparison that started it is gone."""
    pid = _read_record(run).get("pid")
    if pid is None:
        return None
    try:
        process = psutil.Process(pid)
        # Process ids are used again: the same id must also run the same command.
        same = process.status() != psutil.STATUS_ZOMBIE and process.cmdline()[1:] == list(run.command[1:])
    except psutil.Error:
        return None
    return process if same else None


def _check_settings(run: Run) -> None:
    recorded = _read_record(run).get("settings")
    if recorded is None or recorded == run.settings:
        return
    changed = sorted(
        key for key in recorded.keys() | run.settings.keys() if recorded.get(key) != run.settings.get(key)
    )
    details = ", ".join(f"`{key}` {recorded.get(key)!r} -> {run.settings.get(key)!r}" for key in changed)
    raise UsageError(
        f"'{run.folder}' holds a run with other settings ({details}). Give the comparison another --output, or remove "
        "that folder."
    )


def _read_record(run: Run) -> dict[str, Any]:
    try:
        record = json.loads((run.folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_record(run: Run, **entries: Any) -> None:
    record = {"command": shlex.join(mask_secrets(run.command)), "settings": run.settings, **entries}
    temporary = run.folder / f"{RECORD}.part"
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(run.folder / RECORD)


def _part_of(run: Run) -> tuple[str, int, int]:
    """Label, step and number of steps of a run, from the last line of progress in its log."""
    try:
        with (run.folder / LOG).open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(log.tell() - LOG_TAIL, 0))
            found = STEP.findall(log.read())
    except OSError:
        found = []
    return (run.label, int(found[-1][0]), int(found[-1][1])) if found else (run.label, 0, 0)


def _last_line(run: Run) -> str:
    try:
        text = (run.folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
