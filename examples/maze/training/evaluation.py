"""How well a policy does and where it goes, exactly, by the size of the maze and the place of the cheese."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from chanpatch import HookPoints, hook_points
from chanpatch.statistics import Interval, wilson_interval
from maze.analysis.episodes import ORIGINAL, STEPS
from maze.analysis.exact import Chains, Table, cheese_and_corner, decisions, greedy, neither
from maze.analysis.tables import action_tables
from maze.environment.levels import REGION, draw_levels, observe, policy_input
from maze.experiment import SettingsError
from maze.policy.network import load_policy
from maze.report.figures import evaluation_figure
from maze.results import (
    Damaged,
    locked,
    read_arrays,
    read_manifest,
    replace_table,
    replace_text,
    replaced,
    settings_key,
    versions,
    write_manifest,
)

PLACES = ("in distribution", "out of distribution", "as drawn", "top left", "top right", "bottom right")
ACTIONS = ("sampled", "greedy")
SUMMARY, LEVELS = "summary.json", "levels.csv"
MEASURES = {
    "found": "finds the cheese",
    "corner": "passes the corner before",
    "neither": "comes to neither",
    "to_cheese": "decision: to the cheese",
    "to_corner": "decision: to the corner",
    "to_neither": "decision: neither",
}

PerLevel: TypeAlias = Mapping[str, NDArray[np.float64]]  # (level,) by "measure actions"; NaN where it means nothing


@dataclass(frozen=True)
class Settings:
    """What `examples/maze/evaluate.py` takes; its `--help` says what each is.

    Raises:
        SettingsError: something outside what makes sense.
    """

    weights: Path | None
    n: int
    sizes: tuple[int, ...]
    cheese: tuple[str, ...]
    seed: int
    out: Path

    def __post_init__(self) -> None:
        for name, low, high in (("n", 1, 100_000), ("seed", 0, 2**31 - 1)):
            if not low <= getattr(self, name) <= high:
                raise SettingsError(f"--{name} is {getattr(self, name)}, but it is {low} to {high}.")
        for size in self.sizes:
            if size % 2 == 0 or not 3 <= size <= 25:
                raise SettingsError(f"--sizes holds {size}, but the side of a maze is odd, 3 to 25.")
        for place in self.cheese:
            if place not in PLACES:
                raise SettingsError(f"--cheese holds {place!r}; it is one or more of {', '.join(map(repr, PLACES))}.")
        if not list(self.parts()):
            raise SettingsError(
                f"--sizes are {REGION} at most, so no square is outside the top right {REGION}x{REGION}."
            )

    def parts(self) -> Iterator[tuple[int, str]]:
        """Sizes and places, where there are such levels."""
        for size in self.sizes:
            for place in self.cheese:
                if size > REGION or place != "out of distribution":
                    yield size, place


@dataclass(frozen=True)
class Score:
    """The mean of one measure over levels.

    Attributes:
        size: side of the mazes.
        cheese: where it was.
        actions: sampled or greedy.
        measure: one of `MEASURES`.
        n: number of levels that have it: not all have a decision square, or a corner without the cheese.
        mean: over these levels, with its interval.
    """

    size: int
    cheese: str
    actions: str
    measure: str
    n: int
    mean: Interval

    def record(self) -> dict[str, Any]:
        """One flat row."""
        return asdict(self) | {"mean": self.mean.estimate, "low": self.mean.low, "high": self.mean.high}

    def __str__(self) -> str:
        return f"{self.mean.estimate:.1%} ({self.mean.low:.1%} to {self.mean.high:.1%})"


def sizes_in(text: str) -> tuple[int, ...]:
    """The numbers of a list such as `9,15,25` or `3,5,...,25`.

    Raises:
        SettingsError: anything else.

    Example:
        >>> sizes_in("3,5,...,11,25")
        (3, 5, 7, 9, 11, 25)
    """
    spelled = re.sub(r"(\d+),(\d+),\.\.\.,(\d+)", _written_out, text.replace(" ", ""))
    if not re.fullmatch(r"\d+(,\d+)*", spelled):
        raise SettingsError(f"--sizes is '{text}', but it is a list such as 9,15,25 or 3,5,...,25.")
    return tuple(dict.fromkeys(map(int, spelled.split(","))))


def run(settings: Settings) -> Path:
    """Evaluate and return the folder with the results."""
    policy, weights = load_policy(settings.weights)
    policy = policy.to(memory_format=torch.channels_last)  # convolutions run about twice as fast so on a CPU
    points = hook_points(policy, torch.from_numpy(policy_input(observe(draw_levels(2, size=9, seed=0)))))
    known = {
        "n": settings.n,
        "sizes": settings.sizes,
        "cheese": settings.cheese,
        "seed": settings.seed,
        "steps": STEPS,
        "weights": weights["sha256"],
        "versions": versions(),
    }
    folder = settings.out / f"evaluation-n{settings.n}-seed{settings.seed}-{settings_key(known)}"
    print(f"weights {weights['name']} (width {weights['width']}, sha256 {weights['sha256'][:12]})", flush=True)
    if (folder / SUMMARY).exists():
        try:
            read_manifest(folder, SUMMARY)
        except Damaged as fault:
            print(f"Evaluated again, since {fault}: {folder}")
        else:
            print(f"Kept from before, with the same settings, weights and code: {folder}")
            return folder
    with locked(folder):
        _evaluate(settings, points, {**known, "weights": weights}, folder)
    print(f"\nResults in {folder}")
    return folder


def _evaluate(settings: Settings, points: HookPoints, known: Mapping[str, Any], folder: Path) -> None:
    parts = list(settings.parts())
    measured: dict[tuple[int, str], PerLevel] = {}
    for number, (size, place) in enumerate(parts, 1):
        print(f"[{number}/{len(parts)}] size {size}, cheese {place}", flush=True)
        measured[size, place] = _kept(folder / "parts", points, size, place, settings)
        for line in _lines(scores(size, place, measured[size, place])):
            print(f"    {line}", flush=True)
    means = [score for (size, place), values in measured.items() for score in scores(size, place, values)]
    _write(folder, known, means, measured)


def measure(points: HookPoints, levels: Sequence[bytes]) -> PerLevel:
    """Every measure of every level, for sampled and for greedy actions.

    Args:
        points: of the policy.
        levels: procgen states.

    Returns:
        (level,) by measure and actions, such as `"found sampled"`.
    """
    chains = Chains.of(levels)
    sampled = action_tables(points, chains)[ORIGINAL]
    values: dict[str, NDArray[np.float64]] = {}
    tables: dict[str, Table] = {"sampled": sampled, "greedy": greedy(sampled)}
    for actions, table in tables.items():
        found, corner = cheese_and_corner(chains, table)
        each = (found, corner, neither(chains, table), *decisions(chains, table).T)
        values |= {f"{name} {actions}": value for name, value in zip(MEASURES, each, strict=True)}
    return values


def scores(size: int, place: str, values: PerLevel) -> list[Score]:
    """The means over the levels that have a measure; a measure that none has is left out."""
    found = []
    for actions in ACTIONS:
        for name in MEASURES:
            value = values[f"{name} {actions}"]
            value = value[~np.isnan(value)]
            if len(value):
                found.append(Score(size, place, actions, name, len(value), mean_interval(value, actions)))
    return found


def mean_interval(values: NDArray[np.float64], actions: str) -> Interval:
    """The mean over levels and its 95% interval, within 0 and 1.

    Greedy actions do a thing on a level or do not: Wilson's interval of a share. Sampled ones do it with some
    probability: Student's t interval over the levels and two more, one at 0 and one at 1. Without these it would
    have no width where a few levels happen to agree.

    References:
        Agresti and Caffo, "Simple and effective confidence intervals for proportions and differences of
        proportions result from adding two successes and two failures" (2000), for the added observations.
    """
    import scipy.stats

    n, mean = len(values), float(values.mean())
    if actions == "greedy":
        return wilson_interval(round(mean * n), n)
    added = np.append(values, [0.0, 1.0])
    low, high = scipy.stats.t.interval(0.95, n + 1, loc=added.mean(), scale=added.std(ddof=1) / (n + 2) ** 0.5)
    return Interval(mean, max(float(low), 0.0), min(float(high), 1.0), 0.95)


def markdown(means: Sequence[Score]) -> str:
    """A table with one row per size, place and kind of actions."""
    rows: dict[tuple[int, str, str], dict[str, Score]] = {}
    for score in means:
        rows.setdefault((score.size, score.cheese, score.actions), {})[score.measure] = score
    lines = [
        "| size | cheese | actions | levels | " + " | ".join(list(MEASURES.values())[:3]) + " | decision squares | "
        "to the cheese | to the corner | neither |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (size, place, actions), of in rows.items():
        shown = {name: str(of[name]) if name in of else "-" for name in MEASURES}
        squares = of["to_cheese"].n if "to_cheese" in of else 0
        cells = [size, place, actions, of["found"].n, shown["found"], shown["corner"], shown["neither"], squares]
        cells += [shown[name] for name in ("to_cheese", "to_corner", "to_neither")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _lines(means: Sequence[Score]) -> Iterator[str]:
    """What the user reads while it runs: one line for each kind of actions."""
    for actions in ACTIONS:
        of = {score.measure: score for score in means if score.actions == actions}
        line = f"{actions}: finds the cheese {of['found']}"
        if "to_cheese" in of:
            line += (
                f"; on {of['to_cheese'].n} decision squares {of['to_cheese'].mean.estimate:.1%} to the cheese, "
                f"{of['to_corner'].mean.estimate:.1%} to the corner"
            )
        yield line


def _written_out(match: re.Match[str]) -> str:
    first, second, last = map(int, match.groups())
    if not first < second <= last:
        return "?"  # no such list; the caller says so
    return ",".join(map(str, range(first, last + 1, second - first)))


def _kept(parts: Path, points: HookPoints, size: int, place: str, settings: Settings) -> PerLevel:
    """The measures of one size and place, from disk if they are there."""
    file = parts / f"size{size}-{place.replace(' ', '-')}.npz"
    if file.exists() and (kept := read_arrays(file)) is not None:
        print("    kept from before", flush=True)
        return kept
    values = measure(points, draw_levels(settings.n, size=size, seed=settings.seed, cheese=place))
    with replaced(file) as partial:
        np.savez_compressed(partial, **values)
    return values


def _write(
    folder: Path,
    known: Mapping[str, Any],
    means: Sequence[Score],
    measured: Mapping[tuple[int, str], PerLevel],
) -> None:
    """Write every result; the parts are not needed any more then."""
    records = [score.record() for score in means]
    replace_table(folder / "table.csv", records)
    weights = known["weights"]
    heading = (
        f"{weights['name']} (sha256 {weights['sha256'][:12]}), seed {known['seed']}: exact for each level, within "
        f"{STEPS} steps; mean over levels with its 95% interval.\n\n"
    )
    replace_text(folder / "table.md", heading + markdown(means))
    replace_table(
        folder / LEVELS,
        (
            {"size": size, "cheese": place, "level": level}
            | {name: "" if np.isnan(value[level]) else float(value[level]) for name, value in values.items()}
            for (size, place), values in measured.items()
            for level in range(known["n"])
        ),
    )
    with replaced(folder / "evaluation.png") as partial:
        title = f"{weights['name']}, {known['n']} levels of each kind: means over levels with 95% intervals"
        evaluation_figure(means, title).savefig(partial, dpi=110)
    # Last, since a folder with it is complete.
    write_manifest(folder, {**known, "scores": records}, SUMMARY)
    shutil.rmtree(folder / "parts")
