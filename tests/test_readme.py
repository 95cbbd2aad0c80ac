"""The README's code runs, and does what the text beside it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

import chanpatch
from chanpatch import recording

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def run(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block, str(README), "exec"), names)
    return names


def test_the_first_code_comes_within_ninety_words_on_a_page_without_placeholders() -> None:
    text = README.read_text()
    assert len(text.split("```python")[0].split()) <= 90
    assert "@@" not in text


def test_the_users_own_ablation_changes_exactly_the_rows_whose_mouse_is_in_the_left_half() -> None:
    names = run(BLOCKS[1])
    envs, policy, twin, points = names["envs"], names["policy"], names["twin"], names["points"]
    observations, _ = envs.reset(seed=range(8))
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(40):
        observations = envs.step(rng.choice([3, 5, 7, 7, 7, 1], size=8))[0]
        left = envs.mouse_cells()[:, 1] < 7
        with torch.no_grad(), recording(twin, points.site("embedder.relu3")) as patched_run:
            twin(torch.from_numpy(observations))
        with torch.no_grad(), recording(policy, points.site("embedder.relu3")) as plain_run:
            policy(torch.from_numpy(observations))
        patched_sums, plain = patched_run["embedder.relu3"], plain_run["embedder.relu3"]
        differs = (patched_sums != plain).flatten(1).any(1).numpy()
        had_something = plain[:, 7].flatten(1).any(1).numpy()
        assert np.array_equal(differs, left & had_something)
        seen |= set(zip(left.tolist(), differs.tolist(), strict=True))
    assert {(True, True), (False, False)} <= seen


def test_the_users_own_ablation_takes_under_ten_lines() -> None:
    body = BLOCKS[1].split("\n\n\n", 1)[1]
    assert len([line for line in body.splitlines() if line.strip()]) < 10


def test_the_citation_and_the_changelog_name_the_version_of_the_package() -> None:
    version = re.escape(chanpatch.__version__)
    assert re.search(rf"^version: {version}$", (README.parent / "CITATION.cff").read_text(), re.MULTILINE)
    assert re.search(rf"^## \[{version}\] - ", (README.parent / "CHANGELOG.md").read_text(), re.MULTILINE)
