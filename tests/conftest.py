"""The models of models.py as fixtures, Ctrl-C as in a terminal, and skips where procgen is not installed."""

from __future__ import annotations

import signal
from collections.abc import Generator
from importlib.util import find_spec

import pytest
from models import MODELS, Model, build

from maze.environment.requirements import MissingRequirement

NO_PROCGEN = find_spec("procgen") is None  # as on Python 3.12 and later
STUDY = ["examples/maze", "examples/test_maze_goal_misgen.py"]  # tests of commands that end at once without procgen
collect_ignore = STUDY if NO_PROCGEN else []

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell that starts us in the background has Ctrl-C ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> list[str]:
    """List the tests that are left out, at the start of a run."""
    left_out = " and ".join(f"tests/{path}" for path in STUDY)
    return [f"procgen is not installed: tests that need it are skipped, and {left_out} are left out"] * NO_PROCGEN


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    """Skip a test whose fixtures need procgen, if procgen is not installed."""
    yield from _skipped_without_procgen()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Skip a test that needs procgen, if procgen is not installed."""
    yield from _skipped_without_procgen()


def _skipped_without_procgen() -> Generator[None, None, None]:
    try:
        yield
    except MissingRequirement as error:
        if NO_PROCGEN:
            pytest.skip(str(error))
        raise


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Model:
    """Each of the troublesome models in turn."""
    return build(request.param)


@pytest.fixture
def plain_cnn() -> Model:
    return build("plain_cnn")


@pytest.fixture
def inplace_relu() -> Model:
    return build("inplace_relu")


@pytest.fixture
def shared_module() -> Model:
    return build("shared_module")


@pytest.fixture
def tuple_output() -> Model:
    return build("tuple_output")


@pytest.fixture
def dict_output() -> Model:
    return build("dict_output")


@pytest.fixture
def lstm_policy() -> Model:
    return build("lstm_policy")


@pytest.fixture
def residual_add() -> Model:
    return build("residual_add")


@pytest.fixture
def batch_norm() -> Model:
    return build("batch_norm")


@pytest.fixture
def attention() -> Model:
    return build("attention")
