"""The code of the documentation, and the output and figures that the pages show.

python tests/pages.py           run the code of every page; write the output below each block that shows it, save the
                                figures, and write each tutorial as a notebook
python tests/pages.py PAGE...   the same for some pages, such as gallery.md
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
TUTORIALS = ("tutorials/goal_misgeneralization.md", "tutorials/sb3_agent.md", "tutorials/language_model.md")
_BLOCK = re.compile(
    r"(```python\n(.*?)```\n)(?:\n```text\n(.*?)```\n)?(\n!\[[^]]*\]\((\S+)\)\n)?", re.DOTALL
)  # code, output, image
_COMMENT = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?")
_SMALL = re.compile(r"^(\w+ = ).*  # (.+) in the tests$", re.MULTILINE)
_INSTALL = re.compile(r"```sh\n(pip .*)\n```")
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


class Block(NamedTuple):
    """The output that a page shows below a block of code and the real one; the path of the image, and the figures."""

    shown: str
    printed: str
    image: str
    figures: list[Figure]


def pages() -> list[str]:
    """Return the names of the pages that have code with output, except the tutorials."""
    found = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if "```python" in page.read_text())
    return ["../README.md", *(page for page in found if page not in TUTORIALS and "maze_study" not in page)]


def run(page: str, *, small: bool = False) -> tuple[dict[str, Any], list[Block]]:
    """Return the names that the code of a page leaves, and its blocks.

    If `small`, constants have the value in their comment: `STEPS = 800  # 20 in the tests`.
    """
    names: dict[str, Any] = {"__name__": page}
    blocks = []
    for _, code, below, _, image in _BLOCK.findall((DOCS / page).read_text()):
        code = _SMALL.sub(r"\1\2", code) if small else code
        pyplot.close("all")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, page, "exec"), names)
        lines = "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())
        shown = below or "".join(f"{line}\n" for line in _COMMENT.findall(code))
        blocks.append(Block(shown, lines, image, [pyplot.figure(number) for number in pyplot.get_fignums()]))
    return names, blocks


def agree(printed: str, shown: str) -> bool:
    """Return whether two outputs are equal except for rounding, which differs between processors, and for spaces."""
    if _NUMBER.sub("#", printed).split() != _NUMBER.sub("#", shown).split():
        return False
    pairs = [*zip(_NUMBER.findall(printed), _NUMBER.findall(shown), strict=True)]
    return all(one == other or (_is_close(one, other) and not (one + other).isdigit()) for one, other in pairs)


def _is_close(one: str, other: str) -> bool:
    return math.isclose(float(one), float(other), rel_tol=0.01, abs_tol=1e-6)  # 1% is one unit in the third digit


def written(page: str) -> str:
    """Return the text of a page, with the real output below each block that shows it; save the figures."""
    blocks = iter(run(page)[1])

    def replaced(found: re.Match[str]) -> str:
        block = next(blocks)
        if block.image:
            save(block.figures[0], (DOCS / page).parent / block.image)
        if block.shown == block.printed or (_COMMENT.search(found[2]) and not found[3]):  # comments are kept
            return found[0]
        return found[1] + (f"\n```text\n{block.printed}```\n" if block.printed else "") + (found[4] or "")

    return _BLOCK.sub(replaced, (DOCS / page).read_text())


def save(figure: Figure, file: Path) -> None:
    """Save a figure in few colors, in a third of the bytes."""
    figure.savefig(drawn := io.BytesIO(), dpi=100)
    Image.open(drawn).convert("RGB").quantize(64).save(file, optimize=True)


def notebook(page: str) -> dict[str, Any]:
    """Return a page as a notebook in Jupyter's format, with its output and images."""
    cells: list[dict[str, Any]] = []

    def add(kind: str, text: str, **more: Any) -> None:
        lines = text.strip().splitlines(keepends=True)
        if lines:
            cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": lines, **more})

    def add_text(text: str) -> None:
        before, *command = _INSTALL.split(text, maxsplit=1)
        add("markdown", before)
        if command:
            add("code", f"%{command[0]}", execution_count=None, outputs=[])
            add("markdown", command[1])

    text, end = (DOCS / page).read_text(), 0
    for count, found in enumerate(_BLOCK.finditer(text), 1):
        add_text(text[end : found.start()])
        _, code, below, _, image = found.groups()
        outputs: list[dict[str, Any]] = []
        if below:
            outputs.append({"name": "stdout", "output_type": "stream", "text": below.splitlines(keepends=True)})
        if image:
            data = base64.b64encode(((DOCS / page).parent / image).read_bytes()).decode()
            outputs.append({"data": {"image/png": data}, "metadata": {}, "output_type": "display_data"})
        add("code", code, execution_count=count, outputs=outputs)
        end = found.end()
    add_text(text[end:])
    return {"cells": cells, "metadata": {"kernelspec": _KERNEL}, "nbformat": 4, "nbformat_minor": 5}


def notebook_file(page: str) -> Path:
    return (DOCS / page).with_suffix(".ipynb")


if __name__ == "__main__":
    matplotlib.use("Agg")
    for page in sys.argv[1:] or [*pages(), *TUTORIALS]:
        (DOCS / page).write_text(written(page))
        if page in TUTORIALS:
            notebook_file(page).write_text(json.dumps(notebook(page), indent=1) + "\n")
