"""The report of a run: one self-contained HTML page and the same as Markdown, told from the run's CSV files alone."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maze.part import Cell, Finding, Part, Table, Tables, read_table
from maze.results import replace_text, replaced

_SHOWN_ROWS = 40  # of a table; the file has all
_OPEN_ROWS = 12  # tables up to so long are open from the start

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem; }
img { max-width: 100%; height: auto; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.beside > div { background: #f5f5f2; padding: 0.6rem 1rem; border-radius: 4px; }
summary { cursor: pointer; color: #444; } code { background: #f2f2ef; padding: 0 0.2rem; }
"""


@dataclass(frozen=True)
class Result:
    """One part of one policy, read from its folder."""

    part: Part
    subject: str
    folder: Path
    manifest: Mapping[str, Any]
    tables: Tables
    finding: Finding

    @property
    def picture(self) -> Path:
        """Where the part's figure is."""
        return self.folder / f"{self.part.name}.png"


def write_report(folder: Path, subjects: Sequence[str], parts: Mapping[str, Part], command: str) -> Path:
    """Draw the figure of every part that is in a run's folder and write report.html and report.md.

    Args:
        folder: of the run.
        subjects: names of its policies, the main one first.
        parts: by name, in the order of the report.
        command: that made the run.

    Returns:
        The HTML file.
    """
    results = {
        (subject, name): _read(part, subject, folder / subject / name)
        for name, part in parts.items()
        for subject in subjects
        if (folder / subject / name / "manifest.json").exists()
    }
    for result in results.values():
        with replaced(result.picture) as partial:
            result.part.figure(result.tables).savefig(partial, dpi=90)
    shown = [name for name in parts if (subjects[0], name) in results]
    replace_text(folder / "report.html", "\n".join(_html(results, subjects, shown, command)) + "\n")
    replace_text(folder / "report.md", "\n".join(_markdown(results, subjects, shown, command, folder)) + "\n")
    return folder / "report.html"


def _read(part: Part, subject: str, folder: Path) -> Result:
    manifest = json.loads((folder / "manifest.json").read_text())
    tables = {file.stem: read_table(file) for file in sorted(folder.glob("*.csv"))}
    return Result(part, subject, folder, manifest, tables, part.finding(tables))


def _introduction(results: Mapping[tuple[str, str], Result], subjects: Sequence[str]) -> str:
    """What the policies were taught, and what is left of the result in those that were not taught directions."""
    main, *others = subjects
    if not others:
        return (
            "One policy only. If it was taught directions by an auxiliary loss, as the shipped imitation policy was in "
            "its middle layers, a direction signal in it was in part taught; a control beside it would tell how much."
        )
    told = []
    for subject in others:
        there = {name: result.finding for (policy, name), result in results.items() if policy == subject}
        agree = [
            f"{name}: {finding.agrees} ({main}: {results[main, name].finding.agrees})"
            for name, finding in there.items()
            if (main, name) in results
        ]
        ours = [f"{name.capitalize()}: {there[name].ours}" for name in ("sums", "ablation") if name in there]
        told.append(
            f"the {subject} policy agrees with the post, by the same rules, so: {', '.join(agree)}. {' '.join(ours)}"
            if agree
            else f"the {subject} policy was not measured in this run."
        )
    missing = "" if "reward" in others else " No policy trained by reward stands beside them in this run."
    return (
        f"The policy under study ({main}) was trained by imitation with an auxiliary loss that teaches directions to "
        "its middle layers, so a direction signal in it was in part taught. What remains without that teaching: "
        f"{' '.join(told)}{missing} The policies differ in how well they find the cheese too, so a difference between "
        "them is not of that teaching alone."
    )


def _facts(result: Result) -> str:
    manifest = result.manifest
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return (
        f"weights {manifest['weights_name']} (width {manifest['width']}, sha256 {manifest['weights'][:12]}), "
        f"n={manifest['n']}, seed {manifest['seed']}, {versions}"
    )


