"""Many paths in one call, against single path patches, paths written out by hand and counts of forward passes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import Tensor, nn

from chanpatch import HookPoints, hook_points, patch_in, patched, recording
from chanpatch.errors import MetricError, SiteError, SweepError
from chanpatch.metrics import logit_difference
from chanpatch.sweeps import Grid, edge_attribution, path_patch
from maze.policy.network import load_policy


class Residual(nn.Module):
    """A residual stream that `first`, `aside` and `second` write to; the head squares what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.aside, self.second = nn.Linear(4, 6), *(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, vector: Tensor) -> Tensor:
        stream = self.embed(vector)
        stream = stream + self.first(stream).tanh() + self.aside(stream)
        stream = stream + self.second(stream).relu()
        return self.head(stream).square()


with torch.random.fork_rng():
    torch.manual_seed(0)
    MODEL = Residual().double()
    CLEAN, CORRUPTED = torch.randn(2, 5, 4, dtype=torch.float64)
POINTS = hook_points(MODEL, CLEAN)
SENDERS, RECEIVERS = ["embed", "first", "aside", "second"], ["first.in[0]", "second.in[0]", "head.in[0]"]


def first_logit(output: Tensor) -> Tensor:
    return output[:, 0]


def matrix(senders: Any, receivers: Any, **options: Any) -> Grid:
    found = path_patch(POINTS, CLEAN, CORRUPTED, senders, receivers, metric=first_logit, **options)
    assert isinstance(found, Grid)
    return found


@torch.no_grad()
def by_hand() -> dict[tuple[str, str], Tensor]:
    """The change of the first logit along each direct path."""
    m = MODEL
    wrote = []  # what each module writes to the stream, in the clean and in the corrupted run
    for vector in (CLEAN, CORRUPTED):
        stream = m.embed(vector)
        read = stream + m.first(stream).tanh() + m.aside(stream)
        wrote.append([stream, m.first(stream).tanh(), m.aside(stream), m.second(read).relu()])
    change = dict(zip(SENDERS, (two - one for one, two in zip(*wrote, strict=True)), strict=True))
    stream, one, other, last = wrote[0]
    read, final = stream + one + other, stream + one + other + last

    def logit(stream: Tensor) -> Tensor:
        return m.head(stream).square()[:, 0]

    found = {(sender, "head.in[0]"): logit(final + change[sender]) - logit(final) for sender in SENDERS}
    for sender in SENDERS[:3]:
        after = final - last + m.second(read + change[sender]).relu()
        found[sender, "second.in[0]"] = logit(after) - logit(final)
    new = stream + m.first(stream + change["embed"]).tanh() + other
    found["embed", "first.in[0]"] = logit(new + m.second(new).relu()) - logit(final)
    return found


def test_a_matrix_has_the_effects_along_the_direct_paths_written_by_hand() -> None:
    grid, expected = matrix(SENDERS, RECEIVERS), by_hand()
    assert (grid.rows, grid.cols) == (tuple(SENDERS), tuple(RECEIVERS))
    for row, sender in enumerate(grid.rows):
        for col, receiver in enumerate(grid.cols):
            if (sender, receiver) in expected:
                np.testing.assert_allclose(grid.differences[row, col], expected[sender, receiver], atol=1e-12)
            else:  # the receiver comes first
                assert np.isnan(grid.differences[row, col]).all()
    assert np.isnan(grid.differences).sum() == 5 * (12 - len(expected))


def test_a_matrix_for_a_trained_network_equals_single_path_patches() -> None:
    policy, _ = load_policy()
    clean, corrupted = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    points = hook_points(policy, clean)
    block = "embedder.block3"
    senders = [f"{block}.conv", f"{block}.res1.conv2", f"{block}.res2.conv2"]
    receivers = [f"{block}.res1.conv1.in[0]", f"{block}.res2.conv1.in[0]", "embedder.fc.in[0]", f"{block}.res2.resadd"]
    metric = logit_difference(0, 1)
    grid = path_patch(points, clean, corrupted, senders, receivers, metric=metric)
    for row, sender in enumerate(senders):
        for col, receiver in enumerate(receivers):
            if np.isnan(grid.effect()[row, col]):
                with pytest.raises(SiteError, match="does not come after the sender"):
                    path_patch(points, clean, corrupted, sender, receiver, metric=metric)
            else:
                single = path_patch(points, clean, corrupted, sender, receiver, metric=metric)
                assert single.abs().max() > 1e-3
                np.testing.assert_allclose(grid.differences[row, col], single, rtol=1e-4, atol=1e-5)
    assert np.isnan(grid.effect()).sum() == 2 + 1


