"""Sweeps: the numbers of the loop that they replace, whatever strategy made them fast."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from looped import ROWS, Squashed, assert_equals_the_loop, by_hand, parts, strategy_of, total
from models import Model, vectors
from torch import Tensor, nn

from chanpatch import (
    HookPoints,
    Patch,
    PatchedPolicy,
    Site,
    edit,
    errors,
    hook_points,
    mean_ablate,
    patch_in,
    patched,
    resample_ablate,
    run_with_cache,
    steer,
    tap,
    zero_ablate,
)
from chanpatch.patching import Clamp, Project, Scale, Set
from chanpatch.sweeps import SweepResult, fold, plan, sweep


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def traced(model: Model) -> tuple[HookPoints, tuple[Any, ...], Site]:
    inputs = model.inputs(ROWS)
    points = hook_points(model.module, *inputs)
    return points, inputs, points.site(model.site)


def verb(name: str, points: HookPoints, reference: Tensor) -> Callable[[Site], Patch]:
    """A patch of each kind at one channel of a site whose reference activation is given."""
    ones = [1] * reference.dim()
    verbs: dict[str, Callable[[Site], Patch]] = {
        "zero_ablate": zero_ablate,
        "mean_ablate": lambda part: mean_ablate(part, {Site(part.name): reference}),
        "resample_ablate": lambda part: resample_ablate(part, {Site(part.name): reference}, seed=3),
        "patch_in": lambda part: patch_in(part, {Site(part.name): reference}),
        "steer": lambda part: steer(part, torch.ones(ones), 2.0),
        "scale": lambda part: edit(part, Scale(0.5)),
        "clamp": lambda part: edit(part, Clamp(high=0.1)),
        "project": lambda part: edit(part, Project(torch.ones(ones))),
        "a function": lambda part: edit(part, lambda activation: activation.flip(0) + 1),
        "a mask of rows": lambda part: zero_ablate(part, where=(torch.arange(ROWS) % 2 == 0).view(-1, *ones[1:])),
        "rows of the context": lambda part: edit(
            part, Scale(2.0), where=lambda context: (context.rows % 3 == 0).view(-1, *ones[1:])
        ),
        "inputs of the context": lambda part: edit(part, lambda a, *, context: a * context.inputs[0].mean()),
    }
    return verbs[name]


VERBS = ("zero_ablate", "mean_ablate", "resample_ablate", "patch_in", "steer", "scale", "clamp", "project",
         "a function", "a mask of rows", "rows of the context", "inputs of the context")  # fmt: skip


@pytest.mark.parametrize("name", VERBS)
def test_a_sweep_equals_the_loop_for_every_model_and_verb(model: Model, name: str) -> None:
    points, inputs, site = traced(model)
    _, cache = run_with_cache(points, *model.inputs(ROWS), sites=site)
    patch = verb(name, points, cache[site])
    assert_equals_the_loop(points, inputs, {part: patch(part) for part in parts(site)})


@pytest.mark.parametrize("strategy", ["fold", "vmap", "resume", "loop"])
def test_every_strategy_equals_the_loop(plain_cnn: Model, strategy: Any) -> None:
    points, inputs, site = traced(plain_cnn)
    patches = {part: zero_ablate(part) for part in parts(site)}
    assert strategy_of(assert_equals_the_loop(points, inputs, patches, strategy=strategy)) == strategy


def test_a_sweep_of_a_model_without_a_trace_equals_the_loop(model: Model) -> None:
    patches = {factor: edit(Site(model.site), Scale(factor)) for factor in (0.0, 0.5, 2.0, -1.0)}
    assert_equals_the_loop(model.module, model.inputs(ROWS), patches)


def test_every_hook_point_of_a_model_is_swept_at_once_and_equals_the_loop(model: Model) -> None:
    inputs = model.inputs(ROWS)
    points = hook_points(model.module, *inputs)
    names = [name for name, point in points.items() if not point.read_only]
    sites = [part for name in names for part in parts(points.site(name))]
    result = assert_equals_the_loop(points, inputs, {site: edit(site, Scale(2.0)) for site in sites})
    assert [group.point for group in result.groups] == names


def swept(module: nn.Module, name: str = "first", **options: Any) -> SweepResult:
    """A sweep of the channels of a module, checked against the loop."""
    inputs = vectors(ROWS)
    points = hook_points(module.eval(), *inputs)
    patches = {site: zero_ablate(site) for site in parts(points.site(name))}
    return assert_equals_the_loop(points, inputs, patches, **options)


def test_where_the_inputs_of_a_batch_are_treated_together_the_numbers_are_still_those_of_the_loop() -> None:
    assert strategy_of(swept(Squashed(lambda hidden: hidden - hidden.mean(0)))) == "vmap"


def test_a_branch_that_depends_on_numbers_is_run_one_patch_at_a_time() -> None:
    result = swept(Squashed(lambda hidden: hidden.tanh() if hidden.sum() > 0 else -hidden))
    assert strategy_of(result) == "resume"
    assert "vmap: " in result.groups[0].why


class Whisper(nn.Module):
    """Passes sums to a later module through an attribute instead of the output, and removes each sum after use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.sums = nn.Linear(6, 8), nn.Linear(8, 4), []

        class Ear(nn.Module):
            def forward(ear, vector: Tensor) -> Tensor:
                self.sums.append(vector.sum(1, keepdim=True))
                return vector.clone()

        self.ear = Ear()

    def forward(self, vector: Tensor) -> Tensor:
        output = self.last(self.first(self.ear(vector)))
        return output + (self.sums.pop() if self.sums else 0)


