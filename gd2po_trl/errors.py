"""The two errors of this package: a mistake in the user's input, and a failure of a reward."""


class UsageError(ValueError):
    """A mistake in a recipe, a command line or an input file. The command line prints it without a traceback."""


class RewardError(RuntimeError):
    """A reward function raised, left, hung, or returned something that is not one number or `None` per completion."""
