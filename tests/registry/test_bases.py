"""Coordinates of activations in a basis: every value equals the one from matrices by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chanpatch import (
    Site,
    channel_sums,
    contrast,
    hook_points,
    label_channels,
    load,
    mean_ablate,
    patch_in,
    patched,
    recording,
    run_with_cache,
    save,
    steer,
    sweep,
    view,
    zero_ablate,
)
from chanpatch.controls import matched_channels
from chanpatch.errors import InterventionError, SiteError
from chanpatch.patching import Project
from chanpatch.patching import edit as edited
from chanpatch.registry import PCA, Directions


class Autoencoder(nn.Module):
    """A sparse autoencoder of four-channel activations with random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 12), nn.Linear(12, 4)

    def encode(self, activation: Tensor) -> Tensor:
        return self.inner(activation).relu()

    def decode(self, features: Tensor) -> Tensor:
        return self.outer(features)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def points(model, x):
    return hook_points(model, x)


@pytest.fixture
def matrix() -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(2))


def after_relu(model, x):
    return model[1](model[0](x))


def rest(model, hidden):
    return model[3](model[2](hidden))


@torch.no_grad()
def test_coordinates_of_directions_are_those_of_least_squares(model, points, x, matrix):
    site = points.site("1").along("channel", Directions(matrix))
    assert site.point.axes == ("batch", "component", "row", "col") and site.point.shape == (2, 3, 3)
    _, cache = run_with_cache(points, x, sites=site)
    hidden = after_relu(model, x).movedim(1, -1).reshape(-1, 4)
    expected = torch.linalg.lstsq(matrix.T, hidden.T).solution.T.view(6, 3, 3, 2).movedim(-1, 1)
    torch.testing.assert_close(cache[site], expected)


@torch.no_grad()
def test_zero_ablation_of_the_coordinate_along_one_direction_is_project(model, points, x, matrix):
    direction = matrix[0]
    with patched(points, zero_ablate(points.site("1").along("channel", Directions(direction), component=0))):
        found = model(x)
    with patched(points, edited(points.site("1"), Project(direction.view(1, 4, 1, 1)))):
        expected = model(x)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, model(x))


@torch.no_grad()
def test_only_the_edited_coordinates_change(model, points, x, matrix):
    site = points.site("1").along("channel", Directions(matrix), component=1, row=0)
    whole = points.site("1").along("channel", Directions(matrix))
    with patched(points, steer(site, 2.0)), recording(points, ["1", whole]) as cache:
        model(x)
    before = after_relu(model, x)
    moved = before.clone()
    moved[:, :, 0] += 2.0 * matrix[1][:, None]
    torch.testing.assert_close(cache["1"], moved)
    _, clean = run_with_cache(points, x, sites=whole)
    change = cache[whole] - clean[whole]
    torch.testing.assert_close(change[:, 1, 0], torch.full((6, 3), 2.0))
    assert change[:, 0].abs().max() < 1e-5 and change[:, :, 1:].abs().max() < 1e-5


@torch.no_grad()
def test_an_identity_edit_is_exact(model, points, x, matrix):
    site = points.site("1").along("channel", Directions(matrix), component=0)
    with patched(points, edited(site, lambda coordinates: coordinates)):
        assert torch.equal(model(x), model(x))
        found = model(x)
    assert torch.equal(found, model(x))


@torch.no_grad()
def test_an_autoencoder_keeps_its_error_term(model, points, x):
    coder = Autoencoder()
    site = points.site("1").along("channel", coder, component=[0, 3])
    with patched(points, zero_ablate(site)):
        found = model(x)
    hidden = after_relu(model, x).movedim(1, -1)
    features = coder.encode(hidden)
    error = hidden - coder.decode(features)
    features[..., [0, 3]] = 0
    expected = rest(model, (coder.decode(features) + error).movedim(-1, 1))
    torch.testing.assert_close(found, expected)
    assert len(points.site("1").along("channel", coder).split("component")) == 12


