"""The laws on models that were not written for the tests, and on what torch can do with a module."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from chanpatch.engine.moments import forward_context
from chanpatch.engine.paths import leaves
from chanpatch.errors import (
    EditError,
    HookPointError,
    SiteError,
    TraceMismatchError,
    UnreachedError,
    UnsupportedModelError,
)
from chanpatch.patching import (
    Set,
    edit,
    patch_in,
    patched,
    recording,
    resample_ablate,
    run_with_cache,
    steer,
    zero_ablate,
)
from chanpatch.policies import PatchedPolicy
from chanpatch.registry import HookPoints, Site, hook_points, tap
from maze.environment.requirements import policy_models


class RecurrentPolicy(nn.Module):
    """Runs a GRU cell over time in a Python loop."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.cell = nn.GRUCell(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, sequence, hidden=None):
        logits = []
        for observation in sequence.unbind(1):
            hidden = self.cell(self.embed(observation).relu(), hidden)
            logits.append(self.head(hidden))
        return torch.stack(logits, 1), hidden


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        rows, length, width = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        mixed = tap("pattern", scores.softmax(-1)) @ v
        x = x + self.proj(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(7, 8)
        self.blocks = nn.ModuleList(Block(8, 2) for _ in range(2))
        self.ln = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


class Checkpointed(nn.Module):
    """Recomputes its middle part in the backward pass."""

    def __init__(self, *, reentrant: bool = False) -> None:
        super().__init__()
        self.fc1, self.relu, self.fc2, self.head = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4)
        self.reentrant = reentrant

    def middle(self, vector):
        return self.fc2(self.relu(self.fc1(vector))).sin()

    def forward(self, vector):
        return self.head(checkpoint(self.middle, vector, use_reentrant=self.reentrant))


class Case(NamedTuple):
    module: nn.Module
    inputs: Callable[[int], tuple[Any, ...]]
    site: str
    axes: dict[str, tuple[str, ...]]


def impala() -> Case:
    models = policy_models()
    policy = models.CategoricalPolicy(models.InterpretableImpalaModel(3), 15)
    return Case(policy, lambda rows: (torch.rand(rows, 3, 64, 64),), "embedder.block3.res1.conv1", {})


def sb3_cnn() -> Case:
    image = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    policy = ActorCriticCnnPolicy(image, spaces.Discrete(3), lambda _: 1e-3)
    inputs = lambda rows: (torch.randint(0, 255, (rows, 3, 36, 36), dtype=torch.uint8), True)  # noqa: E731
    return Case(policy, inputs, "features_extractor.cnn.2", {})


def transformer() -> Case:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Case(encoder, lambda rows: (torch.randn(rows, 5, 8),), "layers.0.linear1", {})


def vectors(rows: int) -> tuple[Tensor]:
    return (torch.randn(rows, 6),)


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


NAMED = ("batch", "position")
CASES: dict[str, Callable[[], Case]] = {
    "impala": impala,
    "sb3 cnn": sb3_cnn,
    "transformer": transformer,
    "recurrent": lambda: Case(RecurrentPolicy(), lambda rows: (torch.randn(rows, 3, 6),), "cell#1", {}),
    "gpt": lambda: Case(GPT(), lambda rows: (torch.randint(11, (rows, 7)),), "blocks.1.mlp.1", {"tokens.in": NAMED}),
    "fx": lambda: Case(torch.fx.symbolic_trace(sequential()), vectors, "1", {}),
    "data parallel": lambda: Case(nn.DataParallel(sequential()), vectors, "module.1", {}),
    "checkpointed": lambda: Case(Checkpointed(), vectors, "relu", {}),
    "weight norm": lambda: Case(
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh()), vectors, "0", {},
    ),
}  # fmt: skip


class Unfamiliar(NamedTuple):
    case: Case
    inputs: tuple[Any, ...]
    points: HookPoints

    @property
    def axis(self) -> str:
        return next(axis for axis in ("channel", "feature") if axis in self.points[self.case.site].axes)


@functools.cache
def traced(name: str) -> Unfamiliar:
    """A case and its hook points; every test leaves it as it was, which is what they test."""
    torch.manual_seed(0)
    case = CASES[name]()
    case.module.eval()
    inputs = case.inputs(2)
    return Unfamiliar(case, inputs, hook_points(case.module, *inputs, axes=case.axes))


