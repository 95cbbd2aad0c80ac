"""Training on another device than the CPU: everything is brought there, and the weights are the CPU's."""

import json

import pytest
import torch
from second_device import DEVICE, second_device

from maze import train
from maze.training import ppo
from maze.training.trainer import FACTS, WEIGHTS


@pytest.mark.parametrize(("found", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_a_gpu_is_used_where_there_is_one(found, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    assert train._device() == torch.device(chosen)


@pytest.mark.parametrize(
    "given",
    [
        ["--observations", "96", "--batch", "16", "--dagger", "0.5", "--workers", "0"],
        ["--algorithm", "ppo", "--observations", "48", "--environments", "4", "--batch", "12"],
    ],
)
def test_the_command_trains_the_same_weights_there(given, monkeypatch, tmp_path):
    monkeypatch.setattr(ppo, "STEPS", 6)
    facts = {}
    for device in (torch.device("cpu"), DEVICE):
        monkeypatch.setattr(train, "_device", lambda device=device: device)
        folder = tmp_path / device.type
        with second_device():
            assert train.main([*given, "--out", str(folder)]) == 0
        facts[device] = json.loads((folder / FACTS).read_text())
        assert facts[device]["device"] == str(device)
        assert (folder / WEIGHTS).exists()
    on_cpu, there = facts.values()
    assert there["sha256"] == on_cpu["sha256"]