@torch.no_grad()
def test_interchange_along_a_direction_is_patch_in(model, points, x, matrix):
    site = points.site("1").along("channel", Directions(matrix), component=0)
    _, other = run_with_cache(points, x.flip(0), sites=points.site("1").along("channel", site.basis.basis))
    with patched(points, patch_in(site, other)):
        found = model(x)
    hidden, donor = after_relu(model, x).movedim(1, -1), after_relu(model, x.flip(0)).movedim(1, -1)
    inverse = torch.linalg.pinv(matrix)
    difference = ((donor - hidden) @ inverse)[..., :1] * matrix[0]
    torch.testing.assert_close(found, rest(model, (hidden + difference).movedim(-1, 1)))


@torch.no_grad()
def test_verbs_sums_sweeps_and_contrasts_work_on_components(model, points, x, matrix):
    basis = Directions(matrix)
    site = points.site("1").along("channel", basis)
    _, cache = run_with_cache(points, x, sites=site)
    sums = channel_sums(points, x, site)
    np.testing.assert_allclose(sums, cache[site].sum(dim=(2, 3)).double().numpy(), rtol=1e-5, atol=1e-5)
    many = channel_sums(points, x.repeat(20, 1, 1, 1), site)
    above = (many[:, 1] > np.median(many[:, 1])).astype(int)
    assert label_channels(many, above, names=("LOW", "HIGH"))[1].label == "HIGH"
    with patched(points, mean_ablate(site, cache)), recording(points, site) as means:
        model(x)
    torch.testing.assert_close(means[site], cache[site].mean(0, keepdim=True).expand_as(cache[site]))
    result = sweep(points, x, patches=[zero_ablate(each) for each in site.split("component")], metric=lambda o: o[:, 0])
    for component, values in enumerate(result.values["metric"]):
        with patched(points, zero_ablate(points.site("1").along("channel", basis, component=component))):
            torch.testing.assert_close(torch.tensor(values).float(), model(x)[:, 0])
    assert len(contrast(points, x, x.flip(0), site).to_records()) == 2


def test_controls_and_labels_are_those_of_components(model, points, x):
    site = points.site("1").along("channel", Directions(torch.eye(4)[[3, 2, 1, 0]]), component=0)
    background = torch.randn(32, 3, 5, 5, generator=torch.Generator().manual_seed(3))
    controls = matched_channels(points, site, background, count=2)
    reversed_channels = matched_channels(points, points.site("1", channel=3), background, count=2)
    assert [3 - dict(each.indices)["component"][0] for each in controls] == [
        dict(each.indices)["channel"][0] for each in reversed_channels
    ]
    assert all(each.basis == site.basis for each in controls)
    result = sweep(points, x, patches=[zero_ablate(site)], metric=lambda output: output[:, 0])
    assert [*result.labels] == ["1, component=0 along channel"]


