"""Every estimate in the tables of the study has its interval, and says of how many levels it is."""

import importlib

import pytest
from studies import shipped_points

from maze.analysis.part import Study
from maze.measurements import PARTS
from maze.report.answer import NUMBERS

# Fewer of everything that n does not decide, so that all parts are measured in a minute.
FEWER = {
    "AUTOMATIC_LEVELS": 8,
    "BACKGROUND_LEVELS": 20,
    "CHOICE_LEVELS": 40,
    "CHOOSING_LEVELS": 8,
    "MOST_DRAWN": 3,
    "PAIR_LEVELS": 8,
    "RESAMPLES": 99,
}
SMALLER = ("ablation", "decision", "hypothesis", "top16")  # in mazes of size 9
CHOSEN_ON = {
    "maze.analysis.part.SELECTION_LEVELS": 100,
    "maze.analysis.part.LABEL_LEVELS": 60,
    "maze.analysis.decision_squares.THRESHOLD_LEVELS": 80,
    "maze.analysis.effects.REFERENCE_LEVELS": 5,
}

SETTING = "a setting, or chosen by a rule: nothing is estimated"
ONE = "of one maze"
OTHER = "how the controls came out, each of which has its own interval or no interval is shown"
P = "a p-value"
NO_ESTIMATES = {
    "threshold": SETTING,
    "margin": SETTING,
    "mean": SETTING,  # with the deviation the unit of coefficients
    "deviation": SETTING,
    "chosen_by": SETTING,  # too high by the choice; the score on other mazes stands beside it
    **dict.fromkeys(("sum", "sum_0", "sum_1", *(f"col_{col}" for col in range(8))), ONE),
    **dict.fromkeys((f"{what}_{to}" for what in ("original", "zeroed") for to in ("left", "down", "up", "right")), ONE),
    **dict.fromkeys(
        ("controls_lowest", "controls_highest", "random_lowest", "random_highest", "mean_of_random"), OTHER
    ),
    **dict.fromkeys(("p", "adjusted_p", "rank_p", "mcnemar_p"), P),
}
OF = ("n", "pairs", "channels")
# What is none in these tables, by names that are estimates elsewhere.
IN_TABLE = {
    **dict.fromkeys((f"random-mazes/{name}" for name in ("areas", "behaviour", "pictures")), {"share"}),  # a setting
    "spatial/shares": {"distance"},  # a setting
    "dose/doses": {"factor"},  # a setting
    "direction/ranks": {"own"},  # stands in the tables of choices and episodes with its interval
    "search/activations": {"difference", "std", "effect"},  # of one pair, so nothing varies that an interval is about
}


@pytest.fixture(scope="module", params=PARTS)
def measured(request):
    """A part's name and its tables on few levels."""
    part = PARTS[request.param]
    module = importlib.import_module(part.measure.__module__)
    with pytest.MonkeyPatch.context() as patch:
        for name, fewer in FEWER.items():
            if hasattr(module, name):
                patch.setattr(module, name, fewer)
        if part.name in SMALLER:
            patch.setattr(module, "SIZE", 9)
        for name, fewer in CHOSEN_ON.items():
            patch.setattr(name, fewer)
        yield part.name, part.measure(Study(shipped_points(), {"name": "policy.safetensors"}, 20, seed=0))


@pytest.mark.slow
def test_every_estimate_has_its_interval_and_its_n(measured):
    part, tables = measured
    for name, table in tables.items():
        columns = list(table[0])
        numbers = {column for row in table for column, cell in row.items() if isinstance(cell, float)}
        ends = {f"{column}{end}" for column in columns for end in ("_low", "_high")}
        estimates = numbers - ends - NO_ESTIMATES.keys() - IN_TABLE.get(f"{part}/{name}", set())
        for estimate in estimates:
            assert {f"{estimate}_low", f"{estimate}_high"} <= set(columns), f"{part}/{name}.csv: {estimate}"
        if estimates:
            assert any(column in OF or column.startswith("n_") for column in columns), f"{part}/{name}.csv has no n"


def test_every_number_that_is_made_smaller_belongs_to_a_part():
    modules = [importlib.import_module(part.measure.__module__) for part in PARTS.values()]
    assert [name for name in FEWER if not any(hasattr(module, name) for module in modules)] == []


@pytest.mark.slow
def test_every_part_has_the_number_that_decides_it(measured):
    part, tables = measured
    assert part in NUMBERS
    row = NUMBERS[part].row(tables)
    assert row is None or row[NUMBERS[part].n] > 0
    assert {NUMBERS[part].prefix, NUMBERS[part].n, *NUMBERS[part].where} <= tables[NUMBERS[part].table][0].keys()
