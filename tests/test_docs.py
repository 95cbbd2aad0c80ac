"""The pages of the documentation."""

from __future__ import annotations

import ast
import re

import numpy as np
import pages
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

import chanpatch
from chanpatch import PatchedPolicy, hook_points, patch_in, rollout

REFERENCE = (pages.DOCS / "api.md").read_text()


def test_every_public_name_stands_in_the_reference_once() -> None:
    listed = re.findall(r"^\.\. auto(?:class|function|data):: chanpatch\.([\w.]+)$", REFERENCE, re.MULTILINE)
    modules = [module for module in dir(chanpatch) if module not in chanpatch.__all__]
    exported = [(module, name) for module in modules for name in getattr(chanpatch, module).__all__]
    assert sorted(listed) == sorted(
        name if name in chanpatch.__all__ else f"{module}.{name}" for module, name in exported
    )


@pytest.mark.parametrize("page", pages.pages())
def test_the_code_of_a_page_runs_and_prints_the_output_that_the_page_shows(page: str) -> None:
    if "from transformers" in (pages.DOCS / page).read_text():
        pytest.importorskip("transformers")
    _, outputs = pages.run(page)
    for shown, printed in outputs:
        assert printed == shown, "`python tests/pages.py` writes the output into the pages"


def test_a_model_of_stable_baselines_runs_with_a_twin_in_place_of_its_policy() -> None:
    model = PPO("MlpPolicy", "CartPole-v1", seed=0)
    points = hook_points(model.policy, torch.zeros(2, 4, device=model.device), method="get_distribution")
    bias = torch.tensor([[-1e6, 1e6]], device=model.device)
    twin = PatchedPolicy(points, patch_in(points.site("action_net"), bias))
    model.policy = twin
    assert model.predict(np.zeros((3, 4), np.float32))[0].tolist() == [1, 1, 1]
    assert evaluate_policy(model, model.get_env(), n_eval_episodes=2, warn=False)[0] < 12  # always to the right
    assert {record["method"] for record in twin.ledger.to_records()} == {"predict"}


def test_each_of_the_eight_ablation_policies_has_at_most_eight_lines() -> None:
    page = (pages.DOCS / "ablations.md").read_text()
    sections = re.findall(r"^## \d\. .*?```python\n(.*?)```", page, re.MULTILINE | re.DOTALL)
    assert len(sections) == 8
    for code in sections:
        (policy,) = (each for each in ast.parse(code).body if isinstance(each, ast.FunctionDef | ast.ClassDef))
        assert len([line for line in ast.unparse(policy).splitlines() if line.strip()]) <= 8


def test_the_eight_ablation_policies_play_the_same_episodes_in_twins_as_in_the_sweep() -> None:
    names, _ = pages.run("ablations.md")
    pairs, swept, patches = names["pairs"], names["swept"], names["patches"]
    assert len(patches) == 8
    for label, patch in patches.items():
        twin = PatchedPolicy(names["points"], patch)
        alone = rollout(twin, names["envs"], range(40), **names["settings"])
        assert pairs[label].to_records() == swept[label].to_records() == alone.to_records()
