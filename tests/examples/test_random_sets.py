"""The rank of channels that are ablated together among random sets of as many."""

import numpy as np
import pytest
from studies import small_study

from chanpatch import zero_ablate
from maze.analysis.effects import KINDS, activations
from maze.analysis.episodes import ORIGINAL
from maze.analysis.exact import Chains, first_hits
from maze.analysis.random_sets import SETS, different_sets, random_sets, told_sets
from maze.analysis.tables import SITE, action_tables

GROUP = (7, 24)


@pytest.fixture(scope="module")
def study():
    return small_study(3, (*GROUP, 8, 30, 23, 16, 5, 0))


@pytest.fixture(scope="module")
def levels(study):
    return study.levels("sets", size=7, cheese="bottom right")


@pytest.fixture(scope="module")
def rows(study, levels):
    reference = activations(study.points, study.levels("reference", 10, size=7), SITE)
    return random_sets(study, levels, GROUP, reference, seed=1)


def test_every_kind_of_ablation_has_a_rank_and_a_p_value_among_the_sets(rows):
    assert [row["kind"] for row in rows] == list(KINDS)
    for row in rows:
        assert (row["controls"], row["n"]) == (SETS, 3)
        assert row["rank_p"] == pytest.approx(row["rank"] / (1 + SETS))
        assert row["controls_lowest"] <= row["controls_highest"]
        assert (row["rank"] == 1) == (
            abs(row["effect"]) > max(abs(row["controls_lowest"]), abs(row["controls_highest"]))
        )


def test_the_effect_is_that_of_the_group_alone(study, levels, rows):
    chains = Chains.of(levels)
    patches = [zero_ablate(study.points.site(SITE, channel=list(GROUP)))]
    tables = action_tables(study.points, chains, {ORIGINAL: (), "zeroed": patches})
    before, after = (
        first_hits(chains, tables[name], [chains.cheese])[chains.start, 0] for name in (ORIGINAL, "zeroed")
    )
    np.testing.assert_allclose(rows[0]["effect"], (after - before).mean(), atol=1e-6)


def test_the_sets_are_different_ones_and_none_that_is_tested():
    sets = different_sets(range(32), (range(16), range(16, 32)), seed=0)
    assert len(set(sets)) == SETS and not {tuple(range(16)), tuple(range(16, 32))} & set(sets)
    assert all(len(set(each)) == 16 for each in sets)


def test_where_hardly_more_channels_live_than_a_set_takes_there_are_fewer_sets():
    assert different_sets(range(16), (range(16),), seed=0) == []
    assert len(different_sets(range(17), (range(16),), seed=0)) == 16


def test_there_are_no_sets_of_all_live_channels(study, levels):
    assert random_sets(study, levels, study.selection.live, None, seed=1) == []
    assert told_sets([]) == ""


def test_the_rank_is_told_with_its_controls(rows):
    told = told_sets([rows[0] | {"rank": 3, "rank_p": 0.15}])
    assert "The top 2 together, among 19 random sets of as many live channels, n=3" in told
    assert "rank 3 of 20 (p = 0.15)" in told


def test_a_rank_among_too_few_sets_has_no_p_value(rows):
    assert "(too few for a p-value)" in told_sets([rows[0] | {"controls": 16, "rank_p": None}])
