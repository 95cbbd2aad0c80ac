import numpy as np
import pytest
import torch
from studies import shipped_points

from chanpatch import patch_in
from maze.analysis import effects
from maze.analysis.effects import destinations, effect_rows, joined, level_batches
from maze.analysis.exact import ORIGINAL, Chains, cheese_and_corner, decisions
from maze.analysis.forwards import SITE, activations
from maze.levels import draw_levels


@pytest.fixture(scope="module")
def levels():
    return draw_levels(5, size=7, seed=1, cheese="out of distribution")


def test_levels_are_numbered_on_through_the_batches(levels, monkeypatch):
    points = shipped_points()
    site, donors = points.site(SITE), torch.rand(5, 32, 8, 8, generator=torch.manual_seed(0))
    interventions = {ORIGINAL: (), "donor": lambda level: [patch_in(site, donors[level])]}
    (whole,) = [tables for _, tables in level_batches(points, levels, interventions)]
    monkeypatch.setattr(effects, "_LEVELS", 2)
    parts = list(level_batches(points, levels, interventions))
    assert [len(chains.levels) for chains, _ in parts] == [2, 2, 1]
    np.testing.assert_allclose(np.concatenate([tables for _, tables in parts], axis=1), whole, atol=1e-5)


def test_activations_are_those_of_the_levels_one_by_one(levels):
    cache = activations(shipped_points(), levels, SITE)
    alone = [activations(shipped_points(), [level], SITE)[SITE] for level in levels]
    torch.testing.assert_close(cache[SITE], torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_activations_need_no_module_after_the_last_hook_point(levels, monkeypatch):
    points = shipped_points()
    monkeypatch.setattr(points.model.embedder.block3, "forward", lambda *_: pytest.fail("the policy ran on"))
    found = activations(points, levels, "embedder.block1", "embedder.block2")
    assert [tuple(each.shape) for each in found.values()] == [(5, 16, 32, 32), (5, 32, 16, 16)]


def test_destinations_are_named_after_what_is_computed(levels):
    chains = Chains.of(levels)
    tables = np.random.default_rng(0).dirichlet(np.ones(15), (2, len(chains)))
    values = destinations(chains, tables)
    expected = (*cheese_and_corner(chains, tables), *np.moveaxis(decisions(chains, tables), -1, 0)[:2])
    for name, each in zip(("found", "corner", "to_cheese", "to_corner"), expected, strict=True):
        np.testing.assert_array_equal(values[name], each)
    twice = joined([values, values])
    np.testing.assert_array_equal(twice["found"], np.concatenate([values["found"]] * 2, axis=1))


def test_an_effect_is_the_mean_difference_over_the_levels_that_have_the_measure():
    found = np.array([[0.1, 0.2, 0.1, 0.2, 0.1, 0.2, np.nan], [0.5, 0.4, 0.4, 0.5, 0.6, 0.3, np.nan]])
    (row,) = effect_rows({"found": found, "never": np.full((2, 7), np.nan)}, ["changed"])
    assert (row["measure"], row["intervention"], row["n"]) == ("found", "changed", 6)
    assert [row["original"], row["modified"], row["effect"]] == pytest.approx([0.15, 0.45, 0.3])
    assert row["effect_low"] < 0.3 < row["effect_high"]
    (few,) = effect_rows({"found": found[:, :5]}, ["changed"])
    assert few["effect_low"] is few["effect_high"] is None
