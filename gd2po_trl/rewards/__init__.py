"""Reward functions: what the names in a recipe stand for."""

import difflib
import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UsageError


# Short name -> module and builder. A builder takes the keyword arguments of a recipe and returns a reward function.
BUILT_IN: dict[str, tuple[str, str]] = {
    "correctness": ("tool_calling", "Correctness"),
    "format": ("tool_calling", "Format"),
    "length": ("tool_calling", "Length"),
    "reward_model": ("preference", "RewardModel"),
    "remote_scorer": ("remote", "RemoteScorer"),
    "text_scorer": ("text_scorers", "TextScorer"),
}

# What a reward may have beside its call: `load()` reads weights or reaches a server, `unload()` gives the memory back,
# `check_data(dataset, what)` finds rows that it could not score. All three are called before or between the calls.
OPTIONAL_METHODS = ("load", "unload", "check_data")

_DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def resolve_reward(label: str, kwargs: dict[str, Any] | None = None) -> Callable | str:
    """
    The reward that a recipe calls `label`.

    Args:
        label (`str`):
            Name under which the reward is logged.
        kwargs (`dict`, *optional*):
            Keyword arguments. `type` says what the label stands for, and defaults to the label itself: a built-in
            short name, the dotted path of a function or class, or the folder or Hub id of a sequence classifier with
            one label.

    Returns:
        A reward function named `label`, or, for a sequence classifier, its id, which TRL loads.

    Raises:
        [`UsageError`]: if there is no such reward, it does not take these keyword arguments, or the model is no
            sequence classifier with one label.
    """
    kwargs = dict(kwargs or {})
    kind = kwargs.pop("type", label)
    if not isinstance(kind, str):
        raise UsageError(f"`type` of the reward '{label}' is {kind!r}; it must be a name.")
    if kind in BUILT_IN:
        module, name = BUILT_IN[kind]
        builder = getattr(import_module(f".{module}", __name__), name)
        if "name" in inspect.signature(builder).parameters:
            # Reward models name themselves in their errors.
            kwargs.setdefault("name", label)
        return _named(_build(builder, label, kwargs), label)
    is_folder = kind != "" and Path(kind).expanduser().is_dir()
    if is_folder or kind.count("/") == 1:
        if kwargs:
            raise UsageError(
                f"The reward '{label}' is a sequence classifier that TRL loads, without keyword arguments. For "
                f"{', '.join(kwargs)} use `type: reward_model` with `model: {kind}`."
            )
        return _checked_classifier(str(Path(kind).expanduser()) if is_folder else kind, label)
    if _DOTTED_PATH.fullmatch(kind):
        target = _import(kind, label)
        if inspect.isclass(target) or kwargs:
            target = _build(target, label, kwargs)
        return _named(target, label)
    close = difflib.get_close_matches(kind, BUILT_IN, n=1)
    raise UsageError(
        f"Unknown reward '{kind}'.{f' Did you mean {close[0]!r}?' if close else ''} A reward is one of "
        f"{', '.join(BUILT_IN)}, a dotted path such as my_rewards.brevity, or the folder or Hub id of a reward model."
    )


def _checked_classifier(model: str, label: str) -> str:
    """`model`, once its config says that TRL would find a trained head in it. Else TRL gives it a random one."""
    from .preference import trl_scores_another_token
    from .score_model import is_classifier, read_config

    try:
        config = read_config(model)
    except UsageError as error:
        raise UsageError(f"The reward '{label}': {error}") from error
    if not is_classifier(config):
        raise UsageError(
            f"The reward '{label}' is {model}, which is no sequence classifier but {config.architectures}: TRL would "
            f"give it a random head. A model with a score head is `{{type: reward_model, model: {model}}}`."
        )
    if trl_scores_another_token(model, config):
        warnings.warn(
            f"The reward '{label}' ({model}) is loaded by TRL, which takes the last token of its chat template for "
            "padding and scores the one before, unlike plain use of the checkpoint. As the checkpoint does it: "
            f"`{{type: reward_model, model: {model}}}`.",
            stacklevel=2,
        )
    return model


def _import(path: str, label: str) -> Any:
    module_name, _, attribute = path.rpartition(".")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        # As with `python -m`, a module beside the recipe can be named.
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the module does while it is imported, `exit()` included
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise UsageError(
            f"The reward '{label}' is {path}, and importing {module_name} failed: {kind}{_one_line(error)}."
        ) from error
    target = getattr(module, attribute, None)
    if target is None:
        raise UsageError(f"The reward '{label}' is {path}, but {module_name} has no `{attribute}`.")
    if not callable(target):
        raise UsageError(f"The reward '{label}' is {path}, which is not a function or class.")
    return target


def _build(target: Any, label: str, kwargs: dict[str, Any]) -> Callable:
    """An instance of a class, or a function with its keyword arguments bound."""
    try:
        signature = inspect.signature(target)
        signature.bind(**kwargs) if inspect.isclass(target) else signature.bind_partial(**kwargs)
    except TypeError as error:
        raise UsageError(f"The reward '{label}' does not take these keyword arguments: {error}.") from error
    except ValueError:  # some builtins have no signature
        pass
    if not inspect.isclass(target):
        return functools.partial(target, **kwargs)
    try:
        instance: Any = target(**kwargs)
    except (UsageError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever the class does
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UsageError(f"The reward '{label}': {kind}{_one_line(error)}") from error
    if not callable(instance):
        raise UsageError(f"The reward '{label}' is a {target.__name__}, which has no `__call__` to score with.")
    return instance


def load_reward(reward_func: Any) -> None:
    """
    Have a reward load what it needs, if it has a method `load` for that, so that what is missing shows at once.

    Raises:
        [`UsageError`]: if that fails.
    """
    load = getattr(reward_func, "load", None)
    if load is None or any(
        parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        for parameter in inspect.signature(load).parameters.values()
    ):  # a `load(path)` of its own is something else
        return
    label = getattr(reward_func, "__name__", type(reward_func).__name__)
    try:
        load()
    except UsageError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise UsageError(f"The reward '{label}' cannot be loaded: {kind}{_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "it says nothing"


def _named(reward_func: Callable, label: str) -> Callable:
    """`reward_func` under the name `label`, by which TRL logs it."""
    if getattr(reward_func, "__name__", None) == label:
        return reward_func
    unbound: Any = reward_func.func if isinstance(reward_func, functools.partial) else reward_func

    async def awaited(**kwargs: Any) -> list[float | None]:
        return await reward_func(**kwargs)

    def called(**kwargs: Any) -> list[float | None]:
        return reward_func(**kwargs)

    is_async = inspect.iscoroutinefunction(unbound) or inspect.iscoroutinefunction(unbound.__call__)
    reward: Any = awaited if is_async else called
    reward.__name__ = reward.__qualname__ = label
    reward.__wrapped__ = reward_func
    # The trainer reads off the signature which dataset columns the reward needs.
    reward.__signature__ = inspect.signature(reward_func)
    for method in OPTIONAL_METHODS:
        if hasattr(unbound, method):
            setattr(reward, method, getattr(unbound, method))
    return reward
