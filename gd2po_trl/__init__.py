"""Multi-reward RL post-training with GD²PO on top of TRL."""

from importlib import import_module
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


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
