"""Runs of the study: the parts on disk, and the report made from them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from maze.analysis.cells import read_table
from maze.analysis.decision_squares import THRESHOLD_LEVELS
from maze.analysis.effects import SET_LEVELS
from maze.analysis.part import LABEL_LEVELS, SELECTION_LEVELS, Finding, Part, Study
from maze.analysis.steering import MOST_LEVELS, RANKED
from maze.command import UserError
from maze.measurements import PARTS, ablation, parity, retarget, search, top16
from maze.policy.network import SHIPPED_WEIGHTS
from maze.report import run as runs
from maze.report.limits import LIMITS, limits
from maze.report.page import write_report
from maze.report.run import MOST_OTHERS, SHIPPED, RunSettings, run
from maze.results import write_manifest
from maze.study import arguments

SCRIPT = Path(__file__).parents[3] / "examples" / "maze" / "study.py"
MEASURED = []
FACTS = ("weights", "weights_name", "width", "n", "seed", "versions")  # all that decides the numbers of a part


def measure(study):
    MEASURED.append(study.weights["name"])
    return {"squares": [{"number": number, "square": number**2, "share": number / 3} for number in range(study.n)]}


def figure(tables):
    drawn = Figure()
    drawn.subplots().plot([row["square"] for row in tables["squares"]])
    return drawn


def finding(tables):
    last = tables["squares"][-1]
    return Finding(f"the last square is {last['square']}", "yes", f"a share of {last['share']:.3f}")


PART = Part(
    "squares", "What are squares?", "Multiplied.", "Not in the post.", "n < 20 & more", measure, figure, finding
)


@pytest.fixture
def parts(monkeypatch):
    MEASURED.clear()
    monkeypatch.setattr(runs, "PARTS", {"squares": PART})
    monkeypatch.setattr(runs, "SIDE_BY_SIDE", ("squares",))


def sealed(folder, **changed):
    """Write the manifest of a part again, as if its tables had been measured as they are now."""
    facts = json.loads((folder / "manifest.json").read_text())
    del facts["files"], facts["digest"]
    write_manifest(folder, {**facts, **changed})


def settings(out, **changed):
    return RunSettings(**{"only": (), "n": 20, "seed": 0, "weights": (SHIPPED_WEIGHTS,), "out": out, **changed})


def test_a_part_is_measured_once_and_kept(parts, tmp_path):
    first = run(settings(tmp_path))
    assert run(settings(tmp_path)) == first
    assert MEASURED == ["policy.safetensors"]
    table = read_table(first / "imitation" / "squares" / "squares.csv")
    assert table[3] == {"number": 3, "square": 9, "share": 1.0}


def test_other_settings_are_measured_into_a_folder_of_their_own(parts, tmp_path):
    folders = {run(settings(tmp_path)), run(settings(tmp_path, n=21)), run(settings(tmp_path, seed=1))}
    assert len(folders) == len(MEASURED) == 3


@pytest.mark.parametrize("changed", ["weights", "versions", "part"])
def test_a_part_that_was_measured_with_anything_else_is_measured_again(changed, parts, tmp_path):
    manifest = run(settings(tmp_path)) / "imitation" / "squares" / "manifest.json"
    known = json.loads(manifest.read_text())
    sealed(manifest.parent, **{changed: "other"})
    run(settings(tmp_path))
    assert len(MEASURED) == 2
    assert json.loads(manifest.read_text())[changed] == known[changed]


def cut(folder):
    file = folder / "squares.csv"
    file.write_bytes(file.read_bytes()[:40])


def with_an_edited_digit(folder):
    file = folder / "squares.csv"
    file.write_text(file.read_text().replace("\n19,361,", "\n19,362,"))


DAMAGE = [
    (cut, "squares.csv was changed after it was measured"),
    (with_an_edited_digit, "squares.csv was changed after it was measured"),
    (lambda folder: (folder / "squares.csv").unlink(), "squares.csv is missing"),
    (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    (
        lambda folder: (folder / "manifest.json").write_text("{"),
        "manifest.json is damaged, or is from an older version that did not store digests",
    ),
]


@pytest.mark.parametrize(("damage", "fault"), DAMAGE)
def test_a_part_that_is_not_whole_is_measured_again_and_a_line_says_so(damage, fault, parts, tmp_path, capsys):
    folder = run(settings(tmp_path))
    files = {file: file.read_bytes() for file in (folder / "imitation" / "squares").glob("*.csv")}
    damage(folder / "imitation" / "squares")
    run(settings(tmp_path))
    assert len(MEASURED) == 2
    assert f"1 of 1  imitation: squares       measured again, since {fault}: 0 s\n" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in files} == files


def test_a_part_that_is_not_whole_and_not_measured_again_is_left_out_of_the_report_and_named(
    parts, tmp_path, monkeypatch
):
    olds = {f"old{number}": replace(PART, name=f"old{number}") for number in range(len(DAMAGE))}
    monkeypatch.setattr(runs, "PARTS", {"squares": PART, **olds})
    folder = run(settings(tmp_path))
    for old, (damage, _) in zip(olds, DAMAGE, strict=True):
        damage(folder / "imitation" / old)
    run(settings(tmp_path, only=("squares",)))
    text = (folder / "report.md").read_text()
    named = ", ".join(f"imitation/{old} ({fault})" for old, (_, fault) in zip(olds, DAMAGE, strict=True))
    assert f"(named): {named}." in text and "old0: What are squares?" not in text


def test_a_second_run_into_a_folder_is_refused_while_the_first_one_works_in_it(parts, tmp_path, monkeypatch):
    def meanwhile(study):
        with pytest.raises(UserError) as error:
            run(settings(tmp_path))
        messages.append(str(error.value))
        return measure(study)

    messages = []
    monkeypatch.setattr(runs, "PARTS", {"squares": replace(PART, measure=meanwhile)})
    folder = run(settings(tmp_path))
    (message,) = messages
    assert message == (
        f"'{folder}' is in use by another run. Wait until that run ends, or name another folder with --out."
    )
    assert len(MEASURED) == 1


def test_code_that_is_edited_while_a_run_goes_on_is_not_what_its_parts_are_said_to_be_measured_with(
    parts, tmp_path, monkeypatch
):
    sources = iter("ab")
    monkeypatch.setattr(runs, "versions", lambda: {"source": next(sources)})
    monkeypatch.setattr(runs, "PARTS", {"first": replace(PART, name="first"), "squares": PART})
    folder = run(settings(tmp_path))
    known = [json.loads(file.read_text())["versions"]["source"] for file in folder.glob("imitation/*/manifest.json")]
    assert known == ["a", "a"] and "Left out" not in (folder / "report.md").read_text()


def test_a_part_that_is_interrupted_leaves_nothing_and_those_before_it_stay(parts, tmp_path, monkeypatch):
    def interrupted(study):
        raise KeyboardInterrupt

    later = Part("later", "?", "", "", "", interrupted, figure, finding)
    monkeypatch.setattr(runs, "PARTS", {"squares": PART, "later": later})
    with pytest.raises(KeyboardInterrupt):
        run(settings(tmp_path))
    (folder,) = tmp_path.iterdir()
    assert [file.name for file in (folder / "imitation").iterdir()] == ["squares"]
    monkeypatch.setattr(runs, "PARTS", {"squares": PART})
    run(settings(tmp_path))
    assert len(MEASURED) == 1


CONTROL, OTHER = (SHIPPED_WEIGHTS.with_name(f"{name}.safetensors") for name in ("control", "seed2"))


def test_a_run_without_weights_is_on_the_shipped_policy_of_width_1_alone(parts, tmp_path):
    page = (run(settings(tmp_path, weights=())) / "report.html").read_text()
    assert MEASURED == ["policy.safetensors"]
    assert "imitation: imitation of shortest paths at width 1" in page


def test_the_shipped_policies_stand_beside_the_one_of_width_4_and_one_control_is_missing(parts, tmp_path):
    page = (run(settings(tmp_path, weights=SHIPPED)) / "report.html").read_text()
    names = ["width4", "policy", "control", "reward", "seed1", "seed2"]
    assert [name.removesuffix(".safetensors") for name in MEASURED] == names
    assert "The same on the control policy" in page
    assert "<code>python examples/maze/study.py --n 20 --seed 0 --shipped</code>" in page
    assert "no policy of width 4 that was trained without the field of directions" in page
    assert "train.py --width 4 --auxiliary cell" in page


def test_no_control_is_missing_beside_one_of_equal_width(parts, tmp_path):
    page = (run(settings(tmp_path, weights=(SHIPPED_WEIGHTS, CONTROL))) / "report.html").read_text()
    assert "--weights policy.safetensors control.safetensors</code>" in page
    assert "The missing control" not in page


def test_the_policies_beside_the_main_one_are_measured_on_fewer_levels(parts, tmp_path):
    folder = run(settings(tmp_path, weights=(SHIPPED_WEIGHTS, OTHER), n=MOST_OTHERS + 1))
    manifests = {each.parts[-3]: json.loads(each.read_text())["n"] for each in folder.glob("*/squares/manifest.json")}
    assert manifests == {"imitation": MOST_OTHERS + 1, "seed2": MOST_OTHERS}


def test_a_file_of_the_users_has_its_own_name_even_if_a_shipped_one_is_called_so(parts, tmp_path):
    mine = tmp_path / "control.safetensors"
    save_file({name: weight * 0.5 for name, weight in load_file(SHIPPED_WEIGHTS).items()}, mine)
    page = (run(settings(tmp_path, weights=(mine,))) / "report.html").read_text()
    assert "<b>control</b>, width 1, n=20" in page and "<li>control: not known</li>" in page


def test_the_command_takes_several_files_or_all_shipped_policies_but_not_both(capsys):
    given = arguments().parse_args(["--weights", "mine.pth", "other.pth"])
    assert given.weights == [Path("mine.pth"), Path("other.pth")] and not given.shipped
    with pytest.raises(SystemExit):
        arguments().parse_args(["--shipped", "--weights", "mine.pth"])
    assert "--weights: not allowed with argument --shipped" in capsys.readouterr().err


def test_two_policies_of_one_name_are_rejected(parts, tmp_path):
    with pytest.raises(UserError) as caught:
        run(settings(tmp_path, weights=(SHIPPED_WEIGHTS, SHIPPED_WEIGHTS)))
    assert str(caught.value) == (
        f"--weights: '{SHIPPED_WEIGHTS}' is the second policy called imitation. Rename the file, or leave it out."
    )


def test_two_measurements_of_a_real_part_are_equal_to_the_byte(tmp_path):
    files = [
        run(settings(tmp_path / name, only=("statistics",))) / "imitation" / "statistics" / "scores.csv"
        for name in "ab"
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture
def two_policies(parts, tmp_path, monkeypatch):
    """A run on two policies, the second of which squares differently, and on one of which a second part was run."""
    alone = replace(PART, name="alone")
    monkeypatch.setattr(runs, "PARTS", {"alone": alone, "squares": PART})
    folder = run(settings(tmp_path, weights=(SHIPPED_WEIGHTS, CONTROL)))
    file = folder / "control" / "squares" / "squares.csv"
    file.write_text(file.read_text().replace("\n19,361,", "\n19,36100,"))
    sealed(file.parent)
    write_report(folder, as_measured(folder, "imitation", "control"), runs.PARTS, "make report")
    return folder


def as_measured(folder, *subjects):
    """What the squares of each policy were measured with."""
    manifests = {each: json.loads((folder / each / "squares" / "manifest.json").read_text()) for each in subjects}
    return {each: {name: known[name] for name in FACTS} for each, known in manifests.items()}


def test_the_results_of_the_other_policies_are_folded_under_their_heading(two_policies):
    page = (two_policies / "report.html").read_text()
    before, folded = page.split("<details><summary><h3>The same on the control policy</h3></summary>")
    assert "<b>Result.</b> the last square is 361<" in before and "<b>Result.</b> the last square is 36100<" in folded
    assert page.count("<details") == page.count("</details>")


def test_every_number_of_the_report_is_read_from_the_tables(parts, tmp_path):
    folder = run(settings(tmp_path))
    before = (folder / "report.html").read_text()
    file = folder / "imitation" / "squares" / "squares.csv"
    file.write_text(file.read_text().replace("\n19,361,", "\n19,36100,"))
    sealed(file.parent)
    write_report(folder, as_measured(folder, "imitation"), {"squares": PART}, "make report")
    after = (folder / "report.html").read_text()
    assert "the last square is 361<" in before and "the last square is 36100<" in after
    pictures = [re.search("base64,([^']+)", page).group(1) for page in (before, after)]
    assert pictures[0] != pictures[1]


def test_the_page_needs_no_other_file_and_escapes_what_it_shows(parts, tmp_path):
    page = (run(settings(tmp_path)) / "report.html").read_text()
    assert "from this run's CSV files.</p>" in page
    assert "id='part-squares'" in page and "n &lt; 20 &amp; more" in page
    assert not re.findall(r"(?:src|href)='(?!data:|#|https://www.alignmentforum.org/posts/)", page)


def test_a_changed_cell_of_a_real_part_changes_what_the_page_says(tmp_path):
    folder = run(settings(tmp_path, only=("statistics",)))
    file = folder / "imitation" / "statistics" / "scores.csv"
    rows = [line.split(",") for line in file.read_text().splitlines()]
    place = rows[0].index("accuracy")
    before = float(rows[1][place])
    rows[1][place] = "0.123456"
    file.write_text("\n".join(",".join(row) for row in rows) + "\n")
    sealed(file.parent)
    pages = {}
    pages["before"] = (folder / "report.html").read_text()
    manifest = json.loads((file.parent / "manifest.json").read_text())
    known = {"imitation": {name: manifest[name] for name in FACTS}}
    pages["after"] = write_report(folder, known, PARTS, "make report").read_text()
    assert f"predicted {before:.3f} (" in pages["before"] and f"predicted {before:.3f} (" not in pages["after"]
    assert "predicted 0.123 (" in pages["after"] and "<td>0.1235</td>" in pages["after"]
    pictures = [re.search("base64,([^']+)", page).group(1) for page in pages.values()]
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"weights": "other"}, "weights"),
        ({"n": 7, "seed": 7}, "n, seed"),
        ({"versions": {"source": "other"}}, "python, torch, numpy, scipy, procgen, chanpatch, source"),
    ],
)
def test_a_part_that_was_measured_with_anything_else_is_left_out_of_the_report_and_named(
    changed, named, parts, tmp_path, monkeypatch
):
    monkeypatch.setattr(runs, "PARTS", {"old": replace(PART, name="old"), "squares": PART})
    folder = run(settings(tmp_path))
    old = folder / "imitation" / "old"
    manifest = json.loads((old / "manifest.json").read_text())
    versions = {"versions": {name: "0" for name in manifest["versions"]}} if "versions" in changed else {}
    (old / "squares.csv").write_text("a column of older code\n1\n")
    sealed(old, **{**changed, **versions})
    run(settings(tmp_path, only=("squares",)))
    for name in ("report.html", "report.md"):
        text = (folder / name).read_text()
        assert f"as they are damaged or were measured otherwise (named): imitation/old ({named})." in text
        assert "squares" in text and "old: What are squares?" not in text


def test_a_report_of_nothing_that_is_current_names_what_it_leaves_out(parts, tmp_path):
    folder = run(settings(tmp_path))
    known = as_measured(folder, "imitation")
    known["imitation"]["seed"] = 1
    page = write_report(folder, known, {"squares": PART}, "make report").read_text()
    assert "imitation/squares (seed)." in page and "<h2 id=" not in page
    assert page.endswith("</body></html>\n")


def test_the_report_says_how_long_each_part_took(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "PARTS", {"slow": replace(PART, name="slow"), "squares": PART})
    folder = run(settings(tmp_path))
    for name, seconds in (("slow", 90.0), ("squares", 30.0)):
        sealed(folder / "imitation" / name, seconds=seconds)
    write_report(folder, as_measured(folder, "imitation"), runs.PARTS, "make report")
    printed_text = "Measuring took 2 minutes in all. Seconds by policy:\n\n"
    table = (folder / "report.md").read_text().split(printed_text)[1]
    assert table.splitlines() == ["| part | imitation |", "|---|---|", "| slow | 90 |", "| squares | 30 |"]


def test_the_report_and_the_help_say_where_n_is_capped(parts, tmp_path):
    page = (run(settings(tmp_path)) / "report.html").read_text()
    printed_text = " ".join(
        subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True).stdout.split()
    )
    assert limits() in page
    assert limits().replace(" ", "") in printed_text.replace(" ", "")  # argparse breaks lines at hyphens too


def test_the_caps_that_are_told_are_those_of_the_parts():
    assert LIMITS["top16"] == str(top16.MOST_LEVELS)
    assert LIMITS["retarget"] == str(retarget.MOST_LEVELS)
    assert LIMITS["every part of a policy that stands beside the main one"] == str(MOST_OTHERS)
    assert LIMITS["cheese-vector"] == f"{MOST_LEVELS}, and {RANKED} for its rank"
    assert LIMITS["corner-vector"] == f"{MOST_LEVELS}, and {RANKED} for its rank"
    assert f"{SET_LEVELS} for random sets" in LIMITS["ablation"]
    assert LIMITS["search"] == f"background 500, pairs {search.PAIR_LEVELS}"
    assert f"at least {ablation.ELSEWHERE}," in LIMITS["ablation"]
    chosen = (
        f"channels are chosen on {SELECTION_LEVELS} mazes (search {search.CHOICE_LEVELS}, parity "
        f"{parity.CHOICE_LEVELS} per class, retarget {retarget.CHOOSING_LEVELS}), labels on {LABEL_LEVELS}, and "
        f"thresholds on those of {THRESHOLD_LEVELS} in which the direction is free, about half: one half of these "
        "fits, the other scores."
    )
    assert limits().endswith(chosen)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"only": ("squares", "cubes")}, "--only: no part is called cubes. Parts: squares."),
        ({"only": ("square",)}, "--only: no part is called square. Did you mean 'squares'? Parts: squares."),
        ({"n": 3}, "--n is 3, but it is 20 to 100000 for these parts."),
        ({"seed": -1}, "--seed is -1, but it is 0 to 2147483647 for these parts."),
    ],
)
def test_settings_outside_what_makes_sense_are_refused(changed, message, parts, tmp_path):
    with pytest.raises(UserError) as caught:
        settings(tmp_path, **changed)
    assert str(caught.value) == message


def test_purposes_get_seeds_of_their_own_that_depend_on_the_seed():
    one, other = (Study(points=None, weights={}, n=20, seed=seed) for seed in (0, 1))
    seeds = [study.seed_for(purpose) for study in (one, other) for purpose in ("sums", "decision")]
    assert len(set(seeds)) == 4
    assert one.seed_for("sums") == seeds[0]


@pytest.mark.slow
def test_several_workers_measure_the_same_tables(tmp_path, capsys):
    only = ("generator", "pair")
    alone, shared = (run(settings(tmp_path / str(workers), only=only, workers=workers)) for workers in (1, 2))
    printed = capsys.readouterr().out
    for part in only:
        assert re.search(rf"of 2  imitation: {part} +\d+ s\n", printed)
        tables = {file.name: file.read_bytes() for file in (alone / "imitation" / part).glob("*.csv")}
        assert tables == {file.name: file.read_bytes() for file in (shared / "imitation" / part).glob("*.csv")} != {}