@pytest.fixture(params=list(CASES))
def unfamiliar(request):
    with torch.no_grad():  # recurrent and attention modules compute otherwise where a graph is kept
        yield traced(request.param)


def tensors(output: Any) -> list[Tensor]:
    return [tensor for _, tensor in leaves(output)]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_the_batch_is_proved_and_the_axes_of_the_site_are_named(unfamiliar):
    point = unfamiliar.points[unfamiliar.case.site]
    assert point.axes[point.batch_axis] == "batch"
    assert unfamiliar.axis in point.axes


def test_an_identity_edit_at_every_hook_point_changes_no_bit(unfamiliar):
    case, inputs, points = unfamiliar
    plain = case.module(*inputs)
    with patched(
        points,
        [edit(points.site(name), lambda activation: activation) for name, p in points.items() if not p.read_only],
    ):
        assert same(case.module(*inputs), plain)


def test_no_hook_is_left_and_the_model_is_as_it_was(unfamiliar):
    case, inputs, points = unfamiliar
    plain = case.module(*inputs)
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in case.module.modules())
    with patched(points, zero_ablate(points.site(case.site))), recording(points, case.site):
        case.module(*inputs)
    run_with_cache(points, *inputs, sites=case.site, stop=True)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in case.module.modules()) == count
    assert same(case.module(*inputs), plain)


def test_a_patch_is_the_torch_hook_written_by_hand(unfamiliar):
    case, inputs, points = unfamiliar
    point = points[case.site]
    number, calls = point.axes.index(unfamiliar.axis), itertools.count()

    def by_hand(module, args, output):
        changed = output.clone()
        changed.select(number, 1).fill_(0.5)
        return changed if point.call in (None, next(calls)) else output

    with case.module.get_submodule(point.module).register_forward_hook(by_hand):
        expected = case.module(*inputs)
    with patched(points, edit(points.site(case.site, **{unfamiliar.axis: 1}), Set(0.5))):
        found = case.module(*inputs)
    assert same(found, expected)
    assert not same(found, case.module(*inputs))


def test_patching_in_what_another_run_had_at_every_module_gives_that_runs_output(unfamiliar):
    case, inputs, points = unfamiliar
    other = case.inputs(2)
    sites = [points.site(name) for name, point in points.items() if point.side == "out" and point.module]
    expected, source = run_with_cache(points, *other, sites=sites)
    with patched(points, [patch_in(site, source) for site in sites]):
        assert same(case.module(*inputs), expected)
    assert not same(case.module(*inputs), expected)


def test_a_record_is_what_a_torch_hook_sees_and_cannot_be_corrupted(unfamiliar):
    case, inputs, points = unfamiliar
    point, seen = points[case.site], []
    with case.module.get_submodule(point.module).register_forward_hook(lambda m, a, out: seen.append(out.clone())):
        _, cache = run_with_cache(points, *inputs, sites=case.site)
    assert torch.equal(cache[case.site], seen[point.call or 0])


def test_a_later_record_sees_all_patches_and_before_sees_none(unfamiliar):
    case, inputs, points = unfamiliar
    site = points.site(case.site)
    _, clean = run_with_cache(points, *inputs, sites=site)
    with recording(points, site) as after, recording(points, site, before=True) as before:
        with patched(points, edit(site, lambda a: a + 1)), patched(points, edit(site, lambda a: a * 2)):
            case.module(*inputs)
    torch.testing.assert_close(after[site], (clean[site] + 1) * 2, rtol=0, atol=0)
    assert torch.equal(before[site], clean[site])


def test_a_region_keeps_all_axes(unfamiliar):
    case, inputs, points = unfamiliar
    site = points.site(case.site, **{unfamiliar.axis: [3, 0]})
    _, cache = run_with_cache(points, *inputs, sites=[site, points.site(case.site)])
    whole = cache[points.site(case.site)]
    assert torch.equal(cache[site], whole[:, [3, 0]] if unfamiliar.axis == "channel" else whole[..., [3, 0]])