def test_what_is_frozen_is_chosen_for_each_pair_even_if_receivers_are_frozen_for_each_other() -> None:
    receivers = ["first", "second", "head.in[0]", "head"]
    for frozen in (None, (), "aside", ["second", "aside"]):
        grid = matrix(SENDERS[:3], receivers, frozen=frozen)
        for row, sender in enumerate(grid.rows):
            for col, receiver in enumerate(receivers):
                if not np.isnan(grid.effect()[row, col]):
                    single = path_patch(POINTS, CLEAN, CORRUPTED, sender, receiver, metric=first_logit, frozen=frozen)
                    np.testing.assert_allclose(grid.differences[row, col], single, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_single_path_has_the_dtype_of_its_metric_and_a_difference_of_booleans_a_sign(dtype: torch.dtype) -> None:
    def metric(output: Tensor) -> Tensor:
        return (output[:, 0] > 0.2).to(dtype)

    single = path_patch(POINTS, CLEAN, CORRUPTED, "aside", "head.in[0]", metric=metric)
    grid = path_patch(POINTS, CLEAN, CORRUPTED, ["aside"], ["head.in[0]"], metric=metric)
    assert single.dtype == (torch.float64 if dtype == torch.bool else dtype)
    assert single.tolist() == grid.differences[0, 0].tolist() and {*single.tolist()} == {-1, 0, 1}


def test_labels_name_senders_and_groups_of_receivers_that_are_patched_together() -> None:
    senders = {(0, "one"): POINTS.site("first", feature=[1, 2]), (0, "two"): "aside"}
    grid = matrix(senders, {"both": ["second.in[0]", "head.in[0]"], "head": "head.in[0]"})
    assert (grid.rows, grid.cols) == (tuple(senders), ("both", "head"))
    for row, sender in enumerate(senders.values()):
        single = path_patch(POINTS, CLEAN, CORRUPTED, sender, ["second.in[0]", "head.in[0]"], metric=first_logit)
        np.testing.assert_allclose(grid.differences[row, 0], single, atol=1e-12)


def test_hook_points_a_pattern_in_a_list_and_an_iterator_are_senders() -> None:
    expected = matrix(["first", "aside"], ["head.in[0]"])
    deep = nn.Sequential(MODEL)
    points = hook_points(deep, CLEAN)
    for senders in (POINTS[name] for name in ("first", "aside")), iter(["first", "aside"]):
        assert np.array_equal(matrix(senders, iter(["head.in[0]"])).differences, expected.differences)
    found = path_patch(points, CLEAN, CORRUPTED, ["0.?irst"], ["0.head.in[0]"], metric=first_logit)
    assert found.rows == ("0.first",)
    np.testing.assert_allclose(found.differences[0], expected.differences[0])


def test_a_matrix_prints_and_draws_its_largest_effects() -> None:
    pyplot.switch_backend("Agg")
    grid = matrix(SENDERS, RECEIVERS)
    lines = repr(grid).splitlines()
    assert lines[0] == "4 x 3 grid, mean change (first_logit, 5 inputs)" and len(lines) == 2 + 8
    effects = [abs(record["effect"]) for record in grid._lines()]
    assert effects == sorted(effects, reverse=True) and "<table>" in grid._repr_html_()
    axes = grid.plot(cols=["first", "second", "head"])
    assert [text.get_text() for text in axes.get_yticklabels()] == SENDERS
    assert [text.get_text() for text in axes.get_xticklabels()] == ["first", "second", "head"]
    np.testing.assert_array_equal(axes.images[0].get_array(), grid.effect())
    pyplot.close(axes.figure)
    assert grid.to_xarray().sel(row="aside", col="head.in[0]").item() == grid.effect()[2, 2]


class Deep(nn.Module):
    """Eight residual layers that count their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Counting() for _ in range(8)), nn.Linear(6, 3)

    def forward(self, stream: Tensor) -> Tensor:
        for layer in self.layers:
            stream = stream + layer(stream)
        return self.head(stream)


class Counting(nn.Linear):
    calls: Counter[int] = Counter()

    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, stream: Tensor) -> Tensor:
        Counting.calls[id(self)] += 1
        return super().forward(stream).tanh()


def test_the_clean_prefix_of_many_senders_runs_a_fixed_number_of_times() -> None:
    torch.manual_seed(0)
    model, (clean, corrupted) = Deep().eval(), torch.randn(2, 5, 6)
    points = hook_points(model, clean)
    calls = []
    for senders in (range(2, 6), range(2, 8)):
        Counting.calls.clear()
        names = [f"layers.{number}" for number in senders]
        found = path_patch(points, clean, corrupted, names, ["head.in[0]"], metric=first_logit)
        assert np.abs(found.effect()).min() > 1e-3
        calls.append([Counting.calls[id(layer)] for layer in model.layers])
    assert calls[0][:2] == calls[1][:2] and calls[1][1] < calls[1][7]


def test_a_network_in_training_mode_gives_the_same_matrix_as_single_path_patches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(6, 3))
    clean, corrupted = torch.randn(2, 8, 4)
    points, before = hook_points(model, clean), {name: each.clone() for name, each in model.state_dict().items()}
    grid = path_patch(points, clean, corrupted, ["0", "1"], ["2.in[0]", "4.in[0]"], metric=first_logit)
    for row, sender in enumerate(grid.rows):
        for col, receiver in enumerate(grid.cols):
            single = path_patch(points, clean, corrupted, sender, receiver, metric=first_logit)
            np.testing.assert_allclose(grid.differences[row, col], single, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


@pytest.mark.parametrize(
    ("fails", "kind", "message"),
    [
        (lambda: matrix([], RECEIVERS), SiteError,
         "There are no senders. Pass at least one sender, such as 'head.in[0]'."),
        (lambda: matrix({}, RECEIVERS), SiteError,
         "There are no senders. Pass at least one sender, such as 'head.in[0]'."),
        (lambda: matrix(SENDERS, {}), SiteError,
         "There are no receivers. Pass at least one receiver, such as 'head.in[0]'."),
        (lambda: matrix({"both": ["first", "aside"]}, RECEIVERS), SiteError,
         "Expected one site, but got 2: Site('first'), Site('aside'). Pass one of these sites."),
        (lambda: matrix(["second", "head"], ["first.in[0]"]), SiteError,
         "The receiver Site('first.in[0]') does not come after the sender Site('second') in the forward pass, so no "
         "path connects the two. Print the HookPoints to see their execution order."),
        (lambda: path_patch(POINTS, CLEAN, CORRUPTED, ["first"], RECEIVERS, metric={"a": first_logit}), MetricError,  # type: ignore[dict-item]
         "The metric must be a function of the model's output; got dict. Only sweep() accepts a dict of several "
         "metrics."),
        (lambda: edges(receivers={"both": ["second.in[0]", "head.in[0]"]}), SweepError,
         "The label ('embed', 'both') has 2 patches, but estimates need one patch per label. Give each patch or "
         "receiver its own label, or use sweep() or path_patch() to patch several sites together."),
    ],
)  # fmt: skip
def test_what_is_no_matrix_of_paths_is_refused(fails: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        fails()
    assert str(caught.value) == message


def test_a_matrix_in_which_all_paths_are_frozen_is_refused_and_one_open_path_is_enough() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    clean, corrupted = torch.randn(2, 5, 4)
    with pytest.raises(SiteError) as caught:
        path_patch(model, clean, corrupted, ["0", "1"], ["3.in[0]"], metric=first_logit)
    assert str(caught.value) == (
        "All paths from Site('0') to the receivers pass through frozen sites: '1', '2'. Choose the sites to freeze "
        "with frozen=[...], or freeze nothing with frozen=()."
    )
    effect = path_patch(model, clean, corrupted, ["0", "1", "2"], ["3.in[0]"], metric=first_logit).effect()
    assert not effect[:2].any() and effect[2, 0]


def edges(senders: Any = SENDERS, receivers: Any = RECEIVERS, **options: Any) -> Any:
    return edge_attribution(POINTS, CLEAN, CORRUPTED, senders, receivers, **{"metric": first_logit, **options})


def test_an_edge_is_the_change_along_the_direct_path_times_the_gradient_at_the_receiver() -> None:
    result = edges(verify=0)
    with torch.no_grad(), recording(POINTS, ["second.in[0]", "aside"]) as clean:
        MODEL(CLEAN)
    with torch.no_grad(), recording(POINTS, "aside") as corrupted:
        MODEL(CORRUPTED)
    read = clean["second.in[0]"].clone().requires_grad_()
    output = MODEL.head(clean["second.in[0]"] + MODEL.second(read).relu()).square()[:, 0]
    (gradient,) = torch.autograd.grad(output.sum(), read)
    expected = ((corrupted["aside"] - clean["aside"]) * gradient).sum(1).mean()
    assert result.effect()[result.labels.index(("aside", "second.in[0]"))] == pytest.approx(float(expected))


def test_the_receipt_of_edges_has_exact_path_patches() -> None:
    result, grid = edges(verify=8), matrix(SENDERS, RECEIVERS)
    exact = dict(zip(result.labels, result.exact, strict=True))
    assert len(exact) == result.sample == 8
    for (sender, receiver), effect in exact.items():
        assert effect == pytest.approx(grid.effect()[grid.rows.index(sender), grid.cols.index(receiver)])
    assert result.grid().rows == grid.rows
    drawn = result.grid()
    at = np.ix_([drawn.rows.index(each) for each in grid.rows], [drawn.cols.index(each) for each in grid.cols])
    assert np.array_equal(np.isnan(drawn.effect()[at]), np.isnan(grid.effect()))


def test_with_many_steps_edges_add_up_to_the_effect_of_the_corrupted_activation_at_the_receiver() -> None:
    with torch.no_grad(), recording(POINTS, "head.in[0]") as corrupted:
        MODEL(CORRUPTED)
    with torch.no_grad():
        clean = MODEL(CLEAN)
        with patched(POINTS, patch_in(POINTS.site("head.in[0]"), corrupted)):
            whole = float(first_logit(MODEL(CLEAN) - clean).mean())
    sums = [float(edges(receivers=["head.in[0]"], steps=steps).effect().sum()) for steps in (1, 20)]
    assert sums[1] == pytest.approx(whole, rel=1e-3) and abs(sums[0] - whole) > 0.05


def test_edges_run_the_model_once_per_sender_and_not_once_per_edge() -> None:
    torch.manual_seed(0)
    model, (clean, corrupted) = Deep().eval(), torch.randn(2, 5, 6)
    points = hook_points(model, clean)
    senders = [f"layers.{number}" for number in range(8)]
    receivers = [*(f"layers.{number}.in[0]" for number in range(1, 8)), "head.in[0]"]
    Counting.calls.clear()
    result = edge_attribution(points, clean, corrupted, senders, receivers, metric=first_logit, verify=0)
    assert len(result) == 36
    assert max(Counting.calls.values()) <= 8 + 8


class WritesInPlace(nn.Module):
    """Reads its stream again after the ReLU has written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.relu, self.layer = nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, vector: Tensor) -> Tensor:
        stream = self.embed(vector)
        return self.head(stream + self.layer(self.relu(stream)))


