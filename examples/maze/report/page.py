"""The report of a run, one self-contained HTML page and the same as Markdown, made from the run's CSV files alone."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from maze.analysis.cells import Cell, Table, Tables, read_table
from maze.analysis.part import Finding, Part
from maze.policy.shipped import Measured, compared, described, introduction
from maze.report.differences import differences, side_by_side
from maze.report.limits import limits
from maze.results import Damaged, read_manifest, replace_table, replace_text, replaced

Rows: TypeAlias = Sequence[Mapping[str, str]]

_SHOWN_ROWS = 40  # of a table in HTML; the file has all
_OPEN_ROWS = 12  # tables up to this length are open from the start, and stand in the Markdown
_COLORS = 128  # of a figure

_TITLE = "Why a mouse trained with the cheese in the top right corner goes to the corner when it is elsewhere"
_AGREES = "agrees with the reference"
_REFERENCE = (
    "The reference is the post: its measurements, or else its claims, or else the findings of the work it builds on. "
    "The result is the first sentence of the part. It is not comparable if the reference does not predict it."
)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem; }
img { max-width: 100%; height: auto; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; }
summary { cursor: pointer; color: #444; } summary h3 { display: inline-block; margin: 0.6rem 0; }
code { background: #f2f2ef; padding: 0 0.2rem; }
"""


@dataclass(frozen=True)
class Result:
    """One part of one policy, read from its folder."""

    part: Part
    subject: str
    folder: Path
    seconds: float
    tables: Tables
    finding: Finding

    @property
    def picture(self) -> Path:
        return self.folder / f"{self.part.name}.png"

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yields the paragraphs of the part, each with its title."""
        yield "Result", self.finding.ours
        yield "The post", f"{self.part.post} The result {_AGREES}: {self.finding.agrees}."
        yield "Interpretation", self.finding.follows
        yield "Limitations", self.finding.does_not_follow


@dataclass(frozen=True)
class Contents:
    """The contents of a report.

    Attributes:
        folder: folder of the run.
        command: command that made it.
        known: the facts that decide the numbers of every policy, the main one first.
        results: results by policy and part.
        left_out: parts on disk that were measured otherwise, and the difference.
    """

    folder: Path
    command: str
    known: Mapping[str, Mapping[str, Any]]
    results: Mapping[tuple[str, str], Result]
    left_out: Sequence[str]

    def of(self, name: str) -> list[Result]:
        """A part on every policy, the main one first."""
        return [self.results[subject, name] for subject in self.known if (subject, name) in self.results]

    @property
    def shown(self) -> list[str]:
        """The parts of the main policy, in the order of the report."""
        main = next(iter(self.known))
        return [name for subject, name in self.results if subject == main]

    @property
    def measured(self) -> Measured:
        """The tables of every part by policy."""
        return {
            subject: {name: result.tables for (policy, name), result in self.results.items() if policy == subject}
            for subject in self.known
        }

    @cached_property
    def differences(self) -> Table:
        """The headline figures of every policy, and the others' differences from the main one's."""
        return differences(self.measured)


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
    for page in (_Html(folder), _Markdown(folder)):
        _write(contents, page)
        replace_text(folder / page.name, "\n".join([*page.lines, *page.end]) + "\n")
    return folder / _Html.name


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The names of the facts in which a manifest differs, those within `versions` by their own names."""
    names = []
    for name, value in wanted.items():
        other = found.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            names += differing(other, value)
        elif other != value:
            names.append(name)
    return names


def _draw(result: Result) -> None:
    """Draw the part's figure in few colors, so that a report of all policies is a few MB."""
    drawn = io.BytesIO()
    result.part.figure(result.tables).savefig(drawn, dpi=90)
    with replaced(result.picture) as partial:
        Image.open(drawn).convert("RGB").quantize(_COLORS).save(partial, optimize=True)