def test_a_patch_that_did_not_run_is_an_error(unfamiliar):
    with (
        pytest.raises(UnreachedError, match="never ran"),
        patched(unfamiliar.points, zero_ablate(unfamiliar.points.site(unfamiliar.case.site))),
    ):
        pass


def test_an_operand_with_fewer_axes_than_the_region_is_refused_when_the_patch_is_made(unfamiliar):
    site = unfamiliar.points.site(unfamiliar.case.site)
    with pytest.raises(EditError, match="must have the region's length or length 1"):
        steer(site, torch.ones(unfamiliar.points[site.name].shape[-1]))


def test_all_faults_of_a_site_are_told_when_it_is_made(unfamiliar):
    with pytest.raises(SiteError, match="no axis 'nothing'") as caught:
        unfamiliar.points.site(unfamiliar.case.site, **{"nothing": 0, unfamiliar.axis: 10_000})
    assert f"{unfamiliar.axis} 10000 is out of range" in str(caught.value)


def test_a_random_edit_draws_the_same_for_a_row_whatever_the_order_of_the_rows(unfamiliar):
    case, inputs, points = unfamiliar
    site = points.site(case.site)
    _, reference = run_with_cache(points, *case.inputs(9), sites=site)
    with patched(points, resample_ablate(site, reference, seed=3)):
        _, whole = run_with_cache(points, *inputs, sites=site)
        with forward_context(rows=[1, 0]):
            _, turned = run_with_cache(points, *inputs, sites=site)
    assert torch.equal(turned[site], whole[site].flip(points[site.name].batch_axis))


def test_a_twin_is_patched_and_the_model_is_not(unfamiliar):
    case, inputs, points = unfamiliar
    patch = zero_ablate(points.site(case.site, **{unfamiliar.axis: 1}))
    twin = PatchedPolicy(points, patch)
    plain = case.module(*inputs)
    with patched(points, patch):
        expected = case.module(*inputs)
    assert same(twin(*inputs), expected)
    assert same(case.module(*inputs), plain)
    assert isinstance(twin, type(case.module))
    assert all(one is other for one, other in zip(case.module.parameters(), twin.parameters(), strict=True))


# --- call indices ---


@pytest.mark.parametrize("call", [0, 1, 2])
def test_one_step_of_a_recurrent_policy_is_patched_and_the_others_follow_from_it(call):
    policy, sequence = RecurrentPolicy(), torch.randn(2, 3, 6)
    points = hook_points(policy, sequence)
    with patched(points, zero_ablate(points.site(f"cell#{call}"))):
        found, _ = policy(sequence)
    hidden, expected = None, []
    for step in range(3):
        hidden = policy.cell(policy.embed(sequence[:, step]).relu(), hidden)
        hidden = torch.zeros_like(hidden) if step == call else hidden
        expected.append(policy.head(hidden))
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=0, atol=0)


def test_a_longer_rollout_than_the_traced_one_is_refused():
    policy = RecurrentPolicy()
    points = hook_points(policy, torch.randn(2, 3, 6))
    with pytest.raises(TraceMismatchError, match="called 4 times in this model call, but 3 times when the model"):
        with patched(points, zero_ablate(points.site("cell#0"))):
            policy(torch.randn(2, 5, 6))


def test_a_tap_in_a_block_that_runs_twice_is_patched_in_one_of_them():
    gpt, tokens = GPT(), torch.randint(11, (2, 7))
    points = hook_points(gpt, tokens)
    identity = torch.eye(7).expand(2, 2, 7, 7)
    with patched(points, patch_in(points.site("pattern#1"), identity)):
        found = gpt(tokens)
    x = gpt.blocks[0](gpt.tokens(tokens) + gpt.positions(torch.arange(7)))
    last = gpt.blocks[1]
    x = x + last.proj(last.qkv(last.ln1(x))[..., 16:])  # each position attends to itself
    x = x + last.mlp(last.ln2(x))
    torch.testing.assert_close(found, gpt.head(gpt.ln(x)))


# --- names ---


