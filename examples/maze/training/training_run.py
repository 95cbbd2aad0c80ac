"""A training run and its folder, from which an interrupted run continues.

| file | content |
|---|---|
| `checkpoint.pth` | the full state between two updates; `policy.network.load_policy` reads the policy from it |
| `log.jsonl` | every ten seconds one line: the position of the run, and means since the line before |
| `policy.safetensors` | the policy at the end |
| `facts.json` | settings, versions, last losses and sha256 |
"""

from __future__ import annotations

import json
import math
import pickle
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn
from tqdm import tqdm

from maze.results import replace_text, replaced, versions
from maze.training.trainer import Settings, Trainer, TrainingError, Update

CHECKPOINT, LOG, WEIGHTS, FACTS = "checkpoint.pth", "log.jsonl", "policy.safetensors", "facts.json"

_LOG_SECONDS = 10.0


@dataclass
class Position:
    """The position of a run."""

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
    """Means of the updates' measures, in a file of JSON lines."""

    file: Path
    rows: list[dict[str, Any]]
    pending: list[Update] = field(default_factory=list)
    since: float = field(default_factory=time.perf_counter)

    def write(self, position: Position) -> None:
        """Write a line on the pending updates, if there are any.

        Raises:
            TrainingError: a measure is infinite or NaN.
        """
        if not self.pending:
            return
        seconds = time.perf_counter() - self.since
        measured = {
            name: float(torch.stack([update.measures[name].detach().float() for update in self.pending]).mean())
            for name in self.pending[-1].measures
            if all(name in update.measures for update in self.pending)
        }
        if broken := [name for name, mean in measured.items() if not math.isfinite(mean)]:
            raise TrainingError(
                f"{', '.join(broken)} became infinite or NaN by update {position.updates}. The last checkpoint is from "
                "before that; a lower --rate may help."
            )
        speed = {
            "seconds": round(position.seconds, 1),
            "observations_per_second": round(sum(update.observations for update in self.pending) / seconds, 1),
            "waiting_for_data": round(sum(update.waited for update in self.pending) / seconds, 4),
        }
        self.rows.append(asdict(position) | speed | measured)
        replace_text(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.pending, self.since = [], time.perf_counter()


def run(
    trainer: Trainer, settings: Settings, folder: Path, checkpoint: Mapping[str, Any] | None, *, save_seconds: float
) -> bool:
    """Train until the budget is spent or a signal arrives, and save a checkpoint; returns whether it is spent."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"versions": versions(), "commit": _commit()}  # read now: the source may change during the run
    position = Position()
    if checkpoint is None:
        for file in (WEIGHTS, FACTS, LOG):  # from an earlier run
            (folder / file).unlink(missing_ok=True)
    else:
        position = Position(**checkpoint["position"])
        if position.progress(settings) >= 1 and (folder / FACTS).exists():
            return True
        trainer.policy.load_state_dict(checkpoint["model_state_dict"])
        trainer.restore(checkpoint["trainer"])
    log = Log(folder / LOG, checkpoint["log"] if checkpoint else [])
    saved = time.perf_counter()
    with _stop_requests() as stopped, tqdm(total=1, bar_format="{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]") as bar:
        while position.progress(settings) < 1 and not stopped():
            started = time.perf_counter()
            update = trainer.update(position.updates, position.progress(settings))
            log.pending.append(update)
            position.updates += 1
            position.observations += update.observations
            position.seconds += time.perf_counter() - started
            bar.update(min(position.progress(settings), 1) - bar.n)
            if time.perf_counter() - log.since > _LOG_SECONDS:
                log.write(position)
                bar.set_postfix({name: f"{log.rows[-1].get(name, math.nan):.3f}" for name in update.measures})
            if time.perf_counter() - saved > save_seconds:
                log.write(position)  # checks the measures first
                _save(trainer, settings, position, log, folder)
                saved = time.perf_counter()
    log.write(position)
    _save(trainer, settings, position, log, folder)
    finished = position.progress(settings) >= 1
    if finished:
        _write_policy(trainer.policy, settings, {"last": log.rows[-1], **made}, folder)
    return finished


def read_checkpoint(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """The checkpoint of a run, or None if it has none yet.

    Raises:
        TrainingError: the checkpoint has other settings, or is damaged.
    """
    file = folder / CHECKPOINT
    if not file.exists():
        return None
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        before = dict(checkpoint["settings"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise TrainingError(f"'{file}' is damaged or not a checkpoint; --no-resume starts over.") from error
    now = asdict(settings)
    if differing := [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]:
        changes = ", ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in differing)
        raise TrainingError(
            f"'{folder}' holds a run with other settings: {changes}. Name another folder with --out, or start over "
            "with --no-resume."
        )
    return checkpoint


def _save(trainer: Trainer, settings: Settings, position: Position, log: Log, folder: Path) -> None:
    checkpoint = {
        "model_state_dict": trainer.policy.state_dict(),
        "trainer": trainer.state(),
        "position": asdict(position),
        "settings": asdict(settings),
        "log": log.rows,
    }
    with replaced(folder / CHECKPOINT) as partial:
        torch.save(checkpoint, partial)


def _write_policy(policy: nn.Module, settings: Settings, known: Mapping[str, Any], folder: Path) -> None:
    # In the default memory layout, so the file does not depend on that of the training.
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
        **known,
        "threads": torch.get_num_threads(),
        "device": str(next(policy.parameters()).device),
    }
    replace_text(folder / FACTS, json.dumps(facts, indent=2) + "\n")


def _commit() -> str | None:
    """The commit of the source, with `-dirty` if it was changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError):
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None
    return None


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Catch the first Ctrl-C or SIGTERM, so the current update can finish; a second one is not caught."""
    requests: list[int] = []

    def note(number: int, frame: object) -> None:
        requests.append(number)
        restore()
        tqdm.write("Stopping after this update. A second signal stops at once and loses the work since the checkpoint.")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(requests)
    finally:
        restore()
