"""The example's command line, as a user types it."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from chanpatch.policies import Rollout
from maze.rollouts import kept

SCRIPT = Path(__file__).parents[2] / "examples" / "maze_goal_misgen.py"
SMALL = ["--n", "10", "--size", "7", "--controls", "1"]
TABLE = ["label", "found", "both", "only_first", "only_second", "neither", "effect", "low", "high", "p", "control"]


def study(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], cwd=cwd, capture_output=True, text=True)


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def not_played() -> Rollout:
    raise AssertionError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Results of a small run, and its output."""
    folder = tmp_path_factory.mktemp("study")
    done = study(*SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return only(folder / "results"), done.stdout


def test_a_run_prints_its_steps_and_writes_a_figure_a_table_and_the_rollouts(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    assert all(f"\n{step}. " in printed for step in range(1, 6))
    names = {file.name for file in folder.iterdir()}
    assert {"channel.png", "table.csv", "original.npz"} < names
    assert len([name for name in names if name.endswith("-zeroed.npz")]) == len(names) - 3 == 2


def test_the_table_counts_the_rollouts_on_disk_and_is_the_one_that_was_printed(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    original = kept(folder / "original.npz", not_played)
    assert [*rows[0]] == TABLE
    for row in rows:
        found = kept(folder / f"{row['label'].replace(' ', '-')}.npz", not_played).terminated
        counts = [np.sum(found & original.terminated), np.sum(found & ~original.terminated)]
        assert [int(row["both"]), int(row["only_first"])] == counts
        assert float(row["found"]) == found.mean()
        assert f"{row['label']:20} {found.mean():6.1%}" in printed
    assert [row["control"] for row in rows] == ["False", "True"]


def test_a_finished_run_is_not_played_again(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*.npz")}
    again = study(*SMALL, cwd=folder.parents[1])
    assert again.stdout == printed
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*.npz")} == before


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_ends_with_the_same_numbers(finished: tuple[Path, str], tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), *SMALL]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("results/*/original.npz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in complaint
    kept_file = only(tmp_path / "results") / "original.npz"
    before = kept_file.stat().st_mtime_ns
    assert study(*SMALL, cwd=tmp_path).returncode == 0
    assert kept_file.stat().st_mtime_ns == before
    assert (kept_file.parent / "table.csv").read_text() == (finished[0] / "table.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--site", "embedder.relu_3"], "No hook point named 'embedder.relu_3'. Did you mean 'embedder.relu3'?"),
        (["--channel", "32"], "channel 32 is out of range"),
        (["--channel", "-1"], "--channel must be at least 0; got -1."),
        (["--size", "14"], "--size must be odd; got 14."),
        (["--n", "0"], "--n must be between 10 and 1000000; got 0."),
        (["--seed", "-1"], "--seed must be between 0 and 2147483647; got -1."),
        (["--weights", "nowhere.pth"], "The weights 'nowhere.pth' cannot be read: No such file or directory."),
    ],
)
def test_a_wrong_argument_ends_with_one_line_of_advice(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    done = study(*SMALL, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert complaint in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()


def test_help_answers_without_any_package_installed(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-E", str(SCRIPT), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


def test_the_example_is_a_script_of_at_most_250_lines() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 250
