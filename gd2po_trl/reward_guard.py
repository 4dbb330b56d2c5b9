"""A guard around reward functions: whatever they do wrong becomes one error that names the function."""

import asyncio
import functools
import inspect
import itertools
import os
import signal
import threading
import traceback
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .errors import RewardError, one_line
from .reward_parts import is_async, part_names
from .run_log import is_table_column


def own_frames(error: RewardError) -> str:
    """The frames of the reward function itself in what it raised, as a traceback shows them; empty without any."""
    cause = error.__cause__
    if cause is None or isinstance(cause, _TimeIsUp):
        return ""
    ours = {str(Path(__file__)), str(Path(__file__).with_name("__init__.py"))}
    around = (*ours, threading.__file__, asyncio.__path__[0], functools.__file__)
    frames = traceback.extract_tb(cause.__traceback__)
    own = list(itertools.dropwhile(lambda frame: frame.filename.startswith(around), frames))
    return "".join(traceback.format_list(own)).rstrip()


def check_rewards(values: Any, expected: int, name: str) -> list[float | None]:
    """
    The rewards that the function `name` returned, as a list of `expected` numbers or `None`.

    Raises:
        [`RewardError`]: if they are no sequence, have another length, or hold something else than numbers and `None`.
    """
    if isinstance(values, torch.Tensor) or hasattr(values, "tolist"):
        values = values.tolist()
    items = values if isinstance(values, (list, tuple)) else [values]
    mapping = next((item for item in items if isinstance(item, Mapping)), None)
    if mapping is not None:
        raise RewardError(
            f"The reward function '{name}' returned a mapping and does not declare its parts: set `reward_names = "
            f"{list(map(str, mapping))}` on the function or its class (in a recipe: `reward_names` under the reward's "
            "label in `reward_kwargs`), and each becomes a reward of its own."
        )
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f"The reward function '{name}' returned {type(values).__name__}; it must return a list with one number or "
            "None per completion."
        )
    if len(values) != expected:
        raise RewardError(
            f"The reward function '{name}' returned {len(values)} rewards for {expected} completions; it must return "
            "one per completion, None for a completion that it does not score."
        )
    rewards = []
    for index, value in enumerate(values):
        try:
            rewards.append(None if value is None else _as_number(value))
        except _NOT_A_NUMBER:
            raise RewardError(
                f"The reward function '{name}' returned {str(value)[:80]!r} ({type(value).__name__}) for completion "
                f"{index}; a reward must be a number or None."
            ) from None
    return rewards