class Named(nn.Module):
    """Submodules whose names hold what the names of hook points are made of."""

    def __init__(self):
        super().__init__()
        self.out = nn.ModuleDict({"in": nn.Linear(6, 6), "#1": nn.Linear(6, 6), "out": nn.Linear(6, 6)})
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.ModuleDict({"a#0": nn.Linear(6, 6), "b[0]": nn.Linear(6, 6)})])

    def order(self) -> list[nn.Module]:
        return [*self.out.values(), self.layers[0], *self.layers[1].values()]

    def forward(self, vector):
        for module in self.order():
            vector = module(vector)
        return vector


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("traced", [True, False], ids=["hook points", "bare model"])
def test_a_module_whose_name_looks_like_a_part_of_a_hook_points_name_is_patched(number, traced):
    model, vector = Named(), torch.randn(2, 6)
    points = hook_points(model, vector)
    name = [name for name, point in points.items() if point.side == "out" and point.module][number]
    expected = torch.zeros(2, 6)
    for module in model.order()[number + 1 :]:
        expected = module(expected)
    patch = zero_ablate(points.site(name) if traced else Site(name))
    with patched(points if traced else model, patch):
        torch.testing.assert_close(model(vector), expected, rtol=0, atol=0)


@pytest.mark.parametrize("number", range(6))
def test_the_input_of_such_a_module_is_patched_by_its_name(number):
    model, vector = Named(), torch.randn(2, 6)
    name = [name for name, point in hook_points(model, vector).items() if point.side == "in" and point.module][number]
    expected = torch.zeros(2, 6)
    for module in model.order()[number:]:
        expected = module(expected)
    with patched(model, zero_ablate(Site(name))):
        torch.testing.assert_close(model(vector), expected, rtol=0, atol=0)


def test_the_container_that_holds_modules_is_no_hook_point():
    points = hook_points(Named(), torch.randn(2, 6))
    assert points.not_called == ("out", "layers", "layers.1")
    with pytest.raises(HookPointError, match="'layers' is not a hook point"):
        points["layers"]


# --- transformers ---


def test_a_hook_inside_a_transformer_layer_is_reached_though_its_fused_path_would_skip_it():
    encoder = transformer().module.eval()
    sequence = torch.randn(3, 5, 8)
    with torch.no_grad(), patched(encoder, zero_ablate(Site("layers.1.linear2"))) as ledger:
        found = encoder(sequence)
    last = encoder.layers[1]
    hidden = encoder.layers[0](sequence)
    attended = last.norm1(hidden + last.self_attn(hidden, hidden, hidden)[0])
    torch.testing.assert_close(found, last.norm2(attended))
    assert ledger.to_records()[0]["firings"] == 1


def test_the_fused_path_of_a_transformer_gives_what_the_hooked_one_gives_but_for_rounding():
    encoder = transformer().module.eval()
    sequence = torch.randn(3, 5, 8)
    with torch.no_grad():
        plain = encoder(sequence)
        with patched(encoder, edit(Site("layers.1.linear2"), lambda activation: activation)):
            torch.testing.assert_close(encoder(sequence), plain)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_refused_with_what_to_do():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="enable_nested_tensor=False"):
        with patched(encoder, zero_ablate(Site("layers.1"))):
            encoder(torch.randn(3, 5, 8), src_key_padding_mask=padding)


# --- torch.compile and TorchScript ---


