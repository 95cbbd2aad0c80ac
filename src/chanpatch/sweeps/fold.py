"""Fold: run many patches, at one or several hook points, as blocks of rows in one batch.

Each block has one row per input. Modules that finish before the earliest patch are skipped. Their outputs in the clean
run are repeated for each block if they are read after the skipped modules. The fold is correct only if the model treats
rows independently. Therefore, each block is compared with the clean run before the block is patched. The outputs for
two or more patches are compared with the plain loop. One of these patches also runs between a block of NaN and a block
of large values in a fold of its own, because different neighbors must not change the output. One row is enough for
that fold, unless the fold for the single row gives other numbers.
"""

from __future__ import annotations

import copy
import functools
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, TransformedDistribution

from ..engine.paths import Path, _children, get, is_tensordict, leaves, replace, storage
from ..engine.sessions import Attached, Session
from ..errors import EditError
from ..labels import labelled
from ..patching.contexts import ContextSession, nan_error
from ..patching.edits import Set
from ..patching.firing import traced_view
from ..patching.patch import Patch
from .plan import Entry, Forward, Group, Seen
from .prefix import Call, StrategyError, refused

_CPU_BYTES = 2**24  # on a CPU, chunks that use more memory do not fit into the caches and are slower
_GAIN = 0.75  # the fold is used if its estimated time is less than this fraction of the loop's time
# Seconds per prepared module, torch function, operation and byte, on a CPU (True) or on another device (False). The
# values are fixed, so the choice of a strategy is deterministic.
_SECONDS = {True: (1e-5, 1e-5, 3e-11, 1e-10), False: (1e-5, 1e-5, 5e-14, 1e-12)}


