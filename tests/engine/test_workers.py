"""Executors: the same numbers as without, what travels, and lost workers."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import sys
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from parallel import ENVS, ablations, edits, failing, first_logit, interrupting, killed_once, mlp, summed
from torch import nn

from chanpatch import (
    PatchedPolicy,
    channel_sums,
    contrast,
    hook_points,
    paired_rollouts,
    patched,
    recording,
    rollout,
    sweep,
    zero_ablate,
)
from chanpatch.engine import workers
from chanpatch.errors import ConcurrencyError, ContrastError, ExecutorError, RolloutError
from chanpatch.metrics import action_probability, at_position, kl_divergence, logit_difference, normalized_effect
from chanpatch.policies import rollout_sweep
from chanpatch.sweeps import SweepInterrupted, attribution


def processes(count=2):
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, initializer=torch.set_num_threads, initargs=(1,))


@pytest.fixture(scope="module", params=["threads", pytest.param("processes", marks=pytest.mark.slow)])
def executor(request):
    with ThreadPoolExecutor(2) if request.param == "threads" else processes() as executor:
        yield executor


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def without_cloudpickle(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)


def assert_same(one, other):
    """Two results are equal bit for bit."""
    if dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        assert_same(tuple(one.values()), tuple(other.values()))
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other)
    else:
        assert one == other


def test_a_sweep_with_an_executor_has_the_same_numbers_and_every_patch_in_a_group(executor) -> None:
    points, observations = mlp()
    each = {
        "patches": ablations(points),
        "controls": {"control": zero_ablate(points.site("3", feature=[1, 2]))},
        "metric": {"difference": logit_difference(0, 1), "divergence": kl_divergence},
    }
    alone, spread = (sweep(points, observations, **each, executor=used) for used in (None, executor))
    assert spread.labels == alone.labels and spread.complete
    assert_same(spread.baseline, alone.baseline)
    for name in alone.values:
        np.testing.assert_allclose(spread.values[name], alone.values[name], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(spread.controls.values[name], alone.controls.values[name], rtol=1e-6, atol=1e-6)
    counts = Counter[str]()  # a part may be so small that the loop runs
    for group in spread.groups:
        counts[group.point] += group.patches
    assert counts == {"1": 8, "3": 9}


def test_a_sweep_of_every_model_fixture_has_the_same_numbers_in_workers(model, threads) -> None:
    inputs = model.inputs(3)
    points = hook_points(model.module, *inputs)
    site = points.site(model.site)
    axis = next(axis for axis in points[site.name].axes if axis in ("channel", "feature"))
    each = {"patches": [zero_ablate(part) for part in site.split(axis)[:5]], "metric": summed, "strategy": "loop"}
    alone, spread = (sweep(points, *inputs, **each, executor=used) for used in (None, threads))
    assert_same(spread.values, alone.values)


def test_the_built_in_metrics_travel(threads) -> None:
    points, observations = mlp()
    output = points.model(observations)
    metric = {
        "set": logit_difference([0], torch.zeros(6, dtype=torch.int64)),
        "probability": action_probability(1),
        "normalized": normalized_effect(action_probability(1), output, output[:1]),
        "kl": kl_divergence,
    }
    alone, spread = (
        sweep(points, observations, patches=ablations(points), metric=metric, executor=used) for used in (None, threads)
    )
    for name in metric:
        np.testing.assert_allclose(spread.values[name], alone.values[name], rtol=1e-6, atol=1e-6)
    metric = at_position(kl_divergence, -1)
    assert workers._loaded(workers._packed(metric)).__name__ == metric.__name__


def test_the_exact_effects_of_an_attribution_are_identical(executor) -> None:
    points, observations = mlp()
    each = {"patches": ablations(points), "metric": logit_difference(0, 1), "verify": 4}
    alone, spread = (attribution(points, observations, **each, executor=used) for used in (None, executor))
    assert_same(spread.exact, alone.exact)
    assert spread.rank_correlation == alone.rank_correlation


def test_a_contrast_and_channel_sums_are_identical_at_the_same_batch_size(executor) -> None:
    points, observations = mlp()
    clean = torch.randn(50, 4)
    each = {"background": (clean * part for part in (1, 2)), "batch_size": 8}
    alone = contrast(points, clean, clean + 1, **each)
    each["background"] = (clean * part for part in (1, 2))
    spread = contrast(points, clean, clean + 1, **each, executor=executor)
    assert alone.sites == spread.sites
    for name in ("difference", "std", "low", "high", "p"):
        assert_same(getattr(spread, name), getattr(alone, name))
    where = torch.rand(50, 8) > 0.3
    alone, spread = (
        channel_sums(points, clean, "1", where=where, batch_size=7, executor=used) for used in (None, executor)
    )
    assert_same(spread, alone)


@pytest.mark.parametrize("seeds", [range(10), [3, 4, 3, 5, 6, 3, 7]])
def test_rollouts_with_an_executor_are_identical(executor, seeds) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    points = hook_points(model, torch.zeros(2, 4))
    patches = {feature: zero_ablate(points.site("1", feature=feature)) for feature in range(3)}
    each = {"max_steps": 20, "outputs": "logits", "keep": ["observations"]}
    alone, spread = (rollout(points, ENVS, seeds, **each, executor=used) for used in (None, executor))
    assert_same(spread, alone)
    policies = {"original": model, "patched": PatchedPolicy(points, patches[0])}
    alone, spread = (paired_rollouts(policies, ENVS, seeds, **each, executor=used) for used in (None, executor))
    assert_same(spread.rollouts, alone.rollouts)
    each["controls"] = {"control": zero_ablate(points.site("1", feature=5))}
    alone, spread = (rollout_sweep(points, ENVS, seeds, patches, **each, executor=used) for used in (None, executor))
    assert_same(spread.rollouts, alone.rollouts)
    assert_same(spread.controls, alone.controls)


def test_draws_of_a_model_are_the_same_in_a_worker(threads) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    points, observations = hook_points(model, torch.zeros(6, 4)), torch.randn(6, 4)
    patches = [zero_ablate(site) for site in points.site("1").split("feature")]
    alone, spread = (
        sweep(points, observations, patches=patches, metric=first_logit, executor=used) for used in (None, threads)
    )
    assert_same(spread.values, alone.values)
    with pytest.raises(ContrastError) as caught:
        contrast(points, observations, observations, "2", batch_size=1, executor=threads)
    assert str(caught.value) == (
        "The model draws random numbers, so the outputs for a batch depend on the batches that ran before, perhaps in "
        "other workers. Call model.eval(), or omit executor=."
    )


def test_a_second_call_sends_neither_the_model_nor_the_call(threads, monkeypatch) -> None:
    points, observations = mlp()
    sent = []
    submit = threads.submit
    monkeypatch.setattr(threads, "submit", lambda task, data, *rest: sent.append(data) or submit(task, data, *rest))
    monkeypatch.setattr(workers, "_kept", type(workers._kept)())
    for _ in range(2):
        sweep(points, observations, patches=ablations(points), metric=first_logit, executor=threads)
    travels = [sum(data is not None for data in each.values()) for each in sent]
    assert sum(travels) <= 2 * 2 and not any(travels[-4:])  # threads share what they have received
    del sent[:]
    sweep(points, observations[:3], patches=ablations(points), metric=first_logit, executor=threads)
    assert not any(model for model, _ in map(dict.values, sent)) and any(call for _, call in map(dict.values, sent))


def test_lambdas_and_local_classes_travel_with_cloudpickle(executor) -> None:
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    model = nn.Sequential(nn.Linear(4, 8), Doubled(), nn.Linear(8, 2)).eval()
    points, observations = hook_points(model, torch.zeros(6, 4)), torch.randn(6, 4)
    patches = [zero_ablate(site) for site in points.site("1").split("feature")]
    alone, spread = (
        sweep(points, observations, patches=patches, metric=lambda output: output[:, 1], executor=used)
        for used in (None, executor)
    )
    np.testing.assert_allclose(spread.values["metric"], alone.values["metric"], rtol=1e-6)


def test_without_cloudpickle_a_lambda_is_rejected_by_name(threads, without_cloudpickle) -> None:
    points, observations = mlp()
    with pytest.raises(ExecutorError) as caught:
        sweep(points, observations, patches=ablations(points), metric=lambda output: output[:, 0], executor=threads)
    assert str(caught.value) == (
        "The function test_without_cloudpickle_a_lambda_is_rejected_by_name.<locals>.<lambda> in "
        f"{__name__} cannot be sent to workers, because workers cannot import it. Define the function at the top level "
        "of a file that workers can import, or install cloudpickle: pip install chanpatch[parallel]"
    )
    assert sweep(points, observations, patches=ablations(points), metric=first_logit, executor=threads).complete


def test_without_cloudpickle_a_local_model_class_and_a_hook_are_rejected_by_name(threads, without_cloudpickle) -> None:
    class Local(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    for change, name in (
        (lambda: model.append(Local(2, 2)), "class .*Local"),
        (lambda: model[2].register_forward_hook(lambda *_: None), "function .*lambda"),
    ):
        change()
        with pytest.raises(ExecutorError, match=f"The {name}.* cannot be sent to workers"):
            channel_sums(model, torch.zeros(6, 4), "0", executor=threads)
        model[2] = nn.Linear(2, 2)


def test_an_object_that_cannot_be_pickled_is_rejected(threads) -> None:
    points, observations = mlp()
    metric = functools.partial(lambda file, output: output[:, 0], sys.stdout)
    with pytest.raises(ExecutorError, match="^The arguments cannot be sent to workers, .* Remove files, locks"):
        sweep(points, observations, patches=ablations(points), metric=metric, executor=threads)


@pytest.mark.parametrize(
    "context", [lambda points: patched(points, zero_ablate(points.site("1"))), lambda points: recording(points, "1")]
)
def test_a_model_with_an_open_context_is_rejected(threads, context) -> None:
    points, observations = mlp()
    with pytest.raises(ConcurrencyError, match="^A module cannot be pickled while it is patched"), context(points):
        sweep(points, observations, patches=ablations(points), metric=first_logit, executor=threads)


def test_what_is_not_an_executor_or_forks_is_rejected() -> None:
    points, observations = mlp()
    with pytest.raises(TypeError, match="^executor= must be a concurrent.futures.Executor.*; got int.$"):
        sweep(points, observations, patches=ablations(points), metric=first_logit, executor=2)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as forks, pytest.raises(ExecutorError) as caught:
        sweep(points, observations, patches=ablations(points), metric=first_logit, executor=forks)
    assert str(caught.value) == (
        "The executor forks its worker processes, and torch can hang in a forked process. Spawn the processes: "
        'ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")).'
    )


def test_environments_must_be_made_by_a_function(threads) -> None:
    policy = nn.Linear(4, 2)
    with pytest.raises(RolloutError) as caught:
        rollout(policy, ENVS(), range(3), max_steps=5, outputs="logits", executor=threads)
    assert str(caught.value) == (
        "With executor=, envs must be a function that creates environments, because each worker needs its own "
        "environments; got SyncVectorEnv. Pass, for example, envs=lambda: gymnasium.make_vec(...)."
    )


def test_settings_of_torch_that_change_results_must_be_equal(threads) -> None:
    points, observations = mlp()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ExecutorError) as caught:
        sweep(points, observations, patches=ablations(points), metric=first_logit, executor=threads)
    assert str(caught.value) == (
        "torch.is_autocast_enabled('cpu') is True in your process, but False in a worker, so results could differ. "
        "Use the same setting in both, for example by passing initializer= to ProcessPoolExecutor."
    )


def test_an_error_in_a_users_function_is_raised_as_it_is_and_not_repeated(threads, tmp_path) -> None:
    points, observations = mlp()
    log = tmp_path / "log"
    with pytest.raises(LookupError, match="^no such activation") as caught:
        sweep(points, observations, patches=edits(points, log, failing), metric=first_logit, executor=threads)
    assert "in failing" in str(caught.value.__cause__)


def test_ctrl_c_gives_the_partial_result(threads, tmp_path) -> None:
    points, observations = mlp()
    patches = edits(points, tmp_path / "log", interrupting)
    with pytest.raises(SweepInterrupted) as caught:
        sweep(points, observations, patches=patches, metric=first_logit, executor=threads, strategy="loop")
    partial = caught.value.partial
    assert 4 <= len(partial) < 16 and not partial.complete and "last" not in partial.labels


class Losing(ThreadPoolExecutor):
    """An executor that loses the first `count` tasks."""

    count = 1

    def submit(self, *args):
        future = super().submit(*args)
        if self.count:
            self.count -= 1
            future = type(future)()
            future.set_exception(OSError("connection lost"))
        return future


def test_a_lost_task_is_submitted_once_more() -> None:
    points, observations = mlp()
    with Losing(2) as executor:
        assert sweep(points, observations, patches=ablations(points), metric=first_logit, executor=executor).complete
    with Losing(2) as executor, pytest.raises(ExecutorError) as caught:
        executor.count = 20
        channel_sums(points, observations, "1", batch_size=2, executor=executor)
    assert str(caught.value) == (
        "The executor lost 3 of 3 tasks (OSError: connection lost), so these results were not computed: 'inputs[0:2]', "
        "'inputs[2:4]', 'inputs[4:6]'. Repeat the call with a new executor to compute only the missing results. If the "
        "workers ran out of memory, use fewer workers."
    )


class LosingLast(ThreadPoolExecutor):
    """An executor that loses the last of four parts each time."""

    def __init__(self) -> None:
        super().__init__(2)
        self.tasks = {}

    def submit(self, task, sent, part, attempt):
        if self.tasks.setdefault(part, len(self.tasks)) < 3:
            return super().submit(task, sent, part, attempt)
        future = Future()
        future.set_exception(OSError("connection lost"))
        return future


def test_when_episodes_are_lost_the_partial_result_has_the_others_and_the_same_call_goes_on(threads) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    points = hook_points(model, torch.zeros(2, 4))
    patches = {feature: zero_ablate(points.site("1", feature=feature)) for feature in range(3)}
    policies = {"original": model, "patched": PatchedPolicy(points, patches[0])}
    each = {"max_steps": 20, "outputs": "logits"}
    for call, whole, lost in (
        (functools.partial(paired_rollouts, policies, ENVS, range(16), **each), 12, (12, 13, 14, 15)),
        (functools.partial(rollout_sweep, points, ENVS, range(16), patches, **each), 16, (2,)),
    ):
        alone = call()
        with LosingLast() as executor, pytest.raises(ExecutorError) as caught:
            call(executor=executor)
        partial = caught.value.partial
        assert caught.value.lost == lost
        assert [*partial] == [label for label in alone if label not in lost]
        for label in partial:
            np.testing.assert_array_equal(partial[label].returns, alone[label].returns[:whole])
        assert_same(call(executor=threads).rollouts, alone.rollouts)


def test_when_verified_patches_are_lost_their_exact_effects_are_nan() -> None:
    points, observations = mlp()
    each = {"patches": ablations(points), "metric": logit_difference(0, 1), "verify": 16}
    alone = attribution(points, observations, **each)
    with LosingLast() as executor, pytest.raises(ExecutorError) as caught:
        attribution(points, observations, **each, executor=executor)
    exact, lost = caught.value.partial.exact, [label in caught.value.lost for label in alone.labels]
    assert sum(lost) == 4
    assert_same(exact, np.where(lost, np.nan, alone.exact))


@pytest.mark.slow
def test_after_a_killed_worker_the_same_call_with_a_new_pool_runs_only_the_lost_parts(tmp_path) -> None:
    points, observations = mlp()
    log = tmp_path / "log"
    workers._unfinished.clear()  # other tests leave unfinished calls
    each = {"patches": edits(points, log, killed_once), "metric": first_logit}
    with processes() as pool, pytest.raises(ExecutorError) as caught:
        sweep(points, observations, **each, executor=pool)
    partial, lost = caught.value.partial, caught.value.lost
    assert "last" in lost and {*partial.labels} == {*each["patches"]} - {*lost} and len(partial) >= 4
    assert "BrokenProcessPool" in str(caught.value)
    log.unlink()
    with processes() as pool:
        resumed = sweep(points, observations, **each, executor=pool)
    assert resumed.complete and {*log.read_text().split()} == {*lost}
    assert not workers._unfinished
    alone = sweep(points, observations, **each)
    np.testing.assert_allclose(resumed.values["first_logit"], alone.values["first_logit"], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_sweep_and_rollouts_run_on_dask_also_when_a_worker_is_killed(tmp_path) -> None:
    distributed = pytest.importorskip("distributed")
    points, observations = mlp()
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        client.get_executor() as executor,
    ):
        each = {"patches": edits(points, tmp_path / "log", killed_once), "metric": first_logit}
        spread = sweep(points, observations, **each, executor=executor)
        assert (tmp_path / "log.killed").exists() and spread.complete
        alone = sweep(points, observations, **each)
        np.testing.assert_allclose(spread.values["first_logit"], alone.values["first_logit"], rtol=1e-6, atol=1e-6)
        policies = {"one": points, "other": PatchedPolicy(points, zero_ablate(points.site("3", feature=0)))}
        played = [
            paired_rollouts(policies, ENVS, range(10), max_steps=20, outputs="logits", executor=used)
            for used in (None, executor)
        ]
        assert_same(played[0].rollouts, played[1].rollouts)