@pytest.fixture
def dynamo():
    """No compiled code of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


GRAD_IS_ASKED_FOR = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by torch.compile itself


@pytest.fixture
def net():
    torch.manual_seed(0)
    return sequential()


@pytest.fixture
def vector():
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def by_hand(net: nn.Sequential, vector: Tensor) -> Tensor:
    hidden = F.relu(F.linear(vector, net[0].weight, net[0].bias))
    hidden = torch.cat([hidden[..., :2], torch.zeros_like(hidden[..., 2:3]), hidden[..., 3:]], -1)
    return F.linear(hidden, net[2].weight, net[2].bias)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("verb", [patched, PatchedPolicy, recording], ids=lambda verb: verb.__name__)
def test_a_compiled_model_is_refused(net, vector, verb):
    compiled = torch.compile(net, backend="eager")
    compiled(vector)
    what = "1" if verb is recording else zero_ablate(Site("1"))
    with pytest.raises(UnsupportedModelError, match="compiled with torch.compile"):
        with verb(compiled, what):
            pass


@pytest.mark.usefixtures("dynamo")
def test_a_model_that_was_compiled_before_it_is_patched_is_patched_when_its_compiled_form_is_called(net, vector):
    compiled = torch.compile(net, backend="eager")
    plain = compiled(vector)
    with patched(net, zero_ablate(Site("1", axis1=2))) as ledger:
        torch.testing.assert_close(net(vector), by_hand(net, vector))
        torch.testing.assert_close(compiled(vector), by_hand(net, vector))
    assert ledger.to_records()[0]["firings"] == 2
    torch.testing.assert_close(compiled(vector), plain)


@pytest.mark.usefixtures("dynamo")
def test_compiled_code_is_compiled_again_after_the_contexts_whatever_the_order_in_which_they_close(net, vector):
    compiled = torch.compile(net, backend="eager")
    compiled(vector)
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    outer, inner = recording(net, "0"), recording(net, "1")
    for context in (outer, inner):
        context.__enter__()
    compiled(vector)
    for context in (outer, inner):
        context.__exit__(None, None, None)
    torch._dynamo.reset()
    compiled(vector)
    assert torch._dynamo.utils.counters["frames"]["ok"] == frames + 1


@GRAD_IS_ASKED_FOR
@pytest.mark.usefixtures("dynamo")
def test_a_model_that_is_compiled_while_it_is_patched_is_patched_or_an_error(net, vector):
    with patched(net, zero_ablate(Site("1", axis1=2))):
        compiled = torch.compile(net, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(vector), by_hand(net, vector))
    torch.testing.assert_close(compiled(vector), net(vector))


@pytest.mark.usefixtures("dynamo")
def test_a_twin_can_be_compiled(net, vector):
    twin = PatchedPolicy(net, zero_ablate(Site("1", axis1=2)))
    compiled = torch.compile(twin, backend="eager")
    for rows in (vector, vector[:2], torch.randn(7, 6)):
        torch.testing.assert_close(compiled(rows), by_hand(net, rows))
    with twin.disable():
        torch.testing.assert_close(compiled(vector), net(vector))
    assert twin.ledger.to_records()[0]["firings"] == 3
    torch.compile(net, backend="eager")  # marks the policy, as it marked the twin before
    torch.testing.assert_close(twin(vector), by_hand(net, vector))


@GRAD_IS_ASKED_FOR
@pytest.mark.usefixtures("dynamo")
def test_a_compiled_function_that_calls_a_twin_is_patched(net, vector):
    twin = PatchedPolicy(net, zero_ablate(Site("1", axis1=2)))

    @torch.compile(backend="eager")
    def act(rows):
        return twin(rows) * 2

    torch.testing.assert_close(act(vector), by_hand(net, vector) * 2)


@pytest.mark.usefixtures("dynamo")
def test_a_method_that_was_compiled_inside_a_model_is_patched_or_an_error(vector):
    class Compiling(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)
            self.step = torch.compile(self._step, backend="eager")

        def _step(self, vector):
            return self.fc(vector)

        def forward(self, vector):
            return self.step(vector)

    model = Compiling()
    model(vector)
    with patched(model, zero_ablate(Site("fc"))):
        assert not model(vector).any()
    assert model(vector).any()
    with pytest.raises(UnsupportedModelError, match=r"stores the function .*Compiling\._step .*policy itself"):
        PatchedPolicy(model, zero_ablate(Site("fc")))


def test_a_function_that_holds_the_model_itself_is_refused_in_a_twin(vector):
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)
            self.step = lambda vector: self.fc(vector)

        def act(self, vector):
            return self.step(vector)

    with pytest.raises(UnsupportedModelError, match="Held stores the function .* refers to the policy itself"):
        PatchedPolicy(Held(), zero_ablate(Site("fc")))


class Tapped(nn.Module):
    """A tap in a submodule, which methods, properties and others enter by itself."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, vector):
            return tap("hidden", self.fc(vector).relu())

    def __init__(self):
        super().__init__()
        self.encoder, self.head = Tapped.Encoder(), nn.Linear(4, 2)

    def forward(self, vector):
        return self.head(self.encoder(vector))

    act = forward

    @property
    def on_ones(self):
        return self.forward(torch.ones(1, 6))


