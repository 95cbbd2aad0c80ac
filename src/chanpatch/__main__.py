"""Command line: list hook points, inspect and verify patch files, and report on the installation."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .errors import ChanpatchError, did_you_mean
from .registry.points import HookPoints, hook_points
from .saving.files import contents, verify

_MODEL = """MODEL is module:callable, such as my_model:example. The callable has no parameters and returns a tuple
(model, *inputs), in which the inputs are a batch of at least one example. The Python module may be a file in the
current folder."""

_EXAMPLES = """examples:
  chanpatch points my_model:example                            list every activation of a model
  chanpatch show channel_55.safetensors                        print the patches in a file
  chanpatch verify channel_55.safetensors --model my_model:example
  chanpatch doctor                                             versions, optional packages, devices

To load patches in Python: patches = chanpatch.load(file, points). Then run the model inside patched(points, patches).
"""

# The purpose of each optional package.
_OPTIONAL = {
    "matplotlib": "figures (extra: plot)",
    "safetensors": "saving and loading patches (extra: save)",
    "gymnasium": "rollouts in gymnasium environments (extra: rl)",
    "tqdm": "progress bars (extra: rl)",
    "sklearn": "linear probes (extra: probe)",
    "pandas": ".to_pandas()",
    "xarray": ".to_xarray()",
    "stable_baselines3": "policies from Stable-Baselines3",
    "transformers": "models from Hugging Face",
    "procgen": "the maze study (extra: maze; Python 3.10 and 3.11 only)",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; `arguments` defaults to the arguments on the command line."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "points":
            print(_points(chosen.model)[0])
        elif chosen.command == "show":
            print(contents(chosen.file))
        elif chosen.command == "verify":
            points, inputs = _points(chosen.model)
            verify(chosen.file, points, inputs)
            print(f"The run in '{chosen.file}' was reproduced bit for bit: same weights, inputs and output.")
        else:
            print(_doctor())
    except (ChanpatchError, OSError, ValueError, TypeError) as fault:
        parser.exit(1, f"{fault}\n")


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="chanpatch",
        description="List a model's hook points, and inspect and verify patch files written by chanpatch.save().",
        epilog=_EXAMPLES,
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"chanpatch {version('chanpatch')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, brief: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=brief, description=description, formatter_class=formatter)

    points = command("points", "list the hook points of a model", f"Print every hook point of a model.\n\n{_MODEL}")
    points.add_argument("model", metavar="MODEL", help="module:callable, such as my_model:example")
    show = command(
        "show",
        "print the contents of a patch file",
        "Print each patch in a file (site, edit, mask, hook point), then the receipt: SHA-256 digests of one run with\n"
        "the patches, which `chanpatch verify` compares with a new run. No code from the file is executed.",
    )
    show.add_argument("file", help="patch file, such as channel_55.safetensors")
    check = command(
        "verify",
        "compare a model with the receipt in a patch file",
        f"Run a model with the patches in a file, and compare the run with the file's receipt.\n\n{_MODEL}",
    )
    check.add_argument("file", help="patch file that was saved with inputs")
    check.add_argument("--model", required=True, metavar="MODEL", help="module:callable, such as my_model:example")
    command("doctor", "report on the installation", "Print versions, optional packages, and devices.")
    return parser


def _points(reference: str) -> tuple[HookPoints, tuple[Any, ...]]:
    """Import and call a function given as `module:callable`; return the model's hook points and the model's inputs."""
    name, _, attribute = reference.partition(":")
    if not name or not attribute or "/" in name or name.startswith(".") or name.endswith(".py"):
        raise ValueError(
            f"{reference!r} does not have the form module:callable, such as my_model:example for a function in "
            "my_model.py."
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as fault:
        if fault.name is None or not f"{name}.".startswith(f"{fault.name}."):
            raise ValueError(f"The module {name} imports a module that is missing: {fault}.") from fault
        raise ValueError(f"{fault}. Run the command in the folder that contains {name.partition('.')[0]}.py.") from None
    if not callable(function := getattr(module, attribute, None)):
        hint = did_you_mean(attribute, [each for each, value in vars(module).items() if callable(value)])
        raise ValueError(f"The module {name} has no callable '{attribute}'.{hint}")
    returned = function()
    if not isinstance(returned, tuple) or len(returned) < 2:
        got = f"a tuple of length {len(returned)}" if isinstance(returned, tuple) else type(returned).__name__
        raise ValueError(f"{reference} must return a tuple (model, *inputs), with at least one input; got {got}.")
    model, *inputs = returned
    return hook_points(model, *inputs), tuple(inputs)


def _doctor() -> str:
    """Return a report of versions, devices and optional packages."""
    cuda = ", ".join(torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count()))
    lines = [
        f"Python {platform.python_version()}, {platform.platform()}",
        *(f"{name} {_version(name)}" for name in ("chanpatch", "torch", "numpy", "einops", "scipy")),
        f"Devices: CPU with {torch.get_num_threads()} threads; CUDA: {cuda or 'none'}; "
        f"MPS: {'yes' if torch.backends.mps.is_available() else 'no'}",
        "Optional packages:",
    ]
    for name, purpose in _OPTIONAL.items():
        found = importlib.util.find_spec(name) is not None
        lines.append(f"  {'installed' if found else 'missing  '}  {name:18} {purpose}")
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    main()
