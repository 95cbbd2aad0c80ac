"""Changes of the module tree while a context is open."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chanpatch import Site, patched, recording, zero_ablate
from chanpatch.errors import UnsupportedModelError


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 2))


def message(name: str) -> str:
    return (
        f"The module '{name}' was replaced, or its hooks were removed, while a patching or recording context was open. "
        "Modify the model before you open the context."
    )


def test_a_patched_module_that_is_replaced_is_an_error(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError) as caught, patched(model, zero_ablate(Site("0.1"))):
        model(torch.zeros(1, 4))
        model[0][1] = nn.ReLU()
        model(torch.zeros(1, 4))
    assert str(caught.value) == message("0.1")


def test_a_module_around_a_recorded_one_that_is_replaced_is_an_error(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError) as caught, recording(model, "0.1"):
        model(torch.zeros(1, 4))
        model[0] = nn.Sequential(nn.Linear(4, 6), model[0][1])
    assert str(caught.value) == message("0")


def test_hooks_that_are_cleared_are_an_error(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError) as caught, patched(model, zero_ablate(Site("0.1"))):
        model(torch.zeros(1, 4))
        model[0][1]._forward_hooks.clear()
        model(torch.zeros(1, 4))
    assert str(caught.value) == message("0.1")


def test_a_call_while_a_module_is_replaced_for_a_while_is_an_error(model: nn.Module) -> None:
    with patched(model, zero_ablate(Site("0.1"))):
        model(torch.zeros(1, 4))
        relu, model[0][1] = model[0][1], nn.ReLU()
        with pytest.raises(UnsupportedModelError) as caught:
            model(torch.zeros(1, 4))
        model[0][1] = relu
    assert str(caught.value) == message("0.1")


def test_a_change_elsewhere_is_none_of_the_patchs_business(model: nn.Module) -> None:
    with patched(model, zero_ablate(Site("0.1"))):
        model[1] = nn.Linear(6, 3)
        assert model(torch.zeros(1, 4)).shape == (1, 3)


def test_an_exception_in_flight_is_not_masked(model: nn.Module) -> None:
    with pytest.raises(ZeroDivisionError), patched(model, zero_ablate(Site("0.1"))):
        model[0][1] = nn.ReLU()
        raise ZeroDivisionError
