"""The keys of a recipe that neither TRL nor transformers has: data and rewards."""

from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..field_help import help_from_docstring
from ..user_input import as_mapping
from .values import NULL_WORDS


@help_from_docstring
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
            Keyword arguments of the loader (JSON on the command line).
    """

    dataset: str = "prompts"
    dataset_path: str | None = None
    dataset_split: str | None = None
    dataset_kwargs: dict | str | None = None

    def __post_init__(self):
        self.dataset_kwargs = _loader_kwargs("dataset", self.dataset_kwargs)


@help_from_docstring
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
            Keyword arguments per label (JSON on the command line); the key `type` says what the label stands for, and
            `reward_names` which parts a function has that returns a mapping and does not declare them itself.
        verdict_steps (`int` or `None`, *optional*):
            After every so many optimizer steps, and at the end, log what `gd2po analyze` says of the rewards.
    """

    method: str | None = None
    eval_dataset: dict | str | None = None
    eval_dataset_path: str | None = None
    eval_dataset_split: str = "test"
    eval_dataset_kwargs: dict | str | None = None
    max_prompt_tokens: int | None = None
    long_prompts: str = "drop"
    reward_funcs: list[str] | None = None
    reward_kwargs: dict | str | None = None
    verdict_steps: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.eval_dataset_kwargs = _loader_kwargs("eval_dataset", self.eval_dataset_kwargs)
        self._check_eval_datasets()
        self.reward_kwargs = {
            label: as_mapping(f"reward_kwargs.{label}", kwargs)
            for label, kwargs in as_mapping("reward_kwargs", self.reward_kwargs).items()
        }
        if self.long_prompts not in ("drop", "truncate_left"):
            raise UsageError(f"`long_prompts` is {self.long_prompts!r}; it must be 'drop' or 'truncate_left'.")
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
        for key in ("path", "kwargs"):
            if getattr(self, f"eval_dataset_{key}"):
                raise UsageError(
                    f"`eval_dataset` is a mapping, and `eval_dataset_{key}` is set too: set it for each of the sets, "
                    "inside the mapping."
                )

    def eval_datasets(self) -> dict[str, dict[str, Any]]:
        """
        Name to arguments of [`~gd2po_trl.datasets.load_dataset_by_name`], for each evaluation set. The single one has
        no name.
        """
        if self.eval_dataset is None:
            return {}
        split = self.eval_dataset_split
        if isinstance(self.eval_dataset, dict):
            return {name: {"name": name, "split": split, **options} for name, options in self.eval_dataset.items()}
        kwargs = as_mapping("eval_dataset_kwargs", self.eval_dataset_kwargs)
        return {"": {"name": self.eval_dataset, "path": self.eval_dataset_path, "split": split, **kwargs}}


def _loader_kwargs(dataset: str, value: Any) -> dict[str, Any]:
    kwargs = as_mapping(f"{dataset}_kwargs", value)
    for name in ("path", "split"):
        if name in kwargs:
            raise UsageError(f"`{dataset}_kwargs` holds `{name}`; that is the key `{dataset}_{name}`.")
    return kwargs
