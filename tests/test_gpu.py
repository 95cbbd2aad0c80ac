"""On a GPU, where there is one: the CPU's numbers to rounding, and everything put back that a GPU has of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from measured import measured, metric
from models import MODELS, build
from torch import Tensor, nn
from torch.distributions import Categorical

from chanpatch import (
    PatchedPolicy,
    edit,
    hook_points,
    paired_rollouts,
    patch_in,
    patched,
    run_with_cache,
    sweep,
    zero_ablate,
)
from chanpatch.errors import EditError, NaNError, SweepError
from chanpatch.saving import load, save, verify

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

ROWS = 12
STRATEGIES: Any = ["auto", "vmap", "resume", "loop"]


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Compute in full float32, and seeded."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cudnn.allow_tf32 = before


def on_gpu(name: str) -> tuple[nn.Module, tuple[Tensor, ...], str]:
    module, inputs, site = build(name)
    return module.cuda(), tuple(each.cuda() for each in inputs(ROWS)), site


@pytest.mark.parametrize("name", MODELS)
def test_every_function_gives_the_cpus_numbers(name: str) -> None:
    module, inputs, site = build(name)
    given = inputs(4)
    expected = measured(module, given, site)
    found = measured(copy.deepcopy(module).cuda(), tuple(each.cuda() for each in given), site)
    assert all(found[what].is_cuda for what in ("record", "sum", "zero", "zero, twin", "patch in"))
    for what, tensor in expected.items():
        torch.testing.assert_close(found[what].cpu(), tensor, rtol=1e-4, atol=1e-5, msg=what)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_every_strategy_of_a_sweep_gives_the_numbers_of_the_loop(name: str, strategy: Any) -> None:
    module, inputs, site = on_gpu(name)
    points = hook_points(module, *inputs)
    axis = next(axis for axis in points[site].axes if axis in ("channel", "feature"))
    patches = [zero_ablate(part) for part in points.site(site).split(axis)]
    try:
        found = sweep(points, *inputs, patches=patches, metric=metric, strategy=strategy)
    except SweepError as refused:  # torch's LSTM may have no rule for many at a time; the others have
        assert (name, strategy) == ("lstm_policy", "vmap") and "vmap" in str(refused)
        return
    for patch, values in zip(patches, found.values["metric"], strict=True):
        with torch.no_grad(), patched(points, patch):
            expected = metric(module(*inputs)).cpu()
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_an_edit_draws_is_the_same_for_every_patch_and_strategy(strategy: Any) -> None:
    module, inputs, site = on_gpu("plain_cnn")
    points = hook_points(module, *inputs)
    patches = [edit(part, lambda a: a + torch.randn_like(a)) for part in points.site(site).split("channel")]
    before = torch.cuda.get_rng_state()
    values = sweep(points, *inputs, patches=patches, metric=metric, strategy=strategy).values["metric"]
    assert torch.equal(torch.cuda.get_rng_state(), before)
    for patch, row in zip(patches, values, strict=True):
        torch.cuda.set_rng_state(before)
        with torch.no_grad(), patched(points, patch):
            np.testing.assert_allclose(row, metric(module(*inputs)).cpu(), rtol=1e-4, atol=1e-5)


def test_dropout_draws_the_same_for_every_patch_and_nothing_is_left_of_it() -> None:
    module = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 3)).cuda()
    vectors = torch.randn(ROWS, 6, device="cuda")
    points = hook_points(module, vectors)
    before = torch.cuda.get_rng_state()
    found = sweep(points, vectors, patches=[zero_ablate(s) for s in points.site("0").split("feature")], metric=metric)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert {group.strategy for group in found.groups} == {"loop"}
    expected = module(vectors)[:, 0].detach().cpu()
    np.testing.assert_allclose(found.baseline["metric"], expected, rtol=1e-5)


def test_a_module_that_draws_is_not_answered_from_memory() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    module = nn.Sequential(Noisy(), nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).cuda()
    vectors = torch.randn(ROWS, 6, device="cuda")
    points = hook_points(module, vectors)
    before = torch.cuda.get_rng_state()
    patches = [zero_ablate(part) for part in points.site("2").split("feature")]
    found = sweep(points, vectors, patches=patches, metric=metric).values["metric"]
    for patch, row in zip(patches, found, strict=True):
        torch.cuda.set_rng_state(before)
        with torch.no_grad(), patched(points, patch):
            np.testing.assert_allclose(row, metric(module(vectors)).cpu(), rtol=1e-4, atol=1e-5)


def test_no_chunk_takes_much_more_than_max_bytes() -> None:
    module = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
    module.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).cuda().eval()
    images = torch.randn(16, 3, 64, 64, device="cuda")
    points = hook_points(module, images)
    patches = [zero_ablate(part) for part in points.site("1").split("channel")]
    peaks = {}
    for strategy in ("loop", "vmap"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        sweep(points, images, patches=patches, metric=metric, strategy=strategy, max_bytes=2**29)
        peaks[strategy] = torch.cuda.max_memory_allocated() - start
    assert peaks["vmap"] < peaks["loop"] + 1.25 * 2**29


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_a_sweep_equals_the_loop(dtype: torch.dtype) -> None:
    module, inputs, site = on_gpu("plain_cnn")
    with torch.autocast("cuda", dtype=dtype):
        points = hook_points(module, *inputs)
        patches = [zero_ablate(part) for part in points.site(site).split("channel")]
        found = sweep(points, *inputs, patches=patches, metric=lambda output: output[:, 0].float())
        assert points[site].dtype == dtype
        for patch, values in zip(patches, found.values["metric"], strict=True):
            with torch.no_grad(), patched(points, patch):
                np.testing.assert_allclose(values, module(*inputs)[:, 0].float().cpu(), rtol=1e-2, atol=1e-3)


def test_nan_that_a_patch_brings_in_is_an_error_at_the_end_of_the_context() -> None:
    module, inputs, site = on_gpu("plain_cnn")
    points = hook_points(module, *inputs)
    with pytest.raises(NaNError, match="relu1"), patched(points, edit(points.site(site), lambda a: a / 0 * 0)):
        module(*inputs)


def test_an_operand_on_the_cpu_is_refused_with_what_to_type() -> None:
    module, inputs, site = on_gpu("plain_cnn")
    points = hook_points(module, *inputs)
    with pytest.raises(EditError, match=r"on cpu, but the region is torch\.float32 on cuda:0.*value\.to\('cuda:0'"):
        with patched(points, patch_in(points.site(site), torch.zeros(ROWS, *points[site].shape))):
            module(*inputs)


def test_a_record_goes_to_the_cpu_where_that_is_asked_for() -> None:
    module, inputs, site = on_gpu("plain_cnn")
    _, cache = run_with_cache(module, *inputs, sites=[site], device="cpu")
    assert not cache[site].is_cuda


def test_saved_patches_are_replayed_bit_for_bit(tmp_path: Path) -> None:
    module, inputs, site = on_gpu("plain_cnn")
    points = hook_points(module, *inputs)
    _, cache = run_with_cache(points, *inputs, sites=[site])
    file = tmp_path / "patches.safetensors"
    save(file, [patch_in(points.site(site), cache[site].flip(0))], points, inputs=inputs)
    (patch,) = load(file, points)
    verify(file, points, inputs)
    with patched(points, patch):
        assert module(*inputs).is_cuda


def test_rollouts_pair_a_policy_on_a_gpu_with_its_ablation() -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))

        def forward(self, observations: Tensor) -> Categorical:
            return Categorical(logits=self.layers(observations))

    def returns(policy: nn.Module, device: str) -> Any:
        points = hook_points(policy, torch.zeros(1, 4, device=device))
        twin = PatchedPolicy(points, zero_ablate(points.site("layers.1", feature=[*range(8)])))
        envs = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 3)
        return paired_rollouts(
            {"original": policy, "ablated": twin}, envs, [3, 11, 4, 90], max_steps=40, outputs="logits"
        )

    policy = Policy()
    on_cpu, there = returns(policy, "cpu"), returns(copy.deepcopy(policy).cuda(), "cuda")
    assert there.to_records() == on_cpu.to_records()
    assert there["original"].to_records() != there["ablated"].to_records()
