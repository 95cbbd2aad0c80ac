"""The grammar of a hook point's name: `module`, `#call`, `.in` or `.out`, and a path; or the name of a tap.

Names are written, parsed and matched by patterns here and nowhere else.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import nn

from ..engine.hooks import Place
from ..engine.paths import Attr, Item, Path
from ..errors import HookPointError, did_you_mean

_SIDE = re.compile(r"\.(in|out)(?![^.\[])|$")
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
    for match in reversed([*_SIDE.finditer(name)]):  # a module may itself be called "out": the longest name wins
        base, path = name[: match.start()], parsed_path(name[match.end() :])
        module, _, call = (base, "", "") if base in known else base.partition("#")
        side: Literal["in", "out"] = "in" if match[1] == "in" else "out"
        is_tensor = path if side == "in" else match[1] or module  # the inputs together are not one, nor is ""
        if module in known and path is not None and is_tensor and (call.isdigit() or not call):
            return Place(name, module, side, path, int(call) if call else None)
    if is_pattern(name):
        raise HookPointError(
            f"'{name}' is a pattern, and a bare model has no list of hook points to match. Give its hook points: "
            "hook_points(model, *inputs)."
        )
    raise HookPointError(
        f"{unknown_name(name, known, known)} "
        f"({len(known)} modules; hook_points(model, *inputs) lists every hook point, taps included.)"
    )


def unknown_name(name: str, modules: Mapping[str, nn.Module], known: Iterable[str]) -> str:
    """Return the reason why there is no such hook point: it is a weight, or it is not among the known names."""
    module, _, weight = name.rpartition(".")
    if module in modules and weight in {**modules[module]._parameters, **modules[module]._buffers}:
        return f"'{name}' is a weight, not a hook point. In the forward, tap('name', weight) makes it one."
    return f"No hook point named '{name}'.{did_you_mean(name, known)}"


def path_text(path: Path) -> str:
    """Return a path as it stands in a name, such as `[1]["h"].logits`."""
    return "".join(map(str, path))


def parsed_path(text: str) -> Path | None:
    """Return the path that `path_text` wrote as this text, or None."""
    steps: list[Item | Attr] = []
    end = 0
    for match in _STEP.finditer(text):
        if match.start() != end:
            return None
        end = match.end()
        steps.append(Attr(match[2]) if match[2] else Item(ast.literal_eval(match[1])))
    return tuple(steps) if end == len(text) else None


def is_pattern(name: str) -> bool:
    """Return whether a string has a wildcard."""
    return "*" in name or "?" in name


def spellings(name: str, module: str | None = None, aliases: Iterable[str] = ()) -> list[str]:
    """Return a hook point's name and aliases with a line break after the module, for `selected`.

    Without the module's name, it is guessed from the hook point's.
    """
    if module is None:
        module = re.sub(r"(?s)(#\d+)?(\.(in|out)(\[.*)?)?$", "", name, count=1)
    end = name[len(module) :]
    bases = (module, *(alias.removesuffix(end) for alias in aliases))
    return [f"{base}.\n{end}" if base else f"\n{end}" for base in bases]


def selected(pattern: str, names: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the hook points that a pattern selects, in the order given.

    A name has parts, which end at dots outside brackets; `#k`, `.in[...]` and `.out[...]` belong to the part before.
    `*` is any text within a part, `**` any number of parts, `?` one character. A pattern without `#k` selects every
    call, one without `.in` or `.out` all outputs, and the beginning of a path all tensors inside.

    Args:
        pattern: Such as `"h.*"`, `"h.*.in[0]"`, `"**.relu?"`.
        names: For each hook point, the result of `spellings`.

    Raises:
        HookPointError: If `?` leaves out the longer numbers of a list, such as h.10 with `h.?`.
    """
    if pattern in names:
        return [pattern]
    for match in reversed([*_SIDE.finditer(pattern)]):  # a module may itself be called "out": the longest name wins
        one, longer = (_compiled(pattern, match.start(), numbers) for numbers in ("", r"|\d{%d,}"))
        chosen = dict.fromkeys(name for name, each in names.items() if any(map(one.fullmatch, each)))
        left_out = [name for name, each in names.items() if any(map(longer.fullmatch, each)) and name not in chosen]
        if chosen and left_out:
            shown = ", ".join(left_out[:6]) + (f", ... ({len(left_out)} in all)" if len(left_out) > 6 else "")
            raise HookPointError(
                f"'{pattern}' leaves out {shown}: '?' is one character. Write '{re.sub(r'[?]+', '*', pattern)}' to "
                "select these too, or name the hook points in a list."
            )
        if chosen:
            return [*chosen]
    return []


def alternative(pattern: str, names: Mapping[str, Iterable[str]]) -> str:
    """Return advice on a pattern that selects nothing: one like it that selects something, if there is one."""
    like = {
        re.sub(r"#[\d*?]+", "", pattern): "a module that is called once has no call number.",
        re.sub(r"^\*\.", "**.", pattern): "`*` ends at a dot, `**` does not.",
    }
    found = ((each, why, len(selected(each, names))) for each, why in like.items())
    return next((f" '{each}' matches {count}: {why}" for each, why, count in found if count), "")


def _compiled(pattern: str, end: int, numbers: str) -> re.Pattern[str]:
    """Return a regular expression for spellings, of a pattern whose module ends at `end`.

    `numbers` is an alternative to `?`, with the count of `?` to fill in.
    """

    def regex(text: str, any_text: str) -> str:
        def translated(match: re.Match[str]) -> str:
            run, count = match[0], len(match[0])
            if run == "[*]":
                return r"""\[(?:"[^"]*"|[^\]"]*)\]"""
            if run[0] == "?":
                return rf"(?:[^.\n]{{{count}}}{numbers and numbers % count})"
            return any_text if run[0] == "*" else re.escape(run)

        return re.sub(r"\[\*\]|\*+|\?+|.", translated, text, flags=re.DOTALL)

    named = re.fullmatch(r"(.*?)(?:#([\d*?]+))?", pattern[:end], re.DOTALL)
    assert named  # any text matches
    part = r"(?:\[[^\]\n]*\]?|[^.\[\n])*"
    parts = named[1].split(".") if named[1] else []
    module = "".join(rf"(?:{part}\.)*" if each == "**" else regex(each, part) + r"\." for each in parts)
    call = regex(f"#{named[2]}", r"\d*") if named[2] else r"(?:#\d+)?"
    path = regex(pattern[end:], '[^"]*')
    inside = r"(?:[.\[].*)?" if path else r"(?:\.out.*)?"
    return re.compile(rf"{module}\n{call}{path}{inside}", re.DOTALL)
