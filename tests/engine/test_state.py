"""State that a model keeps outside buffers, and outputs that lie in its state: no forward reads another one's."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chanpatch import contrast, edit, hook_points, paired_rollouts, patched, rollout, steer, sweep, zero_ablate
from chanpatch.engine.state import undisturbed
from chanpatch.errors import UnsupportedModelError
from chanpatch.metrics import kl_divergence
from chanpatch.probes import channel_sums
from chanpatch.sweeps import attribution, path_patch


class Recurrent(nn.Module):
    """Keeps its state in a plain attribute, with one row per input."""

    def __init__(self, actions: int = 3) -> None:
        super().__init__()
        self.enc, self.cell, self.head = nn.Linear(4, 8), nn.GRUCell(8, 8), nn.Linear(8, actions)
        self.h: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None or len(self.h) != len(x):
            self.h = torch.zeros(len(x), 8)
        self.h = self.cell(self.enc(x).relu(), self.h)
        return self.head(self.h * 20)


class Caching(nn.Module):
    """Writes into a plain tensor, and appends to a list."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head, self.cache, self.seen = nn.Linear(4, 8), nn.Linear(8, 3), torch.zeros(16, 8), [1.0]

    def forward(self, x: Tensor) -> Tensor:
        self.cache[: len(x)] += self.enc(x)
        self.seen.append(self.seen[-1] + 1)
        return self.head(self.cache[: len(x)] * self.seen[-1])


@dataclass
class Memory:
    total: Any = 0.0
    seen: list[int] = field(default_factory=list)


class Remembering(nn.Module):
    """Keeps its state in an object."""

    def __init__(self, memory: Any) -> None:
        super().__init__()
        self.enc, self.head, self.memory = nn.Linear(4, 8), nn.Linear(8, 3), memory

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enc(x)
        self.memory.total = self.memory.total + hidden.mean()
        self.memory.seen.append(len(x))
        return self.head(hidden + self.memory.total * len(self.memory.seen))


class StaticOutput(nn.Module):
    """Returns a view of one buffer, of one plain tensor or of one array, each time."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.enc, self.head, self.array = nn.Linear(4, 8), nn.Linear(8, 3), np.zeros((16, 3), np.float32)
        self.register_buffer("buffer", torch.zeros(16, 3))
        self.tensor, self.kind = torch.zeros(16, 3), kind

    def forward(self, x: Tensor) -> Tensor:
        out = torch.from_numpy(self.array) if self.kind == "array" else getattr(self, self.kind)
        out[: len(x)] = self.head(self.enc(x).relu()).detach()
        return out[: len(x)]


class Drawing(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.enc, self.head, self.generator = nn.Linear(4, 8), nn.Linear(8, 3), generator

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.generator, torch.Generator):
            noise = torch.rand((), generator=self.generator)
        else:
            noise = torch.tensor(self.generator.random(), dtype=torch.float32)
        return self.head(self.enc(x) + noise)


GENERATORS = [lambda: torch.Generator().manual_seed(0), lambda: np.random.default_rng(0), lambda: random.Random(0)]
MODELS = [
    Recurrent,
    Caching,
    lambda: Remembering(Memory()),
    lambda: Remembering(SimpleNamespace(total=0.0, seen=[])),
    *(lambda kind=kind: StaticOutput(kind) for kind in ("buffer", "tensor", "array")),
    *(lambda made=made: Drawing(made()) for made in GENERATORS),
]


def first(output: Tensor) -> Tensor:
    return output[:, 0]


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run_fresh_copy(model: nn.Module, x: Tensor, *patches: Any) -> Tensor:
    """Return what a copy of the model, which has run nothing yet, returns."""
    fresh = copy.deepcopy(model)
    if isinstance(model, Drawing) and isinstance(model.generator, torch.Generator):
        fresh.generator = model.generator.clone_state()
    with patched(fresh, patches):
        return fresh(x).clone()


@pytest.mark.parametrize("strategy", ["auto", "loop"])
def test_a_sweep_gives_the_numbers_of_models_that_have_run_nothing_yet(model, x, strategy) -> None:
    points = hook_points(model, x)
    patches = [zero_ablate(points.site("enc", feature=k)) for k in range(8)]
    expected = [first(run_fresh_copy(model, x, zero_ablate(points.site("enc", feature=k)))) for k in range(8)]
    result = sweep(points, x, patches=patches, metric={"metric": first}, strategy=strategy)
    np.testing.assert_allclose(result.values["metric"], torch.stack(expected), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.baseline["metric"], first(run_fresh_copy(model, x)), rtol=1e-4, atol=1e-5)


def test_tracing_and_sweeping_leave_the_next_forward_as_it_would_have_been(model, x) -> None:
    expected = run_fresh_copy(model, x)
    points = hook_points(model, x)
    sweep(points, x, patches=[steer(points.site("enc"), torch.zeros(1, 1))], metric=first)
    channel_sums(points, x, "enc", batch_size=5)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


class Rebinding(nn.Module):
    """Puts equal objects in the place of others, in attributes and in containers, and other names."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.empty, self.one, self.gone = nn.Linear(4, 3), [], 1, 0.5
        self.seen, self.nested = {"a": [], "b": 2}, ([],)

    def forward(self, x: Tensor) -> Tensor:
        self.empty, self.one, self.new = [], True, 0.5
        self.seen["a"] = self.seen.pop("a")
        self.nested[0].append(len(x))
        vars(self).pop("gone", None)
        return self.head(x)