@torch.no_grad()
def test_pca_equals_the_decomposition_by_hand(model, points, x):
    _, cache = run_with_cache(points, x, sites="1")
    basis = PCA.fit(cache, 2)
    samples = after_relu(model, x).movedim(1, -1).reshape(-1, 4)
    values, vectors = torch.linalg.eigh(torch.cov(samples.T))
    overlap = (basis.matrix @ vectors[:, [-1, -2]]).abs()
    torch.testing.assert_close(overlap, torch.eye(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(basis.encode(samples).var(dim=0), values[[-1, -2]], rtol=1e-4, atol=1e-5)
    with (
        patched(points, zero_ablate(points.site("1").along("channel", basis, component=0))),
        recording(points, "1") as c,
    ):
        model(x)
    centered = samples - samples.mean(0)
    expected = samples - (centered @ basis.matrix[0])[:, None] * basis.matrix[0]
    torch.testing.assert_close(c["1"].movedim(1, -1).reshape(-1, 4), expected, atol=1e-5, rtol=1e-4)


def test_a_rotation_that_is_trained_through_a_patch_finds_a_planted_direction():
    """Distributed alignment search: the direction that carries one of two features."""
    torch.manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(6, 6)).Q
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(mixing)
        model[1].weight.copy_(mixing[:, :2].T)  # the outputs are the first two features
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    base, source = torch.randn(256, 6), torch.randn(256, 6)
    points = hook_points(model, base)
    wanted = torch.stack([source[:, 0], base[:, 1]], dim=1)  # the first feature from the source, the second from base
    rotation = nn.utils.parametrizations.orthogonal(nn.Linear(6, 6, bias=False))

    class Rotation(nn.Module):
        def encode(self, activation: Tensor) -> Tensor:
            return activation @ rotation.weight.T

        def decode(self, coordinates: Tensor) -> Tensor:
            return coordinates @ rotation.weight

    site = points.site("0").along("feature", Rotation(), component=0)
    optimizer = torch.optim.Adam(rotation.parameters(), lr=0.05)
    for _ in range(150):
        _, donor = run_with_cache(points, source, sites=site, detach=False)
        with patched(points, patch_in(site, donor)):
            loss = (model(base) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-3
    assert abs(float(rotation.weight.detach()[0] @ mixing[:, 0])) > 0.99


@torch.no_grad()
def test_a_basis_acts_on_one_head_of_a_split_axis():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(3, 5, 4)
    points = hook_points(model, x, axes={"0": view("batch position (head feature)", head=2)})
    direction = torch.tensor([1.0, 2.0, 2.0])
    with patched(points, zero_ablate(points.site("0", head=1).along("feature", Directions(direction), component=0))):
        found = model(x)
    hidden = model[0](x).view(3, 5, 2, 3)
    hidden[:, :, 1] -= (hidden[:, :, 1] @ direction / 9)[..., None] * direction
    torch.testing.assert_close(found, model[1](hidden.flatten(2)))


@torch.no_grad()
def test_matrices_are_saved_and_modules_are_refused(tmp_path, model, points, x, matrix):
    for basis in (Directions(matrix), PCA(torch.linalg.qr(matrix.T).Q.T.contiguous(), torch.ones(4))):
        patch = steer(points.site("1").along("channel", basis, component=1), 2.0)
        save(tmp_path / "patch.safetensors", patch)
        (loaded,) = load(tmp_path / "patch.safetensors", points)
        with patched(points, patch):
            expected = model(x)
        with patched(points, loaded):
            assert torch.equal(model(x), expected)
    with pytest.raises(InterventionError, match="its basis is of type Autoencoder, which is code"):
        save(tmp_path / "coder.safetensors", zero_ablate(points.site("1").along("channel", Autoencoder())))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Site("1").along("channel", Directions(torch.eye(4))), "is not traced"),
        (
            lambda p: p.site("1", channel=0).along("channel", Directions(torch.eye(4))),
            "already has a basis or an index",
        ),
        (lambda p: p.site("1").along("chanel", Directions(torch.eye(4))), "Did you mean 'channel'"),
        (lambda p: p.site("1").along("channel", Directions(torch.eye(5))), "length 4, torch.float32"),
        (lambda p: p.site("1").along("channel", Directions(torch.eye(4).double())), "does not fit the axis 'channel'"),
        (lambda p: p.site("1").along("channel", torch.eye(4)), "needs the methods encode and decode"),
        (lambda p: p.site("1").along("channel", Directions(torch.eye(4)), component=4), "component 4 is out of range"),
        (lambda p: Directions(torch.zeros(1, 4)), "linearly independent"),
        (lambda p: Directions(torch.ones(2, 4)), "linearly independent"),
        (
            lambda p: Directions(torch.eye(4, requires_grad=True)),
            "requires a gradient, but Directions cannot train the matrix",
        ),
        (lambda p: PCA.fit(torch.randn(3, 4), 9), "count must be an integer from 1 to 2"),
    ],
)
def test_a_basis_that_does_not_fit_is_an_error(points, make, message):
    with pytest.raises(SiteError, match=message):
        make(points)


def test_directions_are_a_copy_that_autograd_can_use(model, points, x):
    with torch.inference_mode():
        matrix = torch.eye(4)[:2].clone()
        basis = Directions(matrix)
        matrix.zero_()
    with patched(points, zero_ablate(points.site("1").along("channel", basis))):
        found = model(x.clone().requires_grad_())
    found.sum().backward()
    with patched(points, zero_ablate(points.site("1", channel=[0, 1]))):
        torch.testing.assert_close(found, model(x))


def test_a_site_with_a_basis_differs_from_the_site_without(points, matrix):
    basis = Directions(matrix)
    one, other = points.site("1").along("channel", basis), points.site("1").along("channel", basis)
    assert one == other and hash(one) == hash(other)
    assert one != points.site("1") and one != points.site("1").along("channel", Directions(matrix))
    assert repr(one.split("component")[1]) == "Site('1', component=1).along('channel', Directions)"
