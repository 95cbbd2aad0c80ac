"""The prose of this repository uses no phrase more often than other libraries do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from language import LIMITS, PATTERNS, ROOT, hits, of_the_repository, prose, rates, sentences


@pytest.mark.parametrize(("part", "paths"), of_the_repository().items())
def test_no_phrase_is_more_frequent_than_in_other_libraries(part: str, paths: list[Path]) -> None:
    found = rates(paths)
    frequent = [name for name, most in LIMITS.items() if found[name] > most]
    hit = [each for each in hits(paths) if each[0] in frequent]
    listed = [f"{path.relative_to(ROOT)}:{line}: {sentence}" for _, path, line, sentence in hit]
    assert not frequent, "\n".join([", ".join(frequent), *listed])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ('"what" as a noun', "Ablate what is patched."),
        ('"where"', "None where there is no mask."),
        ('begins with "Of"', "Of the bootstrap."),
        ('"is no X"', "The site is no tensor."),
        ("told, tells, telling", "That is told."),
        ("anew, the very, so many, is none", "It is made anew."),
        ("more than 35 words", "word " * 36),
        ("British spelling", "The colours are normalised."),
    ],
)
def test_a_pattern_finds_its_phrase_and_no_other_does(name: str, sentence: str) -> None:
    assert [each for each, pattern in PATTERNS.items() if re.search(pattern, sentence)] == [name]


@pytest.mark.parametrize(
    "sentence",
    ["What is patched?", "There is no hook.", "It is no longer open.", "The effect of a patch.", "word " * 35],
)
def test_plain_sentences_are_left_alone(sentence: str) -> None:
    assert not any(re.search(pattern, sentence) for pattern in PATTERNS.values())


def test_prose_is_docstrings_comments_messages_and_no_code(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""First line.\n\nArgs:\n    site: The place.\n\nExample:\n    >>> told(1)\n    told\n"""\n'
        'raise ValueError(f"The site {told!r} is not {known} here.")  # Why. `told` is code.\n'
        "told = where  # noqa: F821\n"
    )
    found = {(line, text) for line, text in prose(file) if text}
    assert found == {
        (1, "First line."),
        (4, "The place."),
        (10, "The site x is not x here."),
        (10, "Why."),
        (10, "code is code."),
    }


def test_code_and_tables_of_a_page_are_no_prose() -> None:
    page = "# Title\n\nOne. Two:\n\n```python\ntold = 1\n```\n\n| told | tells |\n\n    told\n\n- An entry.\n"
    assert list(sentences(page)) == [(1, "Title"), (3, "One."), (3, "Two:"), (13, "An entry.")]
