"""The common part of both training algorithms: forward pass, optimizer step, and a run that can be interrupted.

A run has a folder:

| file | content |
|---|---|
| `checkpoint.pth` | the full state, every half minute; `policy.network.load_policy` reads the policy from it |
| `log.jsonl` | a line per checkpoint: the position of the run, and means since the previous line |
| `policy.safetensors` | the policy at the end |
| `facts.json` | settings, versions, last losses and sha256 |
| `kept/` | policies along the way, named by the number of observations, with `--keep-every` |
"""

from __future__ import annotations

import json
import math
import pickle
import signal
import subprocess
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from tqdm import tqdm

from maze.command import UserError
from maze.results import replace_text, replaced, versions
from maze.training.training_data import TrainingMazes

CHECKPOINT, LOG, WEIGHTS, FACTS = "checkpoint.pth", "log.jsonl", "policy.safetensors", "facts.json"
KEPT = "kept"  # folder of the policies along the way
SAVE_SECONDS = 30.0


class Update(NamedTuple):
    """The result of one update."""

    observations: int
    waited: float  # seconds spent waiting for data
    measures: dict[str, Tensor]  # scalars, such as losses


class Trainer:
    """An algorithm with its policy, mazes and optimizer.

    The settings are the options of `train.py` that determine the result; options of the other algorithm are None.
    """

    optimizer: torch.optim.Optimizer
    mazes: TrainingMazes | None
    largest_norm: float  # of the gradient

    def __init__(self, policy: nn.Module, settings: Namespace, *, device: torch.device) -> None:
        self.policy = policy.to(device, memory_format=torch.channels_last).train()
        self.settings, self.device = settings, device
        self.position: dict[str, Any] = {"updates": 0, "observations": 0, "seconds": 0.0}
        self.rows: list[dict[str, Any]] = []  # of the log

    def update(self, number: int, progress: float) -> Update:
        """Run the update with this number; `progress` is the fraction of the budget already spent, in [0, 1)."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Everything but the weights of the policy; data and random draws follow from the number of the update."""
        return {"optimizer": self.optimizer.state_dict(), "mazes": self.mazes.state() if self.mazes else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.mazes:
            self.mazes.restore(state["mazes"])

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (batch, action) and values (batch,), both float32, from uint8 images."""
        # The values of `levels.policy_input`; the permuted memory layout makes convolutions fast.
        given = frames.permute(0, 3, 1, 2).float() / 255
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.bfloat16):
            actions, value = self.policy(given)
        # Normalized again, because bfloat16 probabilities do not quite sum to 1.
        return torch.log_softmax(actions.logits.float(), dim=1), value.float()

    def descend(self, loss: Tensor, rate: float) -> None:
        """Take an optimizer step on the clipped gradient, at `rate` times the initial learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self.largest_norm)
        self.optimizer.step()

    def train(self, folder: Path, keep_every: float | None = None) -> bool:
        """Train until the budget is spent or Ctrl-C, save a checkpoint, and return whether the budget is spent.

        With `keep_every`, in minutes of training, also keep the policy at these times.
        If the folder has a checkpoint, the run continues from there. Raises UserError if the checkpoint has other
        settings or is damaged.
        """
        made = {"versions": versions(), "commit": _commit()}  # read now: the source may change during the run
        if checkpoint := _read_checkpoint(folder / CHECKPOINT, self.settings):
            self.position, self.rows = checkpoint["position"], checkpoint["log"]
            self.policy.load_state_dict(checkpoint["model_state_dict"])
            self.restore(checkpoint["trainer"])
        position, budget = self.position, self.settings.observations
        if position["observations"] >= budget and (folder / FACTS).exists():
            return True
        updates: list[Update] = []  # since the last checkpoint
        saved = time.perf_counter()
        progress = tqdm(total=budget, initial=position["observations"], unit="obs", unit_scale=True)
        with _interrupts() as interrupts, progress:
            while position["observations"] < budget and not interrupts:
                started = time.perf_counter()
                updates.append(self.update(position["updates"], position["observations"] / budget))
                position["updates"] += 1
                position["observations"] += updates[-1].observations
                before, after = position["seconds"], position["seconds"] + time.perf_counter() - started
                position["seconds"] = after
                if keep_every and before // (60 * keep_every) < after // (60 * keep_every):
                    _write(folder / KEPT / f"{position['observations']}.safetensors", self._weights())
                progress.update(updates[-1].observations)
                if (now := time.perf_counter()) - saved > SAVE_SECONDS:
                    self._save(folder, updates, now - saved)
                    updates, saved = [], time.perf_counter()
        self._save(folder, updates, time.perf_counter() - saved)
        if position["observations"] < budget:
            return False
        self._write_policy(folder, made)
        return True

    def _save(self, folder: Path, updates: list[Update], seconds: float) -> None:
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
        replace_text(folder / LOG, "".join(json.dumps(row) + "\n" for row in self.rows))
        checkpoint = {
            "model_state_dict": self.policy.state_dict(),
            "trainer": self.state(),
            "position": self.position,
            "settings": vars(self.settings),
            "log": self.rows,
        }
        with replaced(folder / CHECKPOINT) as partial:
            torch.save(checkpoint, partial)

    def _weights(self) -> bytes:
        """The policy as a safetensors file, in the default memory layout, whatever the layout during training."""
        weights = self.policy.state_dict().items()
        return safetensors_bytes({name: weight.detach().cpu().contiguous() for name, weight in weights})

    def _write_policy(self, folder: Path, made: Mapping[str, Any]) -> None:
        content = self._weights()
        _write(folder / WEIGHTS, content)
        facts = {
            "model": "maze.policy.impala.Impala",
            "width": self.settings.width,
            "parameters": sum(weight.numel() for weight in self.policy.state_dict().values()),
            "sha256": sha256(content).hexdigest(),
            "settings": vars(self.settings),
            "last": self.rows[-1],
            **made,
            "threads": torch.get_num_threads(),
            "device": str(self.device),
        }
        replace_text(folder / FACTS, json.dumps(facts, indent=2) + "\n")


def _write(file: Path, content: bytes) -> None:
    with replaced(file) as partial:
        partial.write_bytes(content)


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
