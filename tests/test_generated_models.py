"""Generated models, patches and nestings: chanpatch gives the numbers of plain torch hooks written by hand."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chanpatch import Patch, PatchedPolicy, Site, hook_points, patched, recording
from chanpatch.patching import Add, Clamp, Project, Scale, Set

# Models: a stack of random blocks on images, a stack of random blocks on sequences, and heads.

CHANNELS, WIDTH = 3, 4


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Twice(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = self.same = body

    def forward(self, x: Tensor) -> Tensor:
        return self.same(self.body(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output, (hidden, cell) = self.lstm(x)
        return output + hidden[-1][:, None] * cell[-1][:, None]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        attended, weights = self.attention(x, x, x)
        return attended + weights.square().sum(-1, keepdim=True)


class Split(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return x.tanh(), [x * 2, x]  # the last one is the input itself


class Join(nn.Module):
    def forward(self, parts: tuple[Tensor, list[Tensor]], *, scale: Tensor) -> Tensor:
        return parts[0] + parts[1][0] * scale - parts[1][1]


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.split, self.join = Split(), Join()

    def forward(self, x: Tensor) -> Tensor:
        parts = self.split(x)
        return self.join(parts, scale=parts[0].mean(-1, keepdim=True))


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"gate": x.sigmoid(), "held": (x,)}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.named, self.inside = Named(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        named = self.named(x)
        return named["gate"] * self.inside(named["held"][0])


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(CHANNELS, WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        return self.widen(image.flatten(2).transpose(1, 2))


class Stack(nn.Module):
    def __init__(self, images: list[nn.Module], sequences: list[nn.Module], returns: str) -> None:
        super().__init__()
        self.images, self.to_sequences, self.sequences = nn.Sequential(*images), Sequences(), nn.ModuleList(sequences)
        self.policy, self.value, self.returns = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 1), returns

    def forward(self, image: Tensor) -> Any:
        x = self.to_sequences(self.images(image))
        for block in self.sequences:
            x = block(x)
        logits, value = self.policy(x.mean(1)), self.value(x.amax(1))
        return {"tensor": logits + value, "tuple": (logits, value), "dict": {"logits": logits, "value": [value]}}[
            self.returns
        ]


ANYWHERE: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "relu in place": lambda: nn.ReLU(inplace=True), "tanh": nn.Tanh, "parts": Parts, "gated": Gated,
}  # fmt: skip
ON_IMAGES: dict[str, Callable[[], nn.Module]] = ANYWHERE | {
    "convolution": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), "batch norm": lambda: nn.BatchNorm2d(CHANNELS),
    "group norm": lambda: nn.GroupNorm(1, CHANNELS), "pool": lambda: nn.AvgPool2d(3, 1, 1),
}  # fmt: skip
ON_SEQUENCES: dict[str, Callable[[], nn.Module]] = ANYWHERE | {
    "linear": lambda: nn.Linear(WIDTH, WIDTH), "layer norm": lambda: nn.LayerNorm(WIDTH), "recurrent": Recurrent,
    "attention": Attention,
}  # fmt: skip


def blocks(draw: Any, kinds: dict[str, Callable[[], nn.Module]], most: int, nest: bool = True) -> list[nn.Module]:
    """Some blocks; an earlier one may come again, and some are bodies of residual or repeated blocks."""
    made: list[nn.Module] = []
    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from([*kinds, "again", *(["residual", "twice"] if nest else [])]))
        if kind == "again":
            made.append(made[draw(st.integers(0, len(made) - 1))] if made else nn.Identity())
        elif kind in ("residual", "twice"):
            body = nn.Sequential(*blocks(draw, kinds, 2, nest=False))
            made.append(Residual(body) if kind == "residual" else Twice(body))
        else:
            made.append(kinds[kind]())
    return made


# Places of tensors, found by plain hooks, and trees of tuples, lists and dicts.


class Place(NamedTuple):
    module: str  # its first name
    call: int
    side: str
    path: tuple[Any, ...]


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    else:
        for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(child, (*path, key))


def with_leaf(tree: Any, path: tuple[Any, ...], leaf: Tensor) -> Any:
    if not path:
        return leaf
    children = dict(tree.items() if isinstance(tree, dict) else enumerate(tree))
    children[path[0]] = with_leaf(children[path[0]], path[1:], leaf)
    return children if isinstance(tree, dict) else type(tree)(children.values())


def name_of(place: Place, calls: Counter[str]) -> str:
    steps = "".join(f'["{key}"]' if isinstance(key, str) else f"[{key}]" for key in place.path)
    module = f"{place.module}#{place.call}" if calls[place.module] > 1 else place.module
    return module if place.side == "out" and place.module and not steps else f"{module}.{place.side}{steps}"


@dataclass
class Run:
    """One forward with plain hooks: the output, and every tensor before and after the writes."""

    output: Any = None
    calls: Counter[str] = field(default_factory=Counter)
    before: dict[Place, Tensor] = field(default_factory=dict)
    after: dict[Place, Tensor] = field(default_factory=dict)
    counts: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # firings, rows, elements, by write


@dataclass
class Write:
    """A patch, and the same by hand: indices on every axis, a function of the region, and a mask."""

    place: Place
    patch: Patch
    indices: list[list[int]]
    batch_axis: int
    edited: Callable[[Tensor, Any], Tensor]
    mask: Callable[[Any], Tensor | None]

    def into(self, leaf: Tensor, inputs: tuple[Tensor, ...], run: Run) -> Tensor:
        count = len(self.indices)
        grid = [torch.tensor(each).view([-1 if n == axis else 1 for n in range(count)])
                for axis, each in enumerate(self.indices)]  # fmt: skip
        region = leaf[tuple(grid)]
        rows = torch.tensor(self.indices[self.batch_axis])
        context = SimpleNamespace(inputs=inputs, call=self.place.call, step=None, rows=rows)
        new, mask = self.edited(region, context), self.mask(context)
        chosen = torch.ones_like(region, dtype=torch.bool) if mask is None else mask.expand(region.shape)
        firings, all_rows, elements = run.counts.get(id(self), (0, 0, 0))
        in_rows = int(chosen.transpose(0, self.batch_axis).flatten(1).any(1).sum())
        run.counts[id(self)] = firings + 1, all_rows + in_rows, elements + int(chosen.sum())
        if new is region:
            return leaf
        written = leaf.clone()
        written[tuple(grid)] = torch.where(chosen, new, region)
        return written


def by_hand(model: nn.Module, image: Tensor, writes: Sequence[Write] = ()) -> Run:
    run = Run()
    at: dict[Place, list[Write]] = defaultdict(list)
    for write in writes:
        at[write.place].append(write)

    def through(name: str, side: str, tree: Any) -> Any:
        for path, leaf in [*leaves(tree)]:
            place, new = Place(name, run.calls[name] - (side == "out"), side, path), leaf
            run.before[place] = leaf.detach().clone()
            for write in at[place]:
                new = write.into(new, (image,), run)
            run.after[place] = new.detach().clone()
            tree = tree if new is leaf else with_leaf(tree, path, new)
        return tree

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            inputs = through(name, "in", dict(enumerate(args)) | kwargs)
            run.calls[name] += 1
            return tuple(inputs[n] for n in range(len(args))), {key: inputs[key] for key in kwargs}

        return hook

    def leave(name: str) -> Any:
        return lambda module, args, output: through(name, "out", output)

    handles = [
        handle
        for name, module in model.named_modules()
        for handle in (
            module.register_forward_pre_hook(enter(name), with_kwargs=True),
            module.register_forward_hook(leave(name)),
        )
    ]
    try:
        run.output = model(image)
    finally:
        for handle in handles:
            handle.remove()
    return run


# Random sites, edits and masks


def index(draw: Any, length: int) -> tuple[Any, list[int]]:
    """An index in one of the ways to write it, and the positions that it means."""
    way = draw(st.sampled_from(["int", "list", "mask", "slice", "tensor"]))
    if way == "int":
        position = draw(st.integers(-length, length - 1))
        return position, [position % length]
    if way == "mask":
        flags = draw(st.lists(st.booleans(), min_size=length, max_size=length).filter(any))
        return flags, [position for position, flag in enumerate(flags) if flag]
    if way == "slice":
        start, step = draw(st.integers(-length, length - 1)), draw(st.sampled_from([None, 2, -1, -2]))
        return slice(start, None, step), list(range(length))[start::step]
    chosen = draw(st.permutations(range(length)))[: draw(st.integers(1, length))]
    written = [position - length * draw(st.booleans()) for position in chosen]
    return (torch.tensor(written) if way == "tensor" else written), list(chosen)


def halved(activation: Tensor) -> Tensor:
    return activation / 2


def the_same(activation: Tensor) -> Tensor:
    return activation


def of_the_call(activation: Tensor, *, context: Any) -> Tensor:
    return activation * (context.call + 2) + context.inputs[0].mean().to(activation)


@dataclass
class AddRows:
    axis: int

    def __call__(self, activation: Tensor, *, context: Any) -> Tensor:
        return activation + on_axis(context.rows, self.axis, activation.dim())


def on_axis(rows: Tensor, axis: int, count: int) -> Tensor:
    return rows.view([-1 if number == axis else 1 for number in range(count)])


EDITS = ["set", "set a tensor", "add", "add a tensor", "scale", "clamp", "project", "halved", "the same", "of the call",
         "add rows"]  # fmt: skip


def edit(draw: Any, shape: list[int], batch_axis: int, noise: Callable[..., Tensor], exact: bool) -> tuple[Any, Any]:
    """An edit, and the same by hand as a function of a region and a context."""
    number = draw(st.sampled_from([0, -1.5, 2]))
    operand = noise([length if draw(st.booleans()) else 1 for length in shape])
    kind = draw(st.sampled_from([each for each in EDITS if not (exact and each == "project")]))
    if kind == "set":
        return Set(number), lambda region, context: torch.full_like(region, number)
    if kind == "set a tensor":
        return Set(operand), lambda region, context: operand.expand(region.shape)
    if kind == "add":
        return Add(number), lambda region, context: region + number
    if kind == "add a tensor":
        return Add(operand, -0.5), lambda region, context: region + operand * -0.5
    if kind == "scale":
        return Scale(operand), lambda region, context: region * operand
    if kind == "clamp":
        return Clamp(-0.25, None), lambda region, context: torch.where(region < -0.25, -0.25, region)
    if kind == "project":
        letters = "abcdefg"[: len(shape)]
        along = [letter for letter, length in zip(letters, operand.shape, strict=True) if length > 1]
        unit = operand / operand.norm()

        def projected(region: Tensor, context: Any) -> Tensor:
            left = "".join(letter for letter in letters if letter not in along)
            component = torch.einsum(f"{letters},{letters}->{left}", region, unit.expand(region.shape))
            sizes = [1 if letter in along else length for letter, length in zip(letters, region.shape, strict=True)]
            return region - component.reshape(sizes) * unit

        return Project(operand), projected
    if kind == "halved":
        return halved, lambda region, context: region / 2
    if kind == "the same":
        return the_same, lambda region, context: region
    if kind == "of the call":
        return of_the_call, lambda region, context: region * (context.call + 2) + context.inputs[0].mean().to(region)
    return AddRows(batch_axis), lambda region, context: region + on_axis(context.rows, batch_axis, region.dim())


def where(draw: Any, shape: list[int], batch_axis: int) -> tuple[Any, Callable[[Any], Tensor | None]]:
    kind = draw(st.sampled_from(["none", "none", "mask", "function"]))
    if kind == "none":
        return None, lambda context: None
    if kind == "mask":
        lengths = [length if draw(st.booleans()) else 1 for length in shape]
        count = torch.Size(lengths).numel()
        mask = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count))).view(lengths)
        return mask, lambda context: mask

    def odd(context: Any) -> Tensor:
        return on_axis(context.rows % 2 == 1, batch_axis, len(shape))

    return odd, odd


# The cases


class Generated:
    """One model with its hook points, and what is drawn on it."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.seeds = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        self.exact = draw(st.integers(0, 3)) == 0  # in single precision every bit is compared
        self.dtype = torch.float32 if self.exact else torch.float64
        images, sequences = blocks(draw, ON_IMAGES, 3), blocks(draw, ON_SEQUENCES, 3)
        self.model = Stack(images, sequences, draw(st.sampled_from(["tensor", "tuple", "dict"])))
        self.model.to(self.dtype).eval()
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.copy_(self.noise(weight.shape) * 0.5)
        self.by_hand = copy.deepcopy(self.model)
        self.rows = draw(st.integers(1, 3))
        with torch.no_grad():
            self.plain = by_hand(self.by_hand, self.image())
            longer = by_hand(self.by_hand, self.image(self.rows + 1))
        self.batch_axes = {
            place: [one != other for one, other in zip(tensor.shape, longer.before[place].shape, strict=True)].index(
                True
            )
            for place, tensor in self.plain.before.items()
        }
        self.points = hook_points(self.model, self.image(draw(st.integers(1, 3))))
        self.traced = draw(st.booleans())
        self.target: Any = self.model
        self.kept: list[Write] = []  # in the twin

    def noise(self, shape: Any) -> Tensor:
        return torch.randn(*shape, generator=self.seeds, dtype=torch.float64).to(self.dtype)

    def image(self, rows: int | None = None) -> Tensor:
        return self.noise((self.rows if rows is None else rows, CHANNELS, 3, 3))

    def name(self, place: Place) -> str:
        return name_of(place, self.plain.calls)

    def site(self, traced: bool) -> tuple[Place, Site, list[list[int]]]:
        place = self.draw(st.sampled_from([*self.plain.before]))
        shape, axes = self.plain.before[place].shape, self.points[self.name(place)].axes
        indices, positions = {}, []
        for axis, length in zip(axes, shape, strict=True):
            positions.append([*range(length)])
            if self.draw(st.integers(0, 2)) == 0:
                indices[axis], positions[-1] = index(self.draw, length)
        if traced:
            return place, self.points.site(self.name(place), **indices), positions
        return place, Site(self.name(place), **indices), positions

    def write(self) -> Write:
        place, site, positions = self.site(self.traced)
        shape, batch_axis = [len(each) for each in positions], self.batch_axes[place]
        given, edited = edit(self.draw, shape, batch_axis, self.noise, self.exact)
        mask, same_mask = where(self.draw, shape, batch_axis)
        return Write(place, Patch(site, given, mask), positions, batch_axis, edited, same_mask)

    def writes(self) -> list[Write]:
        return [self.write() for _ in range(self.draw(st.integers(1, 3)))]

    @property
    def points_or_model(self) -> Any:
        return self.points if self.traced and self.target is self.model else self.target

    def same(self, one: Any, other: Any, tolerance: float | None = None) -> None:
        tolerance = tolerance or (0 if self.exact else 1e-8)
        pairs = zip(leaves(one), leaves(other), strict=True)
        for (path, left), (same_path, right) in pairs:
            assert path == same_path
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