def test_every_forward_leaves_the_very_objects_in_their_order(x) -> None:
    model = Rebinding()
    before, seen = dict(vars(model)), [*model.seen.items()]
    for run in (undisturbed(model), undisturbed(model)):
        for _ in range(2):
            with run:
                for _ in range(2):
                    model(x)
                    run.put_back()
                    assert vars(model).keys() == before.keys()
                    assert all(vars(model)[name] is before[name] for name in before)
                    assert [*model.seen.items()] == seen and model.nested == ([],)
            model.nested[0].append(0)
            assert model.nested == ([0],)  # what changes outside stays
            model.nested[0].clear()


def test_a_contrast_of_inputs_with_themselves_is_zero(model, x) -> None:
    assert not contrast(hook_points(model, x), x, x, "head").difference.any()


def test_attribution_gives_the_exact_effect_of_a_model_that_has_run_nothing_yet(x) -> None:
    for made in (Recurrent, lambda: Drawing(random.Random(0))):
        points = hook_points(made().eval(), x)
        patch = zero_ablate(points.site("enc"))
        expected = first(run_fresh_copy(points.model, x, patch) - run_fresh_copy(points.model, x)).mean()
        found = attribution(points, x, patches=[patch], metric=first)
        np.testing.assert_allclose(found.exact, [expected], rtol=1e-4, atol=1e-6)


