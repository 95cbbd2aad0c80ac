"""What a sweep takes on a GPU, beside the loop of forwards that it replaces there.

Times are of the clock, as a GPU works beside the thread that waits for it; the two take turns.
"""

import statistics
import time

import numpy as np
import pytest
import torch

from chanpatch import hook_points, sweep, zero_ablate
from maze.policy.network import new_policy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("observations", [16, 256])
def test_a_sweep_of_128_channels_beside_the_loop(observations, benchmark):
    torch.manual_seed(0)
    batch = torch.rand(observations, 3, 64, 64, device="cuda")
    points = hook_points(new_policy(4).cuda().eval(), batch)
    patches = [zero_ablate(site) for site in points.site("embedder.relu3").split("channel")]

    def swept(strategy):
        return sweep(points, batch, patches=patches, metric=lambda out: out[0].logits[:, 0], strategy=strategy)

    expected = swept("loop")
    loops = []

    def timed_loop():  # before each run of the other
        torch.cuda.synchronize()
        start = time.perf_counter()
        swept("loop")
        loops.append(time.perf_counter() - start)

    found = benchmark.pedantic(swept, args=["auto"], setup=timed_loop, rounds=15, warmup_rounds=1)
    np.testing.assert_allclose(found.values["metric"], expected.values["metric"], atol=1e-3)
    ratio = statistics.median(loops) / benchmark.stats.stats.median
    benchmark.extra_info |= {"device": torch.cuda.get_device_name(), "loop / sweep": round(ratio, 2)}
    print(f"{observations} observations on {torch.cuda.get_device_name()}: the loop takes {ratio:.1f} times as long")
    assert ratio > 1.5
