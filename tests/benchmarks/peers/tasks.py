"""What is compared: each task returns rows, one per peer and measurement, as plain data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from chanpatch import PatchedPolicy, patch_in, patched
from peers import HANDWRITTEN, LIBRARIES, PEERS, models, module_of
from peers.interface import BasePeer, ContextPeer, Unable, Work, Write
from peers.measure import REPEATS, difference, interleaved, peak_memory, quiet, ratio

TOLERANCE = 1e-5
ENTERING = "entering and leaving a context"
OURS = (*HANDWRITTEN, "chanpatch")

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Something that is measured.

    Attributes:
        title: What it is, for the table.
        measure: Returns its rows; `quick` makes it small.
    """

    title: str
    measure: Callable[[str, bool], list[Row]]


def sweep_rows(name: str, quick: bool) -> list[Row]:
    """Return the CPU time of a sweep by each peer, as ratios to the floor and to the loop."""
    work = SWEEPS[name].work(quick)
    checked, rows = _checked(work, SWEEPS[name].peers)
    samples = interleaved(
        {peer: able.peer.sweep for peer, able in checked.items()},
        warm=True,
        title=name,
        repeats=3 if quick else REPEATS,
    )
    for peer, seconds in samples.items():
        row = {"peer": peer, "repeats": len(seconds), "seconds": seconds, "error": checked[peer].error}
        row["size"] = f"{len(work.writes)} patches"
        rows.append(row | {f"to_{base}": ratio(seconds, samples[base]) for base in HANDWRITTEN})
    return rows


def overhead_rows(name: str, quick: bool) -> list[Row]:
    """Return what recording and patching add to one forward of the small policy, in microseconds."""
    work = models.mlp()
    (write,), inputs = work.writes, work.inputs
    checked, rows = _checked(work, (*OURS[1:], *LIBRARIES))
    variants: dict[tuple[str, str], Callable[[], object]] = {("", "plain forward"): partial(work.model, *inputs)}
    with ExitStack() as opened, torch.no_grad():
        for peer, able in checked.items():
            variants[peer, "recording"] = partial(able.peer.record, write.point, *inputs)
            try:
                able.peer.patch(write, *inputs)
                variants[peer, "ablation"] = partial(able.peer.patch, write, *inputs)
            except Unable as reason:
                rows.append({"peer": peer, "what": "ablation", "reason": str(reason)})
            if isinstance(able.peer, ContextPeer):
                reading, writing = type(able.peer)(work), type(able.peer)(work)
                opened.enter_context(reading.recording(write.point))
                opened.enter_context(writing.patching(write))
                variants[peer, "recording, open context"] = partial(reading.model, *inputs)
                variants[peer, "ablation, open context"] = partial(writing.model, *inputs)
        variants |= {("chanpatch", what): variant for what, variant in _own_variants(work).items()}
        calls, repeats = (50, 5) if quick else (500, 25)
        samples = interleaved(variants, calls=calls, title=name, repeats=repeats)
    plain = samples["", "plain forward"]
    for (peer, what), seconds in samples.items():
        base = plain if peer and what != ENTERING else [0.0]
        microseconds = [1e6 * end for end in difference(seconds, base)]
        rows.append({"peer": peer, "what": what, "repeats": len(seconds), "microseconds": microseconds})
    return rows


def _own_variants(work: Work) -> dict[str, Callable[[], object]]:
    """Return what only chanpatch has: twins, and its context alone."""
    peer = module_of("chanpatch").Peer(work)
    (write,) = work.writes
    # An activation that is put there may hold NaN, so that there is something to look for; a zero does not.
    patch = patch_in(peer.points.site(write.point, feature=write.region[1]), torch.zeros(1, 1))

    def enter_and_leave() -> None:
        with patched(peer.points, patch, allow_unreached=[write.point]):
            pass

    return {
        "a twin's call": partial(PatchedPolicy(peer.model, patch), *work.inputs),
        "a twin's call, check_nan=False": partial(PatchedPolicy(peer.model, patch, check_nan=False), *work.inputs),
        ENTERING: enter_and_leave,
    }


def memory_rows(name: str, quick: bool) -> list[Row]:
    """Return the peak memory of each peer above that of its model and one forward, each in a process of its own."""
    rows = []
    for peer in tqdm(MEMORY[name].peers, desc=name):
        command = [sys.executable, "-W", "ignore", "-m", "peers.memory", name, peer, *(["--quick"] if quick else [])]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
        rows.append({"peer": peer} | (json.loads(last) if done.returncode == 0 else {"reason": last}))
    return rows


def memory_of(name: str, peer: str, quick: bool) -> Row:
    """Return the peak memory of one peer in this process, in bytes above its model and one forward."""
    task = MEMORY[name]
    work = task.work(quick)
    with quiet():
        try:
            work.model(*work.inputs)
            before = peak_memory()  # what a peer does to get ready counts as its own
            task.run(module_of(peer).Peer(work), quick)
        except (Unable, ImportError) as reason:
            return {"reason": str(reason)}
        return {"bytes": peak_memory() - before, "size": task.size(work, quick)}


def silence_rows(name: str, quick: bool) -> list[Row]:
    """Return what each peer does with a name that does not exist, and with a module that is never called."""
    work = models.mlp()
    never_called = Write("unused", {1: 3})
    asked = {"unknown name": Write("relu_1", {1: 3}), "patch never ran": never_called}
    rows = []
    for peer in (*OURS[1:], *LIBRARIES):
        for what, write in asked.items():
            try:
                able = module_of(peer).Peer(replace(work, writes=[*work.writes, never_called]))
                able.work = replace(work, writes=[write])
                rows.append({"peer": peer, "what": what, "outcome": _outcome(able)})
            except ImportError as reason:
                rows.append({"peer": peer, "what": what, "reason": _first_line(reason)})
    return rows