def test_a_path_is_measured_against_a_baseline_that_stays(x) -> None:
    points = hook_points(StaticOutput("buffer").eval(), x)
    expected = first(run_fresh_copy(points.model, x.flip(0)) - run_fresh_copy(points.model, x))
    found = path_patch(points, x, x.flip(0), "enc", "head.in[0]", metric=first)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class Framing(nn.Module):
    """Keeps the means of what it saw in a list, and acts by their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.frames = nn.Linear(4, 2), []

    def forward(self, x: Tensor) -> Tensor:
        self.frames.append(float(x.mean()))
        return self.head(x) + 5 * torch.tensor([sum(self.frames), 0.0])


NAMED = Framing()
WAYS = {
    "module": lambda policy: policy,
    "closure": lambda policy: lambda x: policy(x),
    "method": lambda policy: policy.forward,
    "default": lambda policy: lambda x, policy=policy: policy(x),
    "partial": lambda policy: functools.partial(lambda policy, x: policy(x), policy),
    "object": lambda policy: type("Acting", (), {"__init__": lambda self: setattr(self, "policy", policy),
                                                 "__call__": lambda self, x: self.policy(x)})(),
    "global": lambda policy: lambda x: NAMED(x),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("made", [lambda: Recurrent(2), Framing])
def test_two_rollouts_of_one_policy_begin_with_the_same_state(way, made, monkeypatch) -> None:
    torch.manual_seed(1)
    policy = made().eval()
    monkeypatch.setitem(globals(), "NAMED", policy)
    before = dict(vars(policy))
    envs = gymnasium.make_vec("CartPole-v1", num_envs=1, vectorization_mode="sync")
    acting = way(policy)
    pairs = paired_rollouts({"a": acting, "b": acting}, envs, range(6), max_steps=60, outputs="logits")
    assert all(map(np.array_equal, pairs["a"].actions, pairs["b"].actions))
    again = rollout(acting, envs, [5], max_steps=60, outputs="logits")  # no episode begins with what another one left
    assert np.array_equal(pairs["a"].actions[5], again.actions[0])
    assert all(vars(policy)[name] is before[name] for name in before) and not getattr(policy, "frames", None)


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


class HooksItself(nn.Module):
    """Hooks its first layer in its first forward, as Hugging Face's models do where hidden states are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self.hooked = False

    def forward(self, vector: Tensor) -> tuple[Tensor, list[Tensor]]:
        if not self.hooked:
            self.handle = self.first.register_forward_hook(self.keep, with_kwargs=True)
            self.hooked = True
        self.seen: list[Tensor] = []
        return self.second(self.first(vector)), self.seen

    def keep(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self.seen.append(output)


@pytest.mark.parametrize("strategy", ["auto", "vmap", "resume", "loop"])
def test_a_hook_that_a_forward_registers_is_taken_off_again_and_counted_once(strategy: Any) -> None:
    torch.manual_seed(0)
    model, vectors = HooksItself(), torch.randn(9, 4)
    points = hook_points(model, vectors)
    assert not model.first._forward_hooks and not model.hooked
    found = sweep(
        points,
        vectors,
        patches=[zero_ablate(site) for site in points.site(".in[0]").split("feature")],
        metric=lambda output: sum(each.sum(1) for each in output[1]),
        strategy=strategy,
    )
    assert not model.first._forward_hooks and not model.hooked
    weights = model.first.weight.sum(0)  # what each input adds to the sum of the first layer
    np.testing.assert_allclose(found.effect(), -(vectors.mean(0) * weights).detach(), rtol=1e-4, atol=1e-5)
    assert len(model(vectors)[1]) == len(model(vectors)[1]) == 1


class Built(nn.Module):
    """Makes its head when it knows how wide that has to be."""

    def __init__(self, parameter: bool) -> None:
        super().__init__()
        self.parameter, self.head = parameter, None

    def forward(self, vector: Tensor) -> Tensor:
        if self.head is None:
            width = vector.shape[1]
            self.head = nn.Parameter(torch.randn(width)) if self.parameter else nn.Linear(width, 2)
        return vector * self.head if self.parameter else self.head(vector)


@pytest.mark.parametrize("parameter", [False, True])
def test_a_model_that_builds_a_part_of_itself_in_its_first_forward_is_refused_until_it_has(parameter: bool) -> None:
    model, vectors = Built(parameter), torch.randn(9, 4)
    with pytest.raises(
        UnsupportedModelError, match="'head' in Built was created by this forward pass.*Run the model once"
    ):
        hook_points(model, vectors)
    assert model.head is None and not model._modules and not model._parameters
    expected = model(vectors)
    points = hook_points(model, vectors)
    assert parameter or "head" in points
    torch.testing.assert_close(model(vectors), expected, rtol=0, atol=0)


class Adjacent(nn.Module):
    """Has a sparse buffer, and one that takes its size in the first forward, as observers of quantisation have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("adjacency", torch.eye(6).to_sparse())
        self.register_buffer("largest", torch.tensor([]))

    def forward(self, vector: Tensor) -> Tensor:
        hidden: Tensor = self.layer(vector)
        if not len(self.largest):
            self.largest.resize_(6).copy_(hidden.detach().amax(0))
        self.adjacency.mul_(2)
        return (self.adjacency @ hidden.T).T


def test_sparse_buffers_and_those_that_grow_are_put_back() -> None:
    model, vectors = Adjacent(), torch.randn(9, 6)
    hook_points(model, vectors)
    assert not len(model.largest)
    torch.testing.assert_close(model.adjacency.to_dense(), torch.eye(6), rtol=0, atol=0)


class Merging(nn.Module):
    """Adds something to a weight for the time of its forward, as adapters are merged."""

    def __init__(self, swaps: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.swaps = swaps

    def forward(self, vector: Tensor) -> Tensor:
        before = self.body.weight
        if self.swaps:
            self.body.weight = nn.Parameter(before + 1)
        else:
            before.data += 1
        output: Tensor = self.head(self.body(vector))
        if self.swaps:
            self.body.weight = before
        else:
            before.data -= 1
        return output


@pytest.mark.parametrize("swaps", [False, True])
def test_a_forward_that_changes_weights_for_a_while_is_never_ended_early(swaps: bool) -> None:
    torch.manual_seed(0)
    model, vectors = Merging(swaps), torch.randn(12, 4)
    points = hook_points(model, vectors)
    assert not points.steady and not points.select("body*").steady
    with torch.no_grad():
        expected = model.body(vectors) + vectors.sum(1, keepdim=True)
    weight, before = model.body.weight, model.body.weight.detach().clone()
    np.testing.assert_allclose(channel_sums(points, vectors, "body", batch_size=4), expected, atol=1e-5)
    patches = [zero_ablate(site) for site in points.site("body").split("feature")]
    for _ in range(2):
        sweep(points, vectors, patches=patches, metric=lambda output: output[:, 0])
    assert model.body.weight is weight
    torch.testing.assert_close(weight, before, rtol=0, atol=1e-6)


class Changing(nn.Module):
    """Changes a large weight for the time of its forward."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.body, self.change = nn.Linear(300, 300), change

    def forward(self, vector: Tensor) -> Tensor:
        before = self.body.weight.detach().clone()
        self.change(self.body.weight.data)
        output: Tensor = self.body(vector)
        self.body.weight.data.copy_(before)
        return output


@pytest.mark.parametrize(
    "change",
    [lambda weight: weight.neg_(), lambda weight: weight[7, 8].neg_(), lambda weight: weight[7, 9].mul_(1 + 2e-7)],
    ids=["all signs", "one sign", "one last digit"],
)
def test_a_small_change_in_a_large_weight_is_noticed(change: Callable[[Tensor], object]) -> None:
    assert not hook_points(Changing(change), torch.randn(4, 300)).steady
    assert hook_points(Changing(lambda weight: weight), torch.randn(4, 300)).steady


class Lends(nn.Module):
    """Has no parameters while another module runs, and loses them if that module fails."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.relu = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.zeros(3)), nn.ReLU()

    def forward(self, vector: Tensor) -> Tensor:
        held = dict(self._parameters)
        self._parameters.clear()
        output: Tensor = self.relu(vector @ held["weight"].T) + held["bias"]
        self._parameters.update(held)
        return output


def test_parameters_that_an_error_removes_are_put_back_in_order() -> None:
    model, vectors = Lends(), torch.randn(9, 4)
    points, expected = hook_points(model, vectors), model(vectors)
    for patches in ([edit(points.site("relu"), lambda activation: 1 / 0)], [zero_ablate(points.site("relu"))] * 3):
        with suppress(ZeroDivisionError):
            sweep(points, vectors, patches=dict(enumerate(patches)), metric=lambda output: output[:, 0])
        assert [*model._parameters] == ["weight", "bias"]
        torch.testing.assert_close(model(vectors), expected, rtol=0, atol=0)


class Louder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.gain = nn.Linear(4, 8), nn.Linear(8, 3), 1.0

    def forward(self, vector: Tensor) -> Tensor:
        output: Tensor = self.second(self.first(vector)) * self.gain
        return output


def test_what_an_edit_leaves_on_the_model_for_the_rest_of_its_forward_is_there_in_a_sweep() -> None:
    torch.manual_seed(0)
    model, vectors = Louder(), torch.randn(9, 4)

    def louder(activation: Tensor) -> Tensor:
        model.gain = 3.0
        return activation.clone()

    points = hook_points(model, vectors)
    patches: dict[int, Any] = dict(enumerate(map(zero_ablate, points.site("first").split("feature"))))
    patches[2] = edit(points.site("first"), louder)
    found = sweep(points, vectors, patches=patches, metric=lambda output: output[:, 0])
    expected = 2 * model(vectors)[:, 0].mean().item()
    assert found.effect()[2] == pytest.approx(expected, rel=1e-4)
    assert found.groups[0].strategy == "resume" and "2 changes the model's state" in found.groups[0].why


class CallingCopies(nn.Module):
    def __init__(self, copies: Any) -> None:
        super().__init__()
        self.layer, self.copies = nn.Linear(4, 4), copies

    def forward(self, vector: Tensor) -> Tensor:
        output: Tensor = self.layer(self.copies(self.layer)(vector))
        return output


@pytest.mark.parametrize("copies", [copy.copy, copy.deepcopy])
def test_copies_of_modules_that_a_forward_calls_are_no_hook_points(copies: Any) -> None:
    model = CallingCopies(copies)
    assert list(hook_points(model, torch.randn(3, 4))) == [".in[0]", "layer.in[0]", "layer", ".out"]
    assert not model.layer._forward_hooks and not model.layer._forward_pre_hooks
