"""Counts phrases that make prose hard to read, in docstrings, comments, messages and Markdown, but not in code.

python tests/language.py FOLDER...         a table per 10,000 words, for any folder or file
python tests/language.py --show FOLDER...  every hit, with its file and line
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = {
    "src": ["src"],
    "docs": ["docs"],
    "examples": ["examples"],
    "front pages": [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "ROADMAP.md",
        "SECURITY.md",
        "CODE_OF_CONDUCT.md",
        ".github",
    ],
}
GENERATED = (
    "docs/_build/",
    "docs/maze_study/",
    "docs/performance_table.md",
    "docs/agents_table.md",
    "examples/maze/weights/evaluation/",
)

# Searched in one sentence at a time. Add a line to watch another phrase.
PATTERNS = {
    '"what" as a noun': r"\b[Ww]hat\b(?!.*\?$)",
    '"where"': r"\b[Ww]here\b(?!=)",
    'begins with "Of"': r"^Of\b",
    '"is no X"': r"(?<!\b[Tt]here )\b(is|are|was|were) no (?!longer\b)[a-z]+",
    "told, tells, telling": r"\b(un)?(told|tells?|telling)\b",
    "anew, the very, so many, is none": r"\b(anew|the very|so many|(is|are) none)\b|\bfrom \d+ on\b",
    "more than 35 words": r"^(?:\S+ +){35}\S",
    "British spelling": r"\b\w*(normalis|initialis|optimise|generalis|organis|[ae]lise|colour|behaviour|favour"
    r"|neighbour|label(led|ling)|modell|centre|grey|licence)\w*",
}

# The most hits per 10,000 words, at the level of other libraries in the field.
LIMITS = dict(zip(PATTERNS, (3, 25, 0, 5, 1, 1, 0, 0), strict=True))

_CODE = [  # replaced by as many empty lines
    r"^ *(```|~~~)[\s\S]*?^ *\1.*$",
    r"^( *)Examples?:{1,2}\n(?:(?:\1 +\S.*| *)\n)*",
    r"^ *>>> .*\n(?: *\S.*\n)*",
    r"(?<=\n\n)(?: {4,}\S.*\n)+",
    r"^ +[\w-]+ {3,}\S.*$",
    r"^ *(?:\||\.\. |:\w+:|import |from \S+ import|[\w.\[\], ]+ = |[\w.]+\(.*\) *(?:#.*)?$|(?:with|for|if) .*:$).*$",
]
_MARKUP = [(r"(`+).+?\1", "code"), (r"!?\[([^]]*)\]\([^)]*\)", r"\1"), (r"</?\w[^>]*>", " ")]
_ENTRY = re.compile(r" *([-+*>]|\d+\.|#+|\*{0,2}\w+(, \*{0,2}\w+)*( \([^)]*\))?:)( +|$)")
_END = re.compile(r"(?<=[.!?:;])[)\"'*]* +")
_DIRECTIVE = re.compile(r"# *(!|noqa|type:|fmt:|pragma)")


def sentences(text: str, line: int = 1) -> Iterator[tuple[int, str]]:
    """Yield the sentences of a docstring, message or page, each with the line on which its paragraph begins."""
    for pattern in _CODE:
        text = re.sub(pattern, lambda code: "\n" * code[0].count("\n"), text + "\n", flags=re.MULTILINE)
    held, start = "", line
    for number, each in enumerate([*text.splitlines(), ""], line):
        entry = _ENTRY.match(each)
        if entry or not each.strip():
            for pattern, plain in _MARKUP:
                held = re.sub(pattern, plain, held)
            yield from ((start, sentence) for sentence in _END.split(held.strip()) if re.search("[A-Za-z]", sentence))
            held = ""
        start = start if held.strip() else number
        held += f"{each[entry.end() :] if entry else each.strip()} "


def _strings(source: str) -> Iterator[tuple[int, str]]:
    """Yield docstrings, and other strings of four words or more; of f-strings the constant parts."""
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.JoinedStr):
            nodes = nodes[: -len(node.values)]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = inspect.cleandoc(node.value)
        else:
            continue
        if len(re.findall(r"\b[A-Za-z]+\b", text)) >= 4 and " " in text:
            yield node.lineno, text


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield comments; lines of a block are one."""
    held, start, last = "", 0, (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not _DIRECTIVE.match(token.string):
            text = token.string.lstrip("# ")
            if token.start != (last[0] + 1, last[1]):
                yield start, held
                held, start = "", token.start[0]
            held, last = f"{held}{text}\n", token.start
    yield start, held


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the sentences of a Python or Markdown file, each with the line on which its paragraph begins."""
    source = path.read_text()
    pieces = [(1, source)] if path.suffix == ".md" else [*_strings(source), *_comments(source)]
    for line, text in pieces:
        yield from sentences(text, line)


def files(path: Path) -> list[Path]:
    """Return the Python and Markdown files of a folder, or the file itself."""
    found = [path] if path.is_file() else sorted({*path.rglob("*.py"), *path.rglob("*.md")})
    return [each for each in found if not any(part in each.as_posix() for part in GENERATED)]


def hits(paths: Iterable[Path]) -> Iterator[tuple[str, Path, int, str]]:
    """Yield every hit: the name of the pattern, the file, the line and the sentence."""
    for path in paths:
        for line, sentence in prose(path):
            for name, pattern in PATTERNS.items():
                for _ in re.finditer(pattern, sentence):
                    yield name, path, line, sentence


def words(paths: Iterable[Path]) -> int:
    """Return the number of words of prose."""
    return sum(len(text.split()) for path in paths for _, text in prose(path))


def rates(paths: Iterable[Path]) -> dict[str, float]:
    """Return the hits of each pattern per 10,000 words."""
    paths = [*paths]
    found = Counter(name for name, *_ in hits(paths))
    return {name: 10_000 * found[name] / words(paths) for name in PATTERNS}


def of_the_repository() -> dict[str, list[Path]]:
    """Return the files of each part of this repository that holds prose."""
    return {part: [file for name in names for file in files(ROOT / name)] for part, names in PARTS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    parts = {str(folder): files(folder) for folder in given.folders} or of_the_repository()
    if given.show:
        for name, path, line, sentence in hits(file for each in parts.values() for file in each):
            print(f"{path}:{line}: {name}: {sentence}")
    else:
        print(f"{'per 10,000 words':34}" + "".join(f"{part[-20:]:>22}" for part in parts) + f"{'most':>10}")
        print(f"{'words':34}" + "".join(f"{words(paths):>22,}" for paths in parts.values()))
        found = {part: rates(paths) for part, paths in parts.items()}
        for name, most in LIMITS.items():
            print(f"{name:34}" + "".join(f"{found[part][name]:>22.1f}" for part in parts) + f"{most:>10}")


if __name__ == "__main__":
    main()
