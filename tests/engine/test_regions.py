"""A region that is written again and again, against the same written once into a copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chanpatch.engine.moments import Moment
from chanpatch.engine.paths import Place
from chanpatch.errors import UnsupportedModelError
from chanpatch.patching import Patch, Set, patch_in, patched, zero_ablate
from chanpatch.patching.firing import Firing
from chanpatch.registry import Site
from chanpatch.registry.sites import read, written

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.int64, torch.bool]
INDICES = [{"axis1": 3}, {"axis0": 1, "axis1": 0}, {"axis3": 2}, {"axis1": slice(1, 4)}, {"axis1": [0, 4]},
           {"axis2": 0, "axis3": [0, 3]}]  # fmt: skip


def in_format(tensor: Tensor, form: str) -> Tensor:
    if form == "channels_last":
        return tensor.to(memory_format=torch.channels_last)
    return tensor.transpose(2, 3).contiguous().transpose(2, 3) if form == "transposed" else tensor


def overwrites(indices: dict[str, object], region: Tensor | float) -> Firing:
    return Firing(Patch(Site(".out", **indices), Set(region)), Place(".out", "", "out", (), None), check_nan=False)


@pytest.mark.parametrize("indices", INDICES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [False, True], ids=["tensor", "number"])
@pytest.mark.parametrize("rows", [2, 100])  # 240 elements, and more than a mask is made for
def test_every_time_the_same_as_written_once(indices, dtype, number, rows):
    positions = Site(".out", **indices).positions(("axis0", "axis1", "axis2", "axis3"), (rows, 5, 4, 6))
    region = read(torch.ones(rows, 5, 4, 6), positions).to(dtype)
    firing = overwrites(indices, 1 if number else region)
    for seed, form in enumerate(["contiguous", "channels_last", "contiguous", "transposed", "contiguous"]):
        random = torch.randn(rows, 5, 4, 6, generator=torch.Generator().manual_seed(seed))
        tensor = in_format(random.to(dtype), form)
        before = tensor.clone()
        result, expected = firing(tensor, Moment()), written(tensor, positions, region)
        assert torch.equal(result, expected)
        assert (result.dtype, result.stride()) == (expected.dtype, expected.stride())
        assert result.data_ptr() != tensor.data_ptr() and torch.equal(tensor, before)


@pytest.mark.parametrize("form", ["contiguous", "channels_last", "transposed"])
def test_the_strides_of_the_region_leave_no_trace(form):
    tensor = torch.randn(2, 5, 4, 6)
    firing = overwrites({"axis1": 3}, in_format(torch.randn(2, 1, 4, 6), form))
    for _ in range(3):
        assert firing(tensor, Moment()).stride() == tensor.stride()


@pytest.mark.parametrize("zero", [torch.zeros(1, 1), 0.0], ids=["tensor", "number"])
def test_what_is_not_a_number_is_overwritten_too(zero):
    firing = overwrites({"axis1": 0}, zero)
    for _ in range(3):
        result = firing(torch.tensor([[torch.nan, torch.inf]]), Moment())
        assert torch.equal(result, torch.tensor([[0.0, torch.inf]]))


def test_an_operand_that_is_changed_between_forwards_is_read_anew():
    operand = np.zeros((1, 1), dtype=np.float32)
    model = nn.Identity()
    with patched(model, patch_in(Site(".out", axis1=1), torch.from_numpy(operand)), check_nan=False):
        for value in range(5):
            operand[0, 0] = value  # past torch, which sees no new version
            assert torch.equal(model(torch.ones(1, 3)), torch.tensor([[1.0, value, 1.0]]))


def test_a_vector_that_is_learnt_has_its_gradient_in_every_forward():
    vector = torch.zeros(1, 1, requires_grad=True)
    model, inputs = nn.Identity(), torch.ones(2, 3, requires_grad=True)
    with patched(model, patch_in(Site(".out", axis0=0, axis1=1), vector), check_nan=False):
        for _ in range(4):
            at_vector, at_inputs = torch.autograd.grad(model(inputs).mul(2).sum(), [vector, inputs])
            assert torch.equal(at_vector, torch.tensor([[2.0]]))
            assert torch.equal(at_inputs, torch.tensor([[2.0, 0.0, 2.0], [2.0, 2.0, 2.0]]))


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_forwards_of_every_mode_follow_each_other(first):
    model, inputs = nn.Linear(3, 4), torch.randn(2, 3)
    with patched(model, zero_ablate(Site(".out", feature=2))):
        with first():
            outputs = [model(inputs) for _ in range(3)]
        outputs += [model(inputs) for _ in range(2)]
        outputs[-1].sum().backward()
    assert torch.equal(model.weight.grad[2], torch.zeros(3)) and model.weight.grad[1].abs().min() > 0
    for output in outputs:
        assert torch.equal(output[:, 2], torch.zeros(2)) and torch.equal(output, outputs[0])


TRANSFORMED = {
    "vmap": lambda model, inputs: torch.vmap(model)(torch.stack([inputs, inputs]))[0],
    "functionalize": lambda model, inputs: torch.func.functionalize(model)(inputs),
    "grad": lambda model, inputs: torch.func.grad(lambda given: model(given).sum())(inputs),
}


@pytest.mark.parametrize("plain_first", [0, 1, 3])
@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
def test_forwards_inside_a_transform_and_outside_follow_each_other(plain_first, transformed):
    model, inputs = nn.Linear(3, 4), torch.randn(2, 3)

    def ablated(given: Tensor) -> Tensor:
        return model(given) * torch.tensor([1.0, 1.0, 0.0, 1.0])

    with patched(model, zero_ablate(Site(".out", feature=2))):
        plain = [model(inputs) for _ in range(plain_first)]
        inside = [transformed(model, inputs) for _ in range(3)]
        plain += [model(inputs) for _ in range(3)]
    for output in plain:
        assert not torch._is_functional_tensor(output)
        assert torch.equal(output, ablated(inputs))
    for output in inside:
        torch.testing.assert_close(output, transformed(ablated, inputs))


def test_a_sparse_tensor_after_dense_ones_is_refused_as_it_is_at_first():
    model = nn.Identity()
    with patched(model, zero_ablate(Site(".out", axis1=1))):
        for _ in range(3):
            model(torch.ones(2, 3))
        with pytest.raises(UnsupportedModelError, match="Cannot select part of a sparse_coo tensor"):
            model(torch.ones(2, 3).to_sparse())
