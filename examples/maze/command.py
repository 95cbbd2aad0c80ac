"""Exit status of the study's commands, and one-line errors for users."""

from __future__ import annotations

import sys
from collections.abc import Callable

from maze.environment.requirements import MissingRequirement


class UserError(ValueError):
    """An error that the user can mend. All others keep their traceback."""


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit status: its own, 0 for None, 2 for an error of the user's, 130 for Ctrl-C.

    Args:
        command: imports its packages itself, so that a missing one gives a one-line error.
    """
    try:
        return command() or 0
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from what is on disk.", file=sys.stderr)
        return 130
    except Exception as error:
        what_to_mend = _what_to_mend(error)
        if what_to_mend is None:
            raise
        print(f"error: {what_to_mend}", file=sys.stderr)
        return 2


def _what_to_mend(error: Exception) -> str | None:
    """The message for the user; None for a fault of ours."""
    if isinstance(error, (UserError, MissingRequirement, OSError)):
        return str(error)
    if isinstance(error, ImportError):
        return f"{error}. Type: make study (or see 'Install' in the README)"
    from chanpatch.errors import ChanpatchError

    return str(error) if isinstance(error, ChanpatchError) else None
