"""The command line: show the contents of a file of saved patches.

python -m chanpatch show channel_55.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version

from .errors import ChanpatchError
from .saving.files import contents


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command, with the arguments of the process if None."""
    parser = argparse.ArgumentParser(
        prog="python -m chanpatch",
        description="Inspect files of patches that chanpatch.save() wrote.",
        epilog="In Python, chanpatch.load(file, points) returns the patches, checked against the hook points of a "
        "model, and `with patched(points, patches):` runs it with them.",
    )
    parser.add_argument("--version", action="version", version=f"chanpatch {version('chanpatch')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    show = commands.add_parser(
        "show",
        help="print the contents of a file of patches",
        description="Print each patch of a file: site, edit, patched elements (where), hook point; then the receipt, "
        "SHA-256 digests of one run with the patches, which chanpatch.saving.verify(file, points, inputs) repeats. "
        "Showing a file runs no code from it.",
    )
    show.add_argument("file", help="such as channel_55.safetensors")
    chosen = parser.parse_args(arguments)
    try:
        print(contents(chosen.file))
    except (ChanpatchError, OSError) as fault:
        parser.exit(1, f"{fault}\n")


if __name__ == "__main__":
    main()
