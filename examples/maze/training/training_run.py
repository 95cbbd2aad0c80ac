"""A training run: its settings, and the folder in which it is kept, continued and finished.

| file | |
|---|---|
| `checkpoint.pth` | everything that the next update depends on; `maze.policy.load_policy` reads the policy from it |
| `log.jsonl` | one line every ten seconds: where the run stands, and means since the line before |
| `policy.safetensors` | the policy at the end |
| `facts.json` | how it came about, and its sha256 |
"""

from __future__ import annotations

import json
import math
import pickle
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from tqdm import tqdm

from maze.command import UserError
from maze.results import replace_text, replaced, versions

CHECKPOINT, LOG, WEIGHTS, FACTS = "checkpoint.pth", "log.jsonl", "policy.safetensors", "facts.json"

_LOG_SECONDS = 10.0


class TrainingError(UserError):
    """Settings that no policy can be trained with, or a run that cannot go on."""


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run; `train.py --help` says what each is.

    Options of the other algorithm are None, and of `observations` and `minutes` the one that is not the budget. `start`
    is the sha256 of the weights to start from.

    Raises:
        TrainingError: a number outside what makes sense.
    """

    algorithm: str
    width: int
    start: str | None
    seed: int
    large: float
    observations: int | None
    minutes: float | None
    batch: int
    rate: float
    bfloat16: bool
    auxiliary: str | None = None
    dagger: float | None = None
    environments: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("width", 1, 16),
            ("seed", 0, 2**31 - 1),
            ("large", 0, 8),
            ("observations", 1, 10**12),
            ("minutes", 0.01, 10**6),
            ("batch", 2, 65536),
            ("rate", 1e-7, 1),
            ("dagger", 0, 0.9),
            ("environments", 1, 4096),
        ):
            given = getattr(self, name)
            if given is not None and not low <= given <= high:  # not: also where it is no number
                raise TrainingError(f"--{name} is {given}, but it is {low} to {high}.")
        if self.dagger and not round(self.dagger * self.batch):
            raise TrainingError(f"--dagger {self.dagger} of --batch {self.batch} is less than one observation.")


@dataclass
class Update:
    """What one update did.

    Attributes:
        observations: how many it used.
        waited: seconds in which nothing was learned because data were missing.
        measures: losses and the like, by name, each a scalar.
    """

    observations: int
    waited: float
    measures: dict[str, Tensor]


class Trainer(Protocol):
    """An algorithm with the policy that it trains."""

    policy: nn.Module

    def update(self, number: int, progress: float) -> Update:
        """The update with this number, when `progress`, in [0, 1), of the budget is spent."""

    def state(self) -> dict[str, Any]:
        """All that changes from update to update but the policy's weights."""

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""


@dataclass
class Position:
    """How far a run has come."""

    updates: int = 0
    observations: int = 0
    seconds: float = 0.0

    def progress(self, settings: Settings) -> float:
        """The share of the budget that is spent."""
        if settings.observations is not None:
            return self.observations / settings.observations
        return self.seconds / (60 * (settings.minutes or math.inf))


@dataclass
class Log:
    """Means of what updates measured, appended to a file of JSON lines."""

    file: Path
    last: dict[str, Any] = field(default_factory=dict)
    _pending: list[Update] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)

    @property
    def due(self) -> bool:
        """Whether the last line is some time ago."""
        return time.perf_counter() - self._since > _LOG_SECONDS

    def add(self, update: Update) -> None:
        """Keeps what an update measured for the next line."""
        self._pending.append(update)

    def write(self, position: Position) -> None:
        """Writes a line, if there was an update since the last.

        Raises:
            TrainingError: a measure is infinite or no number.
        """
        if not self._pending:
            return
        seconds = time.perf_counter() - self._since
        measured = {
            name: float(torch.stack([update.measures[name].detach().float() for update in self._pending]).mean())
            for name in self._pending[-1].measures
            if all(name in update.measures for update in self._pending)
        }
        broken = [name for name, mean in measured.items() if not math.isfinite(mean)]
        if broken:
            raise TrainingError(
                f"{', '.join(broken)} became infinite or no number by update {position.updates}. The last checkpoint "
                "is from before that; a lower --rate may help."
            )
        self.last = asdict(position) | {
            "seconds": round(position.seconds, 1),
            "observations_per_second": round(sum(update.observations for update in self._pending) / seconds, 1),
            "waiting_for_data": round(sum(update.waited for update in self._pending) / seconds, 4),
            **measured,
        }
        with self.file.open("a") as stream:
            stream.write(json.dumps(self.last) + "\n")
        self._pending.clear()
        self._since = time.perf_counter()

    def cut(self, updates: int) -> None:
        """Forgets the lines after an update: what a killed run did beyond its checkpoint is done again."""
        lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        # A line that was being written when the run was killed has no end.
        rows = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
        kept = [(line, row) for line, row in rows if row["updates"] <= updates]
        replace_text(self.file, "".join(line for line, _ in kept))
        self.last = kept[-1][1] if kept else {}