def test_a_receiver_that_is_written_into_in_place_has_paths_and_no_estimates() -> None:
    torch.manual_seed(0)
    model, (clean, corrupted) = WritesInPlace(), torch.randn(2, 5, 4)
    points, receivers = hook_points(model, clean), ["relu.in[0]", "layer.in[0]"]
    grid = path_patch(points, clean, corrupted, ["embed"], receivers, metric=first_logit)
    for col, receiver in enumerate(receivers):
        single = path_patch(points, clean, corrupted, "embed", receiver, metric=first_logit)
        np.testing.assert_allclose(grid.differences[0, col], single, atol=1e-6)
    with pytest.raises(SiteError) as caught:
        edge_attribution(points, clean, corrupted, ["embed"], receivers, metric=first_logit)
    assert str(caught.value) == (
        "A module modifies a receiver's activation in place, and the original activation is also read elsewhere, so "
        "the gradient is wrong. Use path_patch(), choose the module's output as the receiver, or build the module with "
        "inplace=False."
    )


def test_edges_are_the_same_in_inference_mode_and_with_frozen_weights() -> None:
    expected = edges(steps=2).effect()
    try:
        MODEL.requires_grad_(False)
        with torch.inference_mode():
            found = edge_attribution(POINTS, CLEAN * 1, CORRUPTED * 1, SENDERS, RECEIVERS, metric=first_logit, steps=2)
    finally:
        MODEL.requires_grad_(True)
    assert np.array_equal(found.effect(), expected)


def test_a_model_is_traced_with_the_clean_inputs_and_keywords_reach_it() -> None:
    keywords = [{"vector": each} for each in (CLEAN, CORRUPTED)]
    found = edge_attribution(MODEL, *keywords, SENDERS, RECEIVERS, metric=first_logit)
    assert isinstance(POINTS, HookPoints)
    np.testing.assert_allclose(found.effect(), edges().effect())
