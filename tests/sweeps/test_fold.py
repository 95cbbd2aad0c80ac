"""Folds: patches as blocks of rows in one batch, where rows are independent and where they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from looped import ROWS, Squashed, assert_equals_the_loop, by_hand, parts, strategy_of, total
from models import MODELS, build
from torch import Tensor, nn

from chanpatch import edit, errors, hook_points, patch_in, patched, resample_ablate, steer, sweep, zero_ablate
from chanpatch.patching import Scale, Set
from chanpatch.sweeps import SweepResult, fold, plan


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Residual(nn.Module):
    """Blocks with a skip connection; a test may give what happens in each block and after the last one."""

    def __init__(
        self, between: Callable[[Tensor], Tensor] = torch.relu, after: Callable[[Tensor], Tensor] = torch.tanh
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))
        self.head, self.between, self.after = nn.Linear(6, 4), between, after

    def forward(self, vector: Tensor) -> Tensor:
        for layer in self.layers:
            vector = vector + self.between(layer(vector))
        return self.after(self.head(vector))


def one_per_layer(model: nn.Module, rows: int = ROWS, **options: Any) -> SweepResult:
    """A sweep with one patch at each layer, checked against the loop."""
    inputs = (torch.randn(rows, 6),)
    points = hook_points(model.eval(), *inputs)
    patches = {n: edit(points.site(f"layers.{n}", feature=n), Scale(-2.0)) for n in range(6)}
    return assert_equals_the_loop(points, inputs, patches, **options)


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("rows", [1, 2, ROWS])
def test_one_patch_at_each_layer_is_folded(monkeypatch: pytest.MonkeyPatch, rows: int, store: bool) -> None:
    monkeypatch.setattr(plan, "_OPERATIONS", -1 if store else 10**9)
    result = one_per_layer(Residual(), rows, strategy="auto" if store else "fold")
    assert strategy_of(result) == "fold"
    assert result.groups[0].why == "the 2 patches checked (of 6) agree with the loop"


@pytest.mark.parametrize("max_bytes", [2**11, 2**12, 2**20])
def test_a_fold_in_several_chunks_skips_what_comes_before_each(max_bytes: int) -> None:
    assert strategy_of(one_per_layer(Residual(), strategy="fold", max_bytes=max_bytes)) == "fold"
    result = one_per_layer(Residual(), max_bytes=max_bytes)
    assert strategy_of(result) in ("fold", "loop")


TOGETHER: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda hidden: hidden - hidden.mean(0),
    "largest": lambda hidden: hidden - hidden.max(),
    "smallest": lambda hidden: hidden - hidden.amin(0),
    "softmax over rows": lambda hidden: hidden.softmax(0),
    "running sum": lambda hidden: hidden.cumsum(0),
    "sorted": lambda hidden: hidden.sort(0).values,
    "neighbor": lambda hidden: hidden + hidden.roll(1, 0),
    "first row": lambda hidden: hidden + hidden[:1],
    "last row": lambda hidden: hidden + hidden[-1:],
    "above the median": lambda hidden: hidden * (hidden > hidden.median()),
    "largest of the batch": lambda hidden: hidden.where(hidden >= hidden.flatten().topk(len(hidden)).values[-1], 0),
    "number of rows": lambda hidden: hidden / len(hidden),
    "branch on the number of rows": lambda hidden: hidden if len(hidden) <= ROWS else hidden * 2,
    "position of the row": lambda hidden: hidden + torch.arange(len(hidden)).view(-1, 1),
    "batch statistics": nn.BatchNorm1d(4, track_running_stats=False),
    "quantized by the largest": lambda hidden: (hidden / hidden.abs().max() * 7).round(),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_rows_that_are_treated_together_after_the_last_patch_are_not_folded(name: str) -> None:
    assert strategy_of(one_per_layer(Residual(after=TOGETHER[name]))) in ("resume", "loop", "vmap")


@pytest.mark.parametrize("name", [name for name in TOGETHER if name != "batch statistics"])
def test_rows_that_are_treated_together_in_each_layer_are_not_folded(name: str) -> None:
    assert strategy_of(one_per_layer(Residual(between=TOGETHER[name]))) in ("resume", "loop", "vmap")


@pytest.mark.parametrize("name", ["last row", "above the median", "largest of the batch"])
def test_rows_that_are_treated_together_between_two_hook_points_are_not_folded(name: str) -> None:
    inputs = (torch.randn(ROWS, 6),)
    points = hook_points(Squashed(TOGETHER[name]).eval(), *inputs)
    places = [(name, n, value) for name in ("second", "last") for n in range(4) for value in (0.0, 3.0, -4.0, 1.0)]
    patches = {place: patch_in(points.site(place[0], feature=place[1]), place[2]) for place in places}
    result = assert_equals_the_loop(points, inputs, patches)
    assert "fold" not in {group.strategy for group in result.groups}


RARELY_TOGETHER: dict[str, Callable[[Tensor], Tensor]] = {
    "any large value": lambda hidden: hidden * (1 + (hidden > 4).any()),
    "count of large values": lambda hidden: hidden + (hidden > 4).sum(),
    "scaled by the largest": lambda hidden: hidden / hidden.nan_to_num().abs().amax().clamp(min=4),
}


@pytest.mark.parametrize("name", RARELY_TOGETHER)
def test_rows_that_only_large_values_in_other_rows_change_are_not_folded(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(fold, "_GAIN", np.inf)
    inputs = (torch.randn(ROWS, 6),)
    points = hook_points(Residual(RARELY_TOGETHER[name]).eval(), *inputs)
    places = [(n, feature, value) for n in range(6) for feature in range(3) for value in (0.0, 9.0)]
    patches = {place: patch_in(points.site(f"layers.{place[0]}", feature=place[1]), place[2]) for place in places}
    for max_bytes in (2**11, 2**13):
        result = assert_equals_the_loop(points, inputs, patches, max_bytes=max_bytes)
        assert "fold" not in {group.strategy for group in result.groups}


@pytest.mark.parametrize("name", RARELY_TOGETHER)
def test_the_values_beside_a_single_row_are_large_even_if_those_in_the_row_are_zero(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(fold, "_GAIN", np.inf)

    class Rectified(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.relu, self.last = nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.last(RARELY_TOGETHER[name](self.relu(self.first(hidden))))

    inputs = (torch.randn(ROWS, 6),)
    inputs[0][0] = 0.0
    points = hook_points(Rectified().eval(), *inputs)
    places = [(feature, value) for value in (0.0, 0.5, 9.0) for feature in range(4)]
    patches = {place: patch_in(points.site("relu", feature=place[0]), place[1]) for place in places}
    for max_bytes in (2**8, 2**11, 2**13):
        result = assert_equals_the_loop(points, inputs, patches, max_bytes=max_bytes)
        assert "fold" not in {group.strategy for group in result.groups}


@pytest.mark.parametrize("max_bytes", [2**11, 2**12, 2**13])
def test_what_a_skipped_module_shares_with_later_modules_is_what_the_loop_reads(
    monkeypatch: pytest.MonkeyPatch, max_bytes: int
) -> None:
    monkeypatch.setattr(fold, "_GAIN", np.inf)
    monkeypatch.setattr(plan, "_OPERATIONS", -1)

    class Shares(nn.Module):
        def __init__(self, shared: dict[str, Tensor]) -> None:
            super().__init__()
            self.layer, self.shared = nn.Linear(6, 6), shared

        def forward(self, hidden: Tensor) -> Tensor:
            self.shared["hidden"] = self.layer(hidden).tanh()
            return self.shared["hidden"]

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared: dict[str, Tensor] = {}
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
            self.first, self.second = Shares(self.shared), Shares(self.shared)

        def forward(self, vector: Tensor) -> Tensor:
            hidden = self.layers[1](self.first(self.layers[0](vector)))
            hidden = self.layers[2](hidden + self.shared["hidden"].sin())
            return self.layers[4](self.layers[3](self.second(hidden)) + self.shared["hidden"].sin())  # type: ignore[no-any-return]

    inputs = (torch.randn(9, 6),)
    points = hook_points(Reads().eval(), *inputs)
    names = ("layers.0", "first.layer", "layers.1", "layers.2", "second", "layers.3.in[0]", "layers.3", "layers.4")
    patches = {(name, n): zero_ablate(points.site(name, feature=n)) for name in names for n in range(6)}
    assert_equals_the_loop(points, inputs, patches, max_bytes=max_bytes)


@pytest.mark.parametrize("strategy", ["auto", "resume"])
def test_an_output_that_is_scaled_through_its_data_is_what_the_loop_patches(
    monkeypatch: pytest.MonkeyPatch, strategy: Any
) -> None:
    monkeypatch.setattr(plan, "_OPERATIONS", -1)

    class Scales(Residual):
        def forward(self, vector: Tensor) -> Tensor:
            hidden = self.layers[0](vector)
            result = self.layers[1](hidden)
            hidden.data.mul_(0.5)
            return super().forward(hidden + result)

    inputs = (torch.randn(ROWS, 6),)
    points = hook_points(Scales().eval(), *inputs)
    whole, part = points.site("layers.0#0"), points.site("layers.0#0", feature=2)
    patches = {"first": patch_in(whole, 1.0), "part": patch_in(part, 2.0), "last": patch_in(whole, 3.0)}
    assert_equals_the_loop(points, inputs, patches, strategy=strategy)


@pytest.mark.parametrize("max_bytes", [2**13, 2**15, 2**28])
def test_weights_from_the_mean_of_another_input_are_not_folded(max_bytes: int) -> None:
    class Generated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weights, self.last = nn.Linear(6, 6), nn.Linear(4, 36), nn.Linear(6, 2)

        def forward(self, vector: Tensor, other: Tensor) -> Tensor:
            weights = self.weights(other).mean(0).view(6, 6)
            return self.last((self.first(vector) @ weights).tanh())

    inputs = torch.randn(ROWS, 6), torch.randn(ROWS, 4)
    points = hook_points(Generated().eval(), *inputs)
    names = (".in[0]", "weights.in[0]", "last")
    patches = {site: zero_ablate(site) for name in names for site in parts(points.site(name))[:5]}
    result = assert_equals_the_loop(points, inputs, patches, max_bytes=max_bytes)
    assert "fold" not in {group.strategy for group in result.groups}


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda hidden: hidden.tanh() if hidden[:, 0].sum() > 0.5 else -hidden,
    "item": lambda hidden: hidden * float(hidden.abs().max().item() > 1.5),
    "numpy": lambda hidden: hidden * float(hidden.numpy().max() > 1.5),
    "nonzero": lambda hidden: hidden / max(1, len((hidden > 1).nonzero())),
    "mask": lambda hidden: hidden / max(1, len(hidden[hidden > 1])),
    "unique": lambda hidden: hidden / len(hidden.round().unique()),
    "counts": lambda hidden: hidden.repeat_interleave((hidden[0] > 1).long() + 1, 1).std(1, keepdim=True),
    "one_hot": lambda hidden: hidden * nn.functional.one_hot((hidden > 1.5).any(-1).long()).shape[1],
}


@pytest.mark.parametrize("name", READS)
def test_a_model_that_reads_a_value_after_a_patch_is_not_folded(name: str) -> None:
    result = one_per_layer(Residual(after=READS[name]))
    assert strategy_of(result) != "fold"
    assert "fold: after 'layers.0', the model reads values from tensors" in result.groups[0].why


def test_a_read_before_the_patches_does_not_prevent_a_fold() -> None:
    class Checked(Residual):
        def forward(self, vector: Tensor) -> Tensor:
            return super().forward(vector if vector.abs().max() < 100 else vector * 0)

    assert strategy_of(one_per_layer(Checked())) == "fold"


def test_argument_checks_of_distributions_do_not_prevent_a_fold() -> None:
    class Policy(Residual):
        def forward(self, vector: Tensor) -> Any:
            return torch.distributions.Categorical(logits=super().forward(vector))

    assert strategy_of(one_per_layer(Policy())) == "fold"


class Layered(nn.Module):
    """Four layers; a test gives what follows from the outputs of the layers, whose last one is patched."""

    def __init__(self, end: Callable[[list[Tensor]], Any]) -> None:
        super().__init__()
        self.layers, self.head, self.end = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)), nn.Linear(6, 4), end

    def forward(self, vector: Tensor) -> Any:
        outputs = [vector]
        for layer in self.layers:
            outputs.append(layer(outputs[-1].relu()))
        return self.end([self.head(outputs[-1]), *outputs[:-1]])


ENDS: dict[str, Callable[[list[Tensor]], Any]] = {
    "only the patched output": lambda read: read[0],
    "an earlier output": lambda read: read[0] + read[2].mean(1, keepdim=True),
    "an earlier output through a list": lambda read: read[0] + torch.stack(read[2:]).sum((0, 2))[:, None],
    "the inputs": lambda read: read[0] * read[1][:, :1],
    "the number of rows of an earlier output": lambda read: read[0] + torch.zeros(read[2].shape[0], 1),
    "an earlier output is returned": lambda read: {"late": read[0], "early": read[3]},
    "the inputs are returned": lambda read: (read[0], read[1]),
}


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("name", ENDS)
def test_what_is_read_after_the_patches_has_one_block_per_patch(
    monkeypatch: pytest.MonkeyPatch, name: str, rows: int
) -> None:
    monkeypatch.setattr(plan, "_OPERATIONS", -1)
    inputs = (torch.randn(rows, 6),)
    points = hook_points(Layered(ENDS[name]).eval(), *inputs)
    patches = {site: zero_ablate(site) for site in parts(points.site("layers.3"))}
    assert strategy_of(assert_equals_the_loop(points, inputs, patches)) == "fold"


def test_the_number_of_rows_may_be_read_before_the_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shaped(Residual):
        def forward(self, vector: Tensor) -> Tensor:
            count = vector.shape[0]
            for layer in self.layers:
                vector = layer(vector.relu())
            return self.head(vector.view(count, 2, 3).flatten(1))

    monkeypatch.setattr(plan, "_OPERATIONS", -1)
    points = hook_points(Shaped().eval(), *(inputs := (torch.randn(ROWS, 6),)))
    patches = {site: zero_ablate(site) for site in parts(points.site("layers.5"))}
    assert strategy_of(assert_equals_the_loop(points, inputs, patches)) == "fold"


def test_outputs_that_only_skipped_modules_read_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_OPERATIONS", -1)
    points = hook_points(Layered(ENDS["an earlier output"]).eval(), *(inputs := (torch.randn(ROWS, 6),)))
    seen: dict[int, set[int]] = {number: set() for number in range(4)}
    for number, layer in enumerate(points.model.layers):
        layer.register_forward_hook(lambda _, args, output, number=number: seen[number].add(len(output)))
    patches = {site: zero_ablate(site) for site in parts(points.site("layers.3"))}
    sweep(points, *inputs, patches=patches, metric=total, strategy="fold")
    blocks = len(patches) * ROWS
    assert [blocks in counts for counts in seen.values()] == [True, False, False, True]


@pytest.mark.parametrize("output", ["mean", "total", "constant"])
def test_an_output_without_rows_is_not_folded(output: str) -> None:
    def after(hidden: Tensor) -> Any:
        other = {"mean": hidden.mean(), "total": hidden.sum(0), "constant": torch.ones(3)}[output]
        return {"logits": hidden, "other": other}

    model, inputs = Residual(after=after).eval(), (torch.randn(ROWS, 6),)
    points = hook_points(model, *inputs)
    patches = {n: zero_ablate(points.site(f"layers.{n}")) for n in range(6)}
    metric = lambda output: output["logits"].sum(1) + output["other"].sum()  # noqa: E731
    result = sweep(points, *inputs, patches=patches, metric=metric)
    np.testing.assert_allclose(result.values["metric"], by_hand(points, inputs, patches, metric), rtol=1e-5)
    assert strategy_of(result) != "fold"


def test_numbers_in_the_output_are_those_of_the_unfolded_batch() -> None:
    def after(hidden: Tensor) -> Any:
        return {"logits": hidden, "rows": len(hidden)}

    model, inputs = Residual(after=after).eval(), (torch.randn(ROWS, 6),)
    points = hook_points(model, *inputs)
    patches = {n: zero_ablate(points.site(f"layers.{n}")) for n in range(6)}
    result = sweep(points, *inputs, patches=patches, metric=lambda output: output["logits"].sum(1) / output["rows"])
    expected = by_hand(points, inputs, patches, lambda output: output["logits"].sum(1) / ROWS)
    np.testing.assert_allclose(result.values["metric"], expected, rtol=1e-5)
    assert strategy_of(result) == "fold"


class Cache:
    """Hides a tensor of each forward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.keys = [tensor]

    def __getitem__(self, number: int) -> Tensor:
        return self.keys[number]

    def __len__(self) -> int:
        return len(self.keys)