class Patching:
    def __init__(self, case: Generated) -> None:
        self.case, self.writes, self.counts = case, case.writes(), Counter[tuple[int, int]]()
        self.context = patched(case.points_or_model, [write.patch for write in self.writes])
        self.ledger = self.context.__enter__()

    def after(self, run: Run) -> None:
        counted(self.case, self.ledger, self.writes, self.counts, run)


def counted(case: Generated, ledger: Any, writes: list[Write], counts: Counter[tuple[int, int]], run: Run) -> None:
    """Compare a ledger with the counts of all forwards so far."""
    for number, write in enumerate(writes):
        for which, count in enumerate(run.counts.get(id(write), (0, 0, 0))):
            counts[number, which] += count
        record = ledger.to_records()[number]
        if record["rows"] is None and not case.traced:
            record["rows"] = counts[number, 1]  # the batch axis of a site without a trace may not be known
        assert [record[name] for name in ("firings", "rows", "elements")] == [
            counts[number, which] for which in range(3)
        ]


class Recording:
    def __init__(self, case: Generated) -> None:
        self.case, self.writes = case, list[Write]()
        self.before = case.draw(st.booleans())
        self.sites = [case.site(traced=True) for _ in range(case.draw(st.integers(1, 3)))]
        self.context = recording(case.points_or_model, [site for _, site, _ in self.sites], before=self.before)
        self.cache = self.context.__enter__()
        self.found: dict[int, list[Tensor]] = defaultdict(list)

    def after(self, run: Run) -> None:
        for number, (place, site, positions) in enumerate(self.sites):
            tensor = (run.before if self.before else run.after)[place]
            for axis, each in enumerate(positions):
                tensor = tensor.index_select(axis, torch.tensor(each))
            self.found[number].append(tensor)
            expected = torch.cat(self.found[number], self.case.batch_axes[place])
            self.case.same(self.cache[site], expected)


