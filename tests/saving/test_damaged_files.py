"""Damaged files of patches: each is refused, or loads exactly the patches that were saved."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chanpatch import Patch, Site, hook_points
from chanpatch.errors import InterventionError
from chanpatch.patching import Add, Clamp, Project, Resample, Scale, Set
from chanpatch.saving import contents, save

MUTATIONS, SLOW_MUTATIONS = 500, 10_000

# The files, and the ways to damage them


def saved(folder: Path) -> list[bytes]:
    """Files of a number, of tensors and masks, of every edit, and with a trace and a receipt."""
    torch.manual_seed(0)
    site, file = Site("fc", feature=[3, 0], batch=slice(-2, None)), folder / "whole.safetensors"
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    inputs = torch.randn(4, 3)
    points = hook_points(model, inputs)
    traced = points.site("1", feature=[True, False, True, False])
    made: list[tuple[Any, ...]] = [
        (Patch(Site("conv1", channel=5), Set(0.25)),),
        (Patch(site, Add(torch.randn(1, 2), -2.5), torch.tensor([[True, False]])),),
        ([Patch(Site("fc"), edit) for edit in (Scale(torch.randn(4, 1).to(torch.bfloat16)), Clamp(-0.5, 3),
          Project(torch.randn(1, 4)), Resample(torch.randn(5, 4, dtype=torch.float64), 7))],),
        ([Patch(traced, Set(torch.randn(1, 2))), Patch(traced, Scale(0.5))], points),
    ]  # fmt: skip
    whole = []
    for patches, *points_or_none in made:
        save(file, patches, *points_or_none, inputs=inputs if points_or_none else None)
        whole.append(file.read_bytes())
    file.unlink()
    return whole


def flipped(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flipped_in_tensors(draw: random.Random, data: bytes) -> bytes:
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    return data[:begin] + flipped(draw, data[begin:]) if begin < len(data) else flipped(draw, data)


def cut(draw: random.Random, data: bytes) -> bytes:
    first, second = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return draw.choice([data[:first], data[second:], data[:first] + data[second:]])


def swapped(draw: random.Random, data: bytes) -> bytes:
    length = draw.choice([1, 1, 4, 16])
    first, second = sorted(draw.sample(range(len(data) - 2 * length), 2))
    second = max(second, first + length)
    return b"".join(
        [data[:first], data[second : second + length], data[first + length : second], data[first : first + length],
         data[second + length :]]
    )  # fmt: skip


def with_more(draw: random.Random, data: bytes) -> bytes:
    at, more = draw.randrange(len(data) + 1), draw.randbytes(draw.choice([1, 4, 64]))
    return data[:at] + more + data[at + draw.choice([0, len(more)]) :]


def with_edited_text(draw: random.Random, data: bytes) -> bytes:
    """One entry of the JSON changed, removed or doubled, in a file whose lengths fit."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header["__metadata__"]["chanpatch"])
    edit_one(draw, draw.choice([metadata, metadata, metadata["patches"], header]))
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["chanpatch"] = json.dumps(metadata)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def edit_one(draw: random.Random, tree: Any) -> None:
    """Walk to a random entry, and change it."""
    key = draw.choice([*tree]) if isinstance(tree, dict) else draw.randrange(len(tree))
    child = tree[key]
    if isinstance(child, (dict, list)) and child and draw.random() < 0.85:
        edit_one(draw, child)
    elif isinstance(tree, dict) and draw.random() < 0.2:
        del tree[key]
    else:
        number = draw.choice([-1, 0, 1, 2, 10**9, 10**30, 0.5])
        tree[key] = draw.choice(
            [number, number, str(number), None, True, [child], {"float": "1e3"}, "__import__('os')"]
        )


class Exploit:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def with_a_pickle(draw: random.Random, data: bytes) -> bytes:
    payload = pickle.dumps(Exploit())
    at = draw.choice([0, 8, draw.randrange(len(data))])
    return draw.choice([payload, payload + data, data[:at] + payload + data[at + len(payload) :]])


KINDS: list[Callable[[random.Random, bytes], bytes]] = [
    flipped, flipped_in_tensors, cut, swapped, with_more, with_edited_text, with_a_pickle,
]  # fmt: skip


# Loading them


def facts(file: Path) -> list[Any]:
    """Everything that a file holds, with the bits of each tensor."""
    found = contents(file)
    patches = [(patch.site.name, patch.site.indices, type(patch.edit), exact(patch.where),
                *(exact(getattr(patch.edit, item.name)) for item in fields(patch.edit)))
               for patch in found.patches]  # fmt: skip
    return [patches, found.hook_points, found.receipt, found.chanpatch]


def exact(operand: Any) -> Any:
    if not isinstance(operand, Tensor):
        return type(operand), repr(operand)
    return operand.dtype, operand.shape, operand.stride(), operand.contiguous().view(torch.uint8).flatten().tolist()


FORBIDDEN = ("exec", "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen",
             "socket.connect", "os.mkdir", "os.remove", "os.rename")  # fmt: skip
_watch: dict[str, list[str]] = {}


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if "events" in _watch and event in FORBIDDEN:
        _watch["events"].append(event)


@contextmanager
def without_code() -> Iterator[None]:
    """Fail if code of a file runs: nothing is executed, unpickled, started, created or removed."""
    if not _watch.get("added"):
        sys.addaudithook(_audit)  # cannot be removed again
        _watch["added"] = ["once"]
    _watch["events"] = []
    try:
        yield
        assert not _watch["events"]
    finally:
        del _watch["events"]


def peak() -> int:
    """The most memory that this process held since `start_peak`, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def start_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def outcomes(folder: Path, count: int) -> Counter[str]:
    """Load so many damaged files, and count those that were refused, loaded the same, or loaded something else."""
    whole, found = saved(folder), Counter[str]()
    file, draw = folder / "damaged.safetensors", random.Random(0)
    expected = []
    for data in whole:
        file.write_bytes(data)
        expected.append(facts(file))
    for number in range(count):
        which, kind = draw.randrange(len(whole)), KINDS[number % len(KINDS)]
        data = kind(draw, whole[which])
        file.write_bytes(data)
        with without_code():
            try:
                found["the same" if facts(file) == expected[which] else f"another, {kind.__name__}"] += 1
            except InterventionError:
                found["refused"] += 1
    assert [*folder.iterdir()] == [file] and found.total() == count
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # where a pickle that runs would make its folder
    return tmp_path


@pytest.mark.parametrize("count", [MUTATIONS, pytest.param(SLOW_MUTATIONS, marks=pytest.mark.slow)])
def test_a_damaged_file_is_refused_or_loads_and_runs_no_code_in_bounded_memory(
    count: int, folder: Path, record_property: Any
) -> None:
    outcomes(folder, 50)  # imports come first
    before = start_peak()
    outcomes(folder, count)
    assert peak() - before < 32 * 1024
    record_property("damaged files", count)


@pytest.mark.parametrize("count", [MUTATIONS, pytest.param(SLOW_MUTATIONS, marks=pytest.mark.slow)])
def test_no_damaged_file_loads_as_another_intervention(count: int, folder: Path) -> None:
    found = outcomes(folder, count)
    assert set(found) <= {"refused", "the same"}, found
