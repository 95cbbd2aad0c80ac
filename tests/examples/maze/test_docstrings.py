import doctest

import pytest

from maze import environment, evaluation, levels, pairs, paths, policy, requirements, states


@pytest.mark.parametrize("module", [environment, evaluation, levels, pairs, paths, policy, requirements, states])
def test_the_examples_in_the_docstrings_run(module):
    assert doctest.testmod(module).failed == 0
