import numpy as np
import pytest

from maze.analysis.cells import read_table
from maze.policy.network import SHIPPED_WEIGHTS
from maze.training.evaluation import DIFFERENCES, differences, run_against


def rows(size, sampled, greedy):
    return [
        {"size": size, "cheese": "top left", "level": level, "found sampled": one, "found greedy": other}
        for level, (one, other) in enumerate(zip(sampled, greedy, strict=True))
    ]


def test_differences_are_means_over_the_levels_of_a_size():
    ours = rows(7, [0.5, 0.75, 1.0] * 4, [1, 1, 0] * 4) + rows(9, [0.5, 0.5], [0, 0])
    theirs = rows(7, [0.25] * 12, [0, 1, 1] * 4) + rows(9, [1.0, 1.0], [1, 0])
    found = differences(ours, theirs)
    assert [(row["size"], row["actions"], row["n"], row["difference"]) for row in found] == [
        (7, "sampled", 12, pytest.approx(0.5)),
        (7, "greedy", 12, pytest.approx(0.0)),
        (9, "sampled", 2, pytest.approx(-0.5)),
        (9, "greedy", 2, pytest.approx(-0.5)),
    ]
    assert found[0]["difference_low"] < 0.5 < found[0]["difference_high"]


def test_two_policies_are_compared_on_the_same_levels_and_their_difference_is_kept(tmp_path, capsys):
    control = SHIPPED_WEIGHTS.with_name("control.safetensors")
    folder = run_against(control, None, n=3, sizes=[7], cheese=["top left"], seed=0, out=tmp_path)
    (other,) = set(tmp_path.iterdir()) - {folder}
    (sampled, _) = read_table(folder / DIFFERENCES)
    one, two = ([row["found sampled"] for row in read_table(each / "levels.csv")] for each in (folder, other))
    assert sampled["difference"] == pytest.approx(np.mean(one) - np.mean(two))
    assert one != two
    assert "Finds the cheese more often than" in capsys.readouterr().out
