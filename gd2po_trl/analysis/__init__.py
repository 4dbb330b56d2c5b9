"""What the rewards of logged rollouts do to each other and what to do about it: the library of `gd2po analyze`."""

from typing import TYPE_CHECKING, Any

from .analyzer import Report, analyze, analyze_rewards


if TYPE_CHECKING:
    from .callback import VerdictCallback

__all__ = ["Report", "VerdictCallback", "analyze", "analyze_rewards"]


def __getattr__(name: str) -> Any:
    # Loads transformers, which reading a log does not need.
    if name == "VerdictCallback":
        from .callback import VerdictCallback

        return VerdictCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
