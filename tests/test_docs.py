"""The pages of the documentation."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pages
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

import chanpatch
from chanpatch import PatchedPolicy, hook_points, patch_in, rollout


def test_every_public_module_has_a_page_in_the_reference() -> None:
    named = {
        page.stem: re.findall(r"^\.\. automodule:: chanpatch\.(\w+)$", page.read_text(), re.MULTILINE)
        for page in (pages.DOCS / "reference").glob("*.md")
    }
    modules = [module for module in dir(chanpatch) if module not in chanpatch.__all__]
    assert named == {module: [module] for module in modules}


def need(page: str) -> None:
    """Skip a page if a package is missing that has no release for some versions of Python."""
    text = (pages.DOCS / page).read_text()
    for package, line in {"transformers": "from transformers", "procgen": "from maze"}.items():
        if line in text:
            pytest.importorskip(package)


@pytest.mark.parametrize("page", pages.pages())
def test_the_code_of_a_page_runs_and_prints_the_output_that_the_page_shows(page: str) -> None:
    need(page)
    for block in pages.run(page)[1]:
        agree = pages.agree(block.printed, block.shown)
        assert agree or block.printed == block.shown, "`python tests/pages.py` writes the output into the pages"
        assert block.figures or not block.image


@pytest.mark.parametrize(
    ("printed", "agrees"),
    [("n 20  0.5\n", True), ("n 20 0.50001\n", True), ("n 20 0.51\n", False), ("n 21 0.5\n", False), ("n 20\n", False)],
)
def test_outputs_agree_if_they_differ_only_by_rounding_and_spaces(printed: str, agrees: bool) -> None:
    assert pages.agree(printed, "n 20 0.5\n") == agrees


@pytest.mark.parametrize("page", pages.TUTORIALS)
def test_a_tutorial_runs_at_reduced_size(page: str) -> None:
    need(page)
    for block in pages.run(page, small=True)[1]:
        assert bool(block.printed) == bool(block.shown)
        assert len(block.figures) == bool(block.image)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages.TUTORIALS)
def test_a_tutorial_prints_the_output_that_its_page_shows(page: str) -> None:
    need(page)
    for block in pages.run(page)[1]:
        assert block.printed == block.shown, "`python tests/pages.py` writes the output into the pages"


@pytest.mark.parametrize("page", pages.TUTORIALS)
def test_a_tutorials_notebook_has_the_text_code_output_and_images_of_its_page(page: str) -> None:
    assert json.loads(pages.notebook_file(page).read_text()) == pages.notebook(page)


@pytest.mark.parametrize("page", pages.TUTORIALS)
def test_every_number_with_a_decimal_point_or_percent_sign_in_a_tutorials_text_is_in_its_output(page: str) -> None:
    text = (pages.DOCS / page).read_text()
    outputs = "".join(re.findall(r"```text\n.*?```", text, re.DOTALL))
    prose = re.sub(r"```.*?```|\]\(.*?\)|Python 3[.\d]*( or 3[.\d]*)?", "", text, flags=re.DOTALL)
    claims = re.findall(r"\d+\.\d+%?|\d+%", prose)
    constants = re.findall(r"wrong=(0\.\d+)", text)  # 0.2 is 20% in the text
    known = {f"{float(constant):.0%}" for constant in constants}
    assert [claim for claim in claims if claim not in outputs and claim not in known] == []


def test_the_first_sentence_of_every_page_says_what_the_reader_can_do_with_the_page() -> None:
    opening = re.compile(
        r"# [^\n]+\n\n(Use (this page|these five nouns) to|This page (shows|helps you)|Your code can|"
        r"(Compare|Compute|Create|Find|List|Look up|Measure|Name|Play|Predict|Record|Save|Steer|Turn|Draw)\b)"
    )
    written = [page for page in pages.DOCS.rglob("*.md") if not page.stem.endswith(("_table", "changelog"))]
    assert [page.name for page in written if not opening.match(page.read_text())] == ["report.md"]  # a result


def test_the_gallery_shows_every_figure_of_the_library() -> None:
    text = (pages.DOCS / "gallery.md").read_text()
    assert [name for name in chanpatch.plots.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_every_link_between_pages_leads_to_a_file_and_to_a_heading() -> None:
    def headings(file: Path) -> list[str]:
        titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
        return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]

    broken = []
    for page in [pages.DOCS / "../README.md", *pages.DOCS.glob("*.md"), *pages.DOCS.glob("[hrt]*/*.md")]:
        text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", text):
            file = page.parent / target if target else page
            if not file.exists() or (anchor and anchor not in headings(file)):
                broken.append((page.name, target, anchor))
    assert broken == []


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
