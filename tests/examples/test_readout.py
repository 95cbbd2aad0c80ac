import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from chanpatch.statistics import auc
from maze.analysis.forwards import SITE
from maze.analysis.readings import readout
from maze.analysis.selection import Selection
from maze.paths import Direction

LIVE = (0, 1, 3)


def mazes(n, seed):
    """Sums of four channels, the third of them dead, and in which mazes the way is UP: two of them tell it."""
    rng = np.random.default_rng(seed)
    sums = 10 * rng.random((n, 4))
    sums[:, 2] = 0.0
    return sums, sums[:, 0] + sums[:, 1] + rng.normal(size=n) > 10


@pytest.fixture
def selection():
    sums, up = mazes(200, seed=0)
    first = np.where(up, Direction.UP, Direction.LEFT)
    legal = np.ones((200, 4), dtype=bool)
    legal[:40, Direction.UP] = False
    return Selection(SITE, sums, first, legal, np.empty(0), {Direction.UP: 1}, LIVE, LIVE)


def test_the_readout_is_a_logistic_regression_on_the_mazes_in_which_the_direction_is_legal(selection):
    sums, up = mazes(100, seed=1)
    scale = StandardScaler().fit(selection.sums[40:, LIVE])
    peer = LogisticRegression(tol=1e-9).fit(scale.transform(selection.sums[40:, LIVE]), selection.first[40:] == 2)
    expected = auc(peer.decision_function(scale.transform(sums[:, LIVE])), up)
    row = readout(selection, Direction.UP, 1, sums, up)
    assert (row["channel"], row["live"], row["n_fit"], row["n"]) == (1, 3, 160, 100)
    assert [row["linear"], row["linear_low"]] == pytest.approx([expected.estimate, expected.low])
    assert row["one"] == auc(sums[:, 1], up).estimate
    assert row["more"] == pytest.approx(row["linear"] - row["one"]) and row["more_low"] > 0


def test_with_one_kind_of_maze_there_is_nothing_to_tell(selection):
    sums, _ = mazes(5, seed=1)
    row = readout(selection, Direction.UP, 1, sums, np.ones(5, dtype=bool))
    assert row["linear"] is None and row["more_low"] is None