def _html(
    results: Mapping[tuple[str, str], Result], subjects: Sequence[str], shown: Sequence[str], command: str
) -> Iterator[str]:
    escape = html.escape
    main = [results[subjects[0], name] for name in shown]
    yield "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    yield f"<title>Why the mouse goes to the corner</title><style>{_STYLE}</style></head><body>"
    yield "<h1>Why a mouse trained with the cheese in the top right corner goes to the corner when it is elsewhere</h1>"
    yield f"<p>{escape(_introduction(results, subjects))}</p>"
    yield f"<p>{escape(_facts(main[0]))}. Made by <code>{escape(command)}</code>. Figures of the post are of the "
    yield "published network and stand beside ours; all others are of these weights and come from the CSV files of"
    yield "this run.</p>"
    yield "<h2 id='summary'>Summary</h2><div class='scroll'><table><tr><th>part</th><th>ours</th><th>the post</th>"
    yield "<th>agrees</th></tr>"
    for result in main:
        cells = (result.finding.ours, result.part.post, result.finding.agrees)
        link = f"<a href='#part-{result.part.name}'>{escape(result.part.name)}</a>"
        yield f"<tr><td>{link}</td>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    yield "</table></div>"
    for result in main:
        yield f"<section id='part-{result.part.name}'>"
        yield f"<h2>{escape(result.part.name)}: {escape(result.part.question)}</h2><p>{escape(result.part.method)}</p>"
        yield from _html_result(result)
        for subject in subjects[1:]:
            if (subject, result.part.name) in results:
                beside = results[subject, result.part.name]
                yield f"<h3>The same on the {escape(subject)} policy</h3><p>{escape(_facts(beside))}</p>"
                yield from _html_result(beside)
        yield "</section>"
    yield "</body></html>"


def _html_result(result: Result) -> Iterator[str]:
    escape, finding = html.escape, result.finding
    picture = base64.b64encode(result.picture.read_bytes()).decode()
    yield f"<img alt='{escape(result.part.question, quote=True)}' src='data:image/png;base64,{picture}'>"
    yield f"<div class='beside'><div><b>Ours.</b> {escape(finding.ours)}</div>"
    yield f"<div><b>The post.</b> {escape(result.part.post)}<br><b>Agrees:</b> {finding.agrees}</div></div>"
    yield f"<p><b>What follows.</b> {escape(finding.follows)}</p>"
    yield f"<p><b>What does not.</b> {escape(finding.does_not_follow)}</p>"
    for name, table in result.tables.items():
        unfolded = " open" if len(table) <= _OPEN_ROWS else ""
        yield f"<details{unfolded}><summary>{escape(name)}.csv, {len(table)} rows</summary><div class='scroll'><table>"
        yield "<tr>" + "".join(f"<th>{escape(column)}</th>" for column in (table[0] if table else {})) + "</tr>"
        for row in table[:_SHOWN_ROWS]:
            yield "<tr>" + "".join(f"<td>{escape(_text(cell))}</td>" for cell in row.values()) + "</tr>"
        yield "</table></div>" + _more(table) + "</details>"


def _markdown(
    results: Mapping[tuple[str, str], Result],
    subjects: Sequence[str],
    shown: Sequence[str],
    command: str,
    folder: Path,
) -> Iterator[str]:
    main = [results[subjects[0], name] for name in shown]
    yield "# Why a mouse trained with the cheese in the top right corner goes to the corner when it is elsewhere\n"
    yield f"{_introduction(results, subjects)}\n"
    yield f"{_facts(main[0])}. Made by `{command}`.\n"
    yield "## Summary\n\n| part | ours | the post | agrees |\n|---|---|---|---|"
    for result in main:
        cells = (result.part.name, result.finding.ours, result.part.post, result.finding.agrees)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    for result in main:
        yield f"\n## {result.part.name}: {result.part.question}\n\n{result.part.method}"
        for subject in subjects:
            if (subject, result.part.name) in results:
                yield from _markdown_result(results[subject, result.part.name], folder, named=subject != subjects[0])


def _markdown_result(result: Result, folder: Path, *, named: bool) -> Iterator[str]:
    finding = result.finding
    if named:
        yield f"\n### The same on the {result.subject} policy\n\n{_facts(result)}"
    yield f"\n![{result.part.question}]({result.picture.relative_to(folder).as_posix()})\n"
    yield f"**Ours.** {finding.ours}\n\n**The post.** {result.part.post} **Agrees:** {finding.agrees}\n"
    yield f"**What follows.** {finding.follows}\n\n**What does not.** {finding.does_not_follow}\n"
    files = (f"[{name}.csv]({(result.folder / name).relative_to(folder).as_posix()}.csv)" for name in result.tables)
    yield f"Tables: {', '.join(files)}"


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _more(table: Table) -> str:
    hidden = len(table) - _SHOWN_ROWS
    return f"<p>{hidden} more rows in the file.</p>" if hidden > 0 else ""
