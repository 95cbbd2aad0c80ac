"""The report on a run, as one self-contained HTML page and as Markdown, made from the run's CSV files alone.

The text between results is in `report.html.jinja` and `report.md.jinja`.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from PIL import Image

from maze.analysis.cells import Cell, Row, Table, Tables, read_table
from maze.analysis.part import Finding, Part
from maze.policy.shipped import Measured, described, introduction
from maze.report.differences import differences, side_by_side
from maze.report.limits import limits
from maze.results import Damaged, read_manifest, replace_table, replace_text, replaced

_COLORS = 128  # in a figure
_AGREES = "agrees with the reference"


@dataclass(frozen=True)
class Result:
    """One part for one policy, read from its folder."""

    part: Part
    subject: str
    folder: Path
    seconds: float
    tables: Tables
    finding: Finding

    @property
    def picture(self) -> Path:
        return self.folder / f"{self.part.name}.png"

    @property
    def encoded(self) -> str:
        return base64.b64encode(self.picture.read_bytes()).decode()

    def texts(self) -> Iterator[tuple[str, str]]:
        yield "Result", self.finding.ours
        yield "The post", f"{self.part.post} The result {_AGREES}: {self.finding.agrees}."
        yield "Interpretation", self.finding.follows
        yield "Limitations", self.part.limits

    def row(self, **more: str) -> Row:
        """The result in one line, with further cells before the verdict."""
        return {"result": self.finding.headline, **more, _AGREES: self.finding.agrees}


@dataclass(frozen=True)
class Contents:
    """The contents of a report, as its templates use them."""

    folder: Path  # folder of the run
    command: str  # command that made the run
    known: Mapping[str, Mapping[str, Any]]  # the facts that decide the numbers of every policy, the main policy first
    results: Mapping[tuple[str, str], Result]  # results by policy and part
    left_out: Sequence[str]  # parts on disk that were measured otherwise, and the difference

    @cached_property
    def sections(self) -> list[list[Result]]:
        """The main policy's parts in the order of the report, each followed by the same part on other policies."""
        main = next(iter(self.known))
        names = [name for subject, name in self.results if subject == main]
        return [[self.results[each, name] for each in self.known if (each, name) in self.results] for name in names]

    @property
    def measured(self) -> Measured:
        return {
            subject: {name: result.tables for (policy, name), result in self.results.items() if policy == subject}
            for subject in self.known
        }

    @property
    def summary(self) -> Table:
        return [{"part": main.part.name, **main.row(**{"the post": main.part.post})} for main, *_ in self.sections]

    @property
    def every_policy(self) -> Table:
        shared = [each for section in self.sections if len(section) > 1 for each in section]
        return [{"part": each.part.name, "policy": each.subject, **each.row()} for each in shared]

    @cached_property
    def differences(self) -> Table:
        """The headline figures of every policy, and the differences from the main policy's figures."""
        return differences(self.measured)

    def facts(self, subject: str) -> str:
        """The facts that decide the numbers of a policy, in words."""
        known = self.known[subject]
        versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
        return (
            f"weights {known['weights_name']} (width {known['width']}, sha256 {known['weights'][:12]}), "
            f"n={known['n']}, seed {known['seed']}, {versions}"
        )

    def times(self) -> tuple[str, Table]:
        """The part that takes the most time, and the seconds of all parts by policy."""
        seconds = {part[0].part.name: {each.subject: each.seconds for each in part} for part in self.sections}
        totals = {name: sum(of.values()) for name, of in seconds.items()}
        longest, whole = max(totals, key=lambda name: totals[name]), sum(totals.values())
        fraction = totals[longest] / whole if whole else 0.0
        rows = [
            {"part": name, **{subject: f"{of[subject]:.0f}" if subject in of else "" for subject in self.known}}
            for name, of in seconds.items()
        ]
        return f"Measuring took {whole / 60:.0f} minutes in all; most of it {longest}, {fraction:.0%}.", rows


def write_report(folder: Path, known: Mapping[str, Mapping[str, Any]], parts: Mapping[str, Part], command: str) -> Path:
    """Draw the figures of the parts in a run's folder, write report.html and report.md, and return the first.

    Parts that are damaged, or were measured with anything else than `known`, are left out and named.

    Args:
        folder: folder of the run.
        known: the facts that decide the numbers of every policy, as in its manifests; the main policy first.
        parts: parts by name, in the order of the report.
        command: command that made the run.
    """
    results, left_out = {}, []
    for name, part in parts.items():
        for subject, wanted in known.items():
            here = folder / subject / name
            if not here.exists():
                continue
            try:
                manifest = read_manifest(here)
            except Damaged as fault:
                left_out.append(f"{subject}/{name} ({fault})")
                continue
            if other := differing(manifest, wanted):
                left_out.append(f"{subject}/{name} ({', '.join(other)})")
            else:
                tables = {Path(file).stem: read_table(here / file) for file in manifest["files"]}
                results[subject, name] = Result(part, subject, here, manifest["seconds"], tables, part.finding(tables))
    for result in results.values():
        _draw(result)
    contents = Contents(folder, command, known, results, left_out)
    (folder / "differences.csv").unlink(missing_ok=True)
    if contents.differences:
        replace_table(folder / "differences.csv", contents.differences)
    texts = {
        "introduction": introduction(contents.measured),
        "descriptions": list(described(contents.measured)),
        "limits": limits(),
        "differences": side_by_side(contents.differences) if contents.differences else None,
    }
    for name in ("report.md", "report.html"):
        replace_text(folder / name, _templates().get_template(f"{name}.jinja").render(contents=contents, **texts))
    return folder / name


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The names of the facts in which a manifest differs; facts within `versions` have their own names."""
    names = []
    for name, value in wanted.items():
        other = found.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            names += differing(other, value)
        elif other != value:
            names.append(name)
    return names


def _draw(result: Result) -> None:
    """Draw the part's figure in few colors, so that a report on all policies is a few MB."""
    drawn = io.BytesIO()
    result.part.figure(result.tables).savefig(drawn, dpi=90)
    with replaced(result.picture) as partial:
        Image.open(drawn).convert("RGB").quantize(_COLORS).save(partial, optimize=True)


def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(("html.jinja",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"cell": _cell, "code": _code}
    return templates


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _code(text: str) -> Markup:
    """Text as HTML, with `names` in a code font."""
    return Markup(re.sub("`(.+?)`", r"<code>\1</code>", str(escape(text))))
