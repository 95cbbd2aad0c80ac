"""The pages of the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import chanpatch

REFERENCE = (Path(__file__).parents[1] / "docs" / "api.md").read_text()


def test_every_public_name_stands_in_the_reference_once() -> None:
    told = re.findall(r"^\.\. auto(?:class|function):: chanpatch\.(\w+)$", REFERENCE, re.MULTILINE)
    assert sorted(told) == sorted(chanpatch.__all__)