TAPPED_ENTRIES = {
    "call": lambda model, vector: model(vector),
    "forward": lambda model, vector: model.forward(vector),
    "method": lambda model, vector: model.act(vector),
    "property": lambda model, vector: model.on_ones,
    "submodule": lambda model, vector: model.head(model.encoder(vector)),
}


@pytest.mark.parametrize("entry", TAPPED_ENTRIES)
@pytest.mark.parametrize("kind", ["twin", "context"])
def test_a_tap_in_a_submodule_is_patched_however_it_is_entered(vector, entry, kind):
    torch.manual_seed(0)  # of some weights the hidden units are all dead
    model = Tapped()
    points = hook_points(model, vector)
    patch = zero_ablate(points.site("hidden"))
    bias = model.head.bias
    if kind == "twin":
        output = TAPPED_ENTRIES[entry](PatchedPolicy(points, patch), vector)
    else:
        with patched(points, patch):
            output = TAPPED_ENTRIES[entry](model, vector)
    torch.testing.assert_close(output, bias.expand_as(output))
    assert not torch.allclose(TAPPED_ENTRIES[entry](model, vector), bias.expand_as(output))


def test_twins_with_taps_are_freed_and_serve_their_own_thread_each(vector):
    points = hook_points(Tapped(), vector)
    patch = zero_ablate(points.site("hidden"))
    twins = [PatchedPolicy(points, patch) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for output in pool.map(lambda twin: [twin(vector) for _ in range(20)][-1], twins):
            torch.testing.assert_close(output, points.model.head.bias.expand_as(output))
    alive = [weakref.ref(twin) for twin in twins]
    del twins
    gc.collect()
    assert all(reference() is None for reference in alive)


class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, vector, depth=2):
        hidden = self.fc(vector)
        return self(hidden, depth - 1) if depth else hidden


@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_model_that_calls_itself_is_one_root_call(vector, call):
    model = Recursive()
    points = hook_points(model, vector)
    with patched(points, edit(points.site(f"fc#{call}"), lambda a: a * 0 + 1.0)) as ledger:
        output = model(vector)
    by_hand = torch.ones_like(vector)
    for _ in range(2 - call):
        by_hand = model.fc(by_hand)
    torch.testing.assert_close(output, by_hand)
    assert ledger.to_records()[0]["firings"] == 1


def test_a_call_of_a_submodule_after_a_forward_that_was_stopped_is_counted_by_itself(net, vector):
    model = nn.Sequential(net, nn.Linear(net[2].out_features, 2))
    points = hook_points(model, vector)
    with patched(points, zero_ablate(points.site("0.0"))):
        run_with_cache(points, vector, sites="0.0", stop=True)
        assert not model[0][0](vector).any()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 6))])
def test_a_model_with_a_torchscript_module_inside_is_refused(vector, script):
    model = nn.Sequential(script(nn.Linear(6, 4)), nn.ReLU())
    with pytest.raises(UnsupportedModelError, match="'0' is a TorchScript module"):
        hook_points(model, vector)


# --- torch.func ---


@pytest.fixture
def patch():
    return zero_ablate(Site("1", axis1=2))


def test_functional_call_runs_other_weights_through_the_patch(net, vector, patch):
    doubled = {name: parameter * 2 for name, parameter in net.named_parameters()}
    other = sequential()
    other.load_state_dict(doubled)
    with patched(net, patch):
        torch.testing.assert_close(functional_call(net, doubled, (vector,)), by_hand(other, vector))
    with pytest.raises(UnsupportedModelError, match="was replaced in the policy or its PatchedPolicy"):
        functional_call(PatchedPolicy(net, patch), doubled, (vector,))


@pytest.mark.parametrize("transform", [grad, jacrev], ids=["grad", "jacrev"])
def test_derivatives_by_torch_func_go_through_the_patch(net, vector, patch, transform):
    found_of = transform(lambda rows: net(rows).square().sum())
    with patched(net, patch):
        found = found_of(vector)
    rows = vector.clone().requires_grad_()
    by_hand(net, rows).square().sum().backward()
    torch.testing.assert_close(found, rows.grad)


def test_vmap_over_rows_goes_through_the_patch(net, vector):
    patch = zero_ablate(Site("1", axis0=2))
    with patched(net, patch):
        torch.testing.assert_close(vmap(net)(vector), by_hand(net, vector))
    torch.testing.assert_close(vmap(PatchedPolicy(net, patch))(vector), by_hand(net, vector))


