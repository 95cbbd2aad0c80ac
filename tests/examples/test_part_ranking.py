import copy
from dataclasses import replace

import numpy as np
import pytest
from studies import from_files, shipped_points, small_study

from chanpatch.statistics import Interval
from maze.analysis.forwards import SITE, level_sums
from maze.analysis.labels import LabelledChannel
from maze.environment.pairs import contrastive_pairs, rotations
from maze.levels import draw_levels
from maze.measurements import ranking as part
from maze.states import write_mazes

KNOWN, UNKNOWN = Interval(0.8, 0.75, 0.85, 0.95), Interval(0.5, 0.4, 0.6, 0.95)


def study_with_labelled_channels(live):
    """Channel 27 stands for UP, channel 13 for LEFT or DOWN, and the others for nothing."""
    study = small_study(4, live)
    labels = {27: LabelledChannel("UP", "UP", 40, Interval(0.9, 0.8, 0.95, 0.95), 0.01, 60, KNOWN)}
    labels[13] = replace(labels[27], label="LEFT or DOWN", candidate="LEFT or DOWN", n_choice=70)
    nothing = LabelledChannel(None, "RIGHT", 40, Interval(0.5, 0.4, 0.6, 0.95), 1.0, 50, UNKNOWN)
    study.__dict__["labels"] = [labels.get(channel, nothing) for channel in range(32)]
    return study


@pytest.fixture(scope="module", autouse=True)
def few_textures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part.contrasts, "TEXTURES", 2)
        yield


@pytest.fixture(scope="module")
def tables():
    return part.measure(study_with_labelled_channels(tuple(range(32))))


def test_the_difference_is_the_mean_of_the_absolute_one_over_rotations_textures_and_facings(tables):
    expected = np.zeros(32)
    for pair in rotations(contrastive_pairs()[0]):
        for base in draw_levels(2, size=7, seed=0):
            for facing in (False, True):
                levels = write_mazes(pair.moved(facing_right=facing), base)
                sums = level_sums(shipped_points(), SITE, levels)
                expected += np.abs(sums[0] - sums[1]) / 16
    for row in tables["ranking"]:
        assert row["absolute"] == pytest.approx(expected[row["channel"]], abs=1e-3)
    assert [row["rank"] for row in tables["ranking"]] == list(range(1, 33))
    assert sorted(row["rank_five_pairs"] for row in tables["ranking"]) == list(range(1, 33))


def test_a_channel_has_its_label_and_what_it_tells_where_there_is_a_choice(tables):
    rows = {row["channel"]: row for row in tables["ranking"]}
    assert (rows[27]["label"], rows[13]["label"], rows[0]["label"]) == ("UP", "LEFT or DOWN", None)
    assert (rows[27]["n_choice"], rows[27]["auc_choice"], rows[27]["auc_choice_low"]) == (60, 0.8, 0.75)


@pytest.fixture
def read(tables):
    """The tables of a policy whose channels all stand for RIGHT beyond the walls."""
    changed = copy.deepcopy(tables)
    for row in changed["ranking"]:
        row.update(label="RIGHT", auc_choice=0.8, auc_choice_low=0.75)
    return changed


def test_the_finding_agrees_when_the_first_ten_stand_for_directions_and_says_how_many_others_do(read):
    finding = part.finding(read)
    assert finding.agrees == "yes" and "10 of the first 10 stand for a direction" in finding.ours
    assert "22 of the 22 live channels that the pair ranks lower stand for a direction" in finding.follows


@pytest.mark.parametrize(
    "changed",
    [
        {"label": None},
        {"label": "DOWN or UP"},
        {"label": "LEFT or RIGHT"},
        {"label": "LEFT or DOWN or UP"},
        {"auc_choice": 0.72, "auc_choice_low": 0.65},
        {"auc_choice": None, "auc_choice_low": None, "auc_choice_high": None},
    ],
)
def test_a_channel_that_notices_walls_or_opposite_directions_is_no_reading(changed, read):
    for agrees, rows in (("yes", read["ranking"][:4]), ("no", read["ranking"][4:6])):
        for row in rows:
            row.update(changed)
        assert part.finding(read).agrees == agrees
    assert "4 of the first 10 stand for a direction" in part.finding(read).ours


def test_few_live_channels_are_ranked_and_drawn():
    tables = part.measure(study_with_labelled_channels((13, 27)))
    assert {row["channel"] for row in tables["ranking"]} == {13, 27}
    assert part.figure(tables).axes
    assert part.finding(tables).agrees == "yes"


def test_the_finding_and_the_figure_are_made_from_files(tables, tmp_path):
    read = from_files(tables, tmp_path)
    assert part.finding(read) == part.finding(tables)
    assert part.figure(read).axes
