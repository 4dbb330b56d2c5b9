"""Reward functions with several named parts: called once per batch, and one reward per name."""

import asyncio
import functools
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any


def part_names(reward_func: Any) -> list[str] | None:
    """
    The names of the parts that a reward function declares in its attribute `reward_names`; `None` without any.

    Raises:
        `ValueError`: if they are no list of different names.
    """
    names = getattr(reward_func, "reward_names", None)
    if names is None:
        return part_names(reward_func.func) if isinstance(reward_func, functools.partial) else None
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`reward_names` of a reward is {names!r}; it must be a list of names.")
    if len(set(names)) < len(names):
        raise ValueError(f"`reward_names` of a reward is {list(names)}, with a name twice; each part has its own.")
    return list(names)


def is_async(reward_func: Any) -> bool:
    """Whether a reward function has to be awaited."""
    while isinstance(reward_func, functools.partial):
        reward_func = reward_func.func
    return inspect.iscoroutinefunction(reward_func) or inspect.iscoroutinefunction(reward_func.__call__)


def expand_parts(reward_funcs: Sequence[Any]) -> list[Any]:
    """`reward_funcs` with one function per part in place of each function that declares `reward_names`."""
    expanded: list[Any] = []
    for reward_func in reward_funcs:
        names = part_names(reward_func)
        expanded += [reward_func] if names is None else SharedCall(reward_func, names).parts
    return expanded


def expand_environment_parts(trainer: Any, given: int, weights: Sequence[float] | None) -> None:
    """
    Split the one reward that TRL has for an environment's `get_reward`, where its class declares `reward_names`.

    Args:
        trainer (`GRPOTrainer`): Whose rewards are replaced in place.
        given (`int`): Rewards before those of environments.
        weights (sequence of `float` or `None`): `reward_weights`: of the first `given` rewards, or of all.

    Raises:
        `ValueError`: for another number of weights.
    """
    for index in reversed(range(given, len(trainer.reward_funcs))):
        reward_func, place = trainer.reward_funcs[index], slice(index, index + 1)
        parameter = inspect.signature(reward_func).parameters.get("_env_type")
        environment: Any = None if parameter is None else parameter.default
        names = part_names(environment)
        if names is not None:
            reward_func.__name__, reward_func.reward_names = environment.__name__, names
            trainer.reward_funcs[place] = SharedCall(reward_func, names).parts
            trainer.reward_func_names[place] = names
            trainer.reward_processing_classes[place] = [None] * len(names)
    count = len(trainer.reward_funcs)
    if weights is None or len(weights) == given:
        weights = [*trainer.reward_weights[:given].tolist(), *[1.0] * (count - given)]
    elif len(weights) != count:
        raise ValueError(
            f"`reward_weights` has {len(weights)} entries and there are {count} rewards "
            f"({', '.join(trainer.reward_func_names)}). Give one weight for each, in their order."
        )
    trainer.reward_weights = trainer.reward_weights.new_tensor(weights)


class SharedCall:
    """
    One call of a reward function for all of its parts.

    An outcome belongs to the list `completions` that it was computed from, the same for all functions of a batch, and
    serves each part once: a part that asks again has the function called again.

    Args:
        func (`Callable`): The function, sync or async. It has to return a mapping of names to lists.
        names (`list[str]`): Names of its parts.

    Attributes:
        parts (`list[Callable]`): A reward function per part, with its name, which holds this object as `shared_call`.
    """

    def __init__(self, func: Callable, names: list[str]):
        self.func, self.names = func, names
        self.parts = [self._part(name) for name in names]
        self._completions: Any = None
        self._outcome: Any = None
        self._waiting: set[str] = set()

    def _part(self, name: str) -> Callable:
        async def awaited(**arguments: Any) -> Any:
            return (await self._outcome_for(name, arguments, asyncio.ensure_future))[name]

        def called(**arguments: Any) -> Any:
            return self._outcome_for(name, arguments).result()[name]

        part: Any = awaited if is_async(self.func) else called
        part.__name__ = part.__qualname__ = name
        part.shared_call = self
        return part

    def _outcome_for(self, name: str, arguments: dict[str, Any], start: Callable | None = None) -> Any:
        if name not in self._waiting or self._completions is not arguments["completions"]:
            outcome = start(self.func(**arguments)) if start is not None else _outcome(self.func, arguments)
            self._outcome, self._completions, self._waiting = outcome, arguments["completions"], set(self.names)
        outcome = self._outcome
        self._waiting.remove(name)
        if not self._waiting:  # holds no batch longer than needed
            self._outcome = self._completions = None
        return outcome


def _outcome(func: Callable, arguments: dict[str, Any]) -> Future:
    """What `func` returned or raised, kept for all parts."""
    outcome: Future = Future()
    try:
        outcome.set_result(func(**arguments))
    except Exception as error:
        outcome.set_exception(error)
    return outcome