class _Markdown:
    name = "report.md"
    end: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines = folder, list[str]()

    def heading(self, level: int, text: str, anchor: str = "") -> None:
        self.lines.append(f"{'#' * level} {text}\n")

    def text(self, text: str) -> None:
        self.lines.append(f"{text}\n")

    def items(self, named: Iterable[tuple[str, str]]) -> None:
        if items := [f"- **{name}**: {text}" for name, text in named]:
            self.lines += [*items, ""]

    def table(self, rows: Rows, linked: bool = False) -> None:
        if rows:
            self.lines += [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
            for row in rows:
                values = (cell.replace("|", "\\|").replace("\n", " ") for cell in row.values())
                self.lines.append(f"| {' | '.join(values)} |")
            self.lines.append("")

    def result(self, result: Result) -> None:
        self.text(f"![{result.part.question}]({result.picture.relative_to(self.folder).as_posix()})")
        for title, text in result.texts():
            self.text(f"**{title}.** {text}")
        for name, table in result.tables.items():
            file = (result.folder / name).relative_to(self.folder).as_posix()
            self.text(f"[{name}.csv]({file}.csv), {len(table)} rows" + ":" * (len(table) <= _OPEN_ROWS))
            if len(table) <= _OPEN_ROWS:
                self.table(_texts(table))

    def folded(self, heading: str, text: str, result: Result) -> None:
        self.heading(3, heading)
        self.text(text)
        self.result(result)


class _Html:
    name = "report.html"
    end = ("</body></html>",)

    def __init__(self, folder: Path) -> None:
        self.lines = [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f"<title>Why the mouse goes to the corner</title><style>{_STYLE}</style></head><body>",
        ]

    def heading(self, level: int, text: str, anchor: str = "") -> None:
        named = f" id='part-{anchor}'" if anchor else ""
        self.lines.append(f"<h{level}{named}>{html.escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        marked = re.sub("`(.+?)`", r"<code>\1</code>", html.escape(text))
        self.lines.append(f"<p>{marked}</p>")

    def items(self, named: Iterable[tuple[str, str]]) -> None:
        items = [f"<li><b>{html.escape(name)}</b>: {html.escape(text)}</li>" for name, text in named]
        self.lines += [f"<ul>{''.join(items)}</ul>"] if items else []

    def table(self, rows: Rows, linked: bool = False) -> None:
        """A table; the column `part` can link to the sections."""
        if not rows:
            return
        self.lines.append("<div class='scroll'><table>")
        self.lines.append("<tr>" + "".join(f"<th>{html.escape(column)}</th>" for column in rows[0]) + "</tr>")
        for row in rows:
            values = {column: html.escape(cell) for column, cell in row.items()}
            if linked:
                values["part"] = f"<a href='#part-{values['part']}'>{values['part']}</a>"
            self.lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in values.values()) + "</tr>")
        self.lines.append("</table></div>")

    def result(self, result: Result) -> None:
        picture = base64.b64encode(result.picture.read_bytes()).decode()
        question = html.escape(result.part.question, quote=True)
        self.lines.append(f"<img alt='{question}' src='data:image/png;base64,{picture}'>")
        self.lines += [f"<p><b>{title}.</b> {html.escape(text)}</p>" for title, text in result.texts()]
        for name, table in result.tables.items():
            opened, hidden = " open" * (len(table) <= _OPEN_ROWS), len(table) - _SHOWN_ROWS
            self.lines.append(f"<details{opened}><summary>{html.escape(name)}.csv, {len(table)} rows</summary>")
            self.table(_texts(table[:_SHOWN_ROWS]))
            self.lines.append(f"<p>{hidden} more rows in the file.</p></details>" if hidden > 0 else "</details>")

    def folded(self, heading: str, text: str, result: Result) -> None:
        self.lines.append(f"<details><summary><h3>{html.escape(heading)}</h3></summary>")
        self.text(text)
        self.result(result)
        self.lines.append("</details>")


def _write(contents: Contents, page: _Markdown | _Html) -> None:
    """Write the report in its order."""
    measured = contents.measured
    page.heading(1, _TITLE)
    page.text(introduction(measured))
    mains = [contents.of(name)[0] for name in contents.shown]
    if mains:
        page.heading(2, "Summary")
        page.text(_REFERENCE)
        page.table([{"part": each.part.name, **_compared(each, {"the post": each.part.post})} for each in mains], True)
    if rows := compared(measured):
        page.heading(2, "The policies")
        page.table(rows)
    page.items(described(measured))
    for text in _header(contents):
        page.text(text)
    several = [each for name in contents.shown for each in contents.of(name) if len(contents.of(name)) > 1]
    if several:
        page.heading(2, "The same parts on every policy")
        page.text("By the same rules.")
        page.table([{"part": each.part.name, "policy": each.subject, **_compared(each, {})} for each in several], True)
    if mains and contents.differences:
        text, rows = side_by_side(contents.differences)
        page.heading(2, "How the policies differ")
        page.text(text)
        page.table(rows, True)
    for name in contents.shown:
        main, *others = contents.of(name)
        page.heading(2, f"{name}: {main.part.question}", name)
        page.text(main.part.method)
        page.result(main)
        for other in others:
            page.folded(f"The same on the {other.subject} policy", _facts(contents.known[other.subject]), other)
    if mains:
        page.heading(2, "Time")
        _write_times(contents, page)


def _compared(result: Result, more: Mapping[str, str]) -> dict[str, str]:
    return {"result": result.finding.headline, **more, _AGREES: result.finding.agrees}


def _write_times(contents: Contents, page: _Markdown | _Html) -> None:
    """Write the part that takes most of the time, and the seconds of all."""
    seconds = {name: {each.subject: each.seconds for each in contents.of(name)} for name in contents.shown}
    totals = {name: sum(of.values()) for name, of in seconds.items()}
    longest, whole = max(totals, key=lambda name: totals[name]), sum(totals.values())
    share = totals[longest] / whole if whole else 0.0
    page.text(f"Measuring took {whole / 60:.0f} minutes in all; most of it {longest}, {share:.0%}. Seconds by policy:")
    page.table(
        [
            {"part": name, **{subject: f"{of[subject]:.0f}" if subject in of else "" for subject in contents.known}}
            for name, of in seconds.items()
        ],
        True,
    )


def _header(contents: Contents) -> Iterator[str]:
    """Yields the paragraphs below the table of policies."""
    yield f"{_facts(next(iter(contents.known.values())))}. Made by `{contents.command}`. {limits()}"
    yield "The post's figures are of the published network; all others are of these weights, from this run's CSV files."
    if contents.left_out:
        yield f"Left out, as they are damaged or were measured otherwise (named): {', '.join(contents.left_out)}."


def _facts(known: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    return (
        f"weights {known['weights_name']} (width {known['width']}, sha256 {known['weights'][:12]}), "
        f"n={known['n']}, seed {known['seed']}, {versions}"
    )


def _texts(table: Table) -> Rows:
    return [{column: _text(cell) for column, cell in row.items()} for row in table]


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
