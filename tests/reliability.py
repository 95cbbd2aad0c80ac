"""Runs the tests behind docs/reliability.md, and counts.

python tests/reliability.py               the tests of `make test`
python tests/reliability.py --write-docs  the slow tests too (minutes); writes the counts into docs/reliability.md
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
ROWS = {  # what is counted, and the tests that count it; "tests" counts the tests themselves
    "Laws, on the models in the test suite": ("tests", ["test_laws.py", "test_law_9.py", "test_law_10.py"]),
    "Generated models": ("generated models", ["test_generated_models.py"]),
    "Damaged files": ("damaged files", ["saving/test_damaged_files.py"]),
    "Interrupts": ("interrupts", ["engine/test_interrupts.py"]),
    "User mistakes, with the whole error message": ("tests", ["test_errors.py"]),
}


class Counts:
    """A plugin of pytest that adds up what passing tests count, and notes the gaps that are known."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str, bool]] = Counter()  # by file, noun, and whether the test is slow
        self.gaps: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and hasattr(report, "wasxfail"):
            self.gaps[report.wasxfail] += 1
        elif report.when == "call" and report.passed:
            file, slow = report.nodeid.split("::")[0].removeprefix("tests/"), "slow" in report.keywords
            self.found[file, "tests", slow] += 1
        if report.when == "teardown" and report.passed and not hasattr(report, "wasxfail"):
            file, slow = report.nodeid.split("::")[0].removeprefix("tests/"), "slow" in report.keywords
            for noun, count in report.user_properties:
                self.found[file, noun, slow] += count

    def table(self) -> str:
        lines = ["| cases | `make test` | `make test-all` | tests |", "|---|---|---|---|"]
        for row, (noun, files) in ROWS.items():
            fast, slow = (sum(self.found[file, noun, each] for file in files) for each in (False, True))
            listed = ", ".join(f"`{file}`" for file in files)
            lines.append(f"| {row} | {fast:,} | {fast + slow:,} | {listed} |")
        gaps = [f"{reason} ({count} test{'s' * (count > 1)})" for reason, count in sorted(self.gaps.items())]
        return "\n".join([*lines, "", f"Tests that are expected to fail: {'; '.join(gaps) or 'none'}."])


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--write-docs", action="store_true", help="write the counts into docs/reliability.md")
    write = arguments.parse_args().write_docs
    counts = Counts()
    files = [str(ROOT / "tests" / file) for _, files in ROWS.values() for file in files]
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *([] if write else ["-m", "not slow"])]
    failed = pytest.main([*options, *files], plugins=[counts])
    print(counts.table())
    if write and not failed:
        written = re.sub(
            r"(?<=<!-- counts -->\n)[\s\S]*?(?=<!-- end -->)", lambda _: f"{counts.table()}\n", PAGE.read_text()
        )
        PAGE.write_text(written)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
