"""`gd2po chat`, which is `gd2po generate` turn by turn."""

from .generate import chat as main


__all__ = ["main"]
