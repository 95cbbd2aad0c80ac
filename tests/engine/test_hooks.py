"""The order among hooks, and errors that a model catches."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chanpatch import PatchedPolicy, Site, edit, hook_points, patched, recording, run_with_cache, sweep, zero_ablate
from chanpatch.errors import EditError, UnsupportedModelError
from chanpatch.patching import Scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.relu, self.head = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)

    def forward(self, vector: Tensor) -> Tensor:
        return self.head(self.relu(self.body(vector)))


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def vectors() -> Tensor:
    return torch.randn(3, 4)


def seen_by_hook(module: nn.Module, **where: Any) -> list[Tensor]:
    seen: list[Tensor] = []
    module.register_forward_hook(lambda module, args, output: seen.append(output), **where)
    return seen


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def doubles_in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(2)


def test_every_other_hook_sees_the_patched_output_whenever_it_was_registered(net: Net, vectors: Tensor) -> None:
    points = hook_points(net, vectors)
    seen = [seen_by_hook(net.relu)]
    with patched(points, zero_ablate(points.site("relu"))):
        seen += [seen_by_hook(net.relu), seen_by_hook(net.relu, prepend=True)]
        net(vectors)
        net(vectors)
    assert all(len(each) == 2 and not any(map(torch.any, each)) for each in seen)


def test_a_record_is_the_tensor_that_flows_on_after_all_other_hooks(net: Net, vectors: Tensor) -> None:
    points = hook_points(net, vectors)
    with recording(points, ["relu", "head.in[0]"]) as cache:
        net.relu.register_forward_hook(doubled)
        net.relu.register_forward_hook(doubled, prepend=True)
        net(vectors)
    torch.testing.assert_close(cache["relu"], 4 * net.body(vectors).relu())
    assert torch.equal(cache["relu"], cache["head.in[0]"])


def test_the_unpatched_record_is_taken_before_the_hooks_of_others(net: Net, vectors: Tensor) -> None:
    points = hook_points(net, vectors)
    net.relu.register_forward_hook(doubled)
    with recording(points, "relu", before=True) as cache:
        net(vectors)
    torch.testing.assert_close(cache["relu"], net.body(vectors).relu())


def test_a_hook_that_replaces_the_tensor_that_was_just_patched_is_an_error_that_names_it(
    net: Net, vectors: Tensor
) -> None:
    points = hook_points(net, vectors)
    net.relu.register_forward_hook(doubled)
    with pytest.raises(UnsupportedModelError) as caught, patched(points, zero_ablate(points.site("relu", feature=1))):
        net(vectors)
    assert str(caught.value) == (
        "A forward hook (doubled) replaced or modified the patched tensor at 'relu'. Remove the hook while the patch "
        "is active, or patch the input of the next module instead."
    )


def test_a_hook_that_writes_into_the_tensor_that_was_just_patched_is_an_error(net: Net, vectors: Tensor) -> None:
    net.relu.register_forward_hook(doubles_in_place)
    for points in (net, hook_points(net, vectors)):
        with pytest.raises(UnsupportedModelError, match="replaced or modified .* at 'relu'"), torch.no_grad():
            with patched(points, zero_ablate(Site("relu", feature=1))):
                net(vectors)


def test_a_hook_may_write_into_a_tensor_that_is_only_recorded(net: Net, vectors: Tensor) -> None:
    with torch.no_grad():
        expected = 2 * net.body(vectors).relu()
        net.relu.register_forward_hook(doubles_in_place)
        with recording(net, "relu") as cache:
            net(vectors)
    torch.testing.assert_close(cache["relu"], expected)


def test_a_hook_that_only_looks_is_no_obstacle(net: Net, vectors: Tensor) -> None:
    points = hook_points(net, vectors)
    seen = seen_by_hook(net.relu)
    site = points.site("relu", feature=1)
    with patched(points, edit(site, Scale(3.0))), recording(points, "relu") as cache:
        net(vectors)
    expected = net.body(vectors).relu()
    expected[:, 1] *= 3
    torch.testing.assert_close(cache["relu"], expected)
    torch.testing.assert_close(seen[0], expected)


def test_an_input_is_patched_after_all_pre_hooks(net: Net, vectors: Tensor) -> None:
    points = hook_points(net, vectors)
    with patched(points, zero_ablate(points.site("head.in[0]", feature=1))), recording(points, "head.in[0]") as cache:
        net.head.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        net(vectors)
    expected = net.body(vectors).relu() + 1
    expected[:, 1] = 0
    torch.testing.assert_close(cache["head.in[0]"], expected)


def test_a_pre_hook_of_the_model_itself_that_comes_too_late_is_an_error_in_one_call(net: Net, vectors: Tensor) -> None:
    points = hook_points(net, vectors)
    with patched(points, zero_ablate(points.site(".in[0]", feature=1))):
        net.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        with pytest.raises(
            UnsupportedModelError, match="A pre-hook was registered on this Net while a patch was active"
        ):
            net(vectors)
        found = net(vectors)
    by_hand = vectors + 1
    by_hand[:, 1] = 0
    torch.testing.assert_close(found, net.head(net.body(by_hand).relu()))


class Catching(Net):
    """Catches every error of its activation function."""

    def forward(self, vector: Tensor) -> Tensor:
        hidden = self.body(vector)
        try:
            return self.head(self.relu(hidden))
        except Exception:
            return self.head(hidden.relu())


class Failed(Exception):
    pass


def failing(*_: Any, **__: Any) -> Any:
    raise Failed("by the user's own function")


FAILING = {
    "an edit": lambda site: edit(site, failing),
    "a where": lambda site: edit(site, Scale(2.0), where=failing),
}


@pytest.mark.parametrize("patch", FAILING)
@pytest.mark.parametrize("way", ["patched", "twin", "sweep"])
def test_an_error_that_the_model_catches_is_raised_at_the_end_of_the_root_call(
    patch: str, way: str, vectors: Tensor
) -> None:
    net = Catching()
    points = hook_points(net, vectors)
    chosen = FAILING[patch](points.site("relu"))
    with pytest.raises(Failed, match="by the user's own function") as caught:
        if way == "patched":
            with patched(points, chosen) as ledger:
                try:
                    net(vectors)
                finally:
                    assert ledger.to_records()[0]["firings"] == 0
        elif way == "twin":
            PatchedPolicy(points, chosen)(vectors)
        else:
            sweep(points, vectors, patches=[chosen], metric=lambda output: output.sum(1))
    assert any(entry.name == "failing" for entry in caught.traceback)


def test_a_result_that_does_not_fit_is_raised_although_the_model_catches_it(vectors: Tensor) -> None:
    net = Catching()
    with (
        pytest.raises(EditError, match="returned a tensor with dtype torch.float64"),
        patched(net, edit(Site("relu"), Tensor.double)),
    ):
        net(vectors)


def test_a_reduction_that_fails_is_raised_although_the_model_catches_it(vectors: Tensor) -> None:
    net = Catching()
    with pytest.raises(Failed):
        run_with_cache(net, vectors, sites="relu", reduce=("b f -> b", failing))


class Interrupted(BaseException):
    pass


def test_an_exception_of_any_kind_is_raised_although_the_model_catches_it(vectors: Tensor) -> None:
    class CatchingAll(Net):
        def forward(self, vector: Tensor) -> Tensor:
            try:
                return self.head(self.relu(self.body(vector)))
            except BaseException:
                return vector

    def interrupted(region: Tensor) -> Tensor:
        raise Interrupted

    net = CatchingAll()
    with pytest.raises(Interrupted), patched(net, edit(Site("relu"), interrupted)):
        net(vectors)


def test_an_error_outside_of_a_root_call_is_raised_when_the_context_closes(vectors: Tensor) -> None:
    net = Catching()
    with pytest.raises(Failed), patched(net, edit(Site("relu"), failing)):
        with suppress(Failed):
            net.relu(vectors)


def test_the_models_own_errors_that_it_catches_are_its_own(vectors: Tensor) -> None:
    net = Catching()
    with patched(net, zero_ablate(Site("body"))) as ledger:
        net.relu.register_forward_hook(failing)
        net(vectors)
    assert ledger.to_records()[0]["firings"] == 1
