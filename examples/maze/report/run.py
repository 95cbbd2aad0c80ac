"""A run of the study: parts measured one after the other, kept on disk, and a report of them.

    <out>/study-n200-seed0-a8d9d567/
        report.html, report.md, figures/*.png
        imitation/sums/manifest.json, *.csv, sums.png      a policy, a part
        control/...

A part is measured unless its folder holds it with the same weights, n, seed, versions and code, and its files have the
digests of their manifest. A part appears on disk whole or not at all. The report leaves out parts that fail these
checks and that `--only` does not name. One run at a time works in a folder.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from chanpatch.errors import did_you_mean
from maze.analysis.forwards import load_points
from maze.analysis.part import Part, Study
from maze.command import UserError
from maze.measurements import PARTS, SIDE_BY_SIDE
from maze.policy.network import CLASSES, SHIPPED_WEIGHTS
from maze.policy.shipped import FILES, shipped_name
from maze.report.page import differing, write_report
from maze.results import Damaged, check_folder, locked, read_manifest, replace_table, versions, write_manifest

LONGEST = ("ablation", "corner-vector", "cheese-vector", "counterfactual", "direction", "retarget")
MOST_OTHERS = 300  # levels of each measurement of a policy that only stands beside the main one
SHIPPED = tuple(FILES.values())


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run, explained by `study.py --help`.

    Raises:
        UserError: a number is out of range, a part does not exist, or the folder cannot be written to.
    """

    only: tuple[str, ...]
    n: int
    seed: int
    weights: tuple[Path, ...]  # the main policy first; the shipped policy of width 1 if empty
    out: Path
    policy: str = "chanpatch"
    workers: int = 1  # number of processes that measure parts

    def __post_init__(self) -> None:
        if unknown := [name for name in self.only if name not in PARTS]:
            hint = did_you_mean(unknown[0], PARTS)
            raise UserError(f"--only: no part is called {', '.join(unknown)}.{hint} Parts: {', '.join(PARTS)}.")
        for name, low, high in (("n", 20, 100_000), ("seed", 0, 2**31 - 1), ("workers", 1, 1000)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name} is {getattr(self, name)}, but it is {low} to {high} for these parts.")
        check_folder(self.out)


def run(settings: RunSettings) -> Path:
    """Measure the missing parts, write the report of all, and return the run's folder."""
    subjects = _subjects(settings)
    sha = next(iter(subjects.values())).weights["sha256"]
    folder = settings.out / f"study-n{settings.n}-seed{settings.seed}-{sha[:8]}"
    # Once, as of now: a file that is edited while the run goes on is not the code that runs.
    known = {subject: _known(study) for subject, study in subjects.items()}
    with locked(folder):
        _measure_all(settings, subjects, known, folder)
        report = write_report(folder, known, PARTS, _command(settings))
    print(f"\nReport: {report}")
    return folder


def _measure_all(
    settings: RunSettings, subjects: Mapping[str, Study], known: Mapping[str, Mapping[str, Any]], folder: Path
) -> None:
    jobs: list[tuple[Any, ...]] = []
    for subject, study in subjects.items():
        weights = study.weights
        print(f"{subject}: weights {weights['name']} (width {weights['width']}, sha256 {weights['sha256'][:12]})")
        possible = PARTS if study is next(iter(subjects.values())) else SIDE_BY_SIDE
        names = [name for name in PARTS if name in possible and name in (settings.only or PARTS)]
        jobs += [(subject, name, known[subject], folder / subject / name) for name in names]
    if min(settings.workers, len(jobs)) > 1:
        return _measure_in_workers(settings, jobs)
    for number, (subject, name, *place) in enumerate(jobs, 1):
        print(f"  {number} of {len(jobs)}  {subject}: {name:14}", end="", flush=True)
        print(_measured(PARTS[name], subjects[subject], *place), flush=True)


def _measure_in_workers(settings: RunSettings, jobs: list[tuple[Any, ...]]) -> None:
    """Measure parts in several processes, the longest parts first. The numbers are the same as in one process."""
    jobs.sort(key=lambda job: LONGEST.index(job[1]) if job[1] in LONGEST else len(LONGEST))
    threads = max(1, torch.get_num_threads() // settings.workers)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(settings.workers, context, _start_worker, (threads,)) as pool,
        tqdm(total=len(jobs), desc="parts", unit="part", leave=False) as progress,
    ):
        waiting = {pool.submit(_measured_by_name, settings, *job): job for job in jobs}
        try:
            for number, future in enumerate(as_completed(waiting), 1):
                subject, name, *_ = waiting[future]
                progress.write(f"  {number} of {len(jobs)}  {subject}: {name:14}{future.result()}")
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # the bars of several processes would mix


def _measured_by_name(settings: RunSettings, subject: str, name: str, known: Mapping[str, Any], folder: Path) -> str:
    return _measured(PARTS[name], _cached_subjects(settings)[subject], known, folder)


def _subjects(settings: RunSettings) -> dict[str, Study]:
    """The policies to study by name, the main one first."""
    subjects: dict[str, Study] = {}
    for file in settings.weights or (SHIPPED_WEIGHTS,):
        points, facts = load_points(file, CLASSES[settings.policy])
        name = shipped_name(facts["sha256"]) or file.stem
        if name in subjects:
            raise UserError(
                f"--weights: '{file}' is the second policy called {name}. Rename the file, or leave it out."
            )
        n = min(settings.n, MOST_OTHERS) if subjects else settings.n
        subjects[name] = Study(points, facts, n, settings.seed)
    return subjects


_cached_subjects = functools.cache(_subjects)  # the parts that one worker measures share the selection of channels


def _measured(part: Part, study: Study, known: Mapping[str, Any], folder: Path) -> str:
    """Measure a part unless its folder holds the same already; return a line for the user."""
    facts, again = {"part": part.name, **known}, ""
    if folder.exists():
        try:
            if not differing(read_manifest(folder), facts):
                return "kept from before"
        except Damaged as fault:
            again = f"measured again, since {fault}: "
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    start = time.monotonic()
    for name, table in part.measure(study).items():
        replace_table(partial / f"{name}.csv", table)
    seconds = round(time.monotonic() - start, 1)
    write_manifest(partial, {**facts, "seconds": seconds})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return f"{again}{seconds:.0f} s"


def _known(study: Study) -> dict[str, Any]:
    return {
        "weights": study.weights["sha256"],
        "weights_name": study.weights["name"],
        "width": study.weights["width"],
        "n": study.n,
        "seed": study.seed,
        "versions": versions(),
    }


def _command(settings: RunSettings) -> str:
    named = f" --weights {' '.join(file.name for file in settings.weights)}" if settings.weights else ""
    weights = " --shipped" if settings.weights == SHIPPED else named
    policy = f" --policy {settings.policy}" if settings.policy != "chanpatch" else ""
    return f"python examples/maze/study.py --n {settings.n} --seed {settings.seed}{weights}{policy}"
