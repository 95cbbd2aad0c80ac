"""The example with the lamp, in small."""

from __future__ import annotations

import pytest
import torch
from stable_baselines3 import PPO

import lamp
from chanpatch import PatchedPolicy, hook_points


@pytest.mark.filterwarnings("ignore::UserWarning:gymnasium")
def test_the_example_runs_from_training_to_its_figure(tmp_path, capsys):
    swept = lamp.study(tmp_path, training=2048, episodes=3, controls=2)
    printed = capsys.readouterr().out
    assert list(swept) == ["original", "16 lamp units", "all 64 units"]
    assert "with a random lamp" in printed and "16 lamp units recover" in printed
    assert (tmp_path / "lamp.png").stat().st_size > 10_000


def test_the_patch_makes_the_policy_act_as_with_a_dark_lamp():
    policy = PPO("MlpPolicy", lamp.Lamp("random"), seed=0, device="cpu").policy
    points = hook_points(policy, torch.zeros(2, 5), method="get_distribution")
    twin = PatchedPolicy(points, lamp.with_dark_lamp(points, range(64)))
    seen = torch.randn(6, 5)
    dark = policy.get_distribution(lamp.with_lamp(seen, 0)).distribution.probs
    assert torch.equal(twin.get_distribution(seen).distribution.probs, dark)
    assert not torch.equal(policy.get_distribution(seen).distribution.probs, dark)
