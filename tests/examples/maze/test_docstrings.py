import doctest

import pytest

from maze import levels, paths, states
from maze.environment import pairs, requirements, vector_env
from maze.policy import network
from maze.training import evaluation


@pytest.mark.parametrize("module", [vector_env, evaluation, levels, pairs, paths, network, requirements, states])
def test_the_examples_in_the_docstrings_run(module):
    assert doctest.testmod(module).failed == 0
