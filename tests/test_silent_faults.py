"""Models that once gave wrong numbers without a word, each beside the same computed by hand."""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chanpatch import channel_sums, hook_points, patched, recording, sweep, zero_ablate
from chanpatch._tree import fresh
from chanpatch.errors import SiteError
from chanpatch.metrics import kl_divergence
from chanpatch.path_patching import path_patch
from chanpatch.sweeps._execution import _difference


class ReusesItsDict(nn.Module):
    """Returns one and the same dict from every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head, self.out = nn.Linear(4, 8), nn.Linear(8, 3), {}

    def forward(self, vector: Tensor) -> dict[str, Tensor]:
        self.out["logits"] = self.head(self.encoder(vector).relu())
        return self.out


@pytest.mark.parametrize("strategy", ["auto", "resume", "loop"])
def test_a_model_that_returns_the_same_dict_again_is_compared_with_what_it_held_then(strategy: Any) -> None:
    torch.manual_seed(0)
    model, vectors = ReusesItsDict().eval(), torch.randn(12, 4)
    points = hook_points(model, vectors)
    patches = [zero_ablate(points.site("encoder", feature=unit)) for unit in range(8)]
    expected = []
    with torch.no_grad():
        baseline = {"logits": model(vectors)["logits"].clone()}
        for patch in patches:
            with patched(points, patch):
                expected.append(float(kl_divergence(model(vectors), baseline=baseline).mean()))
    effects = sweep(points, vectors, patches=patches, metric=kl_divergence, strategy=strategy).effect()
    assert max(expected) > 0.001
    torch.testing.assert_close(torch.as_tensor(effects).double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-6)


@dataclass
class Holding:
    inner: list[int]


def test_an_output_has_containers_of_its_own_all_the_way_down() -> None:
    tensor = torch.zeros(1)
    before = (tensor, [tensor, {"a": [1]}], OrderedDict(b=[2]), Holding([3]))
    after = fresh(before)
    after[1][1]["a"].append(0)
    after[2]["b"].append(0)
    after[3].inner.append(0)
    assert before[1][1] == {"a": [1]} and before[2] == OrderedDict(b=[2]) and before[3] == Holding([3])
    assert after[0] is tensor and after[1][0] is tensor and type(after[2]) is OrderedDict
    pair = (tensor, tensor)
    assert fresh(pair) is pair


class WithAHookInside(nn.Module):
    """A linear layer of its own weights with an identity inside, as transformer libraries have them."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(like.weight.data.clone()), nn.Parameter(like.bias.data.clone())
        self.hook = nn.Identity()

    def forward(self, vector: Tensor) -> Tensor:
        return self.hook(vector @ self.weight.T + self.bias)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, vector: Tensor) -> Tensor:
        stream = self.a(vector)
        stream = stream + self.b(stream).relu()
        stream = stream + self.c(stream).relu()
        return self.head(stream)


def test_paths_are_held_in_whatever_way_a_layer_keeps_its_weights() -> None:
    torch.manual_seed(0)
    plain = Residual()
    hooked, normed = copy.deepcopy(plain), copy.deepcopy(plain)
    hooked.b, hooked.c = WithAHookInside(plain.b), WithAHookInside(plain.c)
    for name in "bc":
        nn.utils.parametrizations.weight_norm(getattr(normed, name))
    clean, corrupted = torch.randn(2, 6, 4)
    direct = [
        path_patch(hook_points(model, clean), clean, corrupted, "a", "head.in[0]", metric=lambda output: output[:, 0])
        for model in (plain, hooked, normed)
    ]
    by_hand = (plain.a(corrupted) - plain.a(clean)) @ plain.head.weight[0]
    torch.testing.assert_close(torch.as_tensor(direct[0]).float(), by_hand.detach(), rtol=1e-4, atol=1e-5)
    for other in direct[1:]:
        torch.testing.assert_close(torch.as_tensor(other), torch.as_tensor(direct[0]), rtol=1e-4, atol=1e-5)


class OneExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, vector: Tensor) -> Tensor:
        hidden = self.router(vector)
        chosen = (vector[:, 0] > 0).nonzero()[:, 0]
        output = torch.zeros_like(hidden)
        output[chosen] = self.expert(hidden[chosen])
        return output


def test_rows_that_an_expert_was_given_are_not_the_batch() -> None:
    vectors = torch.randn(8, 4)
    vectors[:, 0] = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, 1])
    points = hook_points(OneExpert(), vectors)
    assert points["router"].batch_axis == 0
    assert points["expert"].batch_axis is None


def test_in_half_precision_a_dead_channel_has_no_effect() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    model = model.bfloat16()
    with torch.no_grad():
        model[0].bias[:20] = -100
    vectors = torch.randn(16, 64).bfloat16()
    points = hook_points(model, vectors)
    patches = [zero_ablate(site) for site in points.site("1").split("feature")]
    fast, loop = (
        sweep(points, vectors, patches=patches, metric=lambda output: output[:, 0] - output[:, 1], strategy=strategy)
        for strategy in ("auto", "loop")
    )
    assert (fast.effect() == loop.effect()).all() and not fast.effect()[:20].any() and fast.effect()[20:].any()


def test_in_half_precision_nan_is_not_zero_and_infinity_is_not_the_largest_number() -> None:
    for got, wanted, alike in ((torch.nan, torch.nan, True), (torch.nan, 0.0, False), (torch.inf, 65504.0, False)):
        given, expected = (torch.tensor([number]).half() for number in (got, wanted))
        assert (_difference(expected, given) == "") is alike


class Complex(nn.Module):
    def forward(self, vector: Tensor) -> Tensor:
        return torch.complex(vector, 2 * vector)


def test_sums_of_complex_activations_are_refused_where_half_of_them_would_be_lost() -> None:
    points = hook_points(nn.Sequential(Complex()), torch.randn(2, 3), axes={"0": ("batch", "feature")})
    with pytest.raises(SiteError, match="complex64.*view_as_real"):
        channel_sums(points, torch.randn(2, 3), "0")


def test_sums_of_half_precision_activations_do_not_overflow() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1)).half()
    nn.init.constant_(model[0].weight, 60.0)
    image = torch.full((2, 1, 64, 64), 1.0).half()
    with recording(hook_points(model, image), "0", reduce="sum") as cache, torch.no_grad():
        expected = model(image).double().sum(dim=(2, 3))
    torch.testing.assert_close(cache["0"].double(), expected)
