"""The report of a run: one self-contained HTML page and the same as Markdown, told from the run's CSV files alone."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from maze.analysis.part import Cell, Finding, Part, Table, Tables, read_table
from maze.policy.shipped import Measured, compared, described, introduction
from maze.report.differences import differences, side_by_side
from maze.report.limits import limits
from maze.results import Damaged, read_manifest, replace_table, replace_text, replaced

Rows: TypeAlias = Sequence[Mapping[str, str]]

_SHOWN_ROWS = 40  # of a table; the file has all
_COLOURS = 128  # of a figure
_OPEN_ROWS = 12  # tables up to so long are open from the start, and stand in the Markdown

_TITLE = "Why a mouse trained with the cheese in the top right corner goes to the corner when it is elsewhere"
_AGREES = "agrees with the reference"
_REFERENCE = (
    "The reference is what stands under 'the post': what it measured, or else what it claims, or else what the work it "
    "builds on found. Ours is the first sentence of what the part says. A result is not comparable where the reference "
    "says nothing of what would come out."
)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem; }
img { max-width: 100%; height: auto; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.beside > div { background: #f5f5f2; padding: 0.6rem 1rem; border-radius: 4px; }
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
        """Where the part's figure is."""
        return self.folder / f"{self.part.name}.png"


@dataclass(frozen=True)
class Contents:
    """What a report tells.

    Attributes:
        folder: of the run.
        command: that made it.
        known: of every policy, the main one first, what its parts were measured with.
        results: by policy and part.
        left_out: the parts on disk that were measured with something else, and what differs.
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
        """The headline figures of every policy and what the others' differ by; no rows for one policy."""
        return differences(self.measured)


