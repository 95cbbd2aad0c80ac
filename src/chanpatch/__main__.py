"""Command line: print the contents of a patch file.

python -m chanpatch show channel_55.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version

from .errors import ChanpatchError
from .saving.files import contents


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; `arguments` defaults to the arguments on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m chanpatch",
        description="Inspect patch files written by chanpatch.save().",
        epilog="In Python, patches = chanpatch.load(file, points) loads the patches and checks them against a model's "
        "hook points; run the model inside `with patched(points, patches):` to apply the patches.",
    )
    parser.add_argument("--version", action="version", version=f"chanpatch {version('chanpatch')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    show = commands.add_parser(
        "show",
        help="print the contents of a patch file",
        description="Print each patch in a file (site, edit, mask, hook point), then the receipt: SHA-256 digests of "
        "one run with the patches, which chanpatch.saving.verify(file, points, inputs) compares with a new run. "
        "No code from the file is executed.",
    )
    show.add_argument("file", help="patch file, such as channel_55.safetensors")
    chosen = parser.parse_args(arguments)
    try:
        print(contents(chosen.file))
    except (ChanpatchError, OSError) as fault:
        parser.exit(1, f"{fault}\n")


if __name__ == "__main__":
    main()
