"""Every peer of the benchmarks does the work that it is timed on, or says why it cannot."""

import pytest
import torch
from peers import EXPERT, HANDWRITTEN, LIBRARIES, measure, module_of, report
from peers.interface import Unable
from peers.measure import interleaved, ratio
from peers.models import impala, impala_everywhere, mlp, transformer

pytestmark = pytest.mark.filterwarnings("default")  # those of the peers are theirs

TOLERANCE = 1e-5
SMALL = {
    "impala": lambda: impala(width=1, observations=2, channels=4),
    "everywhere": lambda: impala_everywhere(observations=2, convolutional=False, every=150),
    "transformer": lambda: transformer(texts=2, positions=6),
    "mlp": mlp,
}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def values(peer, work):
    return module_of(peer).Peer(work).sweep().float()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("peer", ["floor", "chanpatch"])
def test_a_sweep_gives_the_numbers_of_hooks_written_by_hand(peer, name):
    work = SMALL[name]()
    torch.testing.assert_close(values(peer, work), values("loop", work), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["impala", "transformer", "mlp"])
@pytest.mark.parametrize("peer", LIBRARIES)
def test_a_peer_gives_the_numbers_of_hooks_written_by_hand(peer, name):
    work = SMALL[name]()
    torch.testing.assert_close(values(peer, work), values("loop", work), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("peer", [*HANDWRITTEN, "chanpatch", *LIBRARIES])
def test_a_peer_records_what_the_module_returned(peer):
    work = SMALL["impala"]()
    returned = []
    work.model.get_submodule("embedder.relu3").register_forward_hook(lambda *call: returned.append(call[2].clone()))
    work.model(*work.inputs)
    work.model.get_submodule("embedder.relu3")._forward_hooks.clear()
    recorded = module_of(peer).Peer(work).record("embedder.relu3", *work.inputs)
    torch.testing.assert_close(recorded, returned[0], rtol=0, atol=TOLERANCE)


def test_the_experts_list_of_modules_gives_the_same_numbers_and_refuses_other_hook_points():
    work = SMALL["impala"]()
    torch.testing.assert_close(values(EXPERT, work), values("loop", work), rtol=0, atol=TOLERANCE)
    with pytest.raises(Unable, match="written for 'embedder.relu3'"):
        values(EXPERT, SMALL["mlp"]())


@pytest.mark.parametrize("name", SMALL)
def test_the_patches_change_the_metric_by_far_more_than_the_tolerance(name):
    work = SMALL[name]()
    change = values("loop", work) - work.metric(work.model(*work.inputs))
    assert change.abs().max() > 100 * TOLERANCE


def test_variants_take_turns():
    order = []
    variants = {name: lambda name=name: order.append(name) for name in ("one", "other")}
    samples = interleaved(variants, warm=True, title="test", repeats=3)
    assert order == ["one", "other"] * 3
    assert {name: len(seconds) for name, seconds in samples.items()} == {"one": 3, "other": 3}


def test_slow_variants_stop_after_five_rounds(monkeypatch):
    monkeypatch.setattr(measure, "PATIENCE", 0.0)
    samples = interleaved({"one": lambda: sum(range(1000))}, warm=True, title="test", repeats=15)
    assert len(samples["one"]) == 5


def test_a_ratio_is_that_of_the_medians_inside_its_interval():
    found = ratio([2.0, 2.2, 9.0], [1.0, 1.1, 1.2])
    assert found.estimate == pytest.approx(2.0)
    assert found.low <= found.estimate <= found.high


@pytest.mark.parametrize(("megabytes", "met"), [(99, "yes"), (101, "**no**")])
def test_a_target_is_met_where_the_measurement_reaches_it(megabytes, met):
    rows = [{"peer": "chanpatch", "bytes": megabytes * 1e6, "size": "10000 observations"}]
    page = report.page({"memory-sums": rows}, {}, judged=True)
    (line,) = [line for line in page.splitlines() if line.startswith("| channel sums")]
    assert line.endswith(f"| {met} |")