def cached(hidden: Tensor) -> Any:
    return {"logits": hidden, "cache": Cache(hidden * 3)}


def swept_with(metric: Callable[[Any], Tensor]) -> SweepResult:
    model, inputs = Residual(after=cached).eval(), (torch.randn(ROWS, 6),)
    points = hook_points(model, *inputs)
    patches = {n: zero_ablate(points.site(f"layers.{n}")) for n in range(6)}
    result = sweep(points, *inputs, patches=patches, metric={"metric": metric})
    np.testing.assert_allclose(result.values["metric"], by_hand(points, inputs, patches, metric), rtol=1e-5)
    return result


def test_a_cache_in_the_output_does_not_prevent_a_fold() -> None:
    assert strategy_of(swept_with(lambda output: output["logits"][:, 0])) == "fold"


def swallowing(output: Any) -> Tensor:
    try:
        keys = output["cache"].keys[0]
    except Exception:
        keys = output["logits"] * 0
    return (output["logits"] + keys).sum(1)


READERS: dict[str, Callable[[Any], Tensor]] = {
    "attribute": lambda output: output["cache"].keys[0].sum(1),
    "item": lambda output: output["cache"][0].sum(1),
    "length": lambda output: output["logits"][:, 0] * len(output["cache"]),
    "iteration": lambda output: sum(each.sum(1) for each in output["cache"]),
    "caught error": swallowing,
}


