"""Edits are pure functions of a region's activation: each against the same arithmetic written out."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chanpatch import Patch, Site, hook_points, patched
from chanpatch.errors import EditError
from chanpatch.patching import Add, Clamp, Project, Resample, Scale, Set
from chanpatch.patching.edits import donor_rows

REGION = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
CHANNELS = torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1)

# An edit, and what it makes of the region, element by element.
EDITS = {
    "set a number": (Set(2.5), torch.full((4, 3, 5, 5), 2.5)),
    "set one vector everywhere": (Set(CHANNELS), torch.stack([torch.full((4, 5, 5), c) for c in (1, -2, 0.5)], 1)),
    "set all": (Set(REGION.flip(0)), REGION.flip(0)),
    "add a number": (Add(2.0), REGION + 2),
    "add a vector": (Add(CHANNELS), torch.stack([REGION[:, i] + c for i, c in enumerate((1, -2, 0.5))], 1)),
    "add a vector times a coefficient": (
        Add(CHANNELS, -3.0), torch.stack([REGION[:, i] - 3 * c for i, c in enumerate((1, -2, 0.5))], 1),
    ),
    "scale by a number": (Scale(-1.0), -REGION),
    "scale by a vector": (Scale(CHANNELS), torch.stack([REGION[:, i] * c for i, c in enumerate((1, -2, 0.5))], 1)),
    "clamp below": (Clamp(low=0.0), torch.where(REGION < 0, 0.0, REGION)),
    "clamp above": (Clamp(high=0.5), torch.where(REGION > 0.5, 0.5, REGION)),
    "clamp to both": (Clamp(-0.1, 0.1), REGION.minimum(torch.tensor(0.1)).maximum(torch.tensor(-0.1))),
}  # fmt: skip


@pytest.fixture(params=list(EDITS))
def edited(request):
    return EDITS[request.param]


def test_an_edit_is_the_arithmetic_written_out(edited):
    edit, expected = edited
    torch.testing.assert_close(edit(REGION), expected)


def test_an_edit_keeps_shape_and_dtype(edited):
    edit, _ = edited
    result = edit(REGION)
    assert (result.shape, result.dtype) == (REGION.shape, REGION.dtype)


def test_an_edit_writes_nothing_in_place(edited):
    edit, _ = edited
    given = REGION.clone()
    edit(given)
    assert torch.equal(given, REGION)


def test_project_removes_one_direction_at_every_place():
    direction = torch.tensor([3.0, 0.0, 4.0])
    unit = direction / 5
    expected = torch.empty_like(REGION)
    for n in range(4):
        for row in range(5):
            for col in range(5):
                vector = REGION[n, :, row, col]
                expected[n, :, row, col] = vector - (vector @ unit) * unit
    torch.testing.assert_close(Project(direction.view(1, 3, 1, 1))(REGION), expected)


def test_project_over_several_axes_removes_one_direction_of_their_product():
    direction = torch.randn(1, 3, 5, 5)
    unit = direction.flatten() / direction.norm()
    flat = REGION.flatten(1)
    expected = (flat - (flat @ unit)[:, None] * unit).view_as(REGION)
    torch.testing.assert_close(Project(direction)(REGION), expected)


def test_projecting_twice_changes_nothing_more():
    project = Project(CHANNELS)
    torch.testing.assert_close(project(project(REGION)), project(REGION))


def test_project_along_a_direction_of_length_one_removes_everything():
    torch.testing.assert_close(Project(torch.tensor([[2.0]]))(torch.randn(4, 1)), torch.zeros(4, 1))


@pytest.mark.parametrize(("low", "high"), [(None, None), (1.0, 0.0)])
def test_clamp_refuses_bounds_that_are_missing_or_crossed(low, high):
    with pytest.raises(EditError, match="Clamp"):
        Clamp(low, high)


def drawn_by(resample: Resample, region: Tensor) -> Tensor:
    """Return what an edit makes of the output of an identity."""
    points = hook_points(nn.Identity(), region)
    with patched(points, Patch(points.site(".out"), resample)):
        return points.model(region)


def test_resample_returns_rows_of_the_reference():
    reference = torch.arange(30.0).view(10, 3)
    drawn = drawn_by(Resample(reference, seed=0), torch.zeros(7, 3))
    assert all(any(torch.equal(row, donor) for donor in reference) for row in drawn)


def test_resample_takes_rows_along_its_batch_axis():
    reference = torch.arange(30.0).view(3, 10)

    class AlongTheSecondAxis(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            return self.inner(x.T)

    points = hook_points(AlongTheSecondAxis(), torch.zeros(7, 3))
    with patched(points, Patch(points.site("inner"), Resample(reference, seed=0, batch_axis=1))):
        drawn = points.model(torch.zeros(7, 3))
    donors = donor_rows(0, 0, torch.arange(7), 10)
    assert torch.equal(drawn, reference[:, donors])


def test_a_draw_depends_on_the_row_number_and_not_on_where_the_row_stands():
    whole = donor_rows(3, 0, torch.arange(20), 50)
    for rows in ([7], [19, 0], [5, 5, 5], list(range(19, -1, -1))):
        assert donor_rows(3, 0, torch.tensor(rows), 50).tolist() == whole[rows].tolist()


@pytest.mark.parametrize(("seed", "call"), [(4, 0), (3, 1)], ids=["seed", "call"])
def test_another_seed_or_call_draws_anew(seed, call):
    assert donor_rows(seed, call, torch.arange(50), 1000).tolist() != donor_rows(3, 0, torch.arange(50), 1000).tolist()


def test_the_draw_is_no_part_of_torchs_random_numbers():
    before = torch.get_rng_state()
    donor_rows(0, 0, torch.arange(5), 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_are_spread_over_all_donors():
    counts = donor_rows(0, 0, torch.arange(10_000), 10).bincount(minlength=10)
    assert counts.min() > 900
    assert counts.max() < 1100


def test_no_rows_draw_nothing():
    assert donor_rows(0, 0, torch.arange(0), 10).tolist() == []


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_any_integer_is_a_seed(seed):
    assert donor_rows(seed, 0, torch.arange(3), 10).shape == (3,)


NOT_OPERANDS = {
    "set a list": lambda: Set([1.0]),
    "set an array": lambda: Set(np.ones(3)),
    "set a text": lambda: Set("a"),
    "set a complex number": lambda: Set(1j),
    "set a fraction": lambda: Set(Fraction(1, 2)),
    "add a list": lambda: Add([1.0]),
    "add times a text": lambda: Add(1.0, "a"),
    "scale by a text": lambda: Scale("a"),
    "clamp to tensors": lambda: Clamp(torch.zeros(1), torch.ones(1)),
    "clamp to a text": lambda: Clamp("a"),
    "project a number": lambda: Project(3.0),
    "resample a list": lambda: Resample([1.0], 0),
    "resample with a text for a seed": lambda: Resample(REGION, "a"),
    "resample with a fraction for a seed": lambda: Resample(REGION, 0.7),
    "resample no rows": lambda: Resample(REGION[:0], 0),
    "resample an axis that is not there": lambda: Resample(REGION, 0, batch_axis=4),
    "resample per wave": lambda: Resample(REGION, 0, per="wave"),
}


@pytest.mark.parametrize("name", NOT_OPERANDS)
def test_what_is_no_operand_is_refused_when_the_edit_is_built(name):
    with pytest.raises(EditError, match="must be|at least one row"):
        NOT_OPERANDS[name]()


def test_numbers_of_numpy_are_operands():
    assert torch.equal(Set(np.float32(2.5))(REGION), torch.full_like(REGION, 2.5))
    torch.testing.assert_close(Add(np.int64(2), np.float64(0.5))(REGION), REGION + 1)
    assert Resample(REGION, np.int64(3)).seed == 3


def test_a_direction_of_zeros_is_refused():
    with pytest.raises(EditError, match="the direction is zero"):
        Project(torch.zeros(1, 3, 1, 1))


def test_a_direction_of_one_element_removes_everything():
    assert not Project(torch.full((1, 1, 1, 1), 2.0))(REGION).any()


def test_a_direction_is_projected_out_one_per_entry_of_a_vmap():
    directions = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    found = torch.func.vmap(lambda direction: Project(direction)(torch.tensor([[3.0, 4.0]])))(directions)
    assert found.tolist() == [[[0.0, 4.0]], [[3.0, 0.0]]]


FLOATS = "a number from -3.4028234663852886e+38 to 3.4028234663852886e+38"
TOO_LARGE = {
    "below zero": (torch.uint8, Set(-1), "Set", "value", "-1", "an integer from 0 to 255"),
    "above 255": (torch.uint8, Add(256, 1), "Add", "vector", "256", "an integer from 0 to 255"),
    "factor": (torch.int8, Scale(200), "Scale", "factor", "200", "an integer from -128 to 127"),
    "bound": (torch.uint8, Clamp(low=-1), "Clamp", "lower bound", "-1", "an integer from 0 to 255"),
    "flag": (torch.bool, Set(2), "Set", "value", "2", "an integer from 0 to 1"),
    "infinite": (torch.int64, Set(-np.inf), "Set", "value", "-inf",
                 "an integer from -9223372036854775808 to 9223372036854775807"),
    "float": (torch.float32, Set(1e300), "Set", "value", "1e+300", FLOATS),
    "integer": (torch.float16, Set(70_000), "Set", "value", "70000", "a number from -65504.0 to 65504.0"),
    "complex": (torch.complex64, Set(1e300), "Set", "value", "1e+300", FLOATS),
    "coefficient": (torch.float32, Add(torch.ones(1, 1), 1e300), "Add", "coefficient", "1e+300", FLOATS),
    "product": (torch.float32, Add(2.0, 2e38), "Add", "vector times its coefficient", "4e+38", FLOATS),
    "scaled": (torch.float32, Scale(1e300), "Scale", "factor", "1e+300", FLOATS),
    "clamped": (torch.float32, Clamp(low=1e300), "Clamp", "lower bound", "1e+300", FLOATS),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_number_that_the_region_cannot_hold_is_refused_with_its_range(name):
    dtype, edit, verb, operand, number, expected = TOO_LARGE[name]
    model, inputs = torch.nn.Identity(), torch.ones(2, 3).to(dtype)
    with pytest.raises(EditError) as caught:
        Patch(hook_points(model, inputs).site(".out"), edit)
    reason = f"because the region's dtype is {dtype}; got {number}."
    message = f"{verb} at Site('.out'): the {operand} must be {expected}, {reason}"
    assert str(caught.value) == message
    with pytest.raises(EditError) as caught, patched(model, Patch(Site(".out"), edit)):
        model(inputs)
    assert str(caught.value) == message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("edit", [Set(-np.inf), Add(-np.inf), Clamp(high=np.inf)], ids=["set", "add", "clamp"])
def test_an_infinity_is_a_number_of_every_region_of_floats(dtype, edit):
    model, inputs = torch.nn.Identity(), torch.ones(2, 3, dtype=dtype)
    with patched(model, Patch(Site(".out"), edit), check_nan=False):
        assert torch.equal(model(inputs), edit(inputs))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_region_which_would_saturate_is_refused():
    quantized = torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.quint8)
    model = torch.nn.Identity()
    with pytest.raises(EditError) as caught, patched(model, Patch(Site(".out"), Set(1000.0))):
        model(quantized)
    assert str(caught.value) == (
        "Set at Site('.out'): the region is quantized (torch.quint8). Dequantize the tensor, or patch an earlier site."
    )


WRAPPED = {
    "above": (torch.uint8, Add(200, 1)),
    "below": (torch.uint8, Add(1, -101)),
    "a vector": (torch.uint8, Add(torch.tensor([200, 0, 0], dtype=torch.uint8).view(1, 3), 1)),
    "a vector times a coefficient": (torch.uint8, Add(torch.full((1, 3), 128, dtype=torch.uint8), 2)),
    "a product": (torch.int8, Scale(3)),
    "a product of vectors": (torch.int8, Scale(torch.full((1, 3), -2, dtype=torch.int8))),
    "long": (torch.int64, Scale(2**62)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_whole_number_that_wraps_around_is_an_error(name):
    dtype, edit = WRAPPED[name]
    with pytest.raises(EditError) as caught:
        edit(torch.full((2, 3), 100, dtype=dtype))
    assert str(caught.value) == (
        f"{type(edit).__name__}: the result is out of range for the region's dtype, {dtype}. Use smaller values, or "
        "patch a floating-point activation."
    )


@pytest.mark.parametrize(("edit", "expected"), [(Add(155, 1), 255), (Add(1, -100), 0), (Scale(2), 200)], ids=str)
def test_whole_numbers_up_to_the_limits_are_exact(edit, expected):
    result = edit(torch.full((2, 3), 100, dtype=torch.uint8))
    assert (result.dtype, result.unique().tolist()) == (torch.uint8, [expected])


@pytest.mark.parametrize("length", [1e-6, 1.0, 6e4])
def test_a_direction_of_half_precision_is_projected_out_whatever_its_length(length):
    direction, region = torch.tensor([[length, 0.0]]).half(), torch.tensor([[3.0, 4.0]]).half()
    assert Project(direction)(region).tolist() == [[0.0, 4.0]]
