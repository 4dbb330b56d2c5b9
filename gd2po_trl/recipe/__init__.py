"""
Recipes: YAML files that describe a whole training run.

A recipe is a flat mapping. Its keys are the fields of [`RecipeArguments`], [`GD2POConfig`] and TRL's `ModelConfig`,
and `base`, the recipe or recipes that it builds upon. YAML is loaded safely: a recipe can run code only through the
dotted paths of reward functions and of an estimator.
"""

import argparse
import os
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import UsageError, one_line
from ..user_input import is_number
from .arguments import DatasetArguments, RecipeArguments
from .catalog import find_recipe
from .files import merge_layers, read_recipe_file
from .keys import suggestion
from .values import (
    NULL_MEANS,
    NULL_WORDS,
    accepted_types,
    as_meant,
    check_ranges,
    check_value,
    refuse_remote_code,
    without_secrets,
)


__all__ = ["DatasetArguments", "Recipe", "RecipeArguments", "load_recipe", "parse_recipe", "print_options"]


@dataclass
class Recipe:
    """
    A recipe as read: its settings as objects, and the keys that were set with their final values.

    Args:
        arguments ([`RecipeArguments`]):
            Data and rewards.
        training ([`GD2POConfig`]):
            The trainer's settings.
        model (`trl.ModelConfig`):
            Policy, LoRA and quantization.
        settings (`dict`):
            Every key that the recipe, its bases, the method and the command line set. No secrets.
        path (`Path` or `None`, *optional*):
            The file that it was read from.
    """

    arguments: Any
    training: Any
    model: Any
    settings: dict[str, Any]
    path: Path | None = None


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """
    Read a recipe with its bases and apply command-line overrides.

    Args:
        path (`str`, `Path` or `None`):
            YAML file; `None` for a run described by `overrides` alone.
        overrides (sequence of `str`):
            Command-line words such as `["--learning_rate", "1e-5"]`. They win over the recipe.

    Returns:
        [`Recipe`]

    Raises:
        [`UsageError`]: for a file that is missing or no mapping, and for an unknown key or a wrong value, which it
            names together with the remedy.
    """
    (arguments, training, model), settings = parse_recipe(path, overrides, _kinds(), "gd2po train")
    _check_weights(arguments, training)
    return Recipe(arguments, training, model, settings, None if path is None else find_recipe(path))


def parse_recipe(
    path: str | Path | None, overrides: Sequence[str], kinds: Sequence[type], command: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """
    Read a recipe of any command into dataclasses.

    Args:
        path (`str`, `Path` or `None`):
            YAML file; `None` for a run described by `overrides` alone.
        overrides (sequence of `str`):
            Command-line words. They win over the recipe.
        kinds (sequence of dataclass types):
            Whose fields the keys are; the last one is TRL's `ModelConfig`.
        command (`str`):
            For messages, such as `"gd2po train"`.

    Returns:
        `tuple`: one object per kind, and every key that was set with its final value, without secrets.

    Raises:
        [`UsageError`]: as [`load_recipe`].
    """
    source = f"recipe '{path}'"
    settings = read_recipe_file(find_recipe(path)) if path is not None else {}
    parser = _parser(kinds, command)
    items = {item.name: item for kind in kinds for item in fields(kind)}
    hints = {name: hint for kind in kinds for name, hint in typing.get_type_hints(kind).items()}
    keys = {action.dest for action in parser._actions} - {"help"}
    for key in settings:
        if key not in keys:
            if ("reward_funcs" in settings) != ("reward_funcs" in keys):
                other = "gd2po sft" if "reward_funcs" in keys else "gd2po train"
                raise UsageError(f"Unknown key `{key}` in {source}, which looks like one of `{other}`.")
            raise UsageError(f"Unknown key `{key}` in {source}.{suggestion(key, keys, command)}")
    refuse_remote_code(settings, source)
    options = _options(list(overrides), parser, command)
    if options.get("eval_strategy") == "no":  # which alone switches all evaluations of a recipe off
        settings = {key: value for key, value in settings.items() if key not in ("eval_on_start", "eval_on_end")}
    settings = merge_layers(settings, options)
    missing = [key for key in ("model_name_or_path", "reward_funcs") if key in keys and not settings.get(key)]
    if path is None and missing:
        raise UsageError(
            f"No recipe was given, and no {' and no '.join(map('`{}`'.format, missing))}: `{command} RECIPE ...`."
        )
    if settings.get("method") is not None:
        settings = {**_method_preset(settings["method"]), **settings}
    settings = {key: as_meant(key, value, items[key].default) for key, value in settings.items()}
    for key, value in settings.items():
        check_value(key, value, hints[key], items[key].default, source)
    parser = _parser(kinds, command)
    parser.set_defaults_with_config(**settings)
    values = vars(parser.parse_args([]))
    check_ranges({key: values[key] for key in settings})
    try:
        parsed = parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)
    except UsageError:
        raise
    except (ValueError, TypeError, ImportError, ArithmeticError, RuntimeError, OSError) as error:
        raise UsageError(one_line(error)) from error
    model = parsed[-1]
    if model.model_name_or_path is None:
        raise UsageError("`model_name_or_path` is missing: name the policy's folder or Hub id.")
    model.model_name_or_path = os.path.expanduser(model.model_name_or_path)
    values = {key: value for part in reversed(parsed) for key, value in vars(part).items()}
    return parsed, without_secrets({key: _as_written(values[key], hints[key]) for key in sorted(settings)})


