"""The study's command line, as a user types it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from chanpatch import hook_points
from chanpatch.statistics import Interval, PairedCounts
from maze.analysis.ablation import ORIGINAL, Comparison, Episodes, compare, play, ranked, told_rank, zeroed
from maze.environment.levels import draw_levels, observe, policy_input
from maze.policy.network import load_policy

SCRIPT = Path(__file__).parents[2] / "examples" / "maze_goal_misgen.py"
SMALL = ["--only", "rollouts", "--n", "6", "--size", "7", "--controls", "1"]
FILES = ["ablation.png", "episodes.csv", "summary.json", "table.csv"]


def study(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], cwd=cwd, capture_output=True, text=True)


def table(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Results of a small study, and what it printed."""
    folder = tmp_path_factory.mktemp("study")
    done = study(*SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return only(folder / "results"), done.stdout


def test_a_small_study_leaves_its_four_files_and_the_episodes_and_nothing_else(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert sorted(file.name for file in folder.iterdir() if file.is_file()) == FILES
    assert [file.name for file in folder.iterdir() if file.is_dir()] == ["parts"]


def test_a_finished_study_is_not_played_again(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.suffix != ".png"}
    again = study(*SMALL, cwd=folder.parents[1])
    assert again.stdout.count("kept from before") == 3
    assert again.stdout.replace(": kept from before", "") == printed
    assert all((folder / name).read_bytes() == content for name, content in before.items())


def test_the_printed_table_is_the_one_on_disk(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    summary = json.loads((folder / "summary.json").read_text())
    first = summary["comparisons"][0]
    assert sum(first["counts"].values()) == 6
    assert f"channel {first['channel']} zeroed: found it" in printed
    for count in first["counts"].values():
        assert f"{count} ({count / 6:.1%})" in printed
    rows = table(folder / "table.csv")
    assert [int(row["channel"]) for row in rows] == [each["channel"] for each in summary["comparisons"]]
    assert [row["control"] for row in rows] == ["0", "1"]


def test_the_rank_of_the_channel_is_printed_and_on_disk(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    first, control = table(folder / "table.csv")
    rank = 1 + (abs(float(control["difference"])) >= abs(float(first["difference"])))
    assert [first[name] for name in ("rank", "rank_of", "rank_p")] == [str(rank), "2", ""]
    assert [control[name] for name in ("rank", "rank_of", "rank_p")] == [""] * 3
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["rank"]["rank"], summary["rank"]["controls"], summary["rank"]["p"]) == (rank, 1, None)
    told = (
        f"The difference of channel {first['channel']}, up or down, is rank {rank} of 2 (no p-value: it needs at least"
    )
    assert told in printed


def test_a_rank_has_a_p_value_from_19_controls_on_and_none_without_controls() -> None:
    def comparison(channel: int, difference: float) -> Comparison:
        interval = Interval(difference, difference - 0.1, difference + 0.1, 0.95)
        return Comparison(channel, channel > 0, PairedCounts(1, 1, 1, 1), 1.0, interval, interval)

    many = [comparison(channel, 0.3 if channel == 0 else -0.01 * channel) for channel in range(20)]
    assert told_rank(ranked(many)) == "rank 1 of 20 (p = 0.05)"
    assert told_rank(ranked(many[:19])) == "rank 1 of 19 (no p-value: it needs at least 19 controls)"
    assert ranked(many[:1]) is None


def test_the_table_counts_the_episodes_on_disk(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    found = {(row["policy"], row["level"]): row["found"] == "1" for row in table(folder / "episodes.csv")}
    for row in table(folder / "table.csv"):
        name = f"channel {row['channel']} zeroed"
        outcomes = [(found[name, str(level)], found[ORIGINAL, str(level)]) for level in range(6)]
        expected = [outcomes.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
        assert [int(row[key]) for key in ("both", "only_modified", "only_original", "neither")] == expected


@pytest.mark.slow
def test_an_interrupted_study_keeps_what_is_done_and_ends_with_the_same_numbers(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *SMALL], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("results/*/parts/original.npz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command goes on from what is on disk" in complaint
    assert "Traceback" not in complaint
    resumed = study(*SMALL, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "  original: kept from before" in resumed.stdout
    expected, _ = finished
    for name in ("episodes.csv", "summary.json", "table.csv"):
        assert (only(tmp_path / "results") / name).read_text() == (expected / name).read_text()


def test_other_settings_get_a_folder_of_their_own(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    done = study(*SMALL, "--channel", "3", cwd=folder.parents[1])
    assert done.returncode == 0, done.stderr
    assert len(list(folder.parent.iterdir())) == 2
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--site", "embedder.relu_3"], "No hook point named 'embedder.relu_3'. Did you mean 'embedder.relu3'?"),
        (["--site", "embedder.fc"], "--site is 'embedder.fc', which has no channels: its axes are (batch, feature)."),
        (["--channel", "32"], "channel 32 is out of range"),
        (["--channel", "-1"], "--channel is -1, but channels are counted from 0."),
        (["--size", "14"], "--size is 14, but the side of a maze is odd, and 7 to 25 in this study."),
        (["--n", "0"], "--n is 0, but it is 1 to 1000000."),
        (["--seed", "-1"], "--seed is -1"),
        (["--controls", "99"], "--controls is 99, but there are only"),
        (["--weights", "nowhere.pth"], "The weights 'nowhere.pth' cannot be read: No such file or directory."),
    ],
)
def test_a_wrong_argument_ends_with_one_line_that_says_so(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    done = study(*SMALL, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert complaint in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()


def test_help_answers_without_any_package_installed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(SCRIPT), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ},
    )
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


def test_comparisons_count_what_two_arrays_say() -> None:
    def episodes(*found: bool) -> Episodes:
        return Episodes(np.array(found), np.zeros(len(found), dtype=np.int64), np.zeros((len(found), 1), dtype=np.int8))

    outcomes = {ORIGINAL: episodes(True, False, False, True), "a": episodes(True, True, False, False)}
    (comparison,) = compare(outcomes, {"a": 7}, chosen=7)
    assert comparison.counts == (1, 1, 1, 1)
    assert comparison.p == 1.0
    assert comparison.difference.estimate == 0.0
    assert not comparison.control


def test_zeroing_a_channel_changes_what_the_policy_does_and_the_original_beside_itself_does_not(tmp_path: Path) -> None:
    policy, _ = load_policy()
    levels = draw_levels(8, size=9, seed=5, cheese="bottom right")
    points = hook_points(policy, torch.from_numpy(policy_input(observe(levels[:2]))))
    policies = {ORIGINAL: policy, "again": policy, "patched": zeroed(points, "embedder.relu3", 7)}
    done = play(policies, levels, sampling_seed=0, keep=tmp_path)
    assert np.array_equal(done[ORIGINAL].actions, done["again"].actions)
    assert not np.array_equal(done[ORIGINAL].actions, done["patched"].actions)
