"""Small simulations of every interval and test; docs/statistics.md has the large ones."""

import re

import pytest
from rates import Rate, rate_of
from simulations import PAGE, PARTS

PROMISED = {
    f"{part}: {case.row}, {case.column}": (part, case)
    for part, cases in PARTS.items()
    for case in cases()
    if case.promise is not None
}


@pytest.mark.parametrize("part", PARTS)
def test_simulated_rates_keep_their_promises(part):
    for name, (of, case) in PROMISED.items():
        if of == part:
            rate = rate_of(part, case, scale=0.01)
            assert rate.keeps(case.promise), f"{name}: {rate}, but {case.promise} is promised"


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_rates_of_many_trials_keep_their_promises(part):
    for name, (of, case) in PROMISED.items():
        if of == part:
            rate = rate_of(part, case, scale=0.2)
            assert rate.keeps(case.promise), f"{name}: {rate}, but {case.promise} is promised"


def test_the_page_has_a_table_of_every_part_and_no_broken_promise():
    page = PAGE.read_text()
    tables = dict(re.findall(r"<!-- (\w+) -->\n([\s\S]*?)<!-- end -->", page))
    assert [*tables] == [*PARTS]
    assert "not as promised" not in page
    for part, table in tables.items():
        rows = re.findall(r"^\| (.+?) \|", table, re.MULTILINE)[2:]
        assert rows == list(dict.fromkeys(case.row for case in PARTS[part]()))


def test_a_rate_keeps_a_promise_unless_its_interval_excludes_it():
    assert Rate(90, 100, 100).keeps((0.95, 1)) and not Rate(900, 1000, 1000).keeps((0.95, 1))
    assert Rate(0, 0, 100).keeps((0.95, 1)) and str(Rate(0, 0, 100)) == "withheld"
    assert str(Rate(95, 100, 200)) == "95.0% (88.8 to 97.8), 50% withheld"
