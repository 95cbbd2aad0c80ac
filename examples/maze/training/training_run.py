"""A training run and its folder, from which an interrupted run continues.

| file | content |
|---|---|
| `checkpoint.pth` | the full state between two updates; `policy.network.load_policy` reads the policy from it |
| `log.jsonl` | a line every ten seconds: the position of the run, and means since the previous line |
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm

from maze.results import replace_text, replaced, versions
from maze.training.trainer import Settings, Trainer, TrainingError, Update

CHECKPOINT, LOG, WEIGHTS, FACTS = "checkpoint.pth", "log.jsonl", "policy.safetensors", "facts.json"
LOG_SECONDS, SAVE_SECONDS = 10.0, 120.0


class TrainingRun:
    """A run in a folder. It continues from the checkpoint in the folder, if there is one.

    Raises:
        TrainingError: The checkpoint has other settings, or is damaged.
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self.made = {"versions": versions(), "commit": _commit()}  # read now: the source may change during the run
        self.position: dict[str, Any] = {"updates": 0, "observations": 0, "seconds": 0.0}
        self.rows: list[dict[str, Any]] = []  # of the log
        self.pending: list[Update] = []  # since the last row
        self.since = time.perf_counter()
        if checkpoint := _read_checkpoint(folder / CHECKPOINT, trainer.settings):
            self.position, self.rows = checkpoint["position"], checkpoint["log"]
            trainer.policy.load_state_dict(checkpoint["model_state_dict"])
            trainer.restore(checkpoint["trainer"])

    @property
    def progress(self) -> float:
        """The fraction of the budget already spent."""
        return self.position["observations"] / self.trainer.settings.observations

    def train(self) -> bool:
        """Train until the budget is spent or Ctrl-C, save a checkpoint, and return whether the budget is spent."""
        if self.progress >= 1 and (self.folder / FACTS).exists():
            return True
        saved = time.perf_counter()
        progress_bar = tqdm(total=1, bar_format="{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]")
        with _interrupts() as interrupts, progress_bar as bar:
            while self.progress < 1 and not interrupts:
                started = time.perf_counter()
                update = self.trainer.update(self.position["updates"], self.progress)
                self.pending.append(update)
                self.position["updates"] += 1
                self.position["observations"] += update.observations
                self.position["seconds"] += time.perf_counter() - started
                bar.update(min(self.progress, 1) - bar.n)
                if time.perf_counter() - self.since > LOG_SECONDS:
                    self._log()
                    bar.set_postfix({name: f"{self.rows[-1].get(name, math.nan):.3f}" for name in update.measures})
                if time.perf_counter() - saved > SAVE_SECONDS:
                    self._save()
                    saved = time.perf_counter()
        self._save()
        if self.progress < 1:
            return False
        self._write_policy()
        return True

    def _log(self) -> None:
        """Add a row for the pending updates, if there are any.

        Raises:
            TrainingError: A measure is infinite or NaN.
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
                f"{', '.join(broken)} became infinite or NaN by update {self.position['updates']}. The last checkpoint "
                "is from before that update; a lower --rate may help."
            )
        speed = {
            "seconds": round(self.position["seconds"], 1),
            "observations_per_second": round(sum(update.observations for update in self.pending) / seconds, 1),
            "waiting_for_data": round(sum(update.waited for update in self.pending) / seconds, 4),
        }
        self.rows.append(self.position | speed | measured)
        replace_text(self.folder / LOG, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.pending, self.since = [], time.perf_counter()

    def _save(self) -> None:
        self._log()  # raises before a broken policy is saved
        checkpoint = {
            "model_state_dict": self.trainer.policy.state_dict(),
            "trainer": self.trainer.state(),
            "position": self.position,
            "settings": asdict(self.trainer.settings),
            "log": self.rows,
        }
        with replaced(self.folder / CHECKPOINT) as partial:
            torch.save(checkpoint, partial)

    def _write_policy(self) -> None:
        policy, settings = self.trainer.policy, self.trainer.settings
        # In the default memory layout, so the file does not depend on the layout during training.
        weights = {name: weight.detach().cpu().contiguous() for name, weight in policy.state_dict().items()}
        content = safetensors_bytes(weights)
        with replaced(self.folder / WEIGHTS) as partial:
            partial.write_bytes(content)
        facts = {
            "model": "procgen_tools.models.CategoricalPolicy(InterpretableImpalaModel(3), 15)",
            "width": settings.width,
            "parameters": sum(weight.numel() for weight in weights.values()),
            "sha256": sha256(content).hexdigest(),
            "settings": asdict(settings),
            "last": self.rows[-1],
            **self.made,
            "threads": torch.get_num_threads(),
            "device": str(next(policy.parameters()).device),
        }
        replace_text(self.folder / FACTS, json.dumps(facts, indent=2) + "\n")


def _read_checkpoint(file: Path, settings: Settings) -> dict[str, Any] | None:
    """The checkpoint of a run with these settings, or None if there is no file."""
    if not file.exists():
        return None
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        before = dict(checkpoint["settings"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise TrainingError(f"'{file}' is damaged or not a checkpoint. To start over, delete this file.") from error
    now = asdict(settings)
    if differing := [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]:
        changes = ", ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in differing)
        raise TrainingError(
            f"'{file.parent}' contains a run with other settings: {changes}. Name another folder with --out, or delete "
            "this folder to start over."
        )
    return checkpoint


def _commit() -> str | None:
    """The commit of the source, with `-dirty` if it was changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError):
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None
    return None


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect the first Ctrl-C in a list, so that the current update can finish; a second one is raised as usual."""
    interrupts: list[int] = []

    def note(number: int, frame: object) -> None:
        interrupts.append(number)
        signal.signal(signal.SIGINT, before)
        tqdm.write(
            "Stopping after this update. Press Ctrl-C again to stop at once and lose the work since the checkpoint."
        )

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
