"""The models of models.py as fixtures, and Ctrl-C as in a terminal."""

from __future__ import annotations

import signal

import pytest
from models import MODELS, Model, build

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell that starts us in the background has Ctrl-C ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