@pytest.mark.parametrize("name", READERS)
def test_a_metric_that_reads_a_cache_gets_the_cache_of_each_patch(name: str) -> None:
    result = swept_with(READERS[name])
    assert strategy_of(result) != "fold"
    assert "fold: a metric reads the Cache in the output" in result.groups[0].why


def test_a_fold_that_was_asked_for_is_an_error_if_a_metric_reads_a_cache() -> None:
    inputs = (torch.randn(ROWS, 6),)
    points = hook_points(Residual(after=cached).eval(), *inputs)
    patches = [zero_ablate(points.site(f"layers.{n}")) for n in range(6)]
    with pytest.raises(errors.SweepError, match="strategy='fold' does not work at 'layers.0': fold: a metric reads"):
        sweep(points, *inputs, patches=patches, metric=READERS["item"], strategy="fold")


@pytest.mark.parametrize("writes", [torch.relu_, nn.ReLU(inplace=True)], ids=["function", "module"])
def test_writes_in_place_reach_the_rows_that_are_patched_elsewhere(writes: Callable[[Tensor], Tensor]) -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.same, self.last = nn.ModuleList([nn.Linear(6, 6)]), nn.Identity(), nn.Linear(6, 4)

        def forward(self, vector: Tensor) -> Tensor:
            hidden = self.layers[0](vector)
            writes(self.same(hidden))  # also changes `hidden`, unless this place is patched
            return self.last(hidden)

    inputs = (torch.randn(ROWS, 6),)
    points = hook_points(Aliased().eval(), *inputs)
    sites = [site for name in ("layers.0", "same", "last.in[0]") for site in parts(points.site(name))]
    assert_equals_the_loop(points, inputs, {site: edit(site, Scale(3.0)) for site in sites})
    assert_equals_the_loop(points, inputs, {site: edit(site, Scale(3.0)) for site in sites}, max_bytes=2**11)