def check_parts(values: Any, expected: int, name: str, names: Sequence[str]) -> dict[str, list[float | None]]:
    """
    The rewards of each part that the function `name` returned: a mapping of names to lists, or a list with a mapping
    per completion. `None` in place of a list or a mapping leaves all of it unscored.

    Raises:
        [`RewardError`]: if it is neither, a name is missing or was not declared, or as [`check_rewards`].
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    rows = values if isinstance(values, (list, tuple)) else [values]
    start = f"The reward function '{name}' declares the parts {', '.join(names)} and returned"
    for row in rows:
        if not isinstance(row, Mapping) and (row is not None or rows is not values):
            where = "a list with " if rows is values else ""
            raise RewardError(
                f"{start} {where}{type(row).__name__}; it must return a mapping of these names to lists, or a list "
                "with one mapping per completion."
            )
        if row is not None and set(row) != set(names):
            absent, other = set(names) - set(row), set(row) - set(names)
            problem = f"{'without' if absent else 'with'} {', '.join(sorted(map(str, absent or other)))}"
            raise RewardError(
                f"{start} a mapping {problem}. Every name that is declared has to be there, None where it is not "
                "scored, and no other."
            )
    if isinstance(values, Mapping):
        columns = {part: [None] * expected if values[part] is None else values[part] for part in names}
    else:
        columns = {part: [None if row is None else row[part] for row in rows] for part in names}
    return {part: check_rewards(column, expected, f"{name}: {part}") for part, column in columns.items()}


_NOT_A_NUMBER = (TypeError, ValueError, OverflowError, RuntimeError)


def _as_number(value: Any) -> float:
    if isinstance(value, (str, bytes)):
        raise TypeError
    return float(value)


def name_of(reward_func: Any) -> str:
    """The name under which a reward function is logged."""
    while isinstance(reward_func, functools.partial):
        reward_func = reward_func.func
    return getattr(reward_func, "__name__", type(reward_func).__name__)


def required_arguments(reward_func: Callable, given: Collection[str]) -> list[str]:
    """The arguments that `reward_func` cannot do without, beside those that are `given`: columns of the data."""
    return [
        parameter.name
        for parameter in _parameters(reward_func)
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in given
    ]


def refused_arguments(reward_func: Callable, given: Collection[str]) -> list[str]:
    """Those of the arguments `given` that `reward_func` cannot take by name."""
    parameters = _parameters(reward_func)
    if not parameters:
        return []
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    by_name = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
    by_place = {
        parameter.name
        for parameter in parameters
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty
    }
    return [name for name in given if name in by_place or not (takes_all or name in by_name)]


def _parameters(reward_func: Callable) -> list[inspect.Parameter]:
    try:
        # Of the function itself: a decorator may add or drop arguments before the function that it wraps is called.
        return list(inspect.signature(reward_func, follow_wrapped=False).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature
        return []


class RewardGuard:
    """
    Wraps reward functions for one trainer.

    On several processes a failing function would leave the other processes waiting in a collective. There the failure
    is kept, the function's rewards become NaN, and [`~RewardGuard.raise_failures`] ends all processes together.

    Whatever a function lets out counts as its failure, also what Python means for the program's end (`SystemExit` of a
    script that it runs, `KeyboardInterrupt`, `CancelledError`); a Ctrl-C of the user's interrupts as ever.

    Args:
        timeout (`float`, *optional*): Seconds that a call may take.
        defer (`bool`, defaults to `False`): Whether to keep failures for `raise_failures` instead of raising them.
        prefill (`Callable`, *optional*): Gives per prompt the start of the assistant's turn that the prompt holds
            already. Functions with a parameter `prefill` are given it, unless the data has a column of that name.
    """

    def __init__(
        self, timeout: float | None = None, defer: bool = False, prefill: Callable[[list], list[str]] | None = None
    ):
        self.timeout, self.defer, self.prefill = timeout, defer, prefill
        self._failures: list[str] = []
        self._names: set[str] = set()

    def wrap_all(self, reward_funcs: Sequence[Any], names: Sequence[str]) -> list[Any]:
        """The rewards of a trainer under guard: a function with parts once, reward models not at all."""
        for call in {func.shared_call for func in reward_funcs if hasattr(func, "shared_call")}:
            call.func = self.wrap(call.func, name_of(call.func))
        return [
            func if isinstance(func, torch.nn.Module) or hasattr(func, "shared_call") else self.wrap(func, name)
            for func, name in zip(reward_funcs, names, strict=True)
        ]

    def wrap(self, reward_func: Callable, name: str) -> Callable:
        """
        `reward_func`, sync or async, under guard; TRL calls it with keyword arguments and `prompts` among them.

        Of a function that declares `reward_names` it is a mapping of these names to lists that is returned.
        """
        parts = part_names(reward_func)
        self._names.update(parts or [name])

        def checked(values: Any, count: int) -> Any:
            return check_rewards(values, count, name) if parts is None else check_parts(values, count, name, parts)

        def failed(error: Exception, count: int) -> Any:
            nothing = self._fail(self._describe(error, name), count, error)
            return nothing if parts is None else dict.fromkeys(parts, nothing)

        async def awaited(*, prompts: list, **kwargs: Any) -> Any:
            try:
                call = self._bound(reward_func, name, prompts=prompts, **kwargs)
                return checked(await self._result_of(call, "environments" in kwargs), len(prompts))
            except Exception as error:
                return failed(error, len(prompts))

        def called(*, prompts: list, **kwargs: Any) -> Any:
            try:
                call = self._bound(reward_func, name, prompts=prompts, **kwargs)
                with _directory_kept(), _leaving_caught():
                    values = call() if self.timeout is None else _call_with_timeout(call, self.timeout)
                return checked(values, len(prompts))
            except Exception as error:
                return failed(error, len(prompts))

        guarded: Any = awaited if is_async(reward_func) else called
        guarded.__name__ = name
        guarded.__wrapped__ = reward_func
        return guarded

    def score(self, reward_func: Callable, name: str, **arguments: Any) -> dict[str, list[float | None]]:
        """One call of `reward_func`, sync or async, outside a training: its rewards by its name, or by part."""
        result = self.wrap(reward_func, name)(**arguments)
        result = asyncio.run(result) if inspect.iscoroutine(result) else result
        return result if isinstance(result, dict) else {name: result}

    def raise_failures(self, gather_object: Callable[[list], list]) -> None:
        """End every process with the failures of all, if there are any. A collective call."""
        failures = gather_object(self._failures)
        self._failures = []
        if failures:
            raise RewardError("\n".join(failures))

    def _bound(self, reward_func: Callable, name: str, **arguments: Any) -> Callable[[], Any]:
        """The call of `reward_func` with `arguments`, which it must be able to take."""
        takes_prefill = any(parameter.name == "prefill" for parameter in _parameters(reward_func))
        if self.prefill is not None and "prefill" not in arguments and takes_prefill:
            arguments["prefill"] = self.prefill(arguments["prompts"])
        if refused := refused_arguments(reward_func, arguments):
            raise RewardError(takes_no_kwargs(name, refused))
        if missing := required_arguments(reward_func, arguments):
            raise RewardError(
                f"The reward function '{name}' needs {', '.join(f'`{column}`' for column in missing)}, which the data "
                f"does not have (it was given: {', '.join(arguments)}). Add the column, or give the parameter a "
                "default."
            )
        if "log_extra" in arguments:
            count = len(arguments["prompts"])
            arguments["log_extra"] = _checked_log_extra(arguments["log_extra"], name, count, self._names)
        if "log_metric" in arguments:
            arguments["log_metric"] = _checked_log_metric(arguments["log_metric"], name)
        # A function that empties a list or edits a message must not change what the others and the log see.
        return functools.partial(reward_func, **{key: _copied(value) for key, value in arguments.items()})

    async def _result_of(self, call: Callable[[], Coroutine], stays_here: bool) -> Any:
        coroutine = _left_as_error(call)
        if stays_here:
            # What an environment's tools have opened belongs to the loop that they ran in.
            task: asyncio.Future = asyncio.ensure_future(coroutine)
        else:
            task = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, _own_loop()))
        done, _ = await asyncio.wait([task], timeout=self.timeout)
        if not done:
            task.cancel()
            raise _TimeIsUp
        if task.cancelled():
            raise _Left(asyncio.CancelledError())
        return task.result()

    def _describe(self, error: Exception, name: str) -> str:
        if isinstance(error, RewardError):
            return str(error)
        if isinstance(error, _TimeIsUp):
            return (
                f"The reward function '{name}' did not return within reward_timeout={self.timeout} seconds. Make it "
                "faster, or raise `reward_timeout`."
            )
        if isinstance(error, _Left):
            kind, text = type(error.reason).__name__, one_line(error.reason)
            hint = " by `exit()`, perhaps in code that it executes" if isinstance(error.reason, SystemExit) else ""
            return (
                f"The reward function '{name}' raised {kind}{f': {text}' if text else ''}{hint}, which would have "
                f"ended the run. Catch {kind} in the function and return None, or run foreign code in its own process."
            )
        remedy = "A reward function must return None for a completion that it cannot score."
        if isinstance(error, TypeError):
            remedy = "It must take every argument that it is given by name, and return None where it cannot score."
        text = one_line(error).rstrip(".")
        return f"The reward function '{name}' raised {type(error).__name__}{f': {text}' if text else ''}. {remedy}"

    def _fail(self, message: str, num_completions: int, error: Exception) -> list[float | None]:
        cause = error.reason if isinstance(error, _Left) else error
        if not self.defer:
            raise RewardError(message) from cause
        self._failures.append(f"{message}\n{''.join(traceback.format_exception(cause))}")
        return [None] * num_completions


class _TimeIsUp(Exception):
    """Ours, to tell it from a `TimeoutError` of the reward function's own."""


