"""The command line: what a file of saved interventions holds.

python -m chanpatch show channel_55.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version

from .errors import ChanpatchError
from .saving.files import contents


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: Of the command line; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        prog="python -m chanpatch",
        description="Look at interventions that chanpatch.save() wrote.",
        epilog="In Python, chanpatch.load(file, points) returns the patches, checked against the hook points of a "
        "model, and `with patched(points, patches):` runs it with them.",
    )
    parser.add_argument("--version", action="version", version=f"chanpatch {version('chanpatch')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    show = commands.add_parser(
        "show",
        help="print what a file of interventions holds",
        description="Print each patch of a file: its site, its edit, the elements it applies to (where), and the hook "
        "point it was made for. A receipt says what one run with the patches was, in SHA-256 digests: "
        "chanpatch.saving.verify(file, points, inputs) repeats that run. Nothing in the file is run.",
    )
    show.add_argument("file", help="such as channel_55.safetensors")
    chosen = parser.parse_args(arguments)
    try:
        print(contents(chosen.file))
    except (ChanpatchError, OSError) as fault:
        parser.exit(1, f"{fault}\n")


if __name__ == "__main__":
    main()