def write_report(folder: Path, known: Mapping[str, Mapping[str, Any]], parts: Mapping[str, Part], command: str) -> Path:
    """Draw the figure of every part that a run's folder holds and write report.html and report.md.

    A part that is damaged, or was measured with anything else than is known now, such as older code, is left out and
    named.

    Args:
        folder: of the run.
        known: of every policy, the main one first, all that decides the numbers of its parts: a manifest.
        parts: by name, in the order of the report.
        command: that made the run.

    Returns:
        The HTML file.
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
                results[subject, name] = _read(part, subject, here, manifest)
    for result in results.values():
        _draw(result)
    contents = Contents(folder, command, known, results, left_out)
    (folder / "differences.csv").unlink(missing_ok=True)
    if contents.differences:
        replace_table(folder / "differences.csv", contents.differences)
    replace_text(folder / "report.html", "\n".join(_html(contents)) + "\n")
    replace_text(folder / "report.md", "\n".join(_markdown(contents)) + "\n")
    return folder / "report.html"


def _draw(result: Result) -> None:
    """Writes the part's figure, in so few colours that a report of all policies is a few MB."""
    drawn = io.BytesIO()
    result.part.figure(result.tables).savefig(drawn, dpi=90)
    with replaced(result.picture) as partial:
        Image.open(drawn).convert("RGB").quantize(_COLOURS).save(partial, optimize=True)


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The names of what a manifest does not have as wanted, those within `versions` by their own names."""
    names = []
    for name, value in wanted.items():
        other = found.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            names += differing(other, value)
        elif other != value:
            names.append(name)
    return names


def _read(part: Part, subject: str, folder: Path, manifest: Mapping[str, Any]) -> Result:
    tables = {Path(name).stem: read_table(folder / name) for name in manifest["files"]}
    return Result(part, subject, folder, manifest["seconds"], tables, part.finding(tables))


def _summary(contents: Contents) -> tuple[str, str, Rows]:
    """Heading, text below it, and what came out of every part on the main policy, one row each."""
    mains = [(name, contents.of(name)[0]) for name in contents.shown]
    rows = [
        {"part": name, "ours": main.finding.headline, "the post": main.part.post, _AGREES: main.finding.agrees}
        for name, main in mains
    ]
    return "Summary", _REFERENCE, rows


def _beside(contents: Contents) -> Iterator[tuple[str, str, Rows]]:
    """Yields the same for the parts that were measured on several policies, and the differences between these."""
    rows = [
        {"part": name, "policy": each.subject, "ours": each.finding.headline, _AGREES: each.finding.agrees}
        for name in contents.shown
        for each in contents.of(name)
        if len(contents.of(name)) > 1
    ]
    if rows:
        yield "The same parts on every policy", "By the same rules.", rows
    if contents.differences:
        yield "How the policies differ", *side_by_side(contents.differences)


def _times(contents: Contents) -> tuple[str, Rows]:
    """Which part takes most of the time, and the seconds of all."""
    seconds = {name: {each.subject: each.seconds for each in contents.of(name)} for name in contents.shown}
    totals = {name: sum(of.values()) for name, of in seconds.items()}
    longest, whole = max(totals, key=lambda name: totals[name]), sum(totals.values())
    share = totals[longest] / whole if whole else 0.0
    rows = [
        {"part": name, **{subject: f"{of[subject]:.0f}" if subject in of else "" for subject in contents.known}}
        for name, of in seconds.items()
    ]
    told = f"Measuring took {whole / 60:.0f} minutes in all; most of it {longest}, {share:.0%}. Seconds by policy:"
    return told, rows


def _header(contents: Contents) -> Iterator[str]:
    """Yields what stands below the table of policies, one paragraph each."""
    facts = _facts(next(iter(contents.known.values())))
    yield f"{facts}. Made by `{contents.command}`. {limits()}"
    yield (
        "Figures of the post are of the published network and stand beside ours; all others are of these weights and "
        "come from the CSV files of this run."
    )
    if contents.left_out:
        yield (
            "Left out, since they are damaged or were measured with something else than now, which is named: "
            f"{', '.join(contents.left_out)}."
        )


def _facts(known: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    return (
        f"weights {known['weights_name']} (width {known['width']}, sha256 {known['weights'][:12]}), "
        f"n={known['n']}, seed {known['seed']}, {versions}"
    )


def _html(contents: Contents) -> Iterator[str]:
    escape, measured = html.escape, contents.measured
    yield "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    yield f"<title>Why the mouse goes to the corner</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>{_TITLE}</h1>"
    yield f"<p>{escape(introduction(measured))}</p>"
    if contents.shown:
        yield from _html_summary(*_summary(contents))
    if rows := compared(measured):
        yield "<h2>The policies</h2>"
        yield from _html_table(rows)
    if told := [f"<li><b>{escape(name)}</b>: {escape(what)}</li>" for name, what in described(measured)]:
        yield f"<ul>{''.join(told)}</ul>"
    for text in _header(contents):
        marked = re.sub("`(.+?)`", r"<code>\1</code>", escape(text))
        yield f"<p>{marked}</p>"
    if contents.shown:
        yield from _html_parts(contents)
    yield "</body></html>"


def _html_parts(contents: Contents) -> Iterator[str]:
    escape = html.escape
    for heading, text, rows in _beside(contents):
        yield from _html_summary(heading, text, rows)
    for name in contents.shown:
        main, *others = contents.of(name)
        yield f"<section id='part-{name}'>"
        yield f"<h2>{escape(name)}: {escape(main.part.question)}</h2><p>{escape(main.part.method)}</p>"
        yield from _html_result(main)
        for other in others:
            yield f"<details><summary><h3>The same on the {escape(other.subject)} policy</h3></summary>"
            yield f"<p>{escape(_facts(contents.known[other.subject]))}</p>"
            yield from _html_result(other)
            yield "</details>"
        yield "</section>"
    text, rows = _times(contents)
    yield f"<h2>Time</h2><p>{escape(text)}</p>"
    yield from _html_table(rows, linked=True)


def _html_summary(heading: str, text: str, rows: Rows) -> Iterator[str]:
    yield f"<h2>{heading}</h2><p>{html.escape(text)}</p>"
    yield from _html_table(rows, linked=True)


def _html_table(rows: Rows, *, linked: bool = False) -> Iterator[str]:
    """A table; its column called part can link to the sections."""
    if not rows:
        return
    yield "<div class='scroll'><table>"
    yield "<tr>" + "".join(f"<th>{html.escape(column)}</th>" for column in rows[0]) + "</tr>"
    for row in rows:
        cells = {column: html.escape(cell) for column, cell in row.items()}
        if linked:
            cells["part"] = f"<a href='#part-{cells['part']}'>{cells['part']}</a>"
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells.values()) + "</tr>"
    yield "</table></div>"


def _html_result(result: Result) -> Iterator[str]:
    escape, finding = html.escape, result.finding
    picture = base64.b64encode(result.picture.read_bytes()).decode()
    yield f"<img alt='{escape(result.part.question, quote=True)}' src='data:image/png;base64,{picture}'>"
    yield f"<div class='beside'><div><b>Ours.</b> {escape(finding.ours)}</div>"
    yield f"<div><b>The post.</b> {escape(result.part.post)}<br><b>Ours {_AGREES}:</b> {finding.agrees}</div></div>"
    yield f"<p><b>What follows.</b> {escape(finding.follows)}</p>"
    yield f"<p><b>What does not.</b> {escape(finding.does_not_follow)}</p>"
    for name, table in result.tables.items():
        unfolded = " open" if len(table) <= _OPEN_ROWS else ""
        yield f"<details{unfolded}><summary>{escape(name)}.csv, {len(table)} rows</summary>"
        yield from _html_table(_texts(table[:_SHOWN_ROWS]))
        yield _more(table) + "</details>"


def _markdown(contents: Contents) -> Iterator[str]:
    measured = contents.measured
    yield f"# {_TITLE}\n\n{introduction(measured)}"
    if contents.shown:
        yield from _markdown_summary(*_summary(contents))
    if rows := compared(measured):
        yield "\n## The policies\n"
        yield from _markdown_table(rows)
    if told := [f"- **{name}**: {what}" for name, what in described(measured)]:
        yield "\n" + "\n".join(told)
    for text in _header(contents):
        yield f"\n{text}"
    if not contents.shown:
        return
    for heading, text, rows in _beside(contents):
        yield from _markdown_summary(heading, text, rows)
    for name in contents.shown:
        main, *others = contents.of(name)
        yield f"\n## {name}: {main.part.question}\n\n{main.part.method}"
        yield from _markdown_result(main, contents.folder)
        for other in others:
            yield f"\n### The same on the {other.subject} policy\n\n{_facts(contents.known[other.subject])}"
            yield from _markdown_result(other, contents.folder)
    text, rows = _times(contents)
    yield f"\n## Time\n\n{text}\n"
    yield from _markdown_table(rows)


def _markdown_summary(heading: str, text: str, rows: Rows) -> Iterator[str]:
    yield f"\n## {heading}\n\n{text}\n"
    yield from _markdown_table(rows)


def _markdown_table(rows: Rows) -> Iterator[str]:
    if rows:
        yield f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row.values()) + " |"


def _markdown_result(result: Result, folder: Path) -> Iterator[str]:
    finding = result.finding
    yield f"\n![{result.part.question}]({result.picture.relative_to(folder).as_posix()})\n"
    yield f"**Ours.** {finding.ours}\n\n**The post.** {result.part.post} **Ours {_AGREES}:** {finding.agrees}\n"
    yield f"**What follows.** {finding.follows}\n\n**What does not.** {finding.does_not_follow}"
    for name, table in result.tables.items():
        file = (result.folder / name).relative_to(folder).as_posix()
        yield f"\n[{name}.csv]({file}.csv), {len(table)} rows" + (":\n" if len(table) <= _OPEN_ROWS else "")
        if len(table) <= _OPEN_ROWS:
            yield from _markdown_table(_texts(table))


def _texts(table: Table) -> Rows:
    return [{column: _text(cell) for column, cell in row.items()} for row in table]


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _more(table: Table) -> str:
    hidden = len(table) - _SHOWN_ROWS
    return f"<p>{hidden} more rows in the file.</p>" if hidden > 0 else ""
