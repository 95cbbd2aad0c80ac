"""Training on a GPU, where there is one: it is used without being asked for, and its weights run on a CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from maze import train
from maze.policy.network import load_policy
from maze.training import ppo
from maze.training.trainer import FACTS, LOG, WEIGHTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize(
    "given",
    [
        ["--observations", "256", "--batch", "32", "--width", "4", "--workers", "2"],
        ["--algorithm", "ppo", "--observations", "48", "--environments", "4", "--batch", "12"],
    ],
)
def test_the_command_takes_the_gpu_and_the_weights_run_on_a_cpu(
    given: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ppo, "STEPS", 6)
    assert train.main([*given, "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / FACTS).read_text())
    assert facts["device"].startswith("cuda") and facts["settings"]["bfloat16"]
    assert all(math.isfinite(json.loads(line)["value"]) for line in (tmp_path / LOG).read_text().splitlines())
    policy, _ = load_policy(tmp_path / WEIGHTS)
    logits = policy(torch.zeros(2, 3, 64, 64))[0].logits
    assert logits.device == torch.device("cpu") and logits.isfinite().all()
