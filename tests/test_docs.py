"""The pages of the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

import chanpatch
from chanpatch import PatchedPolicy, hook_points, patch_in

DOCS = Path(__file__).parents[1] / "docs"
REFERENCE = (DOCS / "api.md").read_text()


def test_every_public_name_stands_in_the_reference_once() -> None:
    listed = re.findall(r"^\.\. auto(?:class|function|data):: chanpatch\.([\w.]+)$", REFERENCE, re.MULTILINE)
    modules = [module for module in dir(chanpatch) if module not in chanpatch.__all__]
    exported = [(module, name) for module in modules for name in getattr(chanpatch, module).__all__]
    assert sorted(listed) == sorted(
        name if name in chanpatch.__all__ else f"{module}.{name}" for module, name in exported
    )


def run(page: str) -> dict[str, Any]:
    """The names that the code of a page leaves."""
    names: dict[str, Any] = {"__name__": page}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        exec(compile(block, page, "exec"), names)
    return names


def test_the_code_of_the_page_on_sweeps_runs() -> None:
    names = run("sweeps.md")
    assert set(names["result"].values) == {"difference", "flips"}
    assert names["direct"].shape == (8,)
    assert names["estimate"].rank_correlation is not None


def test_the_code_of_the_page_on_policies_runs() -> None:
    names = run("policies.md")
    assert names["results"].labels == ("patched",)
    assert names["twin"](names["observed"]) is names["observed"]


def test_a_model_of_stable_baselines_runs_with_a_twin_in_place_of_its_policy() -> None:
    model = PPO("MlpPolicy", "CartPole-v1", seed=0)
    points = hook_points(model.policy, torch.zeros(2, 4, device=model.device), method="get_distribution")
    bias = torch.tensor([[-1e6, 1e6]], device=model.device)
    twin = PatchedPolicy(points, patch_in(points.site("action_net"), bias))
    model.policy = twin
    assert model.predict(np.zeros((3, 4), np.float32))[0].tolist() == [1, 1, 1]
    assert evaluate_policy(model, model.get_env(), n_eval_episodes=2, warn=False)[0] < 12  # always to the right
    assert {record["method"] for record in twin.ledger.to_records()} == {"predict"}