def test_derivatives_row_by_row_go_through_the_patch(net, vector):
    with patched(net, zero_ablate(Site("1", axis0=2))):
        found = vmap(grad(lambda row: net(row).sum()))(vector)
    rows = vector.clone().requires_grad_()
    by_hand(net, rows).sum().backward()
    torch.testing.assert_close(found, rows.grad)


def test_vmap_over_an_operand_runs_one_patch_per_entry(net, vector):
    def scaled(factor):
        with patched(net, edit(Site("1"), lambda activation: activation * factor)):
            return net(vector)

    found = vmap(scaled)(torch.tensor([0.0, 1.0, -2.0]))
    for one, factor in zip(found, (0.0, 1.0, -2.0), strict=True):
        torch.testing.assert_close(one, net[2](net[1](net[0](vector)) * factor))


def test_nothing_is_recorded_inside_vmap(net, vector):
    with pytest.raises(UnsupportedModelError, match="cannot be recorded inside torch.vmap"), recording(net, "1"):
        vmap(net)(vector)


def test_a_record_taken_inside_grad_is_the_activation(net, vector):
    with recording(net, "1") as cache:
        grad(lambda rows: net(rows).sum())(vector)
    assert torch.equal(cache["1"] + 0, net[1](net[0](vector)).detach())


# --- checkpointing ---


@pytest.fixture(params=[False, True], ids=["not reentrant", "reentrant"])
def checkpointed(request):
    torch.manual_seed(0)
    return Checkpointed(reentrant=request.param)


CHECKPOINT = (
    "'relu' is patched inside torch.utils.checkpoint, whose backward pass reruns the module outside the patched call, "
    "so gradients could be wrong. Disable checkpointing while the model is patched, or run the model under "
    "torch.no_grad()."
)
DOUBLED = edit(Site("relu"), lambda activation: activation * 2)


def test_a_patch_inside_a_checkpoint_is_refused_in_the_forward(checkpointed, vector):
    with pytest.raises(UnsupportedModelError) as caught, patched(checkpointed, DOUBLED):
        checkpointed(vector.requires_grad_())
    assert str(caught.value) == CHECKPOINT
    with pytest.raises(UnsupportedModelError, match="is patched inside torch.utils.checkpoint"):
        PatchedPolicy(checkpointed, DOUBLED)(vector.requires_grad_())


def test_a_patch_outside_of_the_checkpoint_is_right(checkpointed, vector):
    with patched(checkpointed, edit(Site("head"), lambda activation: activation * 2)):
        checkpointed(vector.requires_grad_()).square().sum().backward()
    found = checkpointed.fc1.weight.grad.clone()
    checkpointed.zero_grad()
    (2 * checkpointed(vector)).square().sum().backward()
    torch.testing.assert_close(found, checkpointed.fc1.weight.grad)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_checkpoint_without_gradients_is_patched(checkpointed, vector):
    with torch.no_grad(), patched(checkpointed, DOUBLED):
        found = checkpointed(vector)
    hidden = checkpointed.relu(checkpointed.fc1(vector)) * 2
    torch.testing.assert_close(found, checkpointed.head(checkpointed.fc2(hidden).sin()))


def test_a_forward_without_the_patch_is_not_recomputed_with_it(checkpointed, vector):
    twin = PatchedPolicy(checkpointed, DOUBLED)
    with twin.disable():
        loss = twin(vector.requires_grad_()).square().sum()
    with pytest.raises(UnsupportedModelError, match="is patched inside torch.utils.checkpoint"):
        loss.backward()
    loss = checkpointed(vector).square().sum()
    with pytest.raises(UnsupportedModelError, match="is patched inside"), patched(checkpointed, DOUBLED):
        loss.backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # where it is traced, in no_grad
def test_what_a_backward_pass_computes_anew_is_recorded_once(checkpointed, vector):
    points = hook_points(checkpointed, vector)
    with recording(points, "relu") as cache:
        checkpointed(vector.requires_grad_()).sum().backward()
    torch.testing.assert_close(cache["relu"], F.relu(checkpointed.fc1(vector)).detach())
