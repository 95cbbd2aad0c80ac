import copy
import re
from dataclasses import replace

import numpy as np
import pytest
from studies import BEST, small_study

from maze.analysis.decision_squares import precise_threshold
from maze.analysis.forwards import SITE, level_sums
from maze.analysis.part import POOL, open_to
from maze.analysis.selection import select_channels
from maze.measurements import PARTS
from maze.measurements import sums as part
from maze.paths import Direction, first_steps, legal_moves, top_right
from maze.states import read_mazes


def study_of(n):
    """A study whose channels are given, with the sums of some selection mazes."""
    study = small_study(n, tuple(range(32)))
    levels = study.levels("selection", 60, size=25, cheese="in distribution", mouse="anywhere")
    study.__dict__["selection"] = replace(select_channels(study.points, SITE, levels), best=BEST)
    return study


@pytest.fixture(scope="module")
def study():
    return study_of(20)


@pytest.fixture(scope="module")
def tables(study):
    return part.measure(study)


def test_the_sums_are_of_mazes_in_which_the_direction_is_legal(study, tables):
    levels = study.levels("sums in distribution", 60, size=25, cheese="in distribution", mouse="anywhere")
    mazes = read_mazes(levels)
    legal = legal_moves(mazes)[np.arange(60), Direction.UP, mazes.mouse[:, 0], mazes.mouse[:, 1]]
    chosen = np.flatnonzero(legal)[:20]
    rows = [row for row in tables["sums"] if (row["direction"], row["split"]) == ("UP", "in distribution")]
    sums = level_sums(study.points, SITE, [levels[index] for index in chosen])[:, BEST[Direction.UP]]
    np.testing.assert_allclose([row["sum"] for row in rows], sums, rtol=1e-4, atol=1e-4)
    labels = first_steps(mazes, mazes.cheese)[chosen, Direction.UP]
    np.testing.assert_array_equal([row["is_it"] for row in rows], labels)


def test_too_few_mazes_for_a_threshold_are_said_in_the_table_and_the_finding():
    few = part.measure(study_of(3))
    assert all(row["quantity"].startswith("not measured") for row in few["transfer"] + few["precise"])
    assert part.finding(few).agrees == "not comparable"
    assert part.figure(few).axes


def test_the_precise_threshold_is_the_smallest_of_one_half_scored_on_the_other_and_outside(study, tables):
    of = {}
    for split in part.SPLITS:
        rows = [row for row in tables["sums"] if (row["direction"], row["split"]) == ("UP", split)]
        of[split] = np.array([row["sum"] for row in rows]), np.array([row["is_it"] for row in rows])
    probe = precise_threshold(*of["in distribution"], seed=study.seed_for("halves"))
    sums, labels = of["out of distribution"]
    hits, alarms = ((sums > probe.threshold)[labels == which].mean() for which in (True, False))
    base = probe.held_out.base_rate.estimate
    row = precise_row(tables)
    assert (row["threshold"], row["criterion"]) == (probe.threshold, probe.criterion)
    assert row["fit"] == pytest.approx(probe.held_out.precision.estimate, nan_ok=True)
    assert row["shifted"] == pytest.approx(base * hits / (base * hits + (1 - base) * alarms), nan_ok=True)


@pytest.mark.parametrize(
    ("inside", "outside", "drop"), [(0.9, 0.7, 0.2), (0.9, 0.7, 0.0), (0.5, 0.5, 0.0), (0.3, 0.3, -0.2)]
)
def test_the_areas_are_told_and_not_judged(tables, inside, outside, drop):
    changed = with_precision(tables, (0.95, 0.99), (0.6, 0.8))
    precise_row(changed).update(drop_low=0.1, drop_high=0.3)
    for row in changed["goals"]:
        value = inside if row["split"] == part.SPLITS[0] else outside
        for name, of in (("cheese", value), ("drop", drop)):
            row |= {name: of, f"{name}_low": of - 0.1, f"{name}_high": of + 0.1}
    finding = part.finding(changed)
    assert finding.agrees == "yes" and f"AUC in distribution {inside:.3f}" in finding.ours