class Disabled:
    def __init__(self, case: Generated) -> None:
        self.writes = list[Write]()
        self.context = case.target.disable()
        self.context.__enter__()

    def after(self, run: Run) -> None:
        """Nothing to compare."""


class Bystander:
    """A hook of the user's that was there first: it sees the output that flows on."""

    def __init__(self, case: Generated, root: nn.Module) -> None:
        modules = dict(root.named_modules())
        self.name = case.draw(st.sampled_from(sorted({place.module for place in case.plain.before} - {""})))
        self.case, self.seen = case, list[Any]()
        self.handle = modules[self.name].register_forward_hook(
            lambda module, args, output: self.seen.append(copy.deepcopy([t.detach() for _, t in leaves(output)]))
        )

    def after(self, run: Run) -> None:
        seen, self.seen = self.seen, []
        if len(seen) != run.calls[self.name]:
            assert not self.case.traced  # it saw the trace that gave the axis names, too
            return
        for call, outputs in enumerate(seen):
            places = [place for place in run.after if place[:3] == (self.name, call, "out")]
            self.case.same(outputs, [run.after[place] for place in places])


def check(draw: Any) -> None:
    case = Generated(draw)
    assert {case.name(place) for place in case.plain.before} == set(case.points)
    assert {case.name(place): axis for place, axis in case.batch_axes.items()} == {
        name: point.batch_axis for name, point in case.points.items()
    }
    twin_counts: Counter[tuple[int, int]] = Counter()
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):  # a twin, and a twin of a twin
        writes = case.writes()
        given = case.points if case.traced and case.target is case.model else case.target
        case.target, case.kept = PatchedPolicy(given, [write.patch for write in writes]), case.kept + writes
    bystander = Bystander(case, case.target)
    kinds: list[Any] = [Patching, Recording]
    opened: list[Any] = []
    for _ in range(draw(st.integers(0 if case.kept else 1, 3))):
        opened.append(draw(st.sampled_from([*kinds, Disabled] if case.kept else kinds))(case))
    closed = list(draw(st.permutations(range(len(opened)))))
    remaining = dict(enumerate(opened))
    while True:
        off = any(isinstance(each, Disabled) for each in remaining.values())
        writes = [*([] if off else case.kept), *(write for each in remaining.values() for write in each.writes)]
        run = compared(case, writes, case.target)
        for each in (*remaining.values(), bystander):
            each.after(run)
        if case.kept:
            counted(case, case.target.ledger, case.kept, twin_counts, run)
        if not closed:
            break
        remaining.pop(number := closed.pop())
        opened[number].context.__exit__(None, None, None)
    bystander.handle.remove()
    with torch.no_grad():
        compared(case, [], case.model)
    if case.target is case.model:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())


