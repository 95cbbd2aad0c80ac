import copy

import pytest
from studies import small_study

from maze.measurements import generator as part
from maze.states import mazes_from_pictures

TREE = """
    ..C
    .##
    M..
"""
NAMES = {
    "side": "the side is odd",
    "even": "all (even, even) squares are free",
    "odd": "all (odd, odd) squares are walls",
    "tree": "a tree: connected, and one joint less than squares",
    "corners": "bottom left and top right are free",
    "up": "up and down are legal on all free (odd, even) squares",
    "left": "left and right are legal on all free (even, odd) squares",
}


@pytest.fixture(scope="module")
def study():
    return small_study(5, (7,))


@pytest.fixture(scope="module")
def tables(study):
    return part.measure(study)


def broken(picture):
    """Which facts do not hold in a maze."""
    facts = part.facts(mazes_from_pictures(picture))
    return {short for short, name in NAMES.items() if not facts[name][1][0]}


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (TREE, set()),
        ("..C .#. M..", {"tree"}),  # a loop
        ("..C ### M..", {"tree"}),  # two parts
        ("..C ..# M..", {"odd", "tree"}),
        ("C.# ### M..", {"even", "tree", "corners", "left"}),
    ],
)
def test_the_facts_that_a_maze_breaks_are_named(picture, expected):
    assert broken(picture) == expected


def test_the_consequence_is_counted_over_mazes_that_meet_its_condition():
    fact = "if (1, 0) and (2, 1) are walls, (3, 0) is free"
    meets = "....C .#### ..... ##### M....".replace(" ", "\n").split("\n")
    meets[2] = ".#..."  # (2, 1) is a wall, and so is (1, 0)
    fails = meets.copy()
    fails[1] = "#####"
    other = ["....C", ".####", ".....", ".####", "M...."]
    mazes = mazes_from_pictures(*("\n".join(lines) for lines in (meets, fails, other)))
    applies, holds = part.facts(mazes)[fact]
    assert applies.tolist() == [True, True, False]
    assert holds.tolist()[:2] == [True, False]


def test_the_counts_are_of_the_levels_that_procgen_draws(tables):
    assert sum(row["n"] for row in tables["facts"] if row["fact"] == NAMES["side"]) == 60
    for row in tables["overall"]:
        assert row["n"] == sum(each["n"] for each in tables["facts"] if each["fact"] == row["fact"])


def test_the_finding_reacts_to_one_level_that_breaks_a_rule(tables):
    assert part.finding(tables).agrees == "yes"
    changed = copy.deepcopy(tables)
    changed["overall"][2]["holds"] -= 1
    row = next(row for row in changed["facts"] if row["fact"] == NAMES["odd"])
    row["holds"] -= 1
    finding = part.finding(changed)
    assert finding.agrees == "no"
    assert "A maze is not always decided" in finding.follows
    assert f"first broken one: {NAMES['odd']}, size {row['size']}" in finding.ours


def test_the_figure_has_one_line_per_fact(tables):
    (axes,) = part.figure(tables).axes
    assert len(axes.get_yticklabels()) == len(tables["overall"])
