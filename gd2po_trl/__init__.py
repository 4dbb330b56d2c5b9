"""Multi-reward RL post-training with GD²PO on top of TRL."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.util import spec_from_loader
from typing import TYPE_CHECKING, Any

from ._version import __version__


if TYPE_CHECKING:
    from .advantages import AdvantageBreakdown, compute_advantages, subsample_advantages
    from .gd2po_config import METHODS, GD2POConfig
    from .gd2po_trainer import GD2POTrainer

# Loaded on first use, so that `import gd2po_trl` (and `gd2po --help`) does not pay for torch and TRL.
_EXPORTS = {
    "AdvantageBreakdown": "advantages",
    "compute_advantages": "advantages",
    "subsample_advantages": "advantages",
    "METHODS": "gd2po_config",
    "GD2POConfig": "gd2po_config",
    "GD2POTrainer": "gd2po_trainer",
}

__all__ = [
    "METHODS",
    "AdvantageBreakdown",
    "GD2POConfig",
    "GD2POTrainer",
    "__version__",
    "compute_advantages",
    "subsample_advantages",
]

# Modules that 0.2 moved, by their names in 0.1, which recipes and scripts may still use.
_MOVED = {
    "datasets.safe_alignment": "tasks.safe_alignment.data",
    "datasets.tool_calling": "tasks.tool_calling.data",
    "checkpoints": "run_log",
    "collapse": "diagnostics",
    "completions_table": "trl_workarounds",
    "dry_run": "training.dry_run",
    "evaluation.api_bank": "tasks.tool_calling.api_bank",
    "evaluation.engine": "evaluation.running",
    "evaluation.safe_alignment": "tasks.safe_alignment.evaluation",
    "memory": "training.memory",
    "packages": "preflight",
    "policy": "training.policy",
    "recipe_catalog": "recipe.catalog",
    "recipe_files": "recipe.files",
    "recipe_keys": "recipe.keys",
    "recipe_values": "recipe.values",
    "resuming": "training.resuming",
    "rewards.conversation": "reward_models.conversation",
    "rewards.direction": "reward_models.direction",
    "rewards.guard": "reward_guard",
    "rewards.preference": "reward_models.in_process",
    "rewards.remote": "reward_models.served",
    "rewards.text_scorers": "reward_models.text_scorer",
    "rewards.tool_calling": "tasks.tool_calling.rewards",
    "sft": "training.sft",
    "tool_calls": "tasks.tool_calling.text_format",
}


class _MovedModules(MetaPathFinder, Loader):
    """Imports the modules of [`_MOVED`] under their old names: the same module objects, not copies."""

    def find_spec(self, fullname, path=None, target=None):
        package, _, module = fullname.partition(".")
        return spec_from_loader(fullname, self) if package == __name__ and module in _MOVED else None

    def exec_module(self, module):
        old = module.__spec__.name
        sys.modules[old] = import_module(f".{_MOVED[old.partition('.')[2]]}", __name__)


sys.meta_path.append(_MovedModules())


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