@pytest.mark.parametrize(("low", "high", "agrees"), [(0.1, 0.3, "yes"), (-0.1, 0.3, "undecided"), (-0.3, -0.1, "no")])
def test_the_drop_of_the_precision_decides(tables, low, high, agrees):
    changed = with_precision(tables, (0.95, 0.99), (0.6, 0.8))
    for row in changed["transfer"]:
        row |= {f"{name}{end}": 0.8 for name in ("fit", "shifted", "drop") for end in ("", "_low", "_high")}
    precise_row(changed).update(drop_low=low, drop_high=high)
    assert part.finding(changed).agrees == agrees


def test_a_threshold_that_accepts_nothing_leaves_the_claim_open(tables):
    changed = with_precision(tables, (0.0, 1.0), (0.0, 1.0))
    precise_row(changed).update(fit=np.nan, drop_low=None, drop_high=None)
    found = part.finding(changed)
    assert "with precision undefined, as no sum is accepted in distribution" in found.ours and found.agrees != "yes"


def precise_row(tables):
    return next(
        row
        for row in tables["precise"]
        if row["direction"] == "UP" and row["quantity"] == "precision at the base rate of the fit"
    )


def with_precision(tables, fit, shifted):
    """The tables with other intervals of the precision for UP, in distribution and out of it."""
    changed = copy.deepcopy(tables)
    for name, (low, high) in (("fit", fit), ("shifted", shifted)):
        precise_row(changed).update({name: (low + high) / 2, f"{name}_low": low, f"{name}_high": high})
    return changed


def test_the_figure_has_a_column_of_marks_per_label_and_split(tables):
    for axes, direction in zip(part.figure(tables).axes, Direction, strict=True):
        names, counts = zip(*(text.get_text().split("\nn = ") for text in axes.get_xticklabels()), strict=True)
        assert names == (direction.name, f"not {direction.name}")
        assert sum(map(int, counts)) == 40
        assert [len(marks.get_offsets()) for marks in axes.collections] == [20, 20]


def test_what_all_channels_tell_is_told_beside_what_the_one_does(tables):
    inside, outside = (row for row in tables["linear"] if row["direction"] == "UP")
    assert (inside["channel"], inside["n"], inside["split"]) == (BEST[Direction.UP], 20, "in distribution")
    goals = next(row for row in tables["goals"] if (row["direction"], row["split"]) == ("UP", outside["split"]))
    assert outside["one"] == goals["cheese"]
    assert f"has AUC {inside['linear']:.3f}" in part.finding(tables).follows


def test_the_way_to_the_corner_is_told_apart_from_that_to_the_cheese(study, tables):
    row = next(row for row in tables["goals"] if (row["direction"], row["split"]) == ("UP", "out of distribution"))
    pool = study.levels("sums out of distribution", POOL * study.n, size=25, cheese=row["split"], mouse="anywhere")
    levels, cheese = open_to(Direction.UP, pool, study.n)
    mazes = read_mazes(levels)
    corner = first_steps(mazes, top_right(mazes))[:, Direction.UP]
    sums = np.array(
        [each["sum"] for each in tables["sums"] if (each["direction"], each["split"]) == ("UP", row["split"])]
    )
    pairs = [(one > other) + (one == other) / 2 for one in sums[corner] for other in sums[~corner]]
    assert row["corner"] == pytest.approx(np.mean(pairs))
    alone = (corner[cheese].mean() - corner[~cheese].mean() + 1) / 2
    assert row["corner_alone"] == pytest.approx(alone)
    assert f"the AUC is {row['corner']:.2f}" in part.finding(tables).follows


def test_the_area_in_distribution_is_over_all_mazes_as_it_needs_no_fit(tables):
    inside, outside = (row for row in tables["goals"] if row["direction"] == "UP")
    assert (inside["n"], outside["n"]) == (20, 20)
    assert outside["drop"] == pytest.approx(inside["cheese"] - outside["cheese"]) and inside["drop"] is None
    assert not any(row["quantity"] == "AUC" for row in tables["transfer"] + tables["precise"])
    ours = part.finding(tables).ours
    assert f"AUC in distribution {inside['cheese']:.3f}" in ours and f"n={inside['n']}; out" in ours
    assert f"out of it {outside['cheese']:.3f}" in ours


@pytest.mark.parametrize("name", ["search", "ranking", "sums", "sizes", "parity", "random-mazes", "hypothesis"])
def test_every_method_with_areas_says_over_which_squares_or_mazes_they_are(name):
    (said,) = re.findall(r"[^.;:]*\bAUCs?\b.*", PARTS[name].method)
    assert re.search("squares|mazes|over all n of these", said)