def _outcome(peer: BasePeer) -> str:
    """Return what happens in words, found by running a sweep."""
    with warnings.catch_warnings(record=True) as warned, torch.no_grad():
        warnings.simplefilter("always")
        try:
            peer.sweep()
        except Exception as error:
            return f"error: {type(error).__name__}: {_first_line(error)}"
    if warned:
        return f"warning: {_first_line(warned[0].message)}"
    return "silence: the unpatched output"


def import_rows(name: str, quick: bool) -> list[Row]:
    """Return the CPU seconds that `import chanpatch` adds to `import torch`, in processes of their own."""
    script = (
        "import time; import torch; start = time.process_time(); import chanpatch; print(time.process_time() - start)"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
        for _ in tqdm(range(2 if quick else REPEATS), desc=name)
    ]
    return [{"peer": "chanpatch", "repeats": len(seconds), "seconds": seconds, "over": difference(seconds, [0.0])}]


@dataclass(frozen=True)
class Able:
    """A peer that gives the loop's numbers.

    Attributes:
        peer: Ready to be measured.
        error: How far its numbers are off at most.
    """

    peer: BasePeer
    error: float


def _checked(work: Work, peers: Sequence[str]) -> tuple[dict[str, Able], list[Row]]:
    """Return the peers whose sweep gives the loop's numbers, and rows that say why the others do not.

    Raises:
        RuntimeError: If chanpatch or what is written by hand does not.
    """
    able: dict[str, Able] = {}
    rows: list[Row] = []
    with quiet():
        expected = module_of("loop").Peer(work).sweep()
        if (expected - work.metric(work.model(*work.inputs))).abs().max() < 100 * TOLERANCE:
            raise RuntimeError("The patches change so little that a peer which does nothing would pass.")
        for peer in peers:
            try:
                able[peer] = _compared(module_of(peer).Peer(work), expected)
            except Exception as error:
                if peer in OURS:
                    raise RuntimeError(f"{peer} does not give the numbers of the loop.") from error
                reason = str(error) if isinstance(error, Unable) else f"{type(error).__name__}: {_first_line(error)}"
                rows.append({"peer": peer, "reason": reason})
    return able, rows


def _compared(peer: BasePeer, expected: Tensor) -> Able:
    error = float((peer.sweep() - expected).abs().max())
    if not error <= TOLERANCE:
        raise Unable(f"its numbers are off by up to {error:.1g}")
    return Able(peer, error)


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:160]


@dataclass(frozen=True)
class Sweep:
    work: Callable[[bool], Work]
    peers: tuple[str, ...]


@dataclass(frozen=True)
class Memory:
    work: Callable[[bool], Work]
    peers: tuple[str, ...]
    run: Callable[[BasePeer, bool], object]
    size: Callable[[Work, bool], str]


def _wide(quick: bool) -> Work:
    return models.impala(width=4, observations=16, channels=4 if quick else None)


def _everywhere(quick: bool, *, convolutional: bool) -> Work:
    return models.impala_everywhere(observations=8, convolutional=convolutional, every=20 if quick else 1)


def _observations(quick: bool) -> int:
    return 640 if quick else 10_000


def _sums(peer: BasePeer, quick: bool) -> object:
    batches = models.observation_batches(_observations(quick), 64)
    return peer.channel_sums(models.LAST_CONVOLUTIONAL, batches)


SWEEPS = {
    "impala-4": Sweep(_wide, PEERS),
    "impala-1": Sweep(lambda quick: models.impala(width=1, observations=64, channels=4 if quick else None), PEERS),
    "convolutional": Sweep(partial(_everywhere, convolutional=True), OURS),
    "everywhere": Sweep(partial(_everywhere, convolutional=False), OURS),
    "transformer": Sweep(lambda quick: models.transformer(positions=8 if quick else 32), (*OURS, *LIBRARIES)),
}
MEMORY = {
    "memory-sweep": Memory(
        _wide, PEERS, lambda peer, quick: peer.sweep(), lambda work, quick: f"{len(work.writes)} patches"
    ),
    "memory-sums": Memory(
        lambda quick: models.impala(width=1, observations=64, channels=1),
        (*OURS, *LIBRARIES),
        _sums,
        lambda work, quick: f"{_observations(quick)} observations",
    ),
}
TASKS = {
    "impala-4": Task("IMPALA width 4, 16 observations: single channels of `embedder.relu3`", sweep_rows),
    "impala-1": Task("IMPALA width 1, 64 observations: single channels of `embedder.relu3`", sweep_rows),
    "convolutional": Task(
        "IMPALA width 1, 8 observations: channels of every hook point with rows and columns", sweep_rows
    ),
    "everywhere": Task("IMPALA width 1, 8 observations: channels and features of every hook point", sweep_rows),
    "transformer": Task("Transformer of 2 layers, 8 texts: heads at single positions", sweep_rows),
    "overhead": Task("MLP policy at batch 1: microseconds over a plain forward", overhead_rows),
    "memory-sweep": Task("Peak memory of the sweep at width 4", memory_rows),
    "memory-sums": Task("Peak memory of channel sums, in batches of 64", memory_rows),
    "silence": Task("What goes unnoticed", silence_rows),
    "import": Task("`import chanpatch` after `import torch`", import_rows),
}
