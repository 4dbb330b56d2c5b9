"""
Recipes: YAML files that describe a whole training run.

A recipe is a flat mapping. Its keys are the fields of [`RecipeArguments`], [`GD2POConfig`] and TRL's `ModelConfig`,
and `base`, the recipe or recipes that it builds upon. YAML is loaded safely; the one thing through which a recipe
can run code is the dotted path of a reward function.
"""

import difflib
import json
import os
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError


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
            `"test"`.
        max_prompt_tokens (`int` or `None`, *optional*):
            Longest prompt, in tokens of the policy, chat template included.
        long_prompts (`str`, *optional*, defaults to `"drop"`):
            What happens to longer ones: `"drop"` the row, or `"truncate_left"` the prompt's text.
        reward_funcs (`list[str]`):
            One label per reward, under which it is logged: a built-in short name, a dotted path, or the id or folder
            of a reward model; or any label for which `reward_kwargs` has a `type`.
        reward_kwargs (`dict[str, dict]` or `None`, *optional*):
            Keyword arguments per label; the key `type` says what the label stands for.
    """

    method: str | None = field(
        default=None, metadata={"help": "grpo, gdpo, gd2po_hard or gd2po_snr: a preset of the trainer's fields."}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Short name of the evaluation set's loader."})
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

    def __post_init__(self):
        super().__post_init__()
        self.eval_dataset_kwargs = _loader_kwargs("eval_dataset", self.eval_dataset_kwargs)
        self.reward_kwargs = {
            label: _as_mapping(f"reward_kwargs.{label}", kwargs)
            for label, kwargs in _as_mapping("reward_kwargs", self.reward_kwargs).items()
        }
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
    """

    arguments: Any
    training: Any
    model: Any
    settings: dict[str, Any]


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
    return Recipe(arguments, training, model, settings)


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
    settings = read_recipe_file(Path(path)) if path is not None else {}
    parser = _parser(kinds, command)
    keys = {action.dest for action in parser._actions} - {"help"}
    source = f"recipe '{path}'"
    for key in settings:
        if key not in keys:
            raise UsageError(f"Unknown key `{key}` in {source}.{_suggestion(key, keys, command)}")

    _refuse_remote_code(settings, source)

    given = [_option_name(word) for word in overrides if word.startswith("--")]
    for name in given:
        if name not in keys and name.removeprefix("no_") not in keys:
            raise UsageError(f"Unknown option --{name}.{_suggestion(name, keys, command)}")
    method = settings.get("method")
    if "method" in given:
        # The command line asks for another method: what the recipe says about the old one must not survive.
        method = _last_value(overrides, "method")
        for name in _method_preset(method):
            settings.pop(name, None)
    if method is not None:
        settings = {**_method_preset(method), **settings, "method": method}
    settings = {key: _as_meant(key, value) for key, value in settings.items()}
    hints = {name: hint for kind in parser.dataclass_types for name, hint in typing.get_type_hints(kind).items()}
    for key, value in settings.items():
        _check_type(key, value, hints[key], source)
    parser.set_defaults_with_config(**settings)
    try:
        parsed = parser.parse_args_into_dataclasses(args=list(overrides), look_for_args_file=False)
    except UsageError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(str(error)) from error
    if parsed[-1].model_name_or_path is None:
        raise UsageError("`model_name_or_path` is missing: name the policy's folder or Hub id.")
    parsed[-1].model_name_or_path = os.path.expanduser(parsed[-1].model_name_or_path)
    values = {key: value for part in reversed(parsed) for key, value in vars(part).items()}
    was_set = [key for key in sorted(keys) if key in settings or key in given or f"no_{key}" in given]
    return parsed, without_secrets({key: _as_written(values[key], hints[key]) for key in was_set})