class Fold:
    """Run the patches of many entries in one forward pass, with one block of rows for each entry."""

    def __init__(self, forward: Forward, baseline: Any, seen: Mapping[str, Seen], max_bytes: int) -> None:
        self.forward, self.points, self._baseline, self._seen = forward, forward.points, baseline, seen
        self._max_bytes, self._modules = max_bytes, 40 + len(self.points.tree().modules)
        outer = [point for point in self.points.values() if not point.module and point.side == "in"]
        self.input_axes = {point.path: point.tensor_batch_axis for point in outer}
        inputs = [(self.input_axes.get(path[1:]), leaf) for path, leaf in leaves(forward.inputs)]
        self.rows = next((leaf.shape[axis] for axis, leaf in inputs if axis is not None), 0)
        self._of_output: dict[Path, int] = {}
        self.reads: list[str] = []  # names of the types of those objects in the output that a metric has read
        self.repeats_all = False  # whether to repeat even those inputs and outputs that seem not to be read
        self.has_left_out = False  # whether a forward pass has not repeated all of them
        self._template = baseline
        for path, kind in opaque(baseline):
            self._template = replace(self._template, path, _Unread(kind, self.reads))

    @functools.cached_property
    def axes(self) -> dict[tuple[nn.Module, int, Path], int | None]:
        """Dict that maps (module, index of the call, path in the output) to the batch axis of that output tensor."""
        outputs = [point for point in self.points.values() if point.side == "out"]
        modules = self.points.tree().modules
        return {(modules[point.module], point.call or 0, point.path): point.tensor_batch_axis for point in outputs}

    def obstacle(self, group: Group) -> str:
        """Return the reason why a group cannot be folded, or an empty string if the group can be folded."""
        if self.forward.draws:
            return "the model draws random numbers"
        args, kwargs = self.forward.inputs
        if any(map(is_tensordict, (*args, *kwargs.values()))):
            return "an input is a TensorDict"
        if next(leaves(self._baseline), None) is None:
            return "no tensors were found in the output"
        if not self.rows:
            return "the batch axis of the inputs is unknown"
        names = dict.fromkeys(patch.site.name for entry in group.entries for patch in entry.patches)
        for name in names:
            axis, clean = self.points[name].tensor_batch_axis, self._seen[name].clean
            if axis is None:
                return f"the batch axis of '{name}' is unknown"
            if clean is None or clean.shape[axis] != self.rows:
                return f"the activation at '{name}' is too large, or has a different number of rows than the inputs"
        if self.forward.prefix.last_read > self._seen[group.point.name].step:
            return f"after '{group.point.name}', the model reads values from tensors"
        custom = [{p.site.name for p in entry.patches if not p.runs_only_ours} for entry in group.entries]
        if max(map(len, custom)) > 1:  # an edit may pass data to a later edit in the same entry
            return "patches at several hook points run custom functions"
        return ""

    def chunks(self, groups: Sequence[Group]) -> tuple[list[list[tuple[Entry, Group]]], bool]:
        """Split the groups' entries into chunks, each of which runs in one forward pass.

        Return the chunks, and whether the fold is probably faster than the loop. If a later module modifies the tensor
        at a hook point in place, patches at that hook point are put into separate chunks, because the modification
        would not reach the rows of other entries.
        """
        entries = [(entry, group) for group in groups for entry in group.entries]
        names = [{patch.site.name for patch in entry.patches} for entry, _ in entries]
        written = {name for name, seen in self._seen.items() if seen.overwritten}
        cuts = [
            number
            for number in range(1, len(entries) if written else 0)
            if names[number] != names[number - 1] and written & (names[number] | names[number - 1])
        ]
        best: list[list[tuple[Entry, Group]]] = []
        size, seconds = len(entries), math.inf
        while True:  # halve the chunks while that saves time
            chunks, start = [], 0
            while start < len(entries):
                end = start + self._most(entries[start][1], size)
                end = min([end, *cuts[bisect_right(cuts, start) :][:1]])
                chunks.append(entries[start:end])
                start = end
            other = sum(self._seconds(chunk, len(chunk)) for chunk in chunks)
            if other > seconds:
                break
            best, seconds = chunks, other
            if size == 1:
                break
            size = -(-size // 2)
        loop = self._seconds((), 1)
        compared = max(2, len({chunk[0][1].skippable for chunk in best}))
        return best, seconds + compared * self._seconds((), 1 / self.rows) < _GAIN * len(entries) * loop

    def _most(self, group: Group, size: int) -> int:
        room = min(self._max_bytes, _CPU_BYTES) if group.on_cpu else self._max_bytes
        return min(size, max(1, room // max(1, group.bytes_each)))

    def _seconds(self, chunk: Sequence[tuple[Entry, Group]], blocks: float) -> float:
        """Estimate the seconds for a forward pass on `blocks` blocks that starts at the first hook point in a chunk.

        If `chunk` is empty, the forward pass starts at the inputs.
        """
        groups = [*{id(group): group for _, group in chunk}.values()]
        skipped = groups[0].skippable if groups else 0
        functions, operations, nbytes = self.forward.prefix.work_after(
            self._seen[groups[0].point.name].step if skipped else 0
        )
        nbytes += 2 * sum(self._seen[group.point.name].nbytes for group in groups)
        module, function, operation, byte = _SECONDS[next(iter(self._seen.values())).on_cpu]
        calls = 3 * skipped + 5 * len(groups) + self._modules
        return module * calls + function * functions + blocks * (operation * operations + byte * nbytes)

    def on_row(self, forward: Forward, output: Any) -> Fold:
        """Return a fold for the one row on which `forward` runs. `output` is the model's output for this row."""
        fold = copy.copy(self)
        fold.forward, fold.rows, fold._baseline = forward, 1, output
        fold._seen = {
            name: seen.on_row(self.points[name].tensor_batch_axis, forward.row) for name, seen in self._seen.items()
        }
        return fold

    def outputs(self, chunk: Sequence[tuple[Entry, Group]], disturbed: Sequence[Group] = ()) -> Iterator[Any]:
        """Run a chunk, and return an iterator over the outputs for the entries.

        If groups are `disturbed`, extra blocks surround the entries' blocks. At the hook points of all these groups,
        the first block contains NaN, and the last block contains large values. For integers, both contain reordered
        rows.
        """
        run = _Run(self, [entry for entry, _ in chunk], [group.point.name for group in disturbed])
        with unvalidated() if disturbed else nullcontext():
            output = run.output(min(group.skippable for _, group in chunk) if self.forward.row is None else 0)
        parts = dict[Path, tuple[Tensor, ...]]()
        if [path for path, _ in leaves(output)] != [path for path, _ in leaves(self._baseline)]:
            raise StrategyError("the patched output has tensors in different places than the unpatched output")
        for path, leaf in leaves(output):
            parts[path] = self._split(path, leaf, run.blocks)
        return map(functools.partial(self._output, parts), range(bool(disturbed), run.blocks - bool(disturbed)))

    def _output(self, parts: Mapping[Path, Sequence[Tensor]], number: int) -> Any:
        output = self._template
        for path, blocks in parts.items():
            output = replace(output, path, blocks[number])
        return output

    def _split(self, path: Path, leaf: Tensor, blocks: int) -> tuple[Tensor, ...]:
        wanted = get(self._baseline, path).shape
        if blocks == 1 and leaf.shape == wanted:
            return (leaf,)
        if path not in self._of_output:
            grown = [axis for axis, pair in enumerate(zip(leaf.shape, wanted, strict=False)) if len({*pair}) > 1]
            if len(grown) != 1 or leaf.dim() != len(wanted):
                raise StrategyError("a tensor in the output has no batch axis")
            self._of_output[path] = grown[0]
        axis = self._of_output[path]
        if leaf.shape != (*wanted[:axis], blocks * wanted[axis], *wanted[axis + 1 :]):
            raise StrategyError("a tensor in the output does not have one row per input and patch")
        return leaf.chunk(blocks, axis)


class _Run:
    """One forward pass on a batch that contains one block of rows for each entry."""

    def __init__(self, fold: Fold, entries: Sequence[Entry], disturbed: Sequence[str]) -> None:
        self.fold, self.forward, self.blocks = fold, fold.forward, len(entries) + 2 * bool(disturbed)
        self._disturbed, self._entries = bool(disturbed), entries
        self._masks: list[dict[tuple[object, ...], Any]] = [{} for _ in entries]
        self._flags: list[tuple[Tensor, Entry, Patch]] = []
        self._versions: list[tuple[Tensor, int]] = []
        # At a tensor that is overwritten in place, NaN would have to be written to all tensors that share its memory.
        self._at: dict[str, list[tuple[int, list[Patch]]]] = {
            name: [] for name in disturbed if not fold._seen[name].overwritten
        }
        for number, entry in enumerate(entries):
            for patch in entry.patches:
                here = self._at.setdefault(patch.site.name, [])
                if not here or here[-1][0] != number:
                    here.append((number, []))
                here[-1][1].append(patch)
        self._waiting, self._unchanged = {*self._at}, False
        self._patched: set[int] = set()
        self._read: set[object] | None = None  # the inputs and the outputs of skipped calls to repeat; None for all

    def output(self, skip: int) -> Any:
        """Run the model on all blocks, skipping the first `skip` module calls."""
        forward, points = self.forward, self.forward.points
        inputs: Any = forward.inputs
        if skip and not self.fold.repeats_all:
            self._read = forward.prefix.read_after(skip, self.fold._baseline)
        with refused():  # a container, such as a TensorDict, may have a fixed number of rows
            for path, leaf in [*leaves(inputs)]:
                if self._is_read(storage(leaf)):
                    inputs = replace(inputs, path, self._repeated(leaf, self.fold.input_axes.get(path[1:])))
        session = ContextSession(points)
        for name in self._at:
            session.listen(points[name], "patch", functools.partial(self._put, name))
        try:
            with refused(but=(EditError,)), forward.running(skip, self._spread) as run, Attached(session):
                output = run.kept(forward.output(inputs))
                if run.has_drawn():
                    raise StrategyError("a patch draws random numbers")
        finally:
            session.let_go()
        if self._waiting:
            raise StrategyError("a patch was not reached")
        if any(tensor._version != version for tensor, version in self._versions):
            raise StrategyError("a module modifies a patched tensor in place")
        raise_nan(self._flags)
        return output

    def _repeated(self, leaf: Tensor, axis: int | None) -> Tensor:
        return leaf if axis is None else torch.cat([leaf] * self.blocks, axis)

    def _is_read(self, each: object) -> bool:
        """Return whether to repeat an input, or a skipped call's output, for each block; see `Prefix.read_after`."""
        is_read = self._read is None or each in self._read
        self.fold.has_left_out |= not is_read
        return is_read

    def _spread(self, call: Call, output: Any) -> Any:
        """Return the output of a skipped module call, once for each block of rows if anything reads the output."""
        if not self._is_read((call.module, call.number)):
            return output
        for path, leaf in [*leaves(output)]:
            output = replace(output, path, self._repeated(leaf, self.fold.axes.get((call.module, call.number, path))))
        return output

    def _put(self, name: str, leaf: Tensor, session: Session) -> Tensor:
        """Apply the patches at the hook point `name` to their entries' blocks in `leaf`, and return the new tensor."""
        point, clean, here = self.forward.points[name], self.fold._seen[name].clean, self._at[name]
        axis: Any = point.tensor_batch_axis
        if name not in self._waiting or clean is None or leaf.shape[axis] != self.blocks * self.fold.rows:
            raise StrategyError(f"'{name}' ran twice, or does not have one row per input")
        self._waiting.discard(name)
        blocks, new = _blocks(leaf, axis, self.blocks), leaf.clone()
        traced_view(clean, point)  # raises if the shape differs from the trace
        if first := [self._disturbed + number for number, _ in here if number not in self._patched]:
            several = blocks.narrow(axis, first[0], first[-1] + 1 - first[0])
            if several.shape[axis] > len(first):  # the blocks between them are already patched
                several = blocks.index_select(axis, torch.tensor(first, device=leaf.device))
            self._check(several, clean.unsqueeze(axis), name)
        written = _blocks(new, axis, self.blocks)
        for number, patches in here:
            place = self._disturbed + number
            if len(patches) == 1 and (chosen := _number(patches[0])) is not None:
                index, value = chosen
                index = (*index[:axis], place, *index[axis:])
                written[index] = value
            else:
                block, into = blocks.select(axis, place), written.select(axis, place)
                self._patch(self._entries[number], self._masks[number], patches, block, into)
        if self._disturbed:
            for end, other in zip((0, -1), self.fold._seen[name].others(axis), strict=True):
                written.select(axis, end).copy_(other)
        self._patched.update(number for number, _ in here)
        if (here and len(here) < len(self._entries)) or self._unchanged:
            # Rows that are not patched here were copied, too. A later in-place write would miss tensors that share
            # memory with the original rows.
            self._versions += [(leaf, leaf._version), (new, new._version)]
        return new

    def _patch(
        self, entry: Entry, masks: dict[tuple[object, ...], Any], patches: list[Patch], block: Tensor, into: Tensor
    ) -> None:
        """Apply an entry's patches to the entry's block, and write the result to `into`."""
        ours = all(patch.runs_only_ours for patch in patches)
        state = None if ours else self.forward.undisturbed.snapshot.state()
        with labelled(entry.label):
            activation, flags = self.forward.fire(patches, block, masks)
        if state is not None and not self.forward.undisturbed.snapshot.is_in(*state):
            raise StrategyError(f"the patch {entry.label!r} changes the model's state during the forward pass")
        self._flags += [(flag, entry, patch) for patch, flag in flags]
        if activation is block:
            self._unchanged = True
        else:
            into.copy_(activation)

    def _check(self, blocks: Tensor, clean: Tensor, name: str) -> None:
        """Raise StrategyError unless the blocks, before they are patched, equal the clean activation up to rounding."""
        wanted = clean.expand_as(blocks)
        if not close(blocks, wanted, blocks):
            raise StrategyError(f"before patching, the rows at '{name}' differ from those in the unpatched run")


@contextmanager
def unvalidated() -> Iterator[None]:
    """Disable the argument checks of distributions, which read values and reject NaN."""
    validates = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(validates)


def _blocks(tensor: Tensor, axis: int, count: int) -> Tensor:
    """Return a view of the tensor in which a new axis, before the batch axis, separates the `count` blocks of rows."""
    rows = tensor.shape[axis] // count
    return tensor.unfold(axis, rows, rows).movedim(-1, axis + 1)


def _number(patch: Patch) -> tuple[tuple[int | slice | list[int], ...], float] | None:
    """For a patch that sets a region to a finite number, return the region's index and the number; otherwise None."""
    site, value = patch.site, patch.edit.value if type(patch.edit) is Set else None
    if patch.where is not None or not isinstance(value, Real) or not math.isfinite(value):
        return None
    several = [axis for axis, chosen in site.indices if not isinstance(chosen, tuple) or len(chosen) > 1]
    if site.point is None or site.point.lens is not None or len(several) > 1 or "batch" in dict(site.indices):
        return None  # torch would pair the entries of several index lists
    index: list[int | slice | list[int]] = [slice(None)] * len(site.point.axes)
    for axis, chosen in site.indices:
        if not isinstance(chosen, tuple):
            return None
        index[site.point.axes.index(axis)] = slice(chosen[0], chosen[0] + 1) if len(chosen) == 1 else [*chosen]
    return tuple(index), value


class _Unread:
    """Placeholder for an object in the output that may contain tensors, such as a cache. Any use raises an error."""

    def __init__(self, kind: str, reads: list[str]) -> None:
        self._kind, self._reads = kind, reads

    def _read(self, *_: Any) -> Any:
        self._reads.append(self._kind)  # the metric may catch the error
        raise StrategyError(f"a metric reads the {self._kind} in the output")

    __getattr__ = __getitem__ = __len__ = __iter__ = __bool__ = __call__ = __contains__ = _read


def opaque(tree: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Yield (path, type name) for each object in an output that may hide tensors."""
    children = [*_children(tree)]
    if isinstance(tree, TransformedDistribution) or not (children or isinstance(tree, _PLAIN)):
        yield path, type(tree).__name__
    else:
        for step, child in children:
            yield from opaque(child, (*path, step))


_PLAIN = (Tensor, str, bytes, int, float, complex, type(None), tuple, list, Mapping, torch.dtype, torch.device)
_MASK = 1e4  # larger values, such as -1e8 for a forbidden action, are ignored in the scale of the rounding error


def close(part: Tensor, wanted: Tensor, whole: Tensor) -> bool:
    """Return whether `part` equals `wanted` up to rounding error; the tolerance depends on the values in `whole`."""
    if torch.equal(part, wanted) or not (wanted.is_floating_point() or wanted.is_complex()):
        return torch.equal(part, wanted)
    half = wanted.dtype in (
        torch.float16,
        torch.bfloat16,
    )  # in half precision, rounding errors may be as large as a patch's effect
    tolerance = 0.0 if half else 100 * torch.finfo(wanted.dtype).eps  # long sums lose a few digits
    sizes = [each.abs() for each in (whole, wanted) if each.numel()]
    scale = max((float(each.where(each < _MASK, 0).max()) for each in sizes), default=0.0)
    return torch.allclose(part, wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def raise_nan(flags: Sequence[tuple[Tensor, Entry, Patch]]) -> None:
    """Raise NaNError for the first patch that introduced NaN. If none did, only one value is read from the device."""
    if flags and torch.stack([flag for flag, *_ in flags]).any():
        entry, patch = next((entry, patch) for flag, entry, patch in flags if flag)
        with labelled(entry.label):
            raise nan_error(patch)
