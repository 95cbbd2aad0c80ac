"""A context belongs to the thread and the asyncio task that opened it."""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from stable_baselines3 import PPO
from torch import nn

from chanpatch import PatchedPolicy, Site, hook_points, patched, zero_ablate
from chanpatch.errors import ConcurrencyError

X = torch.ones(2, 3)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.fixture
def ablated(model: nn.Module) -> Iterator[nn.Module]:
    with patched(model, zero_ablate(Site("1"))):
        yield model


@contextmanager
def ablation(model: nn.Module) -> Iterator[None]:
    with patched(model, zero_ablate(Site("1"))):
        yield


def in_threads(count: int, work: Callable[[], Any]) -> list[Any]:
    """Run the work in threads that start together; return the results and the exceptions."""
    results, start = [], threading.Barrier(count)

    def run() -> None:
        start.wait()
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("opens", [False, True], ids=["a plain task", "a task with a context"])
def test_another_task_never_sees_the_patches_of_a_task(model: nn.Module, opens: bool) -> None:
    async def with_a_patch(ready: asyncio.Event, done: asyncio.Event) -> torch.Tensor:
        with patched(model, zero_ablate(Site("1"))):
            ready.set()
            await done.wait()
            return model(X)

    async def both() -> torch.Tensor:
        ready, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(with_a_patch(ready, done))
        await ready.wait()
        with pytest.raises(ConcurrencyError):
            if opens:
                with patched(model, zero_ablate(Site("0"))):
                    model(X)
            else:
                model(X)
        done.set()
        return await task

    assert not asyncio.run(both()).any()
    assert model(X).any()


def test_a_context_of_one_notebook_cell_serves_the_tasks_of_later_cells(model: nn.Module) -> None:
    context = patched(model, zero_ablate(Site("1")))

    async def cell(work: Callable[[], Any]) -> Any:
        return work()

    asyncio.run(cell(context.__enter__))
    assert not asyncio.run(cell(lambda: model(X))).any()
    asyncio.run(cell(lambda: context.__exit__(None, None, None)))
    assert model(X).any()


def test_generators_around_a_context_work_as_fixtures_and_context_managers(ablated: nn.Module) -> None:
    assert not ablated(X).any()
    other = nn.Sequential(nn.Identity(), nn.Linear(3, 2))
    with ablation(other):
        assert not other(X).any()
    assert other(X).any()


def test_four_threads_with_contexts_of_their_own_are_right_or_refused(model: nn.Module) -> None:
    plain = model(X)

    def work() -> bool:
        for _ in range(20):
            with patched(model, zero_ablate(Site("1"))):
                assert not model(X).any()
        return True

    for result in in_threads(4, work):
        assert result is True or isinstance(result, ConcurrencyError)
    assert torch.equal(model(X), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_traces_in_two_threads_leave_no_hooks(model: nn.Module) -> None:
    for result in in_threads(2, lambda: [hook_points(model, X) for _ in range(5)]):
        assert isinstance(result, (list, ConcurrencyError))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_patched_policy_of_sb3_can_be_saved_and_environments_in_processes_run_beside_it(tmp_path: Path) -> None:
    algorithm = PPO("MlpPolicy", "CartPole-v1", seed=0)
    with patched(algorithm.policy, zero_ablate(Site("action_net"))):
        algorithm.save(tmp_path / "model")
        envs = gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="async")
        observations, _ = envs.reset(seed=0)
        assert not algorithm.policy.get_distribution(torch.from_numpy(observations)).distribution.logits.diff().any()
        envs.close()
    loaded = PPO.load(tmp_path / "model")
    for name, weight in algorithm.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], weight)


def test_a_forked_child_is_patched_as_its_parent(model: nn.Module) -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    with patched(model, zero_ablate(Site("1"))), torch.no_grad():
        assert not model(X).any()
        child = context.Process(target=lambda: sender.send(bool(model(X).any())))
        child.start()
        assert receiver.poll(30) and receiver.recv() is False
        child.join()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_a_module_in_distributed_data_parallel_is_patched_and_not_pickled(model: nn.Module, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        points = hook_points(parallel, X)
        hidden = model[0](X).detach()
        hidden[:, 2] = 0
        ablation = zero_ablate(points.site("module.0", feature=2))
        with patched(points, ablation):
            with pytest.raises(ConcurrencyError, match="cannot be pickled while it is patched"):
                pickle.dumps(parallel)
            out = parallel(X)
            out.sum().backward()
        assert torch.equal(out, model[1](hidden))
        assert model[0].weight.grad.abs().sum(1).tolist()[2] == 0 < model[0].weight.grad.abs().sum()
        assert torch.equal(PatchedPolicy(points, ablation)(X), out)
        assert torch.equal(parallel(X), model(X))
    finally:
        torch.distributed.destroy_process_group()