def run(
    trainer: Trainer, settings: Settings, folder: Path, checkpoint: Mapping[str, Any] | None, *, save_seconds: float
) -> bool:
    """Trains until the budget is spent, or until Ctrl-C or a request to terminate; either way a checkpoint is left.

    Args:
        trainer: the algorithm, at its start.
        settings: of the run.
        folder: for its files.
        checkpoint: to go on from.
        save_seconds: time between two checkpoints.

    Returns:
        Whether the budget is spent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = {"versions": versions(), "commit": _commit()}  # as of now: a file edited meanwhile is not the code that runs
    position = Position()
    if checkpoint is None:
        for file in (WEIGHTS, FACTS):  # of a run that is started over
            (folder / file).unlink(missing_ok=True)
    else:
        position = Position(**checkpoint["position"])
        if position.progress(settings) >= 1 and (folder / FACTS).exists():
            return True  # nothing is left to do, and the facts stay those of the day on which it was done
        trainer.policy.load_state_dict(checkpoint["model_state_dict"])
        trainer.restore(checkpoint["trainer"])
    log = Log(folder / LOG)
    log.cut(position.updates)
    saved = time.perf_counter()
    with _stop_requests() as stopped, _progress_bar(settings, position) as bar:
        while position.progress(settings) < 1 and not stopped():
            started = time.perf_counter()
            update = trainer.update(position.updates, position.progress(settings))
            log.add(update)
            position.updates += 1
            position.observations += update.observations
            position.seconds += time.perf_counter() - started
            spent = position.seconds / 60 if settings.observations is None else position.observations
            bar.update(min(spent, bar.total) - bar.n)
            if log.due:
                log.write(position)
                bar.set_postfix({name: f"{log.last[name]:.3f}" for name in update.measures if name in log.last})
            if time.perf_counter() - saved > save_seconds:
                log.write(position)  # checks the measures first
                _save(trainer, settings, position, folder)
                saved = time.perf_counter()
    log.write(position)
    _save(trainer, settings, position, folder)
    finished = position.progress(settings) >= 1
    if finished:
        _write_policy(trainer.policy, settings, log.last, made, folder)
    return finished


def read_checkpoint(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """The checkpoint of a run, or None where there is none.

    Raises:
        TrainingError: it is of other settings, or damaged.
    """
    file = folder / CHECKPOINT
    if not file.exists():
        return None
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        before = dict(checkpoint["settings"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise TrainingError(f"'{file}' is damaged or no checkpoint; --no-resume starts over.") from error
    now = asdict(settings)
    differing = ", ".join(
        f"{name} was {before.get(name)} and is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    )
    if differing:
        raise TrainingError(
            f"'{folder}' holds a run with other settings: {differing}. Name another folder with --out, or start over "
            "with --no-resume."
        )
    return checkpoint


def _save(trainer: Trainer, settings: Settings, position: Position, folder: Path) -> None:
    checkpoint = {
        "model_state_dict": trainer.policy.state_dict(),
        "trainer": trainer.state(),
        "position": asdict(position),
        "settings": asdict(settings),
    }
    with replaced(folder / CHECKPOINT) as partial:
        torch.save(checkpoint, partial)


def _write_policy(
    policy: nn.Module, settings: Settings, last: Mapping[str, Any], made: Mapping[str, Any], folder: Path
) -> None:
    # Copied into the usual memory layout, in which the file does not depend on how the policy was trained.
    weights = {name: weight.detach().cpu().contiguous() for name, weight in policy.state_dict().items()}
    content = safetensors_bytes(weights)
    with replaced(folder / WEIGHTS) as partial:
        partial.write_bytes(content)
    facts = {
        "model": "procgen_tools.models.CategoricalPolicy(InterpretableImpalaModel(3), 15)",
        "width": settings.width,
        "parameters": sum(weight.numel() for weight in weights.values()),
        "sha256": sha256(content).hexdigest(),
        "settings": asdict(settings),
        "last": last,
        **made,
        "threads": torch.get_num_threads(),
        "device": str(next(policy.parameters()).device),
    }
    replace_text(folder / FACTS, json.dumps(facts, indent=2) + "\n")


def _commit() -> str | None:
    """The commit of the sources, with `-dirty` where they were changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def _progress_bar(settings: Settings, position: Position) -> Any:
    if settings.observations is not None:
        start = min(position.observations, settings.observations)
        return tqdm(total=settings.observations, initial=start, unit="obs", unit_scale=True, mininterval=1)
    start = min(position.seconds / 60, settings.minutes or 0)
    # Minutes have fractions, which tqdm's own format would print in full.
    shape = "{l_bar}{bar}| {n:.1f}/{total:g} min{postfix}"
    return tqdm(total=settings.minutes, initial=start, bar_format=shape, mininterval=1)


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Notes the first Ctrl-C, or request to terminate, so that the update at work ends; a second one is not caught."""
    requests: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        requests.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)
        tqdm.write("Stopping after this update; once more stops at once, and what follows the last checkpoint is lost.")

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
