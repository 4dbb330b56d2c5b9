"""Reward functions: what the names in a recipe stand for."""

import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UsageError, one_line
from ..reward_parts import is_async, part_names
from ..user_input import is_hub_id
from .user_code import build_object, import_object, is_dotted_path, path_of_file


# Short name -> module and builder. A builder takes the keyword arguments of a recipe and returns a reward function.
BUILT_IN: dict[str, tuple[str, str]] = {
    "correctness": ("gd2po_trl.tasks.tool_calling.rewards", "Correctness"),
    "format": ("gd2po_trl.tasks.tool_calling.rewards", "Format"),
    "length": ("gd2po_trl.tasks.tool_calling.rewards", "Length"),
    "reward_model": ("gd2po_trl.reward_models.in_process", "RewardModel"),
    "remote_scorer": ("gd2po_trl.reward_models.served", "RemoteScorer"),
    "text_scorer": ("gd2po_trl.reward_models.text_scorer", "TextScorer"),
}

# What a reward may have beside its call: `load()` reads weights or reaches a server, `unload()` gives the memory back,
# `check_data(dataset, what)` finds rows that it could not score. All three are called before or between the calls.
OPTIONAL_METHODS = ("load", "unload", "check_data")


def resolve_reward(label: str, kwargs: dict[str, Any] | None = None, *, beside: Path | None = None) -> Callable | str:
    """
    The reward that a recipe calls `label`.

    Args:
        label (`str`):
            Name under which the reward is logged.
        kwargs (`dict`, *optional*):
            Keyword arguments. `type` says what the label stands for, and defaults to the label itself: a built-in
            short name, the dotted path of a function or class, or the folder or Hub id of a sequence classifier with
            one label. `reward_names` lists the parts of a function that returns a mapping and does not declare them
            itself.
        beside (`Path`, *optional*):
            Folder of the recipe, for the message about a module that is not found.

    Returns:
        A reward function named `label`, or, for a sequence classifier, its id, which TRL loads.

    Raises:
        [`UsageError`]: if there is no such reward, it does not take these keyword arguments, or the model is no
            sequence classifier with one label.
    """
    kwargs = dict(kwargs or {})
    kind, names = kwargs.pop("type", label), kwargs.pop("reward_names", None)
    reward = _resolve(kind, label, kwargs, beside)
    try:
        if names is None:
            part_names(reward)
            return reward
        if isinstance(reward, str):
            raise ValueError("`reward_names` belongs to a function that returns a mapping, and this is a classifier.")
        reward = _named(reward, label, wrap=True)
        reward.reward_names = names
        part_names(reward)
    except ValueError as error:
        raise UsageError(f"The reward '{label}': {error}") from error
    return reward


def reward_names(labels: Sequence[str], kwargs: dict[str, dict[str, Any]], *, beside: Path | None = None) -> list[str]:
    """
    The names under which a recipe's rewards are logged: labels, and in place of a function with parts these.

    No model is loaded. A function of the user's own is imported where the recipe does not say its `reward_names`.

    Args:
        labels (sequence of `str`), kwargs (`dict`):
            The recipe's `reward_funcs` and `reward_kwargs`.
        beside (`Path`, *optional*):
            Folder of the recipe.

    Raises:
        [`UsageError`]: as [`resolve_reward`].
    """
    names: list[str] = []
    for label in labels:
        options = kwargs.get(label) or {}
        parts = options.get("reward_names")
        if parts is None and is_user_code(options.get("type", label)):
            parts = part_names(resolve_reward(label, options, beside=beside))
        names += parts or [label]
    return names


def is_user_code(kind: Any) -> bool:
    """Whether the `type` of a reward is the dotted path of a function or a class."""
    return isinstance(kind, str) and kind not in BUILT_IN and is_dotted_path(kind)


def _resolve(kind: Any, label: str, kwargs: dict[str, Any], beside: Path | None) -> Callable | str:
    if not isinstance(kind, str):
        raise UsageError(f"`type` of the reward '{label}' is {kind!r}; it must be a name.")
    if kind in BUILT_IN:
        module, name = BUILT_IN[kind]
        builder = getattr(import_module(module), name)
        if "name" in inspect.signature(builder).parameters:
            # Reward models name themselves in their errors.
            kwargs.setdefault("name", label)
        return _named(build_object(builder, f"The reward '{label}'", kwargs), label)
    if path := path_of_file(kind):
        raise UsageError(f"The reward '{label}' is {kind}; name a function by the dotted path of its module: {path}.")
    is_folder = kind != "" and Path(kind).expanduser().is_dir()
    if is_folder or is_hub_id(kind):
        if kwargs:
            raise UsageError(
                f"The reward '{label}' is a sequence classifier that TRL loads, without keyword arguments. For "
                f"{', '.join(kwargs)} use `type: reward_model` with `model: {kind}`."
            )
        return _checked_classifier(str(Path(kind).expanduser()) if is_folder else kind, label)
    if is_dotted_path(kind):
        target = import_object(kind, f"The reward '{label}'", beside)
        if inspect.isclass(target) or kwargs:
            target = build_object(target, f"The reward '{label}'", kwargs)
        return _named(target, label)
    if Path(f"{kind}.py").is_file():
        raise UsageError(f"The reward '{label}' is {kind}, a file here; name a function in it, such as {kind}.NAME.")
    close = difflib.get_close_matches(kind, BUILT_IN, n=1)
    raise UsageError(
        f"Unknown reward '{kind}'.{f' Did you mean {close[0]!r}?' if close else ''} A reward is one of "
        f"{', '.join(BUILT_IN)}, a dotted path such as my_rewards.brevity, or the folder or Hub id of a reward model."
    )


def _checked_classifier(model: str, label: str) -> str:
    """`model`, once its config says that TRL would find a trained head in it. Else TRL gives it a random one."""
    from ..reward_models.in_process import trl_scores_another_token
    from ..reward_models.loading import is_classifier, read_config

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
        raise UsageError(
            f"The reward '{label}' cannot be loaded: {kind}{one_line(error, 'it says nothing')}"
        ) from error


def _named(reward_func: Callable, label: str, *, wrap: bool = False) -> Any:
    """`reward_func` under the name `label`, by which TRL logs it; a function of its own with `wrap`."""
    if getattr(reward_func, "__name__", None) == label and not wrap:
        return reward_func
    unbound: Any = reward_func.func if isinstance(reward_func, functools.partial) else reward_func

    async def awaited(**kwargs: Any) -> list[float | None]:
        return await reward_func(**kwargs)

    def called(**kwargs: Any) -> list[float | None]:
        return reward_func(**kwargs)

    reward: Any = awaited if is_async(reward_func) else called
    reward.__name__ = reward.__qualname__ = label
    reward.__wrapped__ = reward_func
    # The trainer reads off the signature which dataset columns the reward needs.
    reward.__signature__ = inspect.signature(reward_func)
    for name in (*OPTIONAL_METHODS, "reward_names"):
        if hasattr(unbound, name):
            setattr(reward, name, getattr(unbound, name))
    return reward
