"""The models of models.py as fixtures."""

from __future__ import annotations

import pytest
from models import MODELS, Model, build


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