@pytest.fixture
def skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the prefix and fold even in a model so small that this saves no time."""
    monkeypatch.setattr(plan, "_OPERATIONS", -1)
    monkeypatch.setattr(fold, "_GAIN", np.inf)


@pytest.mark.usefixtures("skipping")
def test_a_fast_strategy_with_other_numbers_than_the_loop_is_not_taken_and_the_result_says_so() -> None:
    result = swept(Whisper())
    assert strategy_of(result) == "loop"
    assert "differ from the loop's" in result.groups[0].why


@pytest.mark.parametrize("strategy", ["fold", "vmap", "resume"])
def test_a_strategy_that_was_asked_for_and_is_wrong_is_an_error(strategy: Any) -> None:
    with pytest.raises(errors.SweepError, match=f"strategy='{strategy}' does not work at 'first'.*strategy='auto'"):
        swept(Whisper(), strategy=strategy)


def test_an_unknown_strategy_is_an_error_at_once() -> None:
    with pytest.raises(errors.SweepError, match="'auto', 'fold', 'vmap', 'resume' or 'loop'"):
        swept(Squashed(), strategy="fast")


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.BatchNorm1d(8)])
def test_in_train_mode_the_loop_is_taken_and_the_result_says_why(module: nn.Module) -> None:
    model = Squashed(module).train()
    inputs = vectors(ROWS)
    points = hook_points(model, *inputs)
    before = [buffer.clone() for buffer in model.buffers()]
    result = sweep(points, *inputs, patches=[zero_ablate(s) for s in parts(points.site("first"))], metric=total)
    assert strategy_of(result) == "loop"
    assert f"'between' ({type(module).__name__}) in training mode" in result.groups[0].why
    assert all(map(torch.equal, before, model.buffers()))
    state = torch.get_rng_state()
    for row, patches in zip(result.values["total"], result.patches, strict=True):
        torch.set_rng_state(state)
        with torch.no_grad(), patched(points, patches):
            np.testing.assert_allclose(row, total(model(*inputs)), rtol=1e-6, atol=1e-6)


def test_what_an_edit_draws_is_the_same_for_every_patch_and_strategy(plain_cnn: Model) -> None:
    points, inputs, site = traced(plain_cnn)
    patches = [edit(part, lambda activation: torch.rand_like(activation)) for part in parts(site)]
    state = torch.get_rng_state()
    results = [sweep(points, *inputs, patches=patches, metric=total, strategy=each) for each in STRATEGIES]
    assert torch.equal(torch.get_rng_state(), state)
    for result in results:
        np.testing.assert_allclose(result.values["total"], results[0].values["total"], rtol=1e-6, atol=1e-6)


STRATEGIES: tuple[Any, ...] = ("loop", "resume", "vmap")


@pytest.mark.parametrize("seed", range(4))
def test_how_patches_are_cut_into_chunks_changes_nothing(model: Model, seed: int) -> None:
    points, inputs, site = traced(model)
    _, cache = run_with_cache(points, *model.inputs(ROWS), sites=site)
    patches = {part: resample_ablate(part, cache, seed=seed) for part in parts(site)}
    assert_equals_the_loop(points, inputs, patches, max_bytes=int(np.random.default_rng(seed).integers(1, 2**17)))


def chunks_at(module: nn.Module) -> list[tuple[int, int]]:
    """How many patches, and how many bytes, a module is given in each forward of many patches, from now on."""
    chunks: list[tuple[int, int]] = []

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        functorch: Any = torch._C._functorch
        if functorch.is_batchedtensor(inputs[0]):
            stack = functorch.get_unwrapped(inputs[0])
            chunks.append((stack.shape[functorch.maybe_get_bdim(inputs[0])], stack.nbytes))

    module.register_forward_pre_hook(note)
    return chunks


def test_no_chunk_takes_more_than_max_bytes(plain_cnn: Model) -> None:
    points, inputs, site = traced(plain_cnn)
    chunks = chunks_at(plain_cnn.module.get_submodule("conv2"))
    assert_equals_the_loop(
        points, inputs, {part: zero_ablate(part) for part in parts(site)}, max_bytes=2**18, strategy="vmap"
    )
    assert len(chunks) > 1
    assert max(nbytes for _, nbytes in chunks) <= 2**18


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sweep_leaves_no_activation_to_the_garbage_collector(plain_cnn: Model, strategy: Any) -> None:
    points, inputs, site = traced(plain_cnn)
    patches = [zero_ablate(part) for part in parts(site)]
    sweep(points, *inputs, patches=patches, metric=total, strategy=strategy)  # torch imports parts of its own here
    gc.collect()
    gc.disable()
    try:
        before = {id(each) for each in gc.get_objects() if type(each) is Tensor}
        sweep(points, *inputs, patches=patches, metric=total, strategy=strategy)
        left = [each for each in gc.get_objects() if type(each) is Tensor and id(each) not in before]
    finally:
        gc.enable()
    assert not left


@pytest.mark.usefixtures("skipping")
def test_what_comes_before_a_patch_runs_once_and_in_the_checks_on_single_rows() -> None:
    calls = []
    model = Squashed()
    first = model.first.forward
    model.first.forward = lambda vector: (calls.append(len(vector)), first(vector))[1]  # type: ignore[method-assign]
    points = hook_points(model.eval(), *vectors(ROWS))
    calls.clear()
    result = sweep(points, *vectors(ROWS), patches=[zero_ablate(s) for s in parts(points.site("second"))], metric=total)
    assert strategy_of(result) == "fold"
    assert calls == [ROWS, 1, 1, 3]  # the last check has a block of other values before and after the row


def test_hooks_of_others_run_in_every_forward(plain_cnn: Model) -> None:
    handle = plain_cnn.module.conv1.register_forward_hook(lambda module, args, output: output * 2)
    points, inputs, _ = traced(plain_cnn)
    assert_equals_the_loop(points, inputs, {s: zero_ablate(s) for s in parts(points.site("relu2"))})
    assert list(plain_cnn.module.conv1._forward_hooks) == [handle.id]


def test_what_a_model_writes_in_place_is_not_taken_for_what_was_there_before() -> None:
    class WritesInPlace(Squashed):
        def forward(self, vector: Tensor) -> Tensor:
            vector.clamp_(min=0)
            hidden = self.first(vector)
            hidden.add_(1)
            kept = self.second(hidden)
            return self.last(kept.relu_() + hidden)

    assert strategy_of(swept(WritesInPlace(), "second")) == "fold"


def test_a_branch_that_is_written_into_after_the_patch_is_handed_out_anew_each_time() -> None:
    class Branch(Squashed):
        def __init__(self) -> None:
            super().__init__()
            self.elu = nn.ELU(inplace=True)

        def forward(self, vector: Tensor) -> Tensor:
            stem = self.first(vector)
            hidden = self.second(vector[:, :1].expand(-1, 8))
            return self.last(hidden + self.elu(stem))

    assert strategy_of(swept(Branch(), "second")) == "fold"
    assert strategy_of(swept(Branch(), "second", strategy="resume")) == "resume"


def test_taps_are_swept_by_the_index_of_their_call() -> None:
    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, vector: Tensor) -> Tensor:
            return tap("hidden", self.fc(vector).tanh())

    model = nn.Sequential(block := Tapped(), nn.Linear(6, 6), block, nn.Linear(6, 4))
    assert strategy_of(swept(model, "hidden#1")) == "fold"
    assert strategy_of(swept(model, "hidden#0")) == "fold"


def test_inputs_are_swept(plain_cnn: Model) -> None:
    points, inputs, _ = traced(plain_cnn)
    for name in (".in[0]", "conv2.in[0]"):
        assert_equals_the_loop(points, inputs, {s: zero_ablate(s) for s in parts(points.site(name))})


def test_patches_that_do_the_same_later_share_a_forward(plain_cnn: Model) -> None:
    points, inputs, _ = traced(plain_cnn)
    freeze = [
        steer(points.site("conv2", channel=3), torch.ones(1, 1, 1, 1)),
        edit(points.site("relu2"), lambda a: a + 1),
    ]
    patches = {s: [zero_ablate(s), *freeze] for s in parts(points.site("relu1"))}
    result = assert_equals_the_loop(points, inputs, patches)
    assert [(group.point, group.strategy) for group in result.groups] == [("relu1", "fold")]


def test_patches_that_do_something_else_later_share_a_fold_but_not_a_vmap(plain_cnn: Model) -> None:
    points, inputs, _ = traced(plain_cnn)
    pairs = zip(parts(points.site("relu1")), parts(points.site("conv2")), strict=True)
    patches: dict[Any, Any] = {str(one): [zero_ablate(other), zero_ablate(one)] for other, one in pairs}
    for strategy in ("fold", "resume"):
        assert strategy_of(assert_equals_the_loop(points, inputs, patches, strategy=strategy)) == strategy
    with pytest.raises(
        errors.SweepError, match="strategy='vmap' does not work at 'relu1': vmap: patches are at several hook points"
    ):
        sweep(points, *inputs, patches=patches, metric=total, strategy="vmap")


def test_custom_functions_at_several_hook_points_are_run_one_patch_at_a_time(plain_cnn: Model) -> None:
    points, inputs, _ = traced(plain_cnn)
    passed: list[Tensor] = []  # from an edit to a later one under the same label

    def early(activation: Tensor) -> Tensor:
        passed.append(activation.sum())
        return activation * 0

    def late(activation: Tensor) -> Tensor:
        return activation + passed.pop()

    pairs = zip(parts(points.site("relu1")), parts(points.site("conv2")), strict=True)
    patches = {str(one): [edit(other, early), edit(one, late)] for other, one in pairs}
    assert strategy_of(assert_equals_the_loop(points, inputs, patches)) == "resume"


@pytest.mark.parametrize(
    ("strategy", "late"),
    [("vmap", False), *((each, late) for each in ("fold", "resume", "loop") for late in (False, True))],
)
def test_nan_that_one_patch_brings_into_a_forward_of_many_is_an_error(
    plain_cnn: Model, late: bool, strategy: Any
) -> None:
    points, inputs, _ = traced(plain_cnn)
    ablations = [zero_ablate(site) for site in parts(points.site("relu1"))]
    patches: dict[Any, Any] = {number: [patch] for number, patch in enumerate(ablations)}
    if late:
        nan = edit(points.site("conv2", channel=5), lambda region: torch.where(region.abs() > 99, torch.nan, region))
        ablations[5] = steer(points.site("relu1", channel=5), torch.full((1, 1, 1, 1), 1e4))
        patches = {number: [patch, nan] for number, patch in enumerate(ablations)}
    else:
        patches[5].append(Patch(points.site("relu1", channel=5), Set(float("nan"))))
    with pytest.raises(errors.NaNError, match=rf"5: Patch\(Site\('{'conv2' if late else 'relu1'}', channel=5\)"):
        sweep(points, *inputs, patches=patches, metric=total, strategy=strategy)


def test_several_patches_at_one_hook_point_are_applied_in_their_order(shared_module: Model) -> None:
    points, inputs, _ = traced(shared_module)
    patches = {
        s: [
            edit(s, Scale(3.0)),
            steer(points.site("relu#0"), torch.ones(1, 1)),
            zero_ablate(points.site("relu#1", feature=0)),
        ]
        for s in parts(points.site("relu#0"))
    }
    assert strategy_of(assert_equals_the_loop(points, inputs, patches)) == "fold"


def test_a_sweep_inside_patched_keeps_the_outer_patches(plain_cnn: Model) -> None:
    points, inputs, site = traced(plain_cnn)
    with patched(points, [zero_ablate(points.site("conv1", channel=2)), edit(points.site("conv2"), Scale(2.0))]):
        assert_equals_the_loop(points, inputs, {part: zero_ablate(part) for part in parts(site)})


def test_a_twin_is_swept_with_its_own_patches(tuple_output: Model) -> None:
    inputs = tuple_output.inputs(ROWS)
    twin = PatchedPolicy(tuple_output.module, zero_ablate(Site("body", feature=1)))
    points = hook_points(twin, *inputs)
    assert_equals_the_loop(points, inputs, {s: zero_ablate(s) for s in parts(points.site("policy_head"))})


def test_a_policy_of_stable_baselines_is_swept_by_the_method_that_was_traced() -> None:
    from gymnasium import spaces
    from stable_baselines3.common import policies as sb3

    policy = sb3.ActorCriticPolicy(spaces.Box(-1, 1, (6,)), spaces.Discrete(4), lambda progress: 1e-3).eval()
    points = hook_points(policy, *vectors(ROWS), method="get_distribution")
    patches = {s: zero_ablate(s) for s in parts(points.site("mlp_extractor.policy_net.0"))}
    inputs = vectors(ROWS)
    result = sweep(points, *inputs, patches=patches, metric=lambda found: found.distribution.logits[:, 0])
    for row, patch in zip(result.values["metric"], patches.values(), strict=True):
        with torch.no_grad(), patched(points, patch):
            np.testing.assert_allclose(row, policy.get_distribution(*inputs).distribution.logits[:, 0], rtol=1e-6)


def test_keyword_inputs_are_swept() -> None:
    class Keyword(Squashed):
        def forward(self, *, vector: Tensor, factor: float) -> Tensor:
            return super().forward(vector) * factor

    model = Keyword().eval()
    (vector,) = vectors(ROWS)
    patches = [zero_ablate(Site("first", feature=number)) for number in range(8)]
    result = sweep(model, vector=vector, factor=3.0, patches=patches, metric=total)
    with torch.no_grad(), patched(model, patches[5]):
        np.testing.assert_allclose(result.values["total"][5], total(model(vector=vector, factor=3.0)), rtol=1e-6)


def test_a_model_that_draws_in_its_forward_draws_the_same_for_every_patch() -> None:
    class Noise(nn.Module):
        def forward(self, vector: Tensor) -> Tensor:
            return vector + torch.rand_like(vector)

    class Noisy(Squashed):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = Noise(), Noise()

        def forward(self, vector: Tensor) -> Tensor:
            return self.last(self.late(self.second(self.early(self.first(vector)))))

    model = Noisy().eval()
    inputs = vectors(ROWS)
    points = hook_points(model, *inputs)
    for name in ("first", "second"):  # before the first draw, and between the two
        patches = [zero_ablate(site) for site in parts(points.site(name))]
        result = sweep(points, *inputs, patches=patches, metric=total)
        assert strategy_of(result) == "resume"
        state = torch.get_rng_state()
        for row, patch in zip(result.values["total"], patches, strict=True):
            torch.set_rng_state(state)
            with torch.no_grad(), patched(points, patch):
                np.testing.assert_allclose(row, total(model(*inputs)), rtol=1e-6, atol=1e-6)
        torch.set_rng_state(state)


def test_a_sparse_input_that_cannot_be_split_into_rows_is_passed_whole() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
            return self.last(torch.sparse.mm(edges, self.first(nodes)).relu())

    inputs = torch.randn(ROWS, 6), (torch.rand(ROWS, ROWS) > 0.6).float().to_sparse()
    points = hook_points(Graph(), *inputs)
    assert_equals_the_loop(points, inputs, {n: zero_ablate(points.site("first", feature=n)) for n in range(8)})


def test_a_sweep_in_inference_mode_equals_the_loop(inplace_relu: Model) -> None:
    with torch.inference_mode():
        points, inputs, site = traced(inplace_relu)
        assert strategy_of(assert_equals_the_loop(points, inputs, {s: zero_ablate(s) for s in parts(site)})) == "fold"


def test_a_transformer_is_swept_for_many_patches_at_a_time() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)).eval()
    inputs = (torch.randn(ROWS, 5, 8),)
    points = hook_points(model, *inputs)
    for name in ("0.layers.0.linear1", "0.layers.0"):
        result = assert_equals_the_loop(points, inputs, {s: zero_ablate(s) for s in parts(points.site(name))})
        assert strategy_of(result) == "fold"


def test_an_output_that_hides_tensors_is_not_rebuilt_from_the_unpatched_one() -> None:
    class Hidden:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    class Hiding(Squashed):
        def forward(self, vector: Tensor) -> Any:
            output = super().forward(vector)
            return output.argmax(1), Hidden(output)

    model = Hiding().eval()
    inputs = vectors(ROWS)
    points = hook_points(model, *inputs)
    patches = {site: zero_ablate(site) for site in parts(points.site("second"))}
    result = sweep(points, *inputs, patches=patches, metric=lambda output: output[1].tensor[:, 0])
    expected = by_hand(points, inputs, patches, lambda output: output[1].tensor[:, 0])
    np.testing.assert_allclose(result.values["metric"], expected, rtol=1e-6)
    assert strategy_of(result) == "resume"
    assert "the output contains a Hidden" in result.groups[0].why


@pytest.mark.usefixtures("skipping")
def test_a_forbidden_action_does_not_hide_that_a_fast_strategy_is_wrong() -> None:
    class Masked(Whisper):
        def forward(self, vector: Tensor) -> Tensor:
            return super().forward(vector).masked_fill(torch.tensor([False, False, False, True]), -1e8)

    inputs = vectors(ROWS)
    points = hook_points(Masked().eval(), *inputs)
    patches = {site: zero_ablate(site) for site in parts(points.site("first"))}

    def allowed(output: Tensor) -> Tensor:
        return output[:, :3].sum(1)

    result = sweep(points, *inputs, patches=patches, metric=allowed)
    assert strategy_of(result) == "loop"
    np.testing.assert_allclose(result.values["allowed"], by_hand(points, inputs, patches, allowed), rtol=1e-6)


def test_rounding_does_not_make_a_sweep_of_one_input_loop() -> None:
    inputs = vectors(1)
    points = hook_points(nn.Sequential(nn.Linear(6, 64), nn.Linear(64, 64), nn.Linear(64, 4)).eval(), *inputs)
    result = assert_equals_the_loop(points, inputs, {site: zero_ablate(site) for site in parts(points.site("0"))})
    assert strategy_of(result) == "fold"


def test_a_model_that_leaves_inference_tensors_is_swept_and_equals_the_loop() -> None:
    class Inside(Squashed):
        @torch.inference_mode()
        def forward(self, vector: Tensor) -> Tensor:
            return super().forward(vector)

    swept(Inside(), "second")


def test_what_a_model_keeps_as_an_attribute_can_be_read_after_a_sweep() -> None:
    class Keeping(Squashed):
        def forward(self, vector: Tensor) -> Tensor:
            self.kept = self.second(torch.relu(self.first(vector)))
            return self.last(self.kept)

    model, inputs = Keeping().eval(), vectors(ROWS)
    model(*inputs)
    kept = model.kept.tolist()
    points = hook_points(model, *inputs)
    patches = [zero_ablate(site) for site in parts(points.site("second"))]
    for strategy in ("fold", "vmap"):
        sweep(points, *inputs, patches=patches, metric=total, max_bytes=2**12, strategy=strategy)  # in several chunks
        assert model.kept.tolist() == kept


def test_hooks_of_others_on_every_module_run_in_every_forward_that_is_resumed() -> None:
    counted: list[type] = []
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    inputs = vectors(ROWS)
    points = hook_points(model, *inputs)
    patches = [zero_ablate(site) for site in parts(points.site("1"))]
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: counted.append(type(module)))
    try:
        sweep(points, *inputs, patches=patches, metric=total, strategy="resume")
    finally:
        handle.remove()
    assert counted.count(nn.ReLU) * 2 == counted.count(nn.Sequential) > 2 * len(patches)


def test_inputs_without_rows_are_swept_for_a_metric_that_is_one_number(plain_cnn: Model) -> None:
    points, (image,), site = traced(plain_cnn)
    patches = [zero_ablate(part) for part in parts(site)]
    result = sweep(points, image[:0], patches=patches, metric=lambda output: output.sum())
    assert not result.values["metric"].any()


def test_under_autocast_a_sweep_equals_the_loop() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inputs = vectors(ROWS)
        points = hook_points(Squashed().eval(), *inputs)
        patches = {site: zero_ablate(site) for site in parts(points.site("second"))}
        result = sweep(points, *inputs, patches=patches, metric=total)
        np.testing.assert_allclose(result.values["total"], by_hand(points, inputs, patches), atol=0.02)


class Modulated(nn.Module):
    """Takes factors from what an earlier module left on itself, which is a forward of its own to compute."""

    def __init__(self, leave: Callable[[nn.Module, Tensor], None], take: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last, self.take = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4), take

        class Factors(nn.Module):
            def __init__(inner) -> None:
                super().__init__()
                inner.linear, inner.kept = nn.Linear(6, 8), {}

            def forward(inner, vector: Tensor) -> Tensor:
                leave(inner, inner.linear(vector))
                return vector.clone()

        self.factors = Factors()

    def forward(self, vector: Tensor) -> Tensor:
        hidden = self.second(self.first(self.factors(vector)).relu())
        return self.last(hidden * self.take(self.factors))


KEPT: dict[str, Any] = {
    "a tensor": (lambda module, factors: setattr(module, "found", factors), lambda module: module.found),
    "a list": (lambda module, factors: setattr(module, "found", [factors]), lambda module: module.found[0]),
    "a dict": (lambda module, factors: module.kept.update(found=factors), lambda module: module.kept["found"]),
    "a dict in a dict": (
        lambda module, factors: module.kept.setdefault("inner", {}).update(found=factors),
        lambda module: module.kept["inner"]["found"],
    ),
}


@pytest.mark.usefixtures("skipping")
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("strategy", ["auto", "vmap", "resume"])
def test_what_an_early_module_leaves_on_itself_is_there_for_every_chunk(kept: str, strategy: Any) -> None:
    result = swept(Modulated(*KEPT[kept]), "second", strategy=strategy, max_bytes=6 * ROWS * 8 * 4 * 2)
    assert strategy_of(result) == ("vmap" if strategy == "auto" else strategy)


@pytest.mark.usefixtures("skipping")
def test_what_an_early_patch_leaves_on_a_module_is_not_read_after_a_later_patch() -> None:
    model, inputs = Modulated(*KEPT["a tensor"]).eval(), vectors(ROWS)
    points = hook_points(model, *inputs)
    middle = (torch.arange(ROWS) % 5 == 2).view(-1, 1)  # neither the first nor the last row
    patches = {
        site: [zero_ablate(site, where=middle)]
        for name in ("factors.linear", "first", "second")
        for site in parts(points.site(name))
    }
    assert_equals_the_loop(points, inputs, patches)
    assert_equals_the_loop(points, inputs, {name: zero_ablate(points.site(name), where=middle) for name in points})


@pytest.mark.usefixtures("skipping")
def test_what_is_left_where_it_cannot_be_put_back_is_noticed() -> None:
    elsewhere: dict[str, Tensor] = {}
    model = Modulated(lambda module, factors: elsewhere.update(found=factors), lambda module: elsewhere["found"])
    result = swept(model, "second", max_bytes=6 * ROWS * 8 * 4 * 2)
    assert strategy_of(result) != "vmap"
    assert "vmap: the results for the patch" in result.groups[0].why


@pytest.mark.parametrize("strategy", ["auto", "resume"])
@pytest.mark.parametrize("writes", [Tensor.relu_, nn.ReLU(inplace=True)], ids=["a function", "a module"])
def test_an_edit_that_returns_its_region_leaves_the_tensor_that_is_written_into_later(
    strategy: Any, writes: Any
) -> None:
    class Aliased(Squashed):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Identity()
            self.writes = writes

        def forward(self, vector: Tensor) -> Tensor:
            hidden = self.first(vector)
            self.writes(self.same(hidden))
            return self.last(hidden)

    inputs = vectors(ROWS)
    points = hook_points(Aliased().eval(), *inputs)
    patches = {
        number: edit(site, (lambda activation: activation) if number == 3 else (lambda activation: activation * 0 + 5))
        for number, site in enumerate(parts(points.site("same")))
    }
    assert strategy_of(assert_equals_the_loop(points, inputs, patches, strategy=strategy)) == "resume"


@pytest.mark.parametrize("names", [("1", "1.out"), ("1", "3"), ("1.in[0]", "3.in[0]")])
def test_patches_under_two_names_of_one_place_are_applied_in_their_order(names: tuple[str, str]) -> None:
    class Tied(nn.Sequential):
        def forward(self, vector: Tensor) -> Tensor:
            return self[2](self[1](self[0](vector)))

    model = Tied(nn.Linear(6, 8), relu := nn.ReLU(), nn.Linear(8, 4), relu).eval()
    zero, steered = edit(Site(names[0]), lambda activation: activation * 0), steer(Site(names[1]), torch.ones(1, 8))
    later = zero_ablate(Site("2", feature=0))
    patches = {number: [zero, steered, later] if number % 2 else [steered, zero, later] for number in range(6)}
    assert strategy_of(assert_equals_the_loop(model, vectors(ROWS), patches)) == "fold"


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64])
@pytest.mark.parametrize("strategy", ["vmap", "resume", "loop"])
def test_an_output_may_hold_tensors_of_any_dtype(dtype: torch.dtype, strategy: Any) -> None:
    class Several(Squashed):
        def forward(self, vector: Tensor) -> Any:
            output = super().forward(vector)
            return {"logits": output, "other": output.mul(9).to(dtype)}

    model, inputs = Several().eval(), vectors(ROWS)
    points = hook_points(model, *inputs)
    patches = {site: zero_ablate(site) for site in parts(points.site("second"))}

    def both(output: Any) -> Tensor:
        return output["logits"].sum(1) + output["other"].abs().sum(1) if dtype.is_complex else total(output)

    result = sweep(points, *inputs, patches=patches, metric=both, strategy=strategy)
    np.testing.assert_allclose(result.values["both"], by_hand(points, inputs, patches, both), rtol=1e-6)
    assert strategy_of(result) == strategy


@pytest.mark.usefixtures("skipping")
def test_one_patch_at_each_hook_point_does_not_run_anew_what_comes_before() -> None:
    calls = []
    model, inputs = Squashed(), vectors(ROWS)
    points = hook_points(model.eval(), *inputs)
    first = model.first.forward
    model.first.forward = lambda vector: (calls.append(len(vector)), first(vector))[1]  # type: ignore[method-assign]
    patches = {name: zero_ablate(points.site(name)) for name in ("second.in[0]", "second", "last.in[0]", "last")}
    result = assert_equals_the_loop(points, inputs, patches)
    assert [(group.point, group.strategy) for group in result.groups] == [(name, "fold") for name in patches]
    assert calls == [ROWS, 1, 1, 3, *[ROWS] * len(patches)]  # the last ones are those by hand


def test_one_patch_that_is_made_for_the_whole_batch_loops() -> None:
    inputs = vectors(ROWS)
    points = hook_points(Squashed().eval(), *inputs)
    patches = {name: patch_in(points.site(name), torch.randn(ROWS, 8)) for name in ("first", "second")}
    assert strategy_of(assert_equals_the_loop(points, inputs, patches)) == "loop"


def test_every_hook_point_of_a_transformer_is_swept_for_many_patches_at_a_time() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)).eval()
    inputs = (torch.randn(ROWS, 5, 8),)
    points = hook_points(model, *inputs)
    assert torch.backends.mha.get_fastpath_enabled()
    sites = [part for name in points for part in parts(points.site(name))]
    assert strategy_of(assert_equals_the_loop(points, inputs, {site: zero_ablate(site) for site in sites})) == "fold"
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("strategy", ["auto", "resume"])
def test_a_list_that_a_module_returns_and_its_caller_changes_is_handed_out_anew_each_time(strategy: Any) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, vector: Tensor) -> dict[str, list[Tensor]]:
            hidden = self.first(vector).relu()
            return {"skips": [hidden, self.second(hidden).relu()]}

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.middle, self.up, self.last = (
                Encoder(),
                nn.Linear(8, 8),
                nn.Linear(16, 8),
                nn.Linear(16, 4),
            )

        def forward(self, vector: Tensor) -> Tensor:
            skips = self.encoder(vector).pop("skips")
            hidden = self.middle(skips[-1]).relu()
            hidden = self.up(torch.cat([hidden, skips.pop()], 1)).relu()
            return self.last(torch.cat([hidden, skips.pop()], 1))

    assert strategy_of(swept(UNet(), "middle", strategy=strategy)) == ("fold" if strategy == "auto" else strategy)


def test_the_scores_of_attention_count_for_max_bytes() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, sequence: Tensor) -> Tensor:
            hidden = self.first(sequence).unsqueeze(1)
            return self.last(nn.functional.scaled_dot_product_attention(hidden, hidden, hidden)[:, 0].mean(1))

    inputs = (torch.randn(2, 64, 6),)
    model = Attention().eval()
    points, chunks = hook_points(model, *inputs), chunks_at(model.last)
    scores = 2 * 64 * 64 * 4
    patches = {site: zero_ablate(site) for site in parts(points.site("first"))}
    assert_equals_the_loop(points, inputs, patches, max_bytes=3 * 6 * scores, strategy="vmap")
    assert [count for count, _ in chunks] == [3, 3, 2]


class Noted(nn.Module):
    """Keeps something on itself at each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        self.hidden = torch.zeros(1, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.first(x).relu()
        return self.second(self.hidden)


@pytest.mark.parametrize("strategy", ["auto", "resume", "loop"])
def test_a_metric_that_reads_what_a_forward_left_on_a_module_is_refused(strategy: Any) -> None:
    model = Noted()
    points = hook_points(model, *vectors(ROWS))
    inputs = vectors(ROWS)
    model(*inputs)
    patches = [zero_ablate(site) for site in points.site("first").split("feature")]
    for metric in (lambda output: model.hidden.sum(1), lambda output: model.hidden[:, 0]):
        with pytest.raises(
            errors.MetricError, match=r"A metric appears to read attributes of the model \('hidden'\), not"
        ):
            sweep(points, *inputs, patches=patches, metric=metric, strategy=strategy)
    held = model.hidden
    sweep(points, *inputs, patches=patches, metric=lambda output: model.second.weight.sum() * output[:, 0])
    assert model.hidden is held


def test_inputs_without_rows_are_refused(plain_cnn: Model) -> None:
    points, (images,), site = traced(plain_cnn)
    with pytest.raises(errors.MetricError, match="returned no numbers. Pass at least one input"):
        sweep(points, images[:0], patches=zero_ablate(site), metric=lambda output: output[:, 0])


class Pooled(nn.Module):
    """Sums nodes by the graph that each belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, nodes: Tensor, graph: Tensor) -> Tensor:
        hidden = self.layer(nodes).relu()
        pooled: Tensor = self.head(hidden.new_zeros(int(graph.max()) + 1, 8).index_add(0, graph, hidden))
        return pooled


def test_where_the_rows_of_the_output_are_not_the_inputs_a_metric_returns_one_number_per_output() -> None:
    inputs = torch.randn(12, 4), torch.arange(12) // 4
    points = hook_points(Pooled().eval(), *inputs)
    patches = {site: zero_ablate(site) for site in points.site("layer").split("feature")}
    assert assert_equals_the_loop(points, inputs, patches).values["total"].shape == (8, 3)
