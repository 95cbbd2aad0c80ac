"""The page on the architecture names the layers and files that exist, and the files and functions that run."""

from __future__ import annotations

import gc
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import chanpatch
from chanpatch.patching import firing

SOURCE = Path(chanpatch.__file__).parent
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
WALKS = dict(re.findall(r"^## (Walkthrough: .*)\n([\s\S]*?)(?=^## |\Z)", PAGE, re.MULTILINE))


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """The names that the code before the first walk leaves."""
    names: dict[str, Any] = {}
    exec(blocks(PAGE, "python")[0], names)
    return names


def functions_that_run(code: str, names: dict[str, Any]) -> dict[str, set[str]]:
    """Return the functions of chanpatch that run in a second run of the code, by file."""
    ran = defaultdict(set)

    def note(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and SOURCE in path.parents:
            ran[path.relative_to(SOURCE).as_posix()].add(frame.f_code.co_name)

    exec(code, names)
    firing._FITS.clear()  # as for new patches
    gc.collect()
    gc.disable()  # contexts and twins of other tests may be freed while the code runs
    sys.setprofile(note)
    try:
        exec(code, names)
    finally:
        sys.setprofile(None)
        gc.enable()
    return ran


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_names_the_files_that_run_and_functions_that_run_in_them(walk: str, names: dict[str, Any]) -> None:
    (code,), (steps,) = blocks(WALKS[walk], "python"), blocks(WALKS[walk], "text")
    ran = functions_that_run(code, names)
    named = {*re.findall(r"[\w/]+\.py", steps)}
    new, old = {file: sorted(ran[file]) for file in ran.keys() - named}, named - ran.keys()
    assert not (new or old), f"the walk lacks {new}, and names {old}, which did not run"
    for file, functions in re.findall(r"^  (\S+\.py) +([\w.]+(?:, [\w.]+)*)  ", steps, re.MULTILINE):
        lacking = {each for each in functions.split(", ") if each.rpartition(".")[2] not in ran[file]}
        assert not lacking, f"{lacking} did not run in {file}; these did: {sorted(ran[file])}"


def test_the_drawing_has_the_rows_of_the_import_rules() -> None:
    drawing = blocks(PAGE, "text")[0]
    drawn = [re.findall(r"\w+", line.rpartition("│")[0])[1:] for line in drawing.splitlines() if re.match(r" \d", line)]
    rules = re.search(r"^layers = \[\n(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert rules and drawn == [re.findall(r"\w+", line) for line in rules[1].splitlines()]


def test_the_table_of_files_names_the_files_of_each_folder_and_no_others() -> None:
    rows = re.findall(r"^\| (`\w+`.*?) \| (.*) \|$", PAGE, re.MULTILINE)
    named = {room: {*re.findall(r"`(\w+)`(?=(?:, `\w+`)*:)", files)} for rooms, files in rows
             for room in re.findall(r"\w+", rooms)}  # fmt: skip
    found = {
        path.stem: {each.stem for each in path.glob("*") if path.is_dir()} - {"__init__", "__pycache__"}
        for path in SOURCE.iterdir()
        if not path.stem.startswith(("__", "py"))  # py.typed
    }
    assert named == found
