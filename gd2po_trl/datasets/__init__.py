"""
Data sets by short name, with the columns that TRL and the rewards want.

    dataset = load_dataset_by_name("rlla_4k", split="test")

`DATASETS` lists the names.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .prompts import drop_long_prompts, truncate_prompts_left


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class DatasetLoader:
    """An entry of the registry. Its module is imported at first use: a task knows this package, not the reverse."""

    module: str
    name: str  # of the loader there, a function `load(path, split, **kwargs)`
    description: str
    columns: tuple[str, ...]  # what a row certainly has; others of the source are kept beside them
    source: str | None = None  # name of the `Source` there with a Hub id, read when no path is given

    @property
    def load(self) -> Callable[..., "Dataset"]:
        return getattr(import_module(self.module), self.name)

    @property
    def default_path(self) -> str | None:
        """Hub id that is read when no path is given."""
        return getattr(import_module(self.module), self.source).default_path if self.source else None

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the loader's own keyword arguments."""
        return tuple(name for name in inspect.signature(self.load).parameters if name not in ("path", "split"))


_TOOL_CALLING, _SAFE_ALIGNMENT = "gd2po_trl.tasks.tool_calling.data", "gd2po_trl.tasks.safe_alignment.data"
_PAIR = ("prompt", "chosen", "rejected", "chosen_side")

DATASETS: dict[str, DatasetLoader] = {
    "prompts": DatasetLoader(
        "gd2po_trl.datasets.prompts",
        "load_prompts",
        "any file with a `prompt` column, plain or conversational",
        ("prompt",),
    ),
    "rlla_4k": DatasetLoader(
        _TOOL_CALLING, "load_rlla", "ToolRL's tool-calling prompts with gold answers", ("prompt", "answer"), "RLLA"
    ),
    "rlla_sft": DatasetLoader(
        _TOOL_CALLING,
        "load_rlla_sft",
        "ToolRL's supervised examples with reasoning, for a warm-up",
        ("prompt", "completion"),
    ),
    "api_bank": DatasetLoader(
        _TOOL_CALLING,
        "load_api_bank",
        "API-Bank levels 1 to 3, one gold call per row, for evaluation",
        ("prompt", "answer", "level", "index", "other"),
    ),
    "alpaca": DatasetLoader(_SAFE_ALIGNMENT, "load_alpaca", "Alpaca's instructions", ("prompt",), "ALPACA"),
    "beavertails": DatasetLoader(
        _SAFE_ALIGNMENT,
        "load_beavertails",
        "BeaverTails' prompts, with filters by safety label and harm category",
        ("prompt",),
        "BEAVERTAILS",
    ),
    "beavertails_evaluation": DatasetLoader(
        _SAFE_ALIGNMENT,
        "load_beavertails_evaluation",
        "700 harmful prompts in 14 categories, for evaluation",
        ("prompt", "category", "category_id"),
        "BEAVERTAILS_EVALUATION",
    ),
    "pku_saferlhf": DatasetLoader(
        _SAFE_ALIGNMENT, "load_pku_saferlhf", "PKU-SafeRLHF's prompts", ("prompt",), "PKU_SAFERLHF"
    ),
    "hh_rlhf": DatasetLoader(
        _SAFE_ALIGNMENT, "load_hh_rlhf", "HH-RLHF's conversations up to the last user turn", ("prompt",), "HH_RLHF"
    ),
    "hh_rlhf_pairs": DatasetLoader(
        _SAFE_ALIGNMENT, "load_hh_rlhf_pairs", "HH-RLHF's preference pairs, for fitting scorers", _PAIR, "HH_RLHF"
    ),
    "pku_saferlhf_pairs": DatasetLoader(
        _SAFE_ALIGNMENT,
        "load_pku_saferlhf_pairs",
        "PKU-SafeRLHF's preference pairs, by helpfulness or safety, for fitting scorers",
        _PAIR,
        "PKU_SAFERLHF",
    ),
}
ALIASES = {"rlla": "rlla_4k"}


def check_dataset(name: str, kwargs: dict[str, Any] | None = None) -> DatasetLoader:
    """
    The loader called `name`, without reading anything.

    Raises:
        [`UsageError`]: Unknown name or keyword argument; the message lists the known ones.
    """
    key = ALIASES.get(name, name) if isinstance(name, str) else None
    if key not in DATASETS:
        close = difflib.get_close_matches(str(name), [*DATASETS, *ALIASES], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"unknown data set {name!r}{hint} (known: {', '.join(DATASETS)})")
    known = ("limit", "shuffle", "seed", *DATASETS[key].options)
    for option in kwargs or {}:
        if option not in known:
            raise UsageError(f"data set {name!r} takes no {option!r} (it takes: {', '.join(known)})")
    return DATASETS[key]


def load_dataset_by_name(
    name: str,
    path: str | None = None,
    split: str | None = None,
    *,
    limit: int | None = None,
    shuffle: bool = False,
    seed: int = 42,
    **kwargs: Any,
) -> "Dataset":
    """
    Loads a data set of the registry.

    What was read and what was left out (duplicates, empty prompts, ...) is logged, and stands in
    `dataset.info.description`. In local files text stays as it is written: in JSON a date, in CSV `None`, `NA` and
    `007`, and every cell of the columns that the loaders read as text.

    Args:
        name (`str`): Short name, a key of [`DATASETS`].
        path (`str`, *optional*): Parquet, JSON, JSONL or CSV file, a folder that holds such files, or a Hub id
            `owner/name`; `None` for the loader's default Hub id.
        split (`str`, *optional*): Split, possibly a slice such as `"train[:100]"`; `None` for the loader's default. A
            single file is read whole, whatever the split's name.
        limit (`int`, *optional*): Keeps the first `limit` rows, after shuffling.
        shuffle (`bool`, *optional*, defaults to `False`): Whether to shuffle the rows.
        seed (`int`, *optional*, defaults to `42`): Seed of the shuffle.
        kwargs: The loader's own options.

    Returns:
        `Dataset`: Rows with the columns that the loader's entry names; other columns of the source are kept.

    Raises:
        [`UsageError`]: Unknown name or option, nothing at `path`, or rows of another shape, with what to do about it.
    """
    loader = check_dataset(name, kwargs)
    for option, value in (("path", path), ("split", split)):
        if not isinstance(value, (str, PathLike, type(None))):
            raise UsageError(f"{option} of data set {name!r} must be text, got {value!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UsageError(f"seed must be a whole number, got {seed!r}")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise UsageError(f"limit must be a positive whole number, got {limit!r}")
    dataset = loader.load(path, split, **kwargs)
    if shuffle:
        dataset = dataset.shuffle(seed=seed)
    if limit is not None and limit < len(dataset):
        dataset = dataset.select(range(limit))
    return dataset


__all__ = [
    "DATASETS",
    "DatasetLoader",
    "check_dataset",
    "drop_long_prompts",
    "load_dataset_by_name",
    "truncate_prompts_left",
]
