"""Training the same recipe with several methods and seeds, and telling their results apart from noise."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .experiment import compare

__all__ = ["compare"]


def __getattr__(name: str) -> Any:
    # Not at once: most of this package is of use without a trainer.
    if name == "compare":
        from .experiment import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
