import copy

import numpy as np
import pytest
from studies import from_files, small_study

from maze.analysis import contrasts
from maze.analysis.exact import Chains
from maze.analysis.forwards import SITE, level_sums
from maze.analysis.tables import action_tables
from maze.measurements import top16 as part
from maze.paths import Direction
from maze.policy.network import ACTIONS
from maze.states import read_mazes

RANKED = tuple(range(32))


@pytest.fixture(scope="module", autouse=True)
def small_mazes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "SIZE", 9)
        patch.setattr(part, "SETS", 5)
        patch.setattr(contrasts, "TEXTURES", 2)
        yield


@pytest.fixture(scope="module")
def study():
    return small_study(4, RANKED)


@pytest.fixture(scope="module")
def tables(study):
    return part.measure(study)


def test_the_share_that_goes_elsewhere_is_half_the_distance_of_the_moves_averaged_over_states(study):
    chains = Chains.of(study.levels("top16", 2, size=5, cheese="in distribution"))
    first, second = np.random.default_rng(0).dirichlet(np.ones(15), (2, len(chains)))
    expected = np.zeros(2)
    for level in range(2):
        states = np.flatnonzero(chains.level == level)
        for state in states:
            apart = [
                first[state, list(actions)].sum() - second[state, list(actions)].sum() for actions in ACTIONS.values()
            ]
            apart.append(-sum(apart))  # of not moving
            expected[level] += sum(map(abs, apart)) / 2 / len(states)
    np.testing.assert_allclose(part._elsewhere(chains, np.stack([first, second])), [[0, 0], expected])


def test_the_pairs_channels_differ_most_over_the_pictures_of_our_pair(study, tables):
    sums = [level_sums(study.points, SITE, pair.levels) for pair in contrasts.drawn_pairs() if pair.number == 0]
    differences = [sum(abs(turn[0][channel] - turn[1][channel]) for turn in sums) for channel in RANKED]
    rows = [row for row in tables["effects"] if (row["chosen"], row["measure"]) == (part.PAIR, "found")]
    for row, count in zip(rows, (4, 16), strict=True):
        given = list(map(int, row["channels"].split()))
        assert given == sorted(RANKED, key=lambda channel: -differences[channel])[:count]


def test_the_control_sets_are_different_sets_of_live_channels_and_none_of_the_tested_ones(tables):
    for count in (4, 16):
        rows = [row for row in tables["effects"] if (row["measure"], row["count"]) == ("found", count)]
        sets = [tuple(sorted(map(int, row["channels"].split()))) for row in rows]
        assert [row["chosen"] for row in rows] == [part.PAIR, part.TOP] + [part.CONTROL] * part.SETS
        assert len(set(sets)) == len(sets) and all(len(set(each)) == count for each in sets)


def test_both_sets_have_a_rank_among_the_controls_of_their_size(tables):
    for row in tables["effects"]:
        if row["chosen"] == part.CONTROL:
            assert row["rank"] is None
        else:
            controls = [
                each["effect"]
                for each in tables["effects"]
                if (each["chosen"], each["measure"], each["count"]) == (part.CONTROL, row["measure"], row["count"])
            ]
            assert row["rank"] == 1 + sum(abs(each) >= abs(row["effect"]) for each in controls)


@pytest.mark.parametrize(
    ("to_cheese", "drawn"), [([np.nan, 0.4, 0.6, 0.9], 2), ([np.nan, 0.2, 0.4, 0.3], 2), ([np.nan, np.nan], 0)]
)
def test_the_drawn_maze_is_the_first_in_which_the_unpatched_mouse_mostly_goes_to_the_cheese(to_cheese, drawn):
    assert part._shows_the_claim(np.array(to_cheese)) == drawn


def test_the_field_holds_the_mean_of_both_facings_and_nothing_where_the_episode_is_over(study, tables):
    levels = study.levels("top16", size=part.SIZE, cheese="out of distribution")
    size, cheese = tables["field"][0]["size"], (tables["field"][0]["cheese_row"], tables["field"][0]["cheese_col"])
    (level,) = (each for each in levels if tuple(read_mazes([each]).cheese[0]) == cheese)
    chains = Chains.of([level])
    (table,) = action_tables(study.points, chains).values()
    assert len(tables["field"]) == read_mazes([level]).free.sum()
    for row in tables["field"]:
        states = np.flatnonzero((chains.cell == (row["row"], row["col"])).all(axis=1))
        if not len(states):
            assert row["original_up"] is None and row["zeroed_up"] is None
        else:
            up = table[states][:, list(ACTIONS[Direction.UP])].sum(axis=1).mean()
            assert row["original_up"] == pytest.approx(up, abs=1e-5)
    assert size == part.SIZE


@pytest.mark.parametrize(("found", "agrees"), [(-0.1, "yes"), (-0.8, "no"), (-0.4, "undecided")])
def test_the_finding_agrees_when_half_of_the_cheese_is_still_found_without_an_eighth(tables, found, agrees):
    changed = copy.deepcopy(tables)
    for row in changed["effects"]:
        low = found if row["count"] == 4 else -found
        if (row["chosen"], row["measure"]) == (part.PAIR, "found"):
            row |= {"original": 0.8, "effect_low": low - 0.1, "effect_high": low + 0.1}
    assert part.finding(changed).agrees == agrees


def test_a_mouse_that_never_finds_the_cheese_has_nothing_to_keep(tables):
    changed = copy.deepcopy(tables)
    for row in changed["effects"]:
        row |= {"original": 0.0, "effect": 0.0, "effect_low": 0.0, "effect_high": 0.0}
    assert part.finding(changed).agrees == "undecided"


def test_without_decision_squares_and_controls_the_finding_says_so(tables):
    fewer = [row for row in tables["effects"] if not row["measure"].startswith("to_") and row["chosen"] != part.CONTROL]
    finding = part.finding({**tables, "effects": fewer})
    assert "decision square" not in finding.ours
    assert "no other set of as many live channels" in finding.follows


def test_the_finding_tells_the_ranks_and_the_range_of_the_controls(tables):
    changed = copy.deepcopy(tables)
    controls = [
        row for row in changed["effects"] if (row["chosen"], row["measure"], row["count"]) == (part.CONTROL, "found", 4)
    ]
    controls[3]["effect"], controls[2]["effect"] = -0.987, 0.988
    for row in changed["effects"]:
        if row["chosen"] == part.PAIR:
            row |= {"rank": 7, "rank_p": 0.35}
        if row["chosen"] == part.TOP:
            row |= {"rank": 9, "rank_p": 0.45}
    summary = part.finding(changed).follows
    assert "-0.987 to +0.988" in summary and "ranks 7 and 9 of 6 (p = 0.35 and 0.45)" in summary


def test_the_figure_shows_three_fields_and_the_effects(tables):
    assert len(part.figure(tables).axes) == 4


def test_the_finding_and_the_figure_are_made_from_files(tables, tmp_path):
    read = from_files(tables, tmp_path)
    assert part.finding(read) == part.finding(tables)
    part.figure(read)