class _Left(Exception):
    """A reward function let out what is no `Exception`: `SystemExit`, `KeyboardInterrupt`, `CancelledError`, ..."""

    def __init__(self, reason: BaseException):
        super().__init__(reason)
        self.reason = reason


def _copied(value: Any) -> Any:
    """Lists and the messages in them, copied; what they hold beside is shared."""
    if isinstance(value, list):
        is_deep = bool(value) and isinstance(value[0], (list, dict))
        return [_copied(item) for item in value] if is_deep else list(value)
    return dict(value) if isinstance(value, dict) else value


def takes_no_kwargs(name: str, refused: Collection[str]) -> str:
    """What to say of a reward function that has no parameter for some of its arguments."""
    return (
        f"The reward function '{name}' cannot take {', '.join(refused)}, which every reward function is given by "
        "name. Let it take the arguments that it does not use, as in `(prompts, completions, **kwargs)`."
    )


def _checked_log_extra(log_extra: Callable, name: str, count: int, reward_names: Collection[str]) -> Callable:
    """TRL's `log_extra`, which takes anything, and whose table then cannot be written."""

    def checked(column: str, values: Any) -> None:
        taken = not isinstance(column, str) or is_table_column(column) or column in reward_names
        if taken:
            raise RewardError(
                f"The reward function '{name}' logs a column {column!r} with `log_extra`, a name that the completions "
                "table has already; take another."
            )
        try:
            if isinstance(values, (str, bytes)):
                raise TypeError
            values = list(values.tolist() if hasattr(values, "tolist") else values)
        except TypeError:
            raise RewardError(
                f"The reward function '{name}' gives `log_extra` {type(values).__name__} for the column {column!r}; "
                "it takes a list with one value per completion."
            ) from None
        if len(values) != count:
            raise RewardError(
                f"The reward function '{name}' gives `log_extra` {len(values)} values of the column {column!r} for "
                f"{count} completions; it takes one per completion, None where there is none."
            )
        log_extra(column, values)

    return checked


