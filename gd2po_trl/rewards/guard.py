"""A guard around reward functions: whatever they do wrong becomes one error that names the function."""

import asyncio
import functools
import inspect
import threading
import traceback
from collections.abc import Callable, Collection
from typing import Any

import torch


class RewardError(RuntimeError):
    """A reward function raised, hung, or returned something that is not one number or `None` per completion."""


def check_rewards(values: Any, expected: int, name: str) -> list[float | None]:
    """
    The rewards that the function `name` returned, as a list of `expected` numbers or `None`.

    Raises:
        [`RewardError`]: if they are no sequence, have another length, or hold something else than numbers and `None`.
    """
    if isinstance(values, torch.Tensor) or hasattr(values, "tolist"):
        values = values.tolist()
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
        if value is not None:
            if isinstance(value, (str, bytes)):
                raise _not_a_number(name, index, value)
            try:
                value = float(value)
            except (TypeError, ValueError, OverflowError, RuntimeError):
                raise _not_a_number(name, index, value) from None
        rewards.append(value)
    return rewards


def _not_a_number(name: str, index: int, value: Any) -> RewardError:
    return RewardError(
        f"The reward function '{name}' returned {str(value)[:80]!r} ({type(value).__name__}) for completion {index}; "
        "a reward must be a number or None."
    )


def required_arguments(reward_func: Callable, given: Collection[str]) -> list[str]:
    """The arguments that `reward_func` cannot do without, beside those that are `given`: columns of the data."""
    try:
        parameters = inspect.signature(reward_func).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return []
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in given
    ]


class RewardGuard:
    """
    Wraps reward functions for one trainer.

    On several processes a failing function would leave the other processes waiting in a collective. There the failure
    is kept, the function's rewards become NaN, and [`~RewardGuard.raise_failures`] ends all processes together.

    Args:
        timeout (`float` or `None`):
            Seconds that a call may take.
        defer (`bool`):
            Whether to keep failures for `raise_failures` instead of raising them.
    """

    def __init__(self, timeout: float | None = None, defer: bool = False):
        self.timeout = timeout
        self.defer = defer
        self._failures: list[str] = []

    def wrap(self, reward_func: Callable, name: str) -> Callable:
        """`reward_func`, sync or async, under guard; TRL calls it with keyword arguments and `prompts` among them."""
        unwrapped: Any = reward_func
        while isinstance(unwrapped, functools.partial):
            unwrapped = unwrapped.func
        is_async = inspect.iscoroutinefunction(unwrapped) or inspect.iscoroutinefunction(unwrapped.__call__)

        async def awaited(*, prompts: list, **kwargs: Any) -> list[float | None]:
            try:
                call = asyncio.ensure_future(reward_func(prompts=prompts, **kwargs))
                done, _ = await asyncio.wait([call], timeout=self.timeout)
                if not done:
                    call.cancel()
                    raise _TimeIsUp
                return check_rewards(call.result(), len(prompts), name)
            except Exception as error:
                return self._fail(self._describe(error, name), len(prompts), error)

        def called(*, prompts: list, **kwargs: Any) -> list[float | None]:
            try:
                call = functools.partial(reward_func, prompts=prompts, **kwargs)
                values = call() if self.timeout is None else _call_with_timeout(call, self.timeout)
                return check_rewards(values, len(prompts), name)
            except Exception as error:
                return self._fail(self._describe(error, name), len(prompts), error)

        guarded: Any = awaited if is_async else called
        guarded.__name__ = name
        guarded.__wrapped__ = reward_func
        return guarded

    def raise_failures(self, gather_object: Callable[[list], list]) -> None:
        """End every process with the failures of all, if there are any. A collective call."""
        failures = gather_object(self._failures)
        self._failures = []
        if failures:
            raise RewardError("\n".join(failures))

    def _describe(self, error: Exception, name: str) -> str:
        if isinstance(error, RewardError):
            return str(error)
        if isinstance(error, _TimeIsUp):
            return (
                f"The reward function '{name}' did not return within reward_timeout={self.timeout} seconds. Make it "
                "faster, or raise `reward_timeout`."
            )
        return (
            f"The reward function '{name}' raised {type(error).__name__}: {error}. A reward function must return None "
            "for a completion that it cannot score."
        )

    def _fail(self, message: str, num_completions: int, error: Exception) -> list[float | None]:
        if not self.defer:
            raise RewardError(message) from error
        self._failures.append(f"{message}\n{''.join(traceback.format_exception(error))}")
        return [None] * num_completions


class _TimeIsUp(Exception):
    """Ours, to tell it from a `TimeoutError` of the reward function's own."""


def _call_with_timeout(call: Callable[[], Any], timeout: float) -> Any:
    outcome: dict[str, Any] = {}
    # A thread starts on the first device, which on several processes is not this one's.
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            outcome["value"] = call()
        except Exception as error:
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
