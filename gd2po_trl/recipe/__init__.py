"""
Recipes: YAML files that describe a whole training run.

A recipe is a flat mapping. Its keys are the fields of [`RecipeArguments`], [`GD2POConfig`] and TRL's `ModelConfig`,
and `base`, the recipe or recipes that it builds upon. YAML is loaded safely; the only things through which a recipe
can run code are the dotted paths of reward functions and of an estimator.
"""

import argparse
import os
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .catalog import find_recipe
from .files import merge_layers, read_recipe_file
from .keys import suggestion
from .values import (
    NULL_MEANS,
    NULL_WORDS,
    accepted_types,
    as_mapping,
    as_meant,
    check_ranges,
    check_value,
    refuse_remote_code,
    without_secrets,
)


@dataclass
class DatasetArguments:
    r"""
    What a recipe trains on.

    Args:
        dataset (`str`, *optional*, defaults to `"prompts"`):
            Short name of a data set loader, a key of `gd2po_trl.datasets.DATASETS`.
        dataset_path (`str` or `None`, *optional*):
            Local file or folder, or Hub id; `None` is the loader's own Hub id.
        dataset_split (`str` or `None`, *optional*):
            Split to train on; `None` is the loader's own default.
        dataset_kwargs (`dict` or `None`, *optional*):
            Keyword arguments of the loader.
    """

    dataset: str = field(default="prompts", metadata={"help": "Short name of a data set loader."})
    dataset_path: str | None = field(default=None, metadata={"help": "Local file or folder, or Hub id."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split to train on; null is the loader's own."})
    dataset_kwargs: dict | str | None = field(default=None, metadata={"help": "Loader's keyword arguments (JSON)."})

    def __post_init__(self):
        self.dataset_kwargs = _loader_kwargs("dataset", self.dataset_kwargs)


@dataclass
class RecipeArguments(DatasetArguments):
    r"""
    What a recipe says beyond the trainer's and the model's own settings, and beyond [`DatasetArguments`].

    Args:
        method (`str` or `None`, *optional*):
            `"grpo"`, `"gdpo"`, `"gd2po_hard"` or `"gd2po_snr"`: sets `multi_objective_aggregation`, `conflict_filter`
            and `consensus_weighting`. A key of these beside it refines the preset.
        eval_dataset, eval_dataset_path, eval_dataset_split, eval_dataset_kwargs:
            The same as `dataset`, ... for the evaluation set; `eval_dataset=None` means none. The split defaults to
            `"test"`. For several sets `eval_dataset` is a mapping of names, under which each is logged, to mappings:
            `name` (of the loader, by default the set's name), `path`, `split` and the loader's keyword arguments.
        max_prompt_tokens (`int` or `None`, *optional*):
            Longest prompt, in tokens of the policy, chat template included.
        long_prompts (`str`, *optional*, defaults to `"drop"`):
            What happens to longer ones: `"drop"` the row, or `"truncate_left"` the prompt's text.
        reward_funcs (`list[str]`):
            One label per reward, under which it is logged: a built-in short name, a dotted path, or the id or folder
            of a reward model; or any label for which `reward_kwargs` has a `type`.
        reward_kwargs (`dict[str, dict]` or `None`, *optional*):
            Keyword arguments per label; the key `type` says what the label stands for.
        verdict_steps (`int` or `None`, *optional*):
            After every so many optimizer steps, and at the end, log what `gd2po analyze` says of the rewards.
    """

    method: str | None = field(
        default=None, metadata={"help": "grpo, gdpo, gd2po_hard or gd2po_snr: a preset of the trainer's fields."}
    )
    eval_dataset: dict | str | None = field(
        default=None, metadata={"help": "Short name of the evaluation set's loader, or names and settings (JSON)."}
    )
    eval_dataset_path: str | None = field(default=None, metadata={"help": "Local file or folder, or Hub id."})
    eval_dataset_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    eval_dataset_kwargs: dict | str | None = field(default=None, metadata={"help": "Loader's keyword arguments."})
    max_prompt_tokens: int | None = field(default=None, metadata={"help": "Longest prompt, in tokens."})
    long_prompts: str = field(
        default="drop", metadata={"help": "'drop' rows with longer prompts, or 'truncate_left' their text."}
    )
    reward_funcs: list[str] | None = field(default=None, metadata={"help": "One label per reward."})
    reward_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments per reward label (JSON on the command line)."}
    )
    verdict_steps: int | None = field(
        default=None, metadata={"help": "Log the verdict of `gd2po analyze` on the rewards every so many steps."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.eval_dataset_kwargs = _loader_kwargs("eval_dataset", self.eval_dataset_kwargs)
        self._check_eval_datasets()
        self.reward_kwargs = {
            label: as_mapping(f"reward_kwargs.{label}", kwargs)
            for label, kwargs in as_mapping("reward_kwargs", self.reward_kwargs).items()
        }
        if self.verdict_steps is not None and self.verdict_steps < 1:
            raise UsageError(f"`verdict_steps` is {self.verdict_steps!r}; it must be at least 1, or null.")
        if self.long_prompts not in ("drop", "truncate_left"):
            raise UsageError(f"`long_prompts` is {self.long_prompts!r}; it must be 'drop' or 'truncate_left'.")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise UsageError(f"`max_prompt_tokens` is {self.max_prompt_tokens}; it must be at least 1.")
        if not self.reward_funcs:
            raise UsageError("`reward_funcs` is missing: a recipe names at least one reward.")
        for label in self.reward_funcs:
            if not isinstance(label, str):
                raise UsageError(
                    f"`reward_funcs` holds {label!r}; it lists labels, and `reward_kwargs` says the rest."
                )
        if len(set(self.reward_funcs)) != len(self.reward_funcs):
            raise UsageError(
                "`reward_funcs` names a reward twice; give the second a label of its own and its `type` in "
                "`reward_kwargs`."
            )

    def _check_eval_datasets(self) -> None:
        if isinstance(self.eval_dataset, str) and not self.eval_dataset.lstrip().startswith("{"):
            self.eval_dataset = None if self.eval_dataset.lower() in NULL_WORDS else self.eval_dataset
            return
        if self.eval_dataset is None:
            return
        self.eval_dataset = as_mapping("eval_dataset", self.eval_dataset)
        for name, options in self.eval_dataset.items():
            if not isinstance(name, str) or not name or not isinstance(options, dict):
                raise UsageError(
                    f"`eval_dataset` has {name!r}: {options!r}; it maps names to mappings such as "
                    "{name: pku_saferlhf, split: test}, where {} is the loader of that name."
                )
        beside = [key for key in ("path", "kwargs") if getattr(self, f"eval_dataset_{key}")]
        if beside:
            raise UsageError(
                f"`eval_dataset` is a mapping, and `eval_dataset_{beside[0]}` stands beside it: say it for each set, "
                "in the mapping."
            )

    def eval_datasets(self) -> dict[str, dict[str, Any]]:
        """
        Name to arguments of [`~gd2po_trl.datasets.load_dataset_by_name`], for each evaluation set. The single one has
        no name.
        """
        if self.eval_dataset is None:
            return {}
        if isinstance(self.eval_dataset, dict):
            split = self.eval_dataset_split
            return {name: {"name": name, "split": split, **options} for name, options in self.eval_dataset.items()}
        where = {"path": self.eval_dataset_path, "split": self.eval_dataset_split}
        return {
            "": {"name": self.eval_dataset, **where, **as_mapping("eval_dataset_kwargs", self.eval_dataset_kwargs)}
        }


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
            Policy, LoRA and quantisation.
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
    Read a recipe into dataclasses, whatever it is a recipe of.

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
    hints = {name: hint for kind in kinds for name, hint in typing.get_type_hints(kind).items()}
    defaults = {item.name: item.default for kind in kinds for item in fields(kind)}
    keys = {action.dest for action in parser._actions} - {"help"}
    for key in settings:
        if key not in keys:
            other = "gd2po sft" if "reward_funcs" in keys else "gd2po train"
            if ("reward_funcs" in settings) != ("reward_funcs" in keys):
                raise UsageError(f"Unknown key `{key}` in {source}, which looks like one of `{other}`.")
            raise UsageError(f"Unknown key `{key}` in {source}.{suggestion(key, keys, command)}")
    refuse_remote_code(settings, source)
    options = _options(list(overrides), kinds, command)
    if options.get("eval_strategy") == "no":
        # One option switches all evaluations of a recipe off.
        settings = {key: value for key, value in settings.items() if key not in ("eval_on_start", "eval_on_end")}
    settings = merge_layers(settings, options)
    missing = [key for key in ("model_name_or_path", "reward_funcs") if key in keys and not settings.get(key)]
    if path is None and missing:
        raise UsageError(
            f"No recipe was given, and {' and '.join(f'`{key}`' for key in missing)} neither: `{command} RECIPE ...`."
        )
    if settings.get("method") is not None:
        settings = {**_method_preset(settings["method"]), **settings}
    settings = {key: as_meant(key, value, defaults[key]) for key, value in settings.items()}
    for key, value in settings.items():
        check_value(key, value, hints[key], defaults[key], source)
    parser.set_defaults_with_config(**settings)
    values = vars(parser.parse_args([]))
    check_ranges({key: values[key] for key in settings})
    try:
        parsed = parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)
    except UsageError:
        raise
    except (ValueError, TypeError, ImportError, ArithmeticError, RuntimeError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if parsed[-1].model_name_or_path is None:
        raise UsageError("`model_name_or_path` is missing: name the policy's folder or Hub id.")
    parsed[-1].model_name_or_path = os.path.expanduser(parsed[-1].model_name_or_path)
    values = {key: value for part in reversed(parsed) for key, value in vars(part).items()}
    return parsed, without_secrets({key: _as_written(values[key], hints[key]) for key in sorted(settings)})


def _options(words: list[str], kinds: Sequence[type], command: str) -> dict[str, Any]:
    """The keys that a command line sets, with their values, as one more layer over the recipe."""
    if not words:
        return {}
    parser = _parser(kinds, command)
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
            raise UsageError(f"'{word}' is no option of {command}. Did you mean `--{name}`, with two dashes?")
    options = {option for action in parser._actions for option in action.option_strings}
    for index, word in enumerate(words):
        if word.startswith("--no_") and word not in options and word[5:] in keys:
            words[index] = f"--{word[5:]}=false"  # argparse has it for what is true by default alone
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    starts = [index for index, word in enumerate(words) if word.startswith("--")]
    layer: dict[str, Any] = vars(parser.parse_args(words[: starts[0] if starts else None]))
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        for key, value in vars(parser.parse_args(words[start:end])).items():
            # A mapping that is given twice merges too.
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
    """`convert` that takes a word for null too: a command line has no null, and Python's is None."""

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


def _loader_kwargs(dataset: str, value: Any) -> dict[str, Any]:
    kwargs = as_mapping(f"{dataset}_kwargs", value)
    for name in ("path", "split"):
        if name in kwargs:
            raise UsageError(f"`{dataset}_kwargs` holds `{name}`; that is the key `{dataset}_{name}`.")
    return kwargs


def _as_written(value: Any, hint: Any) -> Any:
    """What a recipe would say for `value`, which TRL or transformers made of it."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return [value] if isinstance(value, str) and accepted_types(hint) <= {list, type(None)} else value


def _check_weights(arguments: Any, training: Any) -> None:
    weights = training.reward_weights
    if weights is None:
        return
    if len(weights) != len(arguments.reward_funcs):
        raise UsageError(
            f"`reward_weights` has {len(weights)} entries for {len(arguments.reward_funcs)} rewards "
            f"({', '.join(arguments.reward_funcs)}); give one for each, in this order."
        )
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight != weight or abs(weight) > 1e30:
            raise UsageError(f"`reward_weights` holds {weight!r}; weights are finite numbers.")
    if not any(weights):
        raise UsageError(f"`reward_weights` is {weights}: with all weights 0 nothing is learned.")