def compared(case: Generated, writes: list[Write], target: nn.Module) -> Run:
    """Run by hand and by chanpatch; compare the output, the inputs that are left, and some gradients."""
    image = case.image()
    given, gradients = image.clone(), case.draw(st.booleans()) and torch.is_grad_enabled()
    expected: tuple[Tensor | None, ...] = ()
    with torch.set_grad_enabled(gradients):
        try:
            run = by_hand(case.by_hand, image, writes)
            expected = gradients_of(case.by_hand, run.output) if gradients else ()
        except RuntimeError as error:  # a tensor that the gradient needs was overwritten in place
            assert "inplace operation" in str(error)
            gradients = False
    with torch.set_grad_enabled(gradients):
        if not gradients:
            image = given.clone()
            run = by_hand(case.by_hand, image, writes)
        output = target(given)
    case.same(output, run.output)
    case.same(given, image)
    if gradients:
        for found, other in zip(gradients_of(case.model, output), expected, strict=True):
            for one, another in ((found, other), (other, found)):
                if one is not None:  # a gradient that is cut off is a zero gradient
                    another = torch.zeros_like(one) if another is None else another
                    case.same(one, another, 1e-4 if case.exact else 1e-8)  # sums in another order
    return run


def gradients_of(model: nn.Module, output: Any) -> tuple[Tensor | None, ...]:
    total = sum(tensor.square().sum() for _, tensor in leaves(output))
    weights = [*model.parameters()]
    return torch.autograd.grad(total, weights, allow_unused=True) if total.requires_grad else (None,) * len(weights)


def cases(count: int) -> Any:
    """So many cases, the same ones each time; a failing one is shown as it was found."""
    chosen = settings(
        max_examples=count, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )  # fmt: skip
    return lambda test: chosen(given(data=st.data())(test))


CASES, SLOW_CASES = 200, 2000


@pytest.fixture
def counting(record_property: Any) -> Iterator[Counter[str]]:
    """Counts models for docs/reliability.md."""
    counts: Counter[str] = Counter()
    yield counts
    record_property("generated models", counts["models"])


@cases(CASES)
def test_patches_and_records_of_a_generated_model_are_those_of_hooks_written_by_hand(data: Any, counting: Any) -> None:
    check(data.draw)
    counting["models"] += 1


@pytest.mark.slow
@cases(SLOW_CASES)
def test_patches_and_records_of_many_generated_models_are_those_of_hooks(data: Any, counting: Any) -> None:
    check(data.draw)
    counting["models"] += 1