def _checked_log_metric(log_metric: Callable, name: str) -> Callable:
    """TRL's `log_metric`, which takes anything, and then cannot average it."""

    def checked(metric: str, value: Any) -> None:
        try:
            value = _as_number(value if isinstance(metric, str) else "")
        except _NOT_A_NUMBER:
            raise RewardError(
                f"The reward function '{name}' gives `log_metric` {str(value)[:80]!r} ({type(value).__name__}) for "
                f"{metric!r}; it takes a name and one number."
            ) from None
        log_metric(metric, value)

    return checked


@contextmanager
def _leaving_caught() -> Iterator[None]:
    """
    Turn what is no `Exception` into [`_Left`], but let a Ctrl-C of the user's through, also one that was swallowed.

    A Ctrl-C differs from a `raise KeyboardInterrupt` in the signal before it, and only the main thread gets signals.
    """
    pressed: list[BaseException] = []
    before: Any = None
    if threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGINT)

    def handle(signal_number: int, frame: Any) -> None:
        try:
            before(signal_number, frame)
        except BaseException as error:
            pressed.append(error)
            raise

    watches = callable(before)
    if watches:
        signal.signal(signal.SIGINT, handle)
    try:
        yield
    except Exception:
        if not pressed:
            raise
    except BaseException as error:
        if not pressed:
            raise _Left(error) from error
    finally:
        if watches and signal.getsignal(signal.SIGINT) is handle:
            signal.signal(signal.SIGINT, before)
    if pressed:
        raise pressed[0]


@contextmanager
def _directory_kept() -> Iterator[None]:
    """Go back to the working directory that the run writes its files from, if a function leaves another behind."""
    before = os.getcwd()
    try:
        yield
    finally:
        try:
            stayed = os.getcwd() == before
        except FileNotFoundError:  # it was removed, such as a temporary folder
            stayed = False
        if not stayed:
            os.chdir(before)


async def _left_as_error(call: Callable[[], Coroutine]) -> Any:
    """Await `call()`; what is no `Exception` would end the event loop, and whoever waits for it would wait forever."""
    try:
        return await call()
    except Exception:
        raise
    except BaseException as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise  # from outside, as where the time is up
        raise _Left(error) from error


_loop: asyncio.AbstractEventLoop | None = None
_loop_lock = threading.Lock()


def _own_loop() -> asyncio.AbstractEventLoop:
    """
    The event loop of all async reward functions, in a thread of its own.

    Apart from the trainer's, so that a function that blocks its loop runs into `reward_timeout`, and one that leaves
    by way of a task of its own (`asyncio.gather` over scripts, of which one calls `exit()`) does not end it.
    """
    global _loop
    with _loop_lock:
        if _loop is None or _loop.is_closed():
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_run_forever, args=(_loop,), name="rewards", daemon=True).start()
        return _loop


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        try:
            loop.run_forever()
            return
        except BaseException:  # a task left; who awaits it is told, once the loop goes on
            continue


def _call_with_timeout(call: Callable[[], Any], timeout: float) -> Any:
    outcome: dict[str, Any] = {}
    # A thread starts on the first device, which on several processes is not this one's.
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            outcome["value"] = call()
        except BaseException as error:
            outcome["error"] = error

    # A daemon, since Python cannot end a thread and a hanging one must not keep the process alive.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise _TimeIsUp
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
