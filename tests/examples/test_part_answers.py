"""The parts on the corner as the default: default, share, direction, dose and counterfactual."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from studies import from_files, small_study

from chanpatch import patched, zero_ablate
from maze.analysis.cells import chosen, keyed
from maze.analysis.cheese_removed import mixed, without_cheese
from maze.analysis.effects import p_reached
from maze.analysis.exact import Chains
from maze.analysis.forwards import SITE, frames
from maze.analysis.tables import action_tables
from maze.levels import draw_levels
from maze.measurements import counterfactual, default, direction, dose, share
from maze.paths import Direction, first_steps, top_right
from maze.policy.network import ACTIONS
from maze.states import read_mazes, write_mazes

LEVELS = 8


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        for part in (default, share, direction, dose, counterfactual):
            patch.setattr(part, "SIZE", 9)
        for part in (share, direction, counterfactual):
            patch.setattr(part, "SETS", 3)
        patch.setattr(direction, "FITTED", 40)
        patch.setattr("maze.analysis.decision_squares.THRESHOLD_LEVELS", 60)
        yield


@pytest.fixture(scope="module")
def study():
    return small_study(LEVELS, (7, 8, 24, 30, 1, 2, 3, 4, 5, 6))


@pytest.fixture(scope="module")
def tables(study):
    parts = (default, share, direction, dose, counterfactual)
    return {part: part.measure(study) for part in parts}


@pytest.fixture(scope="module")
def seen(study):
    return without_cheese(
        study.points, study.levels("odds", size=9, cheese="out of distribution", mouse="decision square")
    )


def test_log_odds_are_those_of_the_whole_policy_on_both_pictures(study, seen):
    levels = study.levels("odds", size=9, cheese="out of distribution", mouse="decision square")
    mazes = read_mazes(levels)
    for pictures, activation in ((mazes, seen.shown), (mazes.without_cheese(), seen.removed)):
        probabilities = study.points.model(frames(write_mazes(pictures, levels)))[0].probs.detach().double().numpy()
        expected = []
        for row, steps in enumerate(
            zip(first_steps(mazes, mazes.cheese), first_steps(mazes, top_right(mazes)), strict=True)
        ):
            cheese, corner = (probabilities[row, list(ACTIONS[Direction(each.argmax())])].sum() for each in steps)
            expected.append(np.log(cheese) - np.log(corner))
        np.testing.assert_allclose(seen.odds(activation), expected, atol=1e-3)


def test_all_channels_together_carry_the_whole_effect_of_the_cheese(seen):
    assert torch.equal(mixed(seen.shown, seen.removed, range(32)), seen.removed)
    assert torch.equal(mixed(seen.shown, seen.removed, []), seen.shown)


def test_the_share_of_a_set_is_the_mean_change_over_the_mean_change_of_all(study, tables):
    levels = study.levels(
        "share squares out of distribution", size=9, cheese="out of distribution", mouse="decision square"
    )
    seen = without_cheese(study.points, levels)
    before = seen.odds(seen.shown)
    best = mixed(seen.shown, seen.removed, [7, 8, 24, 30])
    part, total = (seen.odds(each) - before for each in (best, seen.removed))
    row = keyed(tables[share]["shares"], "split", "set")["out of distribution", share.BEST]
    assert row["share"] == pytest.approx(part.mean() / total.mean())
    assert row["channels"] == "7 8 24 30"


def test_the_cheeses_effect_is_the_difference_between_the_pictures(tables):
    odds = keyed(tables[default]["odds"], "split", "picture")
    for split in ("in distribution", "out of distribution"):
        shown, removed, effect = (odds[split, picture]["log_odds"] for picture in default.PICTURES)
        assert effect == pytest.approx(shown - removed)
    (ratio,) = tables[default]["ratio"]
    assert ratio["ratio"] == pytest.approx(
        odds["in distribution", default.PICTURES[2]]["log_odds"]
        / odds["out of distribution", default.PICTURES[2]]["log_odds"]
    )


def test_factor_0_is_zero_ablation_and_factor_1_changes_nothing(study, tables):
    levels = study.levels("dose levels", size=9, cheese="bottom right")
    zeroed = [zero_ablate(study.points.site(SITE, channel=7))]
    found = p_reached(study.points, levels, {"zeroed": zeroed, "once": dose.scaled(study.points, 7, 1.0)})
    doses = keyed(tables[dose]["doses"], "factor")
    assert doses[0.0]["p_cheese"] == pytest.approx(found[1].mean(), abs=1e-5)
    assert doses[1.0]["p_cheese"] == pytest.approx(found[0].mean(), abs=1e-5)
    np.testing.assert_allclose(found[2], found[0], atol=1e-5)


def test_the_corners_direction_is_gone_after_its_projection(study):
    own = direction.corner_up(study)
    inputs = frames(draw_levels(3, size=9, seed=1))
    with patched(study.points, direction.projection(study.points, own)), torch.no_grad():
        kept = []
        hook = study.points.model.get_submodule(SITE).register_forward_hook(lambda *passed: kept.append(passed[-1]))
        study.points.model(inputs)
        hook.remove()
    along = (kept[0] * own).sum(dim=1) / own.norm()
    assert float(along.abs().max()) < 1e-3 * float(kept[0].abs().max())


def test_with_all_channels_as_without_cheese_the_mouse_walks_as_if_it_were_not_shown(study):
    levels = study.levels("counterfactual levels out of distribution", size=9, cheese="out of distribution")[:3]
    chains = Chains.of(levels)
    unseen = action_tables(study.points, replace(chains, mazes=chains.mazes.without_cheese()))
    shown = action_tables(study.points, chains)
    original, every = counterfactual._tables(study, chains, [(), range(32)])
    np.testing.assert_allclose(original, next(iter(shown.values())), atol=1e-5)
    np.testing.assert_allclose(every, next(iter(unseen.values())), atol=1e-5)


@pytest.mark.parametrize("part", [default, share, direction, dose, counterfactual], ids=lambda part: part.__name__[18:])
def test_every_part_has_a_primary_claim_a_figure_and_a_finding(tables, part, tmp_path):
    read = from_files(tables[part], tmp_path)
    (claim,) = read["primary"]
    assert claim["n"] == LEVELS and 0 < claim["p"] <= 1
    assert part.figure(read).axes
    assert part.finding(read).ours


def test_the_default_is_confirmed_by_four_criteria(tables):
    changed = copy.deepcopy(tables[default])
    for row in chosen(changed["odds"], picture=default.PICTURES[1]):
        row |= {"log_odds_low": -3.0, "log_odds_high": -1.0}
    changed["ratio"][0] |= {"ratio_low": 1.2, "ratio_high": 3.0}
    for row in changed["channels"]:
        row |= {"stays_high": 0.97, "stays_high_low": 0.9, "stays_high_high": 1.0}
    assert default.finding(changed).agrees == "yes"
    changed["ratio"][0] |= {"ratio_low": 0.8}
    assert default.finding(changed).agrees == "in part"
