"""The pages of the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import chanpatch

DOCS = Path(__file__).parents[1] / "docs"
REFERENCE = (DOCS / "api.md").read_text()


def test_every_public_name_stands_in_the_reference_once() -> None:
    told = re.findall(r"^\.\. auto(?:class|function):: chanpatch\.(\w+)$", REFERENCE, re.MULTILINE)
    assert sorted(told) == sorted(chanpatch.__all__)


def test_the_code_of_the_page_on_sweeps_runs() -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "sweeps.md").read_text(), re.DOTALL):
        exec(compile(block, "sweeps.md", "exec"), names)
    assert set(names["result"].values) == {"difference", "flips"}
    assert names["direct"].shape == (8,)
    assert names["estimate"].rank_correlation is not None
