import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from chanpatch import hook_points
from maze import evaluate
from maze.analysis.exact import Chains, cheese_and_corner, decisions, greedy, neither
from maze.analysis.tables import action_tables
from maze.levels import draw_levels, observe, policy_input
from maze.policy.network import load_policy
from maze.results import LOCK
from maze.training.evaluation import MEASURES, markdown, measure, rate_interval, scores

SCRIPT = Path(evaluate.__file__)
# The side of 17 takes long enough to be interrupted on any machine.
SMALL = ["--n", "3", "--sizes", "5", "17", "--cheese", "in distribution", "out of distribution", "top right"]
FILES = ["levels.csv", "summary.json", "table.csv", "table.md"]


def command(*arguments, cwd, run=(str(SCRIPT),)):
    return subprocess.run([sys.executable, *run, *arguments], cwd=cwd, capture_output=True, text=True)


def table(file):
    return list(csv.DictReader(file.read_text().splitlines()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The results folder of a small evaluation."""
    folder = tmp_path_factory.mktemp("evaluation")
    done = command(*SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "results"


@pytest.fixture(scope="module")
def points():
    policy = load_policy()[0].to(memory_format=torch.channels_last)
    return hook_points(policy, torch.from_numpy(policy_input(observe(draw_levels(2, size=9, seed=0)))))


def only(folder):
    (found,) = folder.iterdir()
    return found


@pytest.mark.slow
def test_an_interrupted_evaluation_says_so_and_goes_on_where_it_stopped(finished, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *SMALL], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("results/*/parts/size5-in-distribution.npz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    complaint = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "The same command continues from the results on disk" in complaint
    assert "Traceback" not in complaint
    resumed = command(*SMALL, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "[1/5] size 5, cheese in distribution\n    kept from before" in resumed.stdout
    assert (only(tmp_path / "results") / "levels.csv").read_bytes() == (only(finished) / "levels.csv").read_bytes()


def test_an_evaluation_leaves_its_four_files_a_lock_and_nothing_else(finished):
    assert sorted(file.name for file in only(finished).iterdir()) == sorted([*FILES, LOCK])


def test_a_finished_evaluation_is_not_done_again(finished):
    folder = only(finished)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = command(*SMALL, cwd=folder.parents[1])
    assert f"Kept from before, with the same settings, weights and code: results/{folder.name}" in again.stdout
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_an_evaluation_with_an_edited_table_is_done_again_and_a_line_says_so(finished):
    folder = only(finished)
    before = (folder / "levels.csv").read_bytes()
    (folder / "levels.csv").write_bytes(before.replace(b"5,", b"7,", 1))
    again = command(*SMALL, cwd=folder.parents[1])
    assert again.returncode == 0, again.stderr
    reason = "levels.csv was changed after it was measured"
    assert f"Evaluating again, because {reason}: results/{folder.name}" in again.stdout
    assert (folder / "levels.csv").read_bytes() == before


def test_numbers_on_disk_are_those_of_the_levels_evaluated_at_once(finished, points):
    folder = only(finished)
    rows = table(folder / "levels.csv")
    for size, place in ((5, "in distribution"), (17, "out of distribution")):
        values = measure(points, draw_levels(3, size=size, seed=0, cheese=place))
        kept = [row for row in rows if (row["size"], row["cheese"]) == (str(size), place)]
        for name, value in values.items():
            given = [float(row[name]) if row[name] else np.nan for row in kept]
            np.testing.assert_allclose(given, value, atol=1e-5)


def test_the_table_holds_the_means_of_the_levels_that_have_a_measure(finished):
    folder = only(finished)
    levels, rows = table(folder / "levels.csv"), table(folder / "table.csv")
    for row in rows:
        values = [
            float(level[f"{row['measure']} {row['actions']}"])
            for level in levels
            if (level["size"], level["cheese"]) == (row["size"], row["cheese"])
            and level[f"{row['measure']} {row['actions']}"]
        ]
        assert int(row["n"]) == len(values)
        assert float(row["mean"]) == pytest.approx(np.mean(values))
        assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])
    assert {row["measure"] for row in rows if row["cheese"] == "top right"} == {"found", "neither"}


def test_sizes_without_squares_outside_the_top_right_have_no_cheese_there(finished):
    rows = table(only(finished) / "table.csv")
    assert {row["size"] for row in rows if row["cheese"] == "out of distribution"} == {"17"}


def test_the_summary_names_the_weights_and_holds_the_table(finished):
    folder = only(finished)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["weights"]["name"] == "policy.safetensors"
    assert summary["weights"]["sha256"][:12] in (folder / "table.md").read_text()
    assert [str(score["mean"]) for score in summary["scores"]] == [row["mean"] for row in table(folder / "table.csv")]


def test_measures_are_those_of_the_exact_engine_for_both_kinds_of_actions(points):
    levels = draw_levels(3, size=7, seed=3, cheese="out of distribution")
    chains = Chains.of(levels)
    (sampled,) = action_tables(points, chains).values()
    values = measure(points, levels)
    for actions, actions_table in (("sampled", sampled), ("greedy", greedy(sampled))):
        expected = (*cheese_and_corner(chains, actions_table), neither(chains, actions_table))
        expected += (*decisions(chains, actions_table).T,)
        for name, value in zip(MEASURES, expected, strict=True):
            np.testing.assert_array_equal(values[f"{name} {actions}"], value)
    assert np.isin(values["found greedy"], (0, 1)).all()


def test_what_no_level_has_is_left_out_of_the_scores():
    values = {f"{name} {actions}": np.full(3, np.nan) for name in MEASURES for actions in ("sampled", "greedy")}
    values["found sampled"], values["found greedy"] = np.array([0.5, 0.7, 0.9]), np.array([1.0, 0.0, 1.0])
    given = scores(9, "top right", values)
    assert [(row["actions"], row["measure"], row["n"]) for row in given] == [
        ("sampled", "found", 3),
        ("greedy", "found", 3),
    ]
    assert [row["mean"] for row in given] == pytest.approx([0.7, 2 / 3])


def test_a_rate_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        interval = rate_interval(rng.beta(0.3, 0.1, size=40), "sampled")
        covered += interval.low <= 0.75 <= interval.high
    assert 930 <= covered <= 985


@pytest.mark.parametrize("values", [[0.3], [1.0, 1.0, 1.0], [0.0] * 50, [0.2, 0.9]])
def test_a_rate_interval_has_a_width_and_lies_around_the_mean_within_0_and_1(values):
    interval = rate_interval(np.array(values), "sampled")
    assert 0 <= interval.low <= interval.estimate == np.mean(values) <= interval.high <= 1
    assert interval.high - interval.low > 0.01


def test_the_markdown_table_has_a_dash_where_a_measure_means_nothing():
    values = {f"{name} {actions}": np.full(2, np.nan) for name in MEASURES for actions in ("sampled", "greedy")}
    lines = markdown(scores(9, "top right", values | {"found greedy": np.ones(2)})).splitlines()
    assert lines[2] == "| 9 | top right | greedy | 2 | 100.0% (34.2% to 100.0%) | - | - | 0 | - | - | - |"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--n", "0"], "--n must be at least 1; got 0."),
        (["--seed", "-1"], "seed must be between 0 and 2147483647; got -1."),
        (
            ["--sizes", "3", "5", "--cheese", "out of distribution"],
            "No maze in --sizes has a square outside the top right 5x5. Add a larger size.",
        ),
        (["--weights", "nowhere.pth"], "The weights 'nowhere.pth' cannot be read: No such file or directory."),
    ],
)
def test_a_wrong_argument_ends_with_one_line_that_says_so(arguments, complaint, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    assert evaluate.main() == 2
    assert capsys.readouterr().err == f"error: {complaint}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--sizes", "9", "14"], "argument --sizes: invalid choice: 14 (choose from 3, 5, 7, 9, "),
        (["--cheese", "here"], "argument --cheese: invalid choice: 'here' (choose from 'in distribution', "),
    ],
)
def test_an_unknown_size_or_place_is_rejected_with_the_known_ones(arguments, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 2
    assert f"evaluate.py: error: {complaint}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "cwd"), [(["-S", str(SCRIPT)], Path()), (["-S", "-m", "maze.evaluate"], SCRIPT.parents[1])]
)
def test_help_answers_without_any_package_installed_as_a_file_and_as_a_module(run, cwd):
    done = command("--help", cwd=cwd, run=run)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout
