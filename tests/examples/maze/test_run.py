"""Runs of the study: parts on disk, and the report that is told from them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from maze import run as runs
from maze.command import UserError
from maze.part import Finding, Part, Study, read_table
from maze.policy import SHIPPED_WEIGHTS
from maze.report import write_report
from maze.run import RunSettings, run

SCRIPT = Path(__file__).parents[3] / "examples" / "maze_goal_misgen.py"
MEASURED = []


def measure(study):
    MEASURED.append(study.weights["name"])
    return {"squares": [{"number": number, "square": number**2, "share": number / 3} for number in range(study.n)]}


def figure(tables):
    drawn = Figure()
    drawn.subplots().plot([row["square"] for row in tables["squares"]])
    return drawn


def finding(tables):
    last = tables["squares"][-1]
    return Finding(
        f"the last square is {last['square']}", "yes", f"a share of {last['share']:.3f}", "that n < 20 & more"
    )


PART = Part("squares", "What are squares?", "Multiplied.", "Not in the post.", measure, figure, finding)


@pytest.fixture
def parts(monkeypatch):
    MEASURED.clear()
    monkeypatch.setattr(runs, "PARTS", {"squares": PART})
    monkeypatch.setattr(runs, "EXTRA", {})
    monkeypatch.setattr(runs, "SIDE_BY_SIDE", ("squares",))


def settings(out, **changed):
    return RunSettings(**{"only": (), "n": 20, "seed": 0, "weights": SHIPPED_WEIGHTS, "out": out, **changed})


def test_a_part_is_measured_once_and_kept(parts, tmp_path):
    first = run(settings(tmp_path))
    assert run(settings(tmp_path)) == first
    assert MEASURED == ["policy.safetensors"]
    table = read_table(first / "policy" / "squares" / "squares.csv")
    assert table[3] == {"number": 3, "square": 9, "share": 1.0}


def test_other_settings_are_measured_into_a_folder_of_their_own(parts, tmp_path):
    folders = {run(settings(tmp_path)), run(settings(tmp_path, n=21)), run(settings(tmp_path, seed=1))}
    assert len(folders) == len(MEASURED) == 3


@pytest.mark.parametrize("changed", ["weights", "versions", "part"])
def test_a_part_that_was_measured_with_anything_else_is_measured_again(changed, parts, tmp_path):
    manifest = run(settings(tmp_path)) / "policy" / "squares" / "manifest.json"
    known = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**known, changed: "other"}))
    run(settings(tmp_path))
    assert len(MEASURED) == 2
    assert json.loads(manifest.read_text())[changed] == known[changed]


def test_a_part_that_is_interrupted_leaves_nothing_and_those_before_it_stay(parts, tmp_path, monkeypatch):
    def interrupted(study):
        raise KeyboardInterrupt

    later = Part("later", "?", "", "", interrupted, figure, finding)
    monkeypatch.setattr(runs, "PARTS", {"squares": PART, "later": later})
    with pytest.raises(KeyboardInterrupt):
        run(settings(tmp_path))
    (folder,) = tmp_path.iterdir()
    assert [file.name for file in (folder / "policy").iterdir()] == ["squares"]
    monkeypatch.setattr(runs, "PARTS", {"squares": PART})
    run(settings(tmp_path))
    assert len(MEASURED) == 1


def test_the_shipped_policies_stand_side_by_side(parts, tmp_path):
    page = (run(settings(tmp_path, weights=None)) / "report.html").read_text()
    assert MEASURED[:2] == ["policy.safetensors", "control.safetensors"]
    assert "The same on the control policy" in page
    assert "the control policy agrees with the post, by the same rules, so: squares: yes (imitation: yes)." in page


def test_every_number_of_the_report_is_read_from_the_tables(parts, tmp_path):
    folder = run(settings(tmp_path))
    before = (folder / "report.html").read_text()
    file = folder / "policy" / "squares" / "squares.csv"
    file.write_text(file.read_text().replace("\n19,361,", "\n19,36100,"))
    write_report(folder, ["policy"], {"squares": PART}, "make report")
    after, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "the last square is 361<" in before and "the last square is 36100<" in after
    assert "the last square is 36100" in markdown
    pictures = [re.search("base64,([^']+)", page).group(1) for page in (before, after)]
    assert pictures[0] != pictures[1]


def test_the_page_needs_no_other_file_and_escapes_what_it_shows(parts, tmp_path):
    page = (run(settings(tmp_path)) / "report.html").read_text()
    assert "come from the CSV files of\nthis run.</p>" in page
    assert "id='part-squares'" in page and "that n &lt; 20 &amp; more" in page
    assert not re.findall(r"(?:src|href)='(?!data:|#)", page)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"only": ("squares", "cubes")}, "--only: no part is called cubes. Parts: squares."),
        ({"n": 3}, "--n is 3, but it is 20 to 100000 for these parts."),
        ({"seed": -1}, "--seed is -1, but it is 0 to 2147483647 for these parts."),
    ],
)
def test_settings_outside_what_makes_sense_are_refused(changed, message, parts, tmp_path):
    with pytest.raises(UserError) as caught:
        settings(tmp_path, **changed)
    assert str(caught.value) == message


def test_an_option_of_the_rollouts_is_refused_for_other_parts(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--only", "sums", "--channel", "3"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: --channel is for --only rollouts; the other parts choose by rules of their own."
    )


def test_purposes_get_seeds_of_their_own_that_depend_on_the_seed():
    one, other = (Study(points=None, weights={}, n=20, seed=seed) for seed in (0, 1))
    seeds = [study.seed_for(purpose) for study in (one, other) for purpose in ("sums", "decision")]
    assert len(set(seeds)) == 4
    assert one.seed_for("sums") == seeds[0]
