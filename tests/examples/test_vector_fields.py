import numpy as np
from matplotlib.figure import Figure

from maze.analysis.vector_fields import vector_field


def square(row, col, original, zeroed):
    moves = ("left", "down", "up", "right")
    known = {"size": 3, "row": row, "col": col, "cheese_row": 2, "cheese_col": 0}
    known |= {f"original_{move}": share for move, share in zip(moves, original, strict=True)}
    return known | {f"zeroed_{move}": share for move, share in zip(moves, zeroed, strict=True)}


FIELD = [
    square(0, 0, (0, 0, 1, 0), (0, 0, 0.5, 0.5)),
    square(1, 0, (0.25, 0, 0.75, 0), (0, 1, 0, 0)),
    square(2, 0, (None,) * 4, (None,) * 4),  # the cheese
]


def arrows(axes):
    (quiver,) = (each for each in axes.collections if hasattr(each, "U"))
    return np.stack([quiver.U, quiver.V], axis=1)  # to the right, and up


def test_an_arrow_is_the_mean_of_where_the_moves_lead_and_squares_that_are_never_reached_have_none():
    axes = Figure().subplots()
    assert vector_field(FIELD, "original", axes) is axes
    np.testing.assert_allclose(arrows(axes), [[0, 1], [-0.25, 0.75]])


def test_a_difference_is_that_of_the_arrows_at_half_their_length():
    axes = Figure().subplots()
    assert vector_field(FIELD, "zeroed", axes, minus="original") is axes
    np.testing.assert_allclose(arrows(axes), [[0.25, -0.25], [0.125, -0.875]])