class Overwritten(nn.Module):
    """A block overwrites its input, which a skip connection then reads."""

    def __init__(self, writer: nn.Module) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(6, 6), nn.Sequential(writer, nn.Linear(6, 6))
        self.relu, self.last = nn.ReLU(inplace=True), nn.Linear(6, 4)

    def forward(self, vector: Tensor) -> Tensor:
        hidden = self.first(vector)
        return self.last(self.relu(self.block(hidden)) + hidden)


class Halves(nn.Module):
    def forward(self, vector: Tensor) -> Tensor:
        return vector.mul_(0.5).tanh()


@pytest.mark.parametrize("writer", [nn.ReLU(inplace=True), Halves()], ids=["inplace", "custom"])
@pytest.mark.parametrize("max_bytes", [2**11, 2**28])
@pytest.mark.parametrize("strategy", ["fold", "vmap", "resume", "auto"])
def test_a_module_that_overwrites_its_input_does_so_before_every_patch(
    writer: nn.Module, max_bytes: int, strategy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_OPERATIONS", -1)
    inputs = (torch.randn(ROWS, 6),)
    points = hook_points(Overwritten(writer).eval(), *inputs)
    patches = {
        site: steer(site, 1.5) for name in ("first", "block", "relu.in[0]", "last") for site in parts(points.site(name))
    }
    result = assert_equals_the_loop(points, inputs, patches, strategy=strategy, max_bytes=max_bytes)
    assert strategy == "auto" or strategy_of(result) == strategy


class HalvesData(nn.Module):
    """Halves its input in a way that torch's versions do not show."""

    def forward(self, vector: Tensor) -> Tensor:
        vector.data.mul_(0.5)
        return vector * 2


@pytest.mark.parametrize("max_bytes", [2**11, 2**28])
@pytest.mark.parametrize("strategy", ["fold", "resume", "auto"])
def test_patches_before_and_at_an_input_that_is_overwritten_unseen_do_not_affect_each_other(
    max_bytes: int, strategy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_OPERATIONS", -1)
    inputs = (torch.randn(ROWS, 6),)
    points = hook_points(Overwritten(HalvesData()).eval(), *inputs)
    sites = [site for name in ("first", "block.0.in[0]", "block") for site in parts(points.site(name))]
    for each in (sites, sites[::-1]):
        patches = {site: steer(site, 1.5) for site in each}
        assert_equals_the_loop(points, inputs, patches, strategy=strategy, max_bytes=max_bytes)


def test_masks_draws_and_rows_of_the_context_are_those_of_the_unfolded_batch() -> None:
    inputs = (torch.randn(ROWS, 6),)
    points = hook_points(Residual().eval(), *inputs)
    mask = (torch.arange(ROWS) % 3 == 1).view(-1, 1)
    patches: dict[Any, Any] = {}
    for n in range(6):
        site = points.site(f"layers.{n}")
        patches |= {
            (n, "mask"): zero_ablate(site, where=mask),
            (n, "rows"): edit(site, lambda a, *, context: a * context.rows.view(-1, 1)),
            (n, "draws"): resample_ablate(site, torch.randn(50, 6), seed=n),
            (n, "uniform"): edit(site, lambda a, *, context: a + context.uniform((6,))),
            (n, "inputs"): edit(site, lambda a, *, context: a + context.inputs[0].mean()),
            (n, "over rows"): edit(site, lambda a: a - a.mean(0)),
            (n, "source"): patch_in(site, torch.randn(ROWS, 6)),
        }
    assert strategy_of(assert_equals_the_loop(points, inputs, patches)) == "fold"


def test_an_edit_that_draws_from_a_generator_is_not_folded() -> None:
    inputs = (torch.randn(ROWS, 6),)
    points = hook_points(Residual().eval(), *inputs)
    patches = {n: edit(points.site(f"layers.{n}"), torch.rand_like) for n in range(6)}
    state = torch.get_rng_state()
    result = sweep(points, *inputs, patches=patches, metric=total)
    for row, patch in zip(result.values["total"], patches.values(), strict=True):
        torch.set_rng_state(state)
        np.testing.assert_allclose(row, by_hand(points, inputs, {0: patch})[0], rtol=1e-5)
    assert strategy_of(result) != "fold"


def test_an_edit_that_sets_an_attribute_of_the_model_is_not_folded() -> None:
    class Gated(Residual):
        factor = 1.0

        def forward(self, vector: Tensor) -> Tensor:
            return super().forward(vector) * self.factor

    model, inputs = Gated().eval(), (torch.randn(ROWS, 6),)
    points = hook_points(model, *inputs)

    def setting(number: int) -> Callable[[Tensor], Tensor]:
        def function(activation: Tensor) -> Tensor:
            model.factor = number + 2.0
            return activation * 0

        return function

    patches = {n: edit(points.site(f"layers.{n}"), setting(n)) for n in range(6)}
    result = sweep(points, *inputs, patches=patches, metric=total)
    np.testing.assert_allclose(result.values["total"], by_hand(points, inputs, patches), rtol=1e-5)
    assert strategy_of(result) != "fold"


@pytest.mark.parametrize("name", ["lstm_policy", "dict_output", "tuple_output", "attention", "shared_module"])
def test_one_patch_at_every_hook_point_equals_the_loop_in_a_fold(name: str) -> None:
    model = build(name)
    inputs = model.inputs(ROWS)
    points = hook_points(model.module, *inputs)
    names = [each for each, point in points.items() if not point.read_only and point.dtype.is_floating_point]
    assert_equals_the_loop(points, inputs, {each: edit(points.site(each), Scale(2.0)) for each in names})
    patches = {(each, f): edit(points.site(each), Scale(f)) for each in names for f in (0.5, 2.0)}
    assert_equals_the_loop(points, inputs, patches, max_bytes=2**14)


@pytest.mark.parametrize("name", MODELS)
def test_patches_at_one_hook_point_equal_the_loop_after_skipped_modules(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(plan, "_OPERATIONS", -1)
    model = build(name)
    inputs = model.inputs(ROWS)
    points = hook_points(model.module, *inputs)
    for each, point in points.items():
        if not point.read_only and point.dtype.is_floating_point:
            patches = {factor: edit(points.site(each), Scale(factor)) for factor in (-1.0, 0.5, 2.0)}
            assert_equals_the_loop(points, inputs, patches)


def test_a_batch_axis_that_is_not_the_first_is_folded() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(6, 8), nn.Linear(8, 4)

        def forward(self, steps: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
            hidden, _ = self.lstm(steps, state)
            return self.head(hidden)[-1]

    inputs = torch.randn(5, ROWS, 6), (torch.randn(1, ROWS, 8), torch.randn(1, ROWS, 8))
    points = hook_points(Recurrent().eval(), *inputs)
    assert points["lstm.out[0]"].batch_axis == 1
    patches = {site: zero_ablate(site) for site in parts(points.site("lstm.out[0]"))}
    patches |= {site: zero_ablate(site) for site in parts(points.site("lstm.in[1][0]"))}
    assert strategy_of(assert_equals_the_loop(points, inputs, patches)) == "fold"


def test_integers_and_inputs_without_a_batch_axis_are_folded() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, tokens: Tensor, table: Tensor, *, factor: float) -> Tensor:
            return self.head(self.hidden(self.embed(tokens) + table).relu()).mean(1) * factor

    inputs = torch.randint(20, (ROWS, 5)), torch.randn(5, 8)
    model = Tokens().eval()
    points = hook_points(model, *inputs, factor=2.0)
    patches: dict[Any, Any] = {site: zero_ablate(site) for site in parts(points.site("hidden"))}
    patches |= {token: edit(points.site(".in[0]"), Set(token)) for token in range(6)}
    result = sweep(points, *inputs, factor=2.0, patches=patches, metric=total)
    assert strategy_of(result) == "fold"
    for row, patch in zip(result.values["total"], patches.values(), strict=True):
        with torch.no_grad(), patched(points, patch):
            np.testing.assert_allclose(row, total(model(*inputs, factor=2.0)), rtol=1e-5, atol=1e-6)


def test_a_model_that_keeps_one_state_per_row_is_not_folded() -> None:
    class Stateful(Squashed):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.randn(ROWS, 8))

        def forward(self, vector: Tensor) -> Tensor:
            self.state = self.state * 0.5 + self.first(vector)
            return self.last(torch.tanh(self.second(self.state)))

    inputs = (torch.randn(ROWS, 6),)
    points = hook_points(Stateful().eval(), *inputs)
    patches = {site: zero_ablate(site) for name in ("first", "second") for site in parts(points.site(name))}
    result = sweep(points, *inputs, patches=patches, metric=total)
    for row, patch in zip(result.values["total"], patches.values(), strict=True):
        points.model.state = points.model.state.clone()
        before = points.model.state
        np.testing.assert_allclose(row, by_hand(points, inputs, {0: patch})[0], rtol=1e-5, atol=1e-6)
        points.model.state = before
    assert "fold" not in {group.strategy for group in result.groups}


def test_in_training_mode_nothing_is_folded() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).train()
    points = hook_points(model, inputs := torch.randn(ROWS, 6))
    patches = [zero_ablate(site) for site in points.site("0").split("feature")]
    result = sweep(points, inputs, patches=patches, metric=total)
    assert strategy_of(result) == "loop" and "'1' (BatchNorm1d) in training mode" in result.groups[0].why
