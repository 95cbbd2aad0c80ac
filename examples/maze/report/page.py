"""The report on a run, as one self-contained HTML page and as Markdown, made from the run's CSV files alone.

The text between results is in `report.html.jinja` and `report.md.jinja`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from maze.analysis.cells import Tables, above, below, read_table
from maze.analysis.part import Finding, Part
from maze.measurements import spatial
from maze.policy.shipped import shipped_name
from maze.report.answer import CONFIRMED, EPISODES, IN_PART, MISSING, NUMBERS, OPEN, PREDICTED, corrected, status
from maze.report.figures import CHANNEL, TEXT, argument
from maze.report.limits import limits
from maze.results import Damaged, read_manifest, replace_text, replaced

_COLORS = 128  # in a figure
_WORDS = {"yes": CONFIRMED, "in part": IN_PART}  # for the verdicts of parts that are not predictions


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


@dataclass(frozen=True)
class Contents:
    """The contents of a report, as its templates use them."""

    folder: Path  # folder of the run
    command: str  # command that made the run
    known: Mapping[str, Mapping[str, Any]]  # the facts that decide the numbers of every policy, the main policy first
    results: Mapping[tuple[str, str], Result]  # results by policy and part
    left_out: Sequence[str]  # parts on disk that were measured otherwise, and the difference

    @property
    def main(self) -> str:
        """The name of the main policy."""
        return next(iter(self.known))

    @cached_property
    def sections(self) -> list[list[Result]]:
        """The main policy's parts in the order of the report, each followed by the same part on other policies."""
        names = [name for subject, name in self.results if subject == self.main]
        return [[self.results[each, name] for each in self.known if (each, name) in self.results] for name in names]

    @cached_property
    def tables(self) -> dict[str, dict[str, Tables]]:
        """Tables by policy and part."""
        return {
            subject: {name: result.tables for (policy, name), result in self.results.items() if policy == subject}
            for subject in self.known
        }

    @cached_property
    def statuses(self) -> dict[str, dict[str, str]]:
        """The status of each prediction by policy."""
        findings = {key: result.finding for key, result in self.results.items()}
        return {
            subject: {part: status(findings.get((subject, part)), p) for part, p in corrected(parts).items()}
            for subject, parts in self.tables.items()
        }

    def verdict(self, parts: Sequence[str]) -> str:
        """The verdict on a claim from some parts of the main policy, or without parts from all predictions."""
        own = self.statuses[self.main]
        found = [each[0] for each in self.sections if each[0].part.name in parts]
        known = {own.get(each.part.name) or _WORDS.get(each.finding.agrees, OPEN) for each in found}
        if not parts and len(self.known) > 1:
            known = {each for policy in self.statuses.values() for each in policy.values()}
        return known.pop() if len(known) == 1 else IN_PART if known else MISSING

    @property
    def maze(self) -> tuple[Image.Image, Image.Image] | None:
        """A maze, and the UP channel's map of it; None if they were not measured."""
        tables = self.tables[self.main].get("spatial", {})
        if not tables.get("pixels") or not tables.get("map"):
            return None
        shades, heat = spatial.pictures(tables)
        color = np.full((*heat.shape, 3), to_rgb(CHANNEL))
        layers = np.dstack([color, 0.9 * heat / max(heat.max(), 1e-9)])
        return Image.fromarray(shades), Image.fromarray((255 * layers).astype(np.uint8))


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
        _save(result.part.figure(result.tables), result.picture, dpi=90)
    contents = Contents(folder, command, known, results, left_out)
    pictures = {name: folder / "figures" / f"{name}.png" for name in argument(contents.tables)}
    with rc_context(TEXT):
        for name, draw in argument(contents.tables).items():
            _save(draw(), pictures[name], dpi=150)
    for name in ("report.md", "report.html"):
        page = _templates().get_template(f"{name}.jinja").render(contents=contents, pictures=pictures)
        replace_text(folder / name, page)
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


def _save(figure: Figure, file: Path, dpi: int) -> None:
    """Save a figure in few colors, so that a report on all policies is a few MB."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi)
    with replaced(file) as partial:
        Image.open(drawn).convert("RGB").quantize(_COLORS).save(partial, optimize=True)


def _uri(picture: Path | Image.Image) -> str:
    """A picture as text for the page."""
    stream = io.BytesIO(picture.read_bytes() if isinstance(picture, Path) else b"")
    if isinstance(picture, Image.Image):
        picture.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(("html.jinja",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["uri"] = _uri
    templates.globals |= {"numbers": NUMBERS, "predicted": PREDICTED, "episodes": EPISODES}
    templates.globals |= {each.__name__: each for each in (above, below, corrected, limits, shipped_name)}
    return templates
