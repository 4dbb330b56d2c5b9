"""Training runs as processes of their own: started, watched, recognized when they are already done."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

from ..errors import UsageError
from ..run_log import STATE_FILE, read_state
from ..terminal import duration
from .variants import Variant, mask_secrets


RECORD = "run.json"
LOG = "train.log"
POLL_SECONDS = 0.25
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
        settings (`dict`): All settings of its recipe that determine the result; JSON types.
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
    watch: Callable[[int, int, list[tuple[str, int, int]]], None] | None = None,
) -> list[Outcome]:
    """
    Train every run that is not finished yet.

    Args:
        runs (sequence of [`Run`]): What to train. A failed run is tried again.
        jobs (`int`): How many runs to train at the same time.
        devices (sequence of `str`): CUDA device ids. If given, each has one run at a time, and `jobs` is not used.
        report (callable): Called with one line about every run.
        watch (callable): Called several times a second with how many runs have ended, of how many, and the label, step
            and number of steps of every run at work; 0 where a run has not said them yet.

    Raises:
        [`UsageError`]: if a folder holds a run with other settings, or a run ended because its input is wrong.
    """
    for run in runs:
        _check_settings(run)
    waiting = [run for run in runs if finished_state(run) is None]
    if len(waiting) < len(runs):
        report(f"{len(runs) - len(waiting)} of {len(runs)} runs are already finished.")
    workers, started, done = _Workers(devices or [None] * jobs), time.monotonic(), 0
    try:
        pending = {workers.submit(run) for run in waiting}
        while pending:
            ended, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
            for line in [future.result() for future in ended]:
                done += 1
                left = (time.monotonic() - started) / done * (len(waiting) - done)
                rest = f", about {duration(left)} left" if done < len(waiting) else ""
                report(f"[{done}/{len(waiting)}{rest}] {line}")
            if watch is not None:
                watch(done, len(waiting), [(run.label, *_step(run)) for run, _ in list(workers.active.values())])
    finally:
        workers.stop()
    return [outcome_of(run) for run in runs]


class _Workers:
    """One thread per device, each waiting for one training process at a time."""

    def __init__(self, devices: Sequence[str | None]):
        self.active: dict[Path, tuple[Run, subprocess.Popen]] = {}
        self._free: SimpleQueue = SimpleQueue()
        for device in devices:
            self._free.put(device)
        self._pool = ThreadPoolExecutor(len(devices))
        self._lock, self._stopped = Lock(), False

    def submit(self, run: Run) -> "Future[str]":
        return self._pool.submit(self._train, run)

    def _train(self, run: Run) -> str:
        """Train `run`, record how it ended, and say it in a few words."""
        device, started = self._free.get(), time.monotonic()
        try:
            with self._lock:
                if self._stopped:
                    return ""
                child = _start(run, device)
                self.active[run.folder] = run, child
            code = child.wait()
            seconds = time.monotonic() - started
            with self._lock:
                del self.active[run.folder]
                if self._stopped:
                    return ""
                self._stopped = code == USAGE_STATUS
            _write_record(run, exit_code=code, seconds=round(seconds, 1))
        finally:
            self._free.put(device)
        if code == USAGE_STATUS:
            raise UsageError(f"{run.label}: {_last_line(run)}")
        failure = outcome_of(run).failure
        return f"{run.label}: " + (f"FAILED after {seconds:.0f} s, {failure}" if failure else f"{seconds:.0f} s")

    def stop(self) -> None:
        """End the processes that still train; no further one starts."""
        import psutil

        with self._lock:
            self._stopped = True
            family = []
            for _, child in self.active.values():
                with suppress(psutil.NoSuchProcess):
                    # `accelerate launch` does not always end what it started.
                    process = psutil.Process(child.pid)
                    family += [*process.children(recursive=True), process]
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    end(process)
            _, family = psutil.wait_procs(family, timeout=20)
        self._pool.shutdown(cancel_futures=True)


def _start(run: Run, device: str | None) -> subprocess.Popen:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / STATE_FILE).unlink(missing_ok=True)
    _write_record(run)
    environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    with (run.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            run.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def finished_state(run: Run) -> dict[str, Any] | None:
    """Content of `trainer_state.json`, which a run writes when all its steps are done; `None` before that."""
    record, state = _read_record(run), read_state(run.folder)
    is_ours = record.get("settings") == run.settings and not record.get("exit_code")
    return state if is_ours and state is not None and state["log_history"] else None


def outcome_of(run: Run) -> Outcome:
    """How `run` ended, from what is in its folder."""
    record, state = _read_record(run), finished_state(run)
    code, seconds = record.get("exit_code"), record.get("seconds")
    if state is not None:
        return Outcome(run, state, seconds=seconds)
    ending = {None: "was not trained", 0: f"ended without a {STATE_FILE}"}.get(code, f"ended with status {code}")
    return Outcome(run, None, f"{ending}: {_last_line(run)}".removesuffix(": "), seconds)


def _check_settings(run: Run) -> None:
    recorded = _read_record(run).get("settings", run.settings)
    keys = sorted(recorded.keys() | run.settings.keys())
    changed = [key for key in keys if recorded.get(key) != run.settings.get(key)]
    if changed:
        details = ", ".join(f"`{key}` {recorded.get(key)!r} -> {run.settings.get(key)!r}" for key in changed)
        raise UsageError(
            f"'{run.folder}' holds a run with other settings ({details}). Give the comparison another --output, or "
            "remove that folder."
        )


def _read_record(run: Run) -> dict[str, Any]:
    """What an earlier comparison wrote of `run`; empty where there is nothing or it is damaged."""
    try:
        content = json.loads((run.folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_record(run: Run, **entries: Any) -> None:
    record = {"command": shlex.join(mask_secrets(run.command)), "settings": run.settings, **entries}
    temporary = run.folder / f"{RECORD}.part"
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(run.folder / RECORD)


def _log_tail(run: Run) -> bytes:
    try:
        with (run.folder / LOG).open("rb") as log:
            log.seek(max(log.seek(0, os.SEEK_END) - LOG_TAIL, 0))
            return log.read()
    except OSError:
        return b""


def _step(run: Run) -> tuple[int, int]:
    """Step and number of steps of a run, from the last line of progress in its log."""
    found = STEP.findall(_log_tail(run))
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def _last_line(run: Run) -> str:
    lines = _log_tail(run).decode(errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
