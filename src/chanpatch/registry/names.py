"""From what a user names to the hook points meant, with a trace or by names alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..engine.paths import Attr, Item, Path
from ..errors import HookPointError, did_you_mean

_STEP = re.compile(r"""\[(\d+|"[^"]*"|'[^']*')\]|\.([A-Za-z_]\w*)""")


def parse_path(text: str) -> Path | None:
    """Return the path that a text such as `[1]["h"].logits` names, or None if it names none."""
    steps: list[Item | Attr] = []
    end = 0
    for match in _STEP.finditer(text):
        if match.start() != end:
            return None
        end = match.end()
        steps.append(Attr(match[2]) if match[2] else Item(ast.literal_eval(match[1])))
    return tuple(steps) if end == len(text) else None


def glob(pattern: str) -> Callable[[str], object]:
    """Return a function that tells whether a name matches; brackets are ordinary characters in these names."""
    parts = (".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
    return re.compile("".join(parts), re.DOTALL).fullmatch


@dataclass(frozen=True)
class BarePoint:
    """What a name alone says of a hook point, where the model was not traced."""

    name: str
    module: str
    side: Literal["in", "out"]
    path: Path
    call: int | None


def _parsed(known: Mapping[str, nn.Module], name: str) -> BarePoint:
    if name and name in known:
        return BarePoint(name, name, "out", (), None)
    ends = [match.start() for match in re.finditer(r"\.(?:in|out)(?![^.\[])|$", name)]
    for end in reversed(ends):  # a module may itself be called "out": the longest module name wins
        module, _, call = name[:end].partition("#") if name[:end] not in known else (name[:end], "", "")
        tail = re.fullmatch(r"\.(in|out)(.*)|", name[end:], re.DOTALL)
        path = parse_path(tail[2] or "") if tail else None
        if module in known and path is not None and (not call or call.isdigit()) and (name[end:] or module):
            side: Literal["in", "out"] = "in" if tail and tail[1] == "in" else "out"
            if side == "out" or path:
                return BarePoint(name, module, side, path, int(call) if call else None)
    raise HookPointError(
        f"No hook point named '{name}'.{did_you_mean(name, known)} "
        f"({len(known)} modules; hook_points(model, *inputs) lists every hook point, taps included.)"
    )
