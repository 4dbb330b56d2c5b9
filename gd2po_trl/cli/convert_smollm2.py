"""`gd2po convert-smollm2`."""

from ..smollm2 import main


__all__ = ["main"]
