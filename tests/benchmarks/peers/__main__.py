"""Measure chanpatch beside its peers, as `make bench` does: `python -m peers`.

tests/benchmarks and examples have to be in PYTHONPATH. A task that is done is kept until the code, a release or the
settings change, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from maze.results import replace_text, versions
from peers import LIBRARIES, report
from peers.tasks import TASKS, Row

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs" / "performance_table.md"
DISTRIBUTIONS = {peer: "transformer-lens" if peer == "transformer_lens" else peer for peer in LIBRARIES}


def main() -> None:
    arguments = _parsed()
    folder = arguments.out / "quick" if arguments.quick else arguments.out
    machine = _machine()
    key = _key(machine)
    for name in arguments.only:
        if name in _measured(folder, key):
            print(f"{name}: already measured, {folder / name}.json")
            continue
        rows = TASKS[name].measure(name, arguments.quick)
        replace_text(folder / f"{name}.json", json.dumps({"key": key, "rows": rows}, indent=1))
    results = _measured(folder, key)
    asked = sys.argv[1:]
    if "--out" in asked:  # where the results are kept is of no interest to others
        del asked[asked.index("--out") : asked.index("--out") + 2]
    machine |= {"command": f"`{shlex.join(['python', '-m', 'peers', *asked])}`"}
    if arguments.quick:
        machine |= {"size": "quick: few patches and few repeats, which show that everything runs and little else"}
    text = report.page(results, machine, judged=not arguments.quick)
    replace_text(folder / "table.md", text)
    replace_text(folder / "results.json", json.dumps({"machine": machine, "results": results}, indent=1))
    if arguments.write_docs:
        replace_text(DOCS, text)
    print(text)


def _measured(folder: Path, key: str) -> dict[str, list[Row]]:
    """Return the rows of the tasks that were measured with this very code on this machine."""
    files = {name: folder / f"{name}.json" for name in TASKS}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    return {name: task["rows"] for name, task in found.items() if task["key"] == key}


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m peers", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), help="these tasks; all if left out")
    parser.add_argument("--quick", action="store_true", help="few patches and repeats, into a folder of their own")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench", help="where results are kept")
    parser.add_argument("--write-docs", action="store_true", help=f"write {DOCS.relative_to(ROOT)} too")
    arguments = parser.parse_args()
    if arguments.quick and arguments.write_docs:
        parser.error("--write-docs takes full sizes only: leave out --quick")
    return arguments


def _machine() -> dict[str, str]:
    return {"processor": _processor(), "threads": "1", "system": platform.system(), **versions(), **_releases()}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{models[0] if models else platform.processor()} ({instructions})"


def _releases() -> dict[str, str]:
    releases = {}
    for peer, distribution in DISTRIBUTIONS.items():
        try:
            releases[peer] = version(distribution)
        except PackageNotFoundError:
            releases[peer] = "not installed"
    return releases


def _key(machine: dict[str, str]) -> str:
    """Return a name for everything that the numbers depend on."""
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode())
    for file in sorted([*(ROOT / "src").rglob("*.py"), *Path(__file__).parent.glob("*.py")]):
        if file.name not in ("report.py", "__main__.py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:10]


main()
