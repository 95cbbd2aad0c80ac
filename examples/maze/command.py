"""Exit statuses of the study's commands, and one-line error messages for users."""

from __future__ import annotations

import sys
from collections.abc import Callable

from maze.environment.requirements import MissingRequirement, check_python


class UserError(ValueError):
    """An error that the user can fix. All other errors keep their traceback."""


def exit_status(command: Callable[[], int | None], *, resumes: bool = True) -> int:
    """Run a command and return the exit status: the number that the command returns, or 0 if it returns None.

    The status is 2 after an error that the user can fix, and 130 after Ctrl-C. Import packages inside the command, so
    that a missing package gives a one-line error message. `resumes` is whether the command can continue later.
    """
    try:
        check_python()
        return command() or 0
    except KeyboardInterrupt:
        kept = "The same command continues from the results on disk." if resumes else "Nothing was saved."
        print(f"\nInterrupted. {kept}", file=sys.stderr)
        return 130
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


def _message(error: Exception) -> str | None:
    """Return the message to print for an error that the user can fix, or None for any other error."""
    if isinstance(error, (UserError, MissingRequirement, OSError)):
        return str(error)
    if isinstance(error, ImportError):
        return f"{error}. Type: make study (or see 'Install' in the README)"
    from chanpatch.errors import ChanpatchError

    return str(error) if isinstance(error, ChanpatchError) else None
