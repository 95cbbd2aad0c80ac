"""The code of the documentation, and the output that the pages show.

python tests/pages.py    run the code of every page, and write the output below each block that shows it
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"(```python\n(.*?)```\n)(?:\n```text\n(.*?)```\n)?", re.DOTALL)
_COMMENT = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)


def pages() -> list[str]:
    """Return the names of the pages that have code with output."""
    return ["../README.md", *(page.name for page in sorted(DOCS.glob("*.md")) if "print(" in page.read_text())]


def run(page: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the names that the code of a page leaves and, for each block, the output it shows and the real one."""
    names: dict[str, Any] = {"__name__": page}
    outputs = []
    for _, code, below in _BLOCK.findall((DOCS / page).read_text()):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, page, "exec"), names)
        lines = "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())
        outputs.append((below or "".join(f"{line}\n" for line in _COMMENT.findall(code)), lines))
    return names, outputs


def written(page: str) -> str:
    """Return the text of a page, with the real output below each block that shows it."""
    printed = iter(run(page)[1])

    def replaced(block: re.Match[str]) -> str:
        shown, real = next(printed)
        if shown == real or (_COMMENT.search(block[2]) and not block[3]):  # comments are corrected by hand
            return block[0]
        return f"{block[1]}\n```text\n{real}```\n" if real else block[1]

    return _BLOCK.sub(replaced, (DOCS / page).read_text())


if __name__ == "__main__":
    for page in pages():
        (DOCS / page).write_text(written(page))
