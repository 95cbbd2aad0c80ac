"""The grammar of a hook point's name: `module`, `#call`, `.in` or `.out`, and a path; or the name of a tap.

Names are written and parsed here and nowhere else.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Literal

from torch import nn

from ..engine.hooks import Place
from ..engine.paths import Attr, Item, Path
from ..errors import HookPointError, did_you_mean

_STEP = re.compile(r"""\[(\d+|"[^"]*"|'[^']*')\]|\.([A-Za-z_]\w*)""")


def written_name(module: str, side: str, path: Path, call: int | None) -> str:
    """Return the name of a hook point, or of a tap; `call` is None if the module is called once."""
    base = module if call is None else f"{module}#{call}"
    if side == "tap" or (side == "out" and module and not path):
        return base
    return f"{base}.{side}{path_text(path)}"


def parsed_name(known: Mapping[str, nn.Module], name: str) -> Place:
    """Return the hook point with this name in a model with these modules.

    Raises:
        HookPointError: If there is no such module, or the name does not follow the grammar.
    """
    if name and name in known:
        return Place(name, name, "out", (), None)
    ends = [match.start() for match in re.finditer(r"\.(?:in|out)(?![^.\[])|$", name)]
    for end in reversed(ends):  # a module may itself be called "out": the longest module name wins
        module, _, call = name[:end].partition("#") if name[:end] not in known else (name[:end], "", "")
        tail = re.fullmatch(r"\.(in|out)(.*)|", name[end:], re.DOTALL)
        path = parsed_path(tail[2] or "") if tail else None
        if module in known and path is not None and (not call or call.isdigit()) and (name[end:] or module):
            side: Literal["in", "out"] = "in" if tail and tail[1] == "in" else "out"
            if side == "out" or path:
                return Place(name, module, side, path, int(call) if call else None)
    raise HookPointError(
        f"No hook point named '{name}'.{did_you_mean(name, known)} "
        f"({len(known)} modules; hook_points(model, *inputs) lists every hook point, taps included.)"
    )


def path_text(path: Path) -> str:
    """Return a path as it stands in a name, such as `[1]["h"].logits`."""
    return "".join(map(str, path))


def parsed_path(text: str) -> Path | None:
    """Return the path that `path_text` wrote so, or None if there is none."""
    steps: list[Item | Attr] = []
    end = 0
    for match in _STEP.finditer(text):
        if match.start() != end:
            return None
        end = match.end()
        steps.append(Attr(match[2]) if match[2] else Item(ast.literal_eval(match[1])))
    return tuple(steps) if end == len(text) else None


def glob(pattern: str) -> Callable[[str], object]:
    """Return a function that matches names: `*` is any text, `?` any one character, brackets are ordinary."""
    parts = (".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
    return re.compile("".join(parts), re.DOTALL).fullmatch
