"""The rank of channels that are ablated together among random sets of as many."""

import numpy as np
import pytest
from studies import small_study

from chanpatch import zero_ablate
from maze.analysis.effects import KINDS, SETS, rank_text, set_rows
from maze.analysis.exact import ORIGINAL, Chains, first_hits
from maze.analysis.forwards import SITE, activations
from maze.analysis.tables import action_tables

GROUP = (7, 24)


@pytest.fixture(scope="module")
def study():
    return small_study(3, (*GROUP, 8, 30, 23, 16, 5, 0))


@pytest.fixture(scope="module")
def levels(study):
    return study.levels("sets", size=7, cheese="bottom right")


@pytest.fixture(scope="module")
def rows(study, levels):
    reference = activations(study.points, study.levels("reference", 10, size=7), SITE)[SITE][None]
    return set_rows(study, levels, GROUP, reference, seed=1)


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


def test_there_are_no_sets_of_all_live_channels(study, levels):
    assert set_rows(study, levels, study.selection.live, None, seed=1) == []


@pytest.mark.parametrize(("p", "words"), [(0.15, "3 of 20 (p = 0.15)"), (None, "3 of 20 (too few for a p-value)")])
def test_a_rank_in_words_has_its_p_value(rows, p, words):
    assert words in rank_text(rows[0] | {"rank": 3, "rank_p": p})
