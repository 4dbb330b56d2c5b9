"""Recipes as files: YAML into a mapping, bases and layers merged, and a mapping back into YAML."""

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError, one_line
from ..user_input import as_mapping


# Numbers in YAML 1.2 that PyYAML, which follows YAML 1.1, reads as text: 1e-7, 2E3, 1.5e3.
_EXPONENT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_EXPONENT_TAG = "tag:yaml.org,2002:float#exponent"
# The fields that the key `method` presets. A layer that sets `method` drops them from the layers below.
METHOD_FIELDS = ("multi_objective_aggregation", "conflict_filter", "consensus_weighting")

# Keys that map labels to keyword arguments -> the keyword that names what takes them, by default the label itself.
KINDS = {"reward_kwargs": "type", "eval_dataset": "name"}
SCHEDULES = "reward_weight_schedules"


def read_recipe_file(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """
    The keys of a recipe merged over those of its bases, as [`merge_layers`] merges.

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
    content = _parse(text, path)
    if "env" in content:
        raise UsageError(f"Recipe '{path}' has the key `env`; recipes do not set environment variables.")

    bases = content.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UsageError(f"`base` in recipe '{path}' must name one or several YAML files.")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge_layers(merged, read_recipe_file(path.parent / Path(base).expanduser(), (*_seen, resolved)))
    return merge_layers(merged, content)


def merge_layers(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """
    The keys of `above` over those of `below`.

    Mappings merge key by key, everything else is replaced. There are four exceptions: another `type` of a reward
    (`name` of an evaluation set) replaces all settings of its label, a weight schedule replaces that of the same
    reward, null in place of an evaluation set removes the set, and `method` removes the fields that it presets.
    """
    below, above = _with_mappings(below), _with_mappings(above)
    if "method" in above:
        below = {key: value for key, value in below.items() if key not in METHOD_FIELDS}
    merged = _merge(below, above)
    for key, kind in KINDS.items():
        for label, kwargs in _mapping(above.get(key)).items():
            inherited = _mapping(below.get(key)).get(label)
            if isinstance(kwargs, dict) and isinstance(inherited, dict) and kind in kwargs:
                if kwargs[kind] != inherited.get(kind, label):
                    merged[key][label] = kwargs
    for label, schedule in _mapping(above.get(SCHEDULES)).items():
        merged[SCHEDULES][label] = schedule
    sets, inherited = _mapping(above.get("eval_dataset")), _mapping(below.get("eval_dataset"))
    for label, options in sets.items():
        if options is None and label in inherited:
            del merged["eval_dataset"][label]
    return merged


def dump_recipe(settings: dict[str, Any]) -> str:
    """`settings` as YAML that [`read_recipe_file`] reads back as they are."""
    return yaml.dump(settings, Dumper=_RecipeDumper, allow_unicode=True, sort_keys=True)


def _with_mappings(layer: dict[str, Any]) -> dict[str, Any]:
    """`layer` with the JSON texts among its values as mappings, as a command line has them."""

    def is_json(key: str, value: Any) -> bool:
        takes_mappings = key.endswith("_kwargs") or key in ("eval_dataset", "reward_gates", SCHEDULES)
        return takes_mappings and isinstance(value, str) and value.lstrip().startswith("{")

    return {key: as_mapping(key, value) if is_json(key, value) else value for key, value in layer.items()}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(text, Loader=_RecipeLoader)
        if isinstance(content, dict):
            # 1e3 may be a learning rate or the name of a run: the type of the key's field decides.
            content = {
                key: value.text if isinstance(value, _Exponent) else _plain_numbers(value)
                for key, value in content.items()
            }
    except (yaml.YAMLError, ValueError) as error:  # the latter for a date that no calendar has
        raise UsageError(f"Recipe '{path}' is not valid YAML: {one_line(error)}") from error
    except RecursionError as error:
        raise UsageError(f"Recipe '{path}' is nested too deeply.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"Recipe '{path}' must be a mapping of keys to values.")
    return content


class _Exponent(float):
    """A number that remembers how it was written."""

    text: str


def _plain_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key.text if isinstance(key, _Exponent) else key: _plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(item) for item in value]
    return float(value) if isinstance(value, _Exponent) else value


class _RecipeLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also reads 1e-7 as a number and refuses a key that occurs twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked here because merge keys (<<), which may repeat a key, are resolved only when values are made.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag == "tag:yaml.org,2002:str":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key `{key.value}` occurs twice", key.start_mark
                    )
                seen.add(key.value)
        return node

    def construct_exponent(self, node: yaml.ScalarNode) -> _Exponent:
        number = _Exponent(node.value)
        number.text = node.value
        return number


class _RecipeDumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes text that [`_RecipeLoader`] would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _handler in (_RecipeLoader, _RecipeDumper):
    _handler.add_implicit_resolver(_EXPONENT_TAG, _EXPONENT, list("-+.0123456789"))
_RecipeLoader.add_constructor(_EXPONENT_TAG, _RecipeLoader.construct_exponent)