def read_recipe_file(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """
    The keys of a recipe merged over those of its bases; mappings merge key by key, everything else is replaced.

    Raises:
        [`UsageError`]: if a file is missing, is not a YAML mapping, holds a key twice, or is its own base.
    """
    resolved = path.resolve()
    if resolved in _seen:
        raise UsageError(f"Recipe '{path}' is its own base.")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        hint = " `gd2po recipes list` shows the recipes that come with the package." if not _seen else ""
        raise UsageError(f"Cannot read recipe '{path}': {error.strerror}.{hint}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"Recipe '{path}' is not UTF-8 text.") from error
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError) as error:  # the latter for a date that no calendar has
        raise UsageError(f"Recipe '{path}' is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UsageError(f"Recipe '{path}' is nested too deeply.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"Recipe '{path}' must be a mapping of keys to values.")
    if "env" in content:
        raise UsageError(f"Recipe '{path}' has the key `env`; recipes do not set environment variables.")

    bases = content.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UsageError(f"`base` in recipe '{path}' must name one or several YAML files.")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, read_recipe_file(path.parent / base, (*_seen, resolved)))
    return _merge(merged, content)


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key}` occurs twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _kinds() -> tuple[type, ...]:
    from trl import ModelConfig

    from .gd2po_config import GD2POConfig

    return RecipeArguments, GD2POConfig, ModelConfig


def _parser(kinds: Sequence[type], command: str):
    from trl import TrlParser

    class RecipeParser(TrlParser):
        def error(self, message: str) -> typing.NoReturn:
            raise UsageError(message[:1].upper() + message[1:])

    return RecipeParser(list(kinds), prog=command, allow_abbrev=False)


def print_options(kinds: Sequence[type] | None = None, command: str = "gd2po train") -> None:
    """Print every key of a recipe with its help text, as the command line takes it."""
    _parser(kinds or _kinds(), command).print_help(sys.stdout)


def _method_preset(method: Any) -> dict[str, Any]:
    from .gd2po_config import METHODS

    if not isinstance(method, str) or method not in METHODS:
        raise UsageError(f"`method` is {method!r}; it must be one of {', '.join(METHODS)}.")
    return METHODS[method]


def _option_name(word: str) -> str:
    return word[2:].split("=", 1)[0].replace("-", "_")


def _last_value(words: Sequence[str], name: str) -> str | None:
    value = None
    for index, word in enumerate(words):
        if word.startswith("--") and _option_name(word) == name:
            following = words[index + 1] if index + 1 < len(words) else None
            value = word.split("=", 1)[1] if "=" in word else following
    return value


def _suggestion(name: str, known: set[str], command: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean `{close[0]}`?" if close else f" `{command} --help-all` lists all."


def _as_mapping(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UsageError(f"`{name}` is not valid JSON: {error}.") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"`{name}` must be a mapping, not {type(value).__name__}.")
    return dict(value)


def _loader_kwargs(dataset: str, value: Any) -> dict[str, Any]:
    kwargs = _as_mapping(f"{dataset}_kwargs", value)
    for name in ("path", "split"):
        if name in kwargs:
            raise UsageError(f"`{dataset}_kwargs` holds `{name}`; that is the key `{dataset}_{name}`.")
    return kwargs


def _as_meant(key: str, value: Any) -> Any:
    """What a YAML value means where YAML, or TRL's type hint, says it in another type."""
    if key == "scale_rewards" and isinstance(value, bool):
        return "group" if value else "none"
    if key.endswith("_strategy") and value is False:  # YAML's reading of `no`
        return "no"
    if key == "resume_from_checkpoint" and isinstance(value, bool):
        return "latest" if value else None
    return value


def _accepted_types(hint: Any) -> set[Any]:
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return {typing.get_origin(member) or member for member in members}


def _as_written(value: Any, hint: Any) -> Any:
    """What a recipe would say for `value`, which TRL or transformers made of it."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return [value] if isinstance(value, str) and _accepted_types(hint) <= {list, type(None)} else value


def _check_type(key: str, value: Any, hint: Any, source: str) -> None:
    """argparse converts text only; any other YAML value must already be what the field holds."""
    accepted = _accepted_types(hint)
    if (
        value is None
        or (isinstance(value, str) and not accepted <= {list, type(None)})
        or type(value) in accepted
        or (isinstance(value, int) and not isinstance(value, bool) and float in accepted)
        or not accepted <= {str, int, float, bool, list, dict, type(None)}
    ):
        return
    names = " or ".join(sorted(kind.__name__ for kind in accepted if kind is not type(None)))
    raise UsageError(f"`{key}` in {source} is {value!r} ({type(value).__name__}); it must be {names}.")


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


def _refuse_remote_code(settings: dict[str, Any], source: str) -> None:
    """A file may come from anyone; what lets code of a model's repository in takes a word on the command line."""
    model_kwargs = _as_mapping("model_init_kwargs", settings.get("model_init_kwargs"))
    places = {"": settings, "model_init_kwargs.": model_kwargs}
    for prefix, mapping in places.items():
        for key in ("trust_remote_code", "use_kernels"):
            if mapping.get(key):
                option = "model_init_kwargs '{\"use_kernels\": true}'" if key == "use_kernels" else key
                raise UsageError(_REMOTE_CODE.format(key=prefix + key, source=source, option=option))
        if "/" in str(mapping.get("attn_implementation") or ""):
            key = "attn_implementation"
            raise UsageError(_REMOTE_CODE.format(key=prefix + key, source=source, option=key))


_REMOTE_CODE = (
    "`{key}` in {source} would run code from the Hub, which a recipe cannot ask for. If you trust the model, give "
    "--{option} on the command line."
)


_SECRET_WORDS = ("password", "secret", "api_key", "apikey", "headers", "authorization")
_TOKENS_OF_THE_VOCABULARY = ("eos_token", "pad_token")


def without_secrets(settings: Any) -> Any:
    """`settings` without what would give an account away, in nested mappings and lists too."""
    if isinstance(settings, (list, tuple)):
        return [without_secrets(item) for item in settings]
    if not isinstance(settings, dict):
        return settings
    return {key: without_secrets(value) for key, value in settings.items() if not _is_secret(str(key).lower())}


def _is_secret(key: str) -> bool:
    is_token = key == "token" or key.endswith("_token")
    return (is_token and key not in _TOKENS_OF_THE_VOCABULARY) or any(word in key for word in _SECRET_WORDS)
