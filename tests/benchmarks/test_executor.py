"""Throughput of a sweep on two warm workers, relative to the same sweep without an executor, in wall-clock time.

    python -m pytest -s tests/benchmarks/test_executor.py                    two sweeps of a minute per executor
    SWEEP_SECONDS=5 python -m pytest -s tests/benchmarks/test_executor.py    a quick check

Run it on an idle machine with at least two cores. Dask runs twice: with the MALLOC_TRIM_THRESHOLD_ that its nanny sets,
and without.
"""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from parallel import first_logit
from torch import nn

from chanpatch import hook_points, sweep, zero_ablate

SECONDS = float(os.environ.get("SWEEP_SECONDS", 60))
TRIM = "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_"


@contextmanager
def processes():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        yield executor


@contextmanager
def dask(**settings):
    import dask
    from distributed import Client, LocalCluster

    os.environ.pop("MALLOC_TRIM_THRESHOLD_", None)  # an earlier cluster may have set this variable in this process, too
    with (
        dask.config.set(settings),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
        client.get_executor() as executor,
    ):
        yield executor


EXECUTORS = {"processes": processes, "dask": dask, "dask without trimming": lambda: dask(**{TRIM: None})}


@pytest.fixture(scope="module")
def alone():
    """A sweep of about SECONDS without an executor: its arguments, result and time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 15)).eval()
    images = torch.randn(32, 3, 32, 32)
    points = hook_points(model, images)
    sites = [site for layer in range(1, 10, 2) for site in points.site(f"{layer}").split("channel")]

    def arguments(rounds):
        patches = {(count, site): zero_ablate(site) for count in range(rounds) for site in sites}
        return {"patches": patches, "metric": first_logit, "progress": False}

    timed(points, images, arguments(1))
    _, once = timed(points, images, arguments(1))
    given = arguments(max(1, round(SECONDS / once)))
    return points, images, given, *timed(points, images, given)


def timed(points, images, given, executor=None):
    start = time.perf_counter()
    result = sweep(points, images, **given, executor=executor)
    return result, time.perf_counter() - start


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXECUTORS)
def test_two_workers_have_1_6_times_the_throughput_of_none(alone, name) -> None:
    points, images, given, result, seconds = alone
    few = {**given, "patches": dict([*given["patches"].items()][:8])}
    with EXECUTORS[name]() as executor:
        timed(points, images, few, executor)  # starts the workers and sends the model
        spread, shared = timed(points, images, given, executor)
    np.testing.assert_allclose(spread.values["first_logit"], result.values["first_logit"], rtol=1e-4, atol=1e-5)
    print(
        f"\n{name}: {len(result)} patches, {seconds:.1f} s alone, {shared:.1f} s shared, ratio {seconds / shared:.2f}"
    )
    assert seconds / shared >= 1.6 or name != "processes"