def _options(words: list[str], parser: Any, command: str) -> dict[str, Any]:
    """The keys that a command line sets, with their values, as one more layer over the recipe; changes `parser`."""
    if not words:
        return {}
    keys = {action.dest for action in parser._actions} - {"help"}
    for index, word in enumerate(words):
        name = word.lstrip("-\N{EN DASH}\N{EM DASH}").split("=", 1)[0].replace("-", "_")
        is_value = index > 0 and words[index - 1].startswith("--") and "=" not in words[index - 1]
        if word.startswith("--"):
            if name not in keys and name.removeprefix("no_") not in keys:
                raise UsageError(f"Unknown option --{name}.{suggestion(name, keys, command)}")
        elif not is_value and word.endswith((".yaml", ".yml")):
            raise UsageError(f"The recipe '{word}' comes first: `{command} {word} ...`.")
        elif not is_value and name in keys and (name != word.replace("-", "_") or "=" in word):
            raise UsageError(f"'{word}' is not an option of {command}. Did you mean `--{name}`, with two dashes?")
    options = {option for action in parser._actions for option in action.option_strings}
    for index, word in enumerate(words):
        if word.startswith("--no_") and word not in options and word[5:] in keys:
            words[index] = f"--{word[5:]}=false"  # argparse has --no_ for what is true by default only
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    starts = [index for index, word in enumerate(words) if word.startswith("--")]
    layer: dict[str, Any] = vars(parser.parse_args(words[: starts[0] if starts else None]))
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        for key, value in vars(parser.parse_args(words[start:end])).items():
            # If a mapping is given twice, the two are merged.
            layer |= merge_layers({key: layer[key]}, {key: value}) if key in layer else {key: value}
    return layer


def _kinds() -> tuple[type, ...]:
    from trl import ModelConfig

    from ..gd2po_config import GD2POConfig

    return RecipeArguments, GD2POConfig, ModelConfig


def _parser(kinds: Sequence[type], command: str):
    from trl import TrlParser

    class RecipeParser(TrlParser):
        def error(self, message: str) -> typing.NoReturn:
            raise UsageError(message[:1].upper() + message[1:])

    parser = RecipeParser(list(kinds), prog=command, allow_abbrev=False)
    defaults = {item.name: item.default for kind in kinds for item in fields(kind)}
    hints = {name: hint for kind in kinds for name, hint in typing.get_type_hints(kind).items()}
    for action in parser._actions:
        if action.dest in defaults and action.nargs != 0:
            is_nullable = defaults[action.dest] is None or action.dest in NULL_MEANS
            if dict in accepted_types(hints[action.dest]):
                action.type = _text
            elif is_nullable and action.dest != "report_to":
                action.type = _or_null(action.type or str)
    return parser


def _text(word: str) -> str | None:
    """Text that is JSON, or the name of a file; a word for null is null."""
    return None if word.lower() in NULL_WORDS else word


def _or_null(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """`convert`, which also takes the words for null: a command line has no other way to write it."""

    def converted(word: str) -> Any:
        return None if word.lower() in NULL_WORDS else convert(word)

    converted.__name__ = getattr(convert, "__name__", "value")  # argparse puts it into its message
    return converted


def print_options(kinds: Sequence[type] | None = None, command: str = "gd2po train") -> None:
    """Print every key of a recipe with its help text, as the command line takes it."""
    _parser(kinds or _kinds(), command).print_help(sys.stdout)


def _method_preset(method: Any) -> dict[str, Any]:
    from ..gd2po_config import METHODS

    if not isinstance(method, str) or method not in METHODS:
        raise UsageError(f"`method` is {method!r}; it must be one of {', '.join(METHODS)}.")
    return METHODS[method]


def _as_written(value: Any, hint: Any) -> Any:
    """`value`, which TRL or transformers may have converted, as it is written in a recipe."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return [value] if isinstance(value, str) and accepted_types(hint) <= {list, type(None)} else value


def _check_weights(arguments: Any, training: Any) -> None:
    from ..rewards import is_user_code

    weights = training.reward_weights
    if weights is None:
        return
    named = [arguments.reward_kwargs.get(label, {}).get("reward_names") or [label] for label in arguments.reward_funcs]
    names = [str(name) for parts in named for name in parts]
    # A function of the user's own may have several parts, which is known once it is imported.
    may_be_more = any(is_user_code(arguments.reward_kwargs.get(name, {}).get("type", name)) for name in names)
    if len(weights) != len(names) and not (may_be_more and len(weights) > len(names)):
        raise UsageError(
            f"`reward_weights` has {len(weights)} entries for {len(names)} rewards ({', '.join(names)}); give one for "
            "each, in this order."
        )
    for weight in weights:
        if not is_number(weight) or weight != weight or abs(weight) > 1e30:
            raise UsageError(f"`reward_weights` holds {weight!r}; weights are finite numbers.")
    if not any(weights):
        raise UsageError(f"`reward_weights` is {weights}: with all weights 0 there is no gradient.")
