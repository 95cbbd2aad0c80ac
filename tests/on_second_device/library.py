"""On another device than the CPU everything lies there, is refused where it does not, and gives the CPU's numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from measured import measured
from models import MODELS, build
from second_device import DEVICE, second_device

from chanpatch import channel_sums, hook_points, patch_in, patched, run_with_cache
from chanpatch.errors import ChanpatchError


# An LSTM would run a fused operation there that torch has for accelerators alone.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "lstm_policy"])
def test_every_function_gives_the_cpus_numbers(name):
    module, inputs, site = build(name)
    given = inputs(4)
    expected = measured(module, given, site)
    with second_device():
        found = measured(copy.deepcopy(module).to(DEVICE), tuple(each.to(DEVICE) for each in given), site)
        assert found["record"].device == found["zero"].device == found["zero, twin"].device == DEVICE
        for what, tensor in expected.items():
            torch.testing.assert_close(found[what].cpu(), tensor, rtol=0, atol=0, msg=what)


def test_a_record_goes_to_the_device_that_was_asked_for():
    module, inputs, site = build("plain_cnn")
    with second_device():
        batch = inputs(4)[0].to(DEVICE)
        _, cache = run_with_cache(module.to(DEVICE), batch, sites=[site], device="cpu")
    assert cache[site].device == torch.device("cpu")


def test_a_mask_on_the_cpu_selects_what_is_reduced_there():
    module, inputs, site = build("plain_cnn")
    batch, mask = inputs(4)[0], torch.arange(8).view(1, 1, 1, 8) < 3
    expected = channel_sums(module, batch, site, where=mask)
    with second_device():
        batch = batch.to(DEVICE)
        points = hook_points(module.to(DEVICE), batch)
        _, cache = run_with_cache(points, batch, sites=site, reduce="sum", where=mask)
        torch.testing.assert_close(channel_sums(points, batch, site, where=mask), expected, rtol=1e-6, atol=1e-6)
        assert cache.counts[site].device == cache[site].device == DEVICE


def test_an_operand_on_the_wrong_device_is_refused_with_both_named():
    module, inputs, site = build("plain_cnn")
    with second_device():
        batch = inputs(4)[0].to(DEVICE)
        points = hook_points(module.to(DEVICE), batch)
        with pytest.raises(ChanpatchError, match=r"on cpu, but the region is torch\.float32 on simulated:0") as caught:
            with patched(points, patch_in(points.site(site), torch.zeros(4, *points[site].shape))):
                module(batch)
    assert "value.to('simulated:0', torch.float32)" in str(caught.value)
