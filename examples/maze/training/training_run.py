"""A training run and its folder, from which an interrupted run continues.

| file | content |
|---|---|
| `checkpoint.pth` | the full state, every half minute; `policy.network.load_policy` reads the policy from it |
| `log.jsonl` | a line per checkpoint: the position of the run, and means since the previous line |
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
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm

from maze.command import UserError
from maze.results import replace_text, replaced, versions
from maze.training.trainer import Trainer, Update

CHECKPOINT, LOG, WEIGHTS, FACTS = "checkpoint.pth", "log.jsonl", "policy.safetensors", "facts.json"
SAVE_SECONDS = 30.0


class TrainingRun:
    """A run in a folder. It continues from the checkpoint in the folder, if there is one.

    Raises:
        UserError: The checkpoint has other settings, or is damaged.
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self.made = {"versions": versions(), "commit": _commit()}  # read now: the source may change during the run
        self.position: dict[str, Any] = {"updates": 0, "observations": 0, "seconds": 0.0}
        self.rows: list[dict[str, Any]] = []  # of the log
        if checkpoint := _read_checkpoint(folder / CHECKPOINT, trainer.settings):
            self.position, self.rows = checkpoint["position"], checkpoint["log"]
            trainer.policy.load_state_dict(checkpoint["model_state_dict"])
            trainer.restore(checkpoint["trainer"])

    def train(self) -> bool:
        """Train until the budget is spent or Ctrl-C, save a checkpoint, and return whether the budget is spent."""
        position, budget = self.position, self.trainer.settings.observations
        if position["observations"] >= budget and (self.folder / FACTS).exists():
            return True
        updates: list[Update] = []  # since the last checkpoint
        saved = time.perf_counter()
        progress = tqdm(total=budget, initial=position["observations"], unit="obs", unit_scale=True)
        with _interrupts() as interrupts, progress:
            while position["observations"] < budget and not interrupts:
                started = time.perf_counter()
                updates.append(self.trainer.update(position["updates"], position["observations"] / budget))
                position["updates"] += 1
                position["observations"] += updates[-1].observations
                position["seconds"] += time.perf_counter() - started
                progress.update(updates[-1].observations)
                if (now := time.perf_counter()) - saved > SAVE_SECONDS:
                    self._save(updates, now - saved)
                    updates, saved = [], time.perf_counter()
        self._save(updates, time.perf_counter() - saved)
        if position["observations"] < budget:
            return False
        self._write_policy()
        return True

    def _save(self, updates: list[Update], seconds: float) -> None:
        """Add a log row for the updates and save a checkpoint; raise UserError if a measure is not finite."""
        if updates:
            measured = {
                name: float(torch.stack([update.measures[name].float() for update in updates]).mean())
                for name in updates[-1].measures
            }
            if broken := [name for name, mean in measured.items() if not math.isfinite(mean)]:
                raise UserError(
                    f"{', '.join(broken)} became infinite or NaN by update {self.position['updates']}. The last "
                    "checkpoint is from before that update; a lower --rate may help."
                )
            speed = {
                "seconds": round(self.position["seconds"], 1),
                "observations_per_second": round(sum(update.observations for update in updates) / seconds, 1),
                "waiting_for_data": round(sum(update.waited for update in updates) / seconds, 4),
            }
            self.rows.append(self.position | speed | measured)
        replace_text(self.folder / LOG, "".join(json.dumps(row) + "\n" for row in self.rows))
        checkpoint = {
            "model_state_dict": self.trainer.policy.state_dict(),
            "trainer": self.trainer.state(),
            "position": self.position,
            "settings": vars(self.trainer.settings),
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
            "settings": vars(settings),
            "last": self.rows[-1],
            **self.made,
            "threads": torch.get_num_threads(),
            "device": str(next(policy.parameters()).device),
        }
        replace_text(self.folder / FACTS, json.dumps(facts, indent=2) + "\n")


def _read_checkpoint(file: Path, settings: Namespace) -> dict[str, Any] | None:
    """The checkpoint of a run with these settings, or None if there is no file."""
    if not file.exists():
        return None
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        before = dict(checkpoint["settings"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"'{file}' is damaged or not a checkpoint. To start over, delete this file.") from error
    now = vars(settings)
    if differing := [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]:
        changes = ", ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in differing)
        raise UserError(
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
