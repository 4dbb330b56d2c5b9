"""The two errors of this package, a mistake in the user's input and a failure of a reward, and the text of any."""


class UsageError(ValueError):
    """A mistake in a recipe, a command line or an input file. The command line prints it without a traceback."""


class RewardError(RuntimeError):
    """A reward function raised, left, hung, or returned something that is not one number or `None` per completion."""


def one_line(error: BaseException, empty: str = "") -> str:
    """What an exception says, in one line; `empty` if that is nothing, or if its `__str__`, foreign code, fails."""
    try:
        return " ".join(str(error).split()) or empty
    except Exception:
        return empty
