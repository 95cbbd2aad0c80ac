"""Grammar for hook-point names: a module's name, `#call`, `.in` or `.out`, and a path. A tap has only its own name.

Only this file formats, parses and matches names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import nn

from ..engine.paths import Attr, Item, Path, Place
from ..errors import HookPointError, did_you_mean

_SIDE = re.compile(r"\.(in|out)(?![^.\[])|$")
_STEP = re.compile(r"""\[(\d+|"[^"]*"|'[^']*')\]|\.([A-Za-z_]\w*)""")


def written_name(module: str, side: str, path: Path, call: int | None) -> str:
    """Return the name of a hook point. `call` must be None if the module or tap is called only once."""
    base = module if call is None else f"{module}#{call}"
    if side == "tap" or (side == "out" and module and not path):
        return base
    return f"{base}.{side}{path_text(path)}"


def parsed_name(known: Mapping[str, nn.Module], name: str) -> Place:
    """Parse a hook point's name into a place. `known` maps module names to modules.

    Raises:
        HookPointError: If the name is not valid.
    """
    for match in reversed([*_SIDE.finditer(name)]):  # a module may be named "out", so try the longest name first
        base, path = name[: match.start()], parsed_path(name[match.end() :])
        module, _, call = (base, "", "") if base in known else base.partition("#")
        side: Literal["in", "out"] = "in" if match[1] == "in" else "out"
        is_tensor = path if side == "in" else match[1] or module  # "conv1.in" means all inputs, not one tensor
        if module in known and path is not None and is_tensor and (call.isdigit() or not call):
            return Place(name, module, side, path, int(call) if call else None)
    if is_pattern(name):
        raise HookPointError(
            f"'{name}' is a pattern, but an untraced model has no list of hook points to match. Pass "
            "hook_points(model, *inputs) instead of the model."
        )
    raise HookPointError(
        f"{unknown_name(name, known, known)} "
        "To list all hook points, including taps, print hook_points(model, *inputs)."
    )


def unknown_name(name: str, modules: Mapping[str, nn.Module], known: Iterable[str]) -> str:
    """Return the error message for a name that is not in `known`, the names of the hook points.

    `modules` maps module names to modules.
    """
    module, _, weight = name.rpartition(".")
    known = list(known)
    if module in modules and weight in {**modules[module]._parameters, **modules[module]._buffers}:
        return f"'{name}' is a weight, not a hook point. To create a hook point, call tap('name', weight) in forward()."
    from ..huggingface import own_name  # used only for this message

    if name.endswith(("attn.hook_pattern", "attn.hook_attn_scores")):
        return (
            f"'{name}' is a name from TransformerLens. In this model, that tensor is a local variable of the attention "
            "function. With attn_implementation='eager', you can record the pattern as an output of the attention "
            "module. To patch the pattern, call tap() in the attention function."
        )
    if own := own_name(name, known):
        return f"'{name}' is a name from TransformerLens. In this model, the name is {own}."
    inside = [each for each in known if each.endswith(f".{name}")]
    hint = f" Did you mean '{inside[0]}'?" if len(inside) == 1 else did_you_mean(name, known)
    return f"No hook point named '{name}'.{hint}"


def path_text(path: Path) -> str:
    """Format a path as it appears in a name, such as `[1]["h"].logits`."""
    return "".join(map(str, path))


def parsed_path(text: str) -> Path | None:
    """Parse a path formatted by `path_text`; return None for any other text."""
    steps: list[Item | Attr] = []
    end = 0
    for match in _STEP.finditer(text):
        if match.start() != end:
            return None
        end = match.end()
        steps.append(Attr(match[2]) if match[2] else Item(ast.literal_eval(match[1])))
    return tuple(steps) if end == len(text) else None


def is_pattern(name: str) -> bool:
    """Return whether a string contains a wildcard."""
    return "*" in name or "?" in name


def spellings(name: str, module: str | None = None, aliases: Iterable[str] = ()) -> list[str]:
    """Return a hook point's name and aliases in the form with which patterns are compared.

    In this form, a dot and a line break follow the module's name. If `module` is None, the module's name is inferred
    from the hook point's name.
    """
    if module is None:
        module = re.sub(r"(?s)(#\d+)?(\.(in|out)(\[.*)?)?$", "", name, count=1)
    end = name[len(module) :]
    bases = (module, *(alias.removesuffix(end) for alias in aliases))
    return [f"{base}.\n{end}" if base else f"\n{end}" for base in bases]


def selected(pattern: str, names: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the names of the hook points that match a pattern, in the order of `names`.

    `names` maps each hook point's name to the result of `spellings`. A name consists of parts, separated by dots that
    are not inside brackets; `#k`, `.in[...]` and `.out[...]` belong to the preceding part. `*` matches any text within
    a part, `**` matches any number of parts, and `?` matches one character. A pattern without `#k` matches all calls. A
    pattern without `.in` or `.out` matches all outputs. A pattern that ends with an incomplete path matches all tensors
    whose paths start with the incomplete path.

    Raises:
        HookPointError: If `?` would miss indices with several digits, as `h.?` would miss `h.10`.
    """
    if pattern in names:
        return [pattern]
    for match in reversed([*_SIDE.finditer(pattern)]):  # a module may be named "out", so try the longest name first
        one, longer = (_compiled(pattern, match.start(), numbers) for numbers in ("", r"|\d{%d,}"))
        chosen = dict.fromkeys(name for name, each in names.items() if any(map(one.fullmatch, each)))
        left_out = [name for name, each in names.items() if any(map(longer.fullmatch, each)) and name not in chosen]
        if chosen and left_out:
            shown = ", ".join(left_out[:6]) + (f", ... ({len(left_out)} in all)" if len(left_out) > 6 else "")
            raise HookPointError(
                f"'{pattern}' does not match {shown}, because '?' matches exactly one character. Use "
                f"'{re.sub(r'[?]+', '*', pattern)}' to include these hook points, or pass a list of names."
            )
        if chosen:
            return [*chosen]
    return []


def alternative(pattern: str, names: Mapping[str, Iterable[str]]) -> str:
    """Return a hint for an error message: a similar pattern that matches hook points, or "" if nothing matches."""
    like = {
        re.sub(r"#[\d*?]+", "", pattern): "a module that is called once has no call index.",
        re.sub(r"^\*\.", "**.", pattern): "`*` stops at a dot; `**` does not.",
        f"**.{pattern}": "`**.` matches modules inside other modules.",
    }
    found = ((each, why, len(selected(each, names))) for each, why in like.items())
    return next(
        (f" '{each}' would match {count} hook point{'s' * (count != 1)}: {why}" for each, why, count in found if count),
        "",
    )


def _compiled(pattern: str, end: int, numbers: str) -> re.Pattern[str]:
    """Compile a pattern to a regular expression that matches spellings.

    `end` is the length of the part of the pattern that must match a module's name. `numbers` is added to the regular
    expression after each run of `?`, as an alternative to the run. `%d` in `numbers` stands for the length of the run.
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
