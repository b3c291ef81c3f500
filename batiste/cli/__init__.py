# SPDX-License-Identifier: Apache-2.0
"""The command line: `batiste train|evaluate|compare|inspect PROGRAM.py:NAME --set key=value`.

NAME is a function from a configuration, a dataclass, to an Experiment:

    @dataclass
    class Config:
        lr: float = 1e-3

    def digits(config: Config) -> Experiment:
        ...
        return Experiment(state=(model, optimizer), step=train_step(loss), data=batches, until=1000)

Exit codes: 0 done; 1 a threshold was missed, or the result is negative; 2 the command is wrong; 3 the program failed;
130 interrupted (143 by SIGTERM).

A command is a line of the table in `commands.py`; what it does is loaded when it is called, so that `batiste --help` is
quick.
"""

from __future__ import annotations

import argparse
import pkgutil
import sys
import traceback
from collections.abc import Sequence

from batiste.version import __version__

from .commands import COMMANDS, EXIT_CODES
from .experiment import Experiment
from .program import program
from .settings import table
from .usage import FAILED, INTERRUPTED, OK, USAGE, UsageError

__all__ = ["Experiment", "UsageError", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and gives its exit code."""
    parser = argument_parser()
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return OK
    try:
        if args.help:
            print(args.parser.format_help())
            if getattr(args, "program", None):
                print(about(args.program))
            return OK
        return pkgutil.resolve_name(COMMANDS[args.command].run)(args)
    except UsageError as error:
        print(f"batiste {args.command}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return FAILED


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "batiste", description="Neural networks in JAX.", epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"batiste {__version__}")
    below = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        sub = below.add_parser(
            name, help=command.summary, description=command.summary, epilog=EXIT_CODES, add_help=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("-h", "--help", action="store_true", help="show this, and the settings of the program")
        command.options(sub)
        sub.set_defaults(parser=sub)
    return parser


def about(target: str) -> str:
    """The settings of a program, for its help."""
    found = program(target)
    said = f"settings of {found.name}, changed by --set key=value:"
    return f"{said}\n{table(found.config)}" if found.config else f"{found.name} has no settings"
