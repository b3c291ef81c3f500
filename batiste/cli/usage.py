# SPDX-License-Identifier: Apache-2.0
"""What a command ends with: its exit codes, and the error of a command that was written wrongly."""

from __future__ import annotations

OK = 0
NEGATIVE = 1  # a threshold was missed, the other checkpoint is worse, the training broke down
USAGE = 2  # the command is wrong; argparse's own
FAILED = 3  # the program raised: a gate must not take that for a verdict
INTERRUPTED = 130  # Ctrl-C; 143 after SIGTERM


class UsageError(Exception):
    """The command is wrong: what happened, got and expected, and the fix. Shown without a traceback.

    >>> print(UsageError("There is no setting 'lrr'", expected="one of lr, steps", fix="did you mean 'lr'?"))
    There is no setting 'lrr': expected one of lr, steps.
      fix: did you mean 'lr'?
    """

    def __init__(self, problem: str, *, got: object = None, expected: object = None, fix: str | None = None):
        details = [f"{word} {value}" for word, value in (("got", got), ("expected", expected)) if value is not None]
        text = f"{problem}: {', '.join(details)}." if details else f"{problem}."
        super().__init__(f"{text}\n  fix: {fix}" if fix else text)
