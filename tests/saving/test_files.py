"""Patches in files: exact, without code, whole or not at all, and repeated bit for bit."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import MODELS, Model, PlainCNN, build
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributions import Categorical

import chanpatch
from chanpatch import (
    HookPoints,
    Patch,
    Site,
    edit,
    hook_points,
    mean_ablate,
    patch_in,
    patched,
    resample_ablate,
    run_with_cache,
    steer,
    zero_ablate,
)
from chanpatch.errors import HookPointError, InterventionError, MissingPackageError, UnreachedError
from chanpatch.patching import Add, Clamp, Project, Resample, Scale, Set
from chanpatch.saving import contents, load, save, verify

VERSION = chanpatch.__version__


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "patches.safetensors"


def traced(model: Model, rows: int = 4) -> tuple[HookPoints, tuple[Any, ...]]:
    inputs = model.inputs(rows)
    return hook_points(model.module, *inputs), inputs


def written(file: Path, metadata: Any, tensors: dict[str, Tensor] | None = None) -> Path:
    """Write a file by hand, with a checksum."""
    if isinstance(metadata, dict) and "sha256" not in metadata:
        metadata = metadata | {"sha256": checksum(metadata, tensors or {})}
    save_file(tensors or {}, file, {"chanpatch": metadata if isinstance(metadata, str) else json.dumps(metadata)})
    return file


def checksum(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return the checksum of a file, as it is written by hand."""
    of_tensors = digest(*((f'["{name}"]', tensor) for name, tensor in tensors.items()))
    return hashlib.sha256(f"{json.dumps(metadata)}\n{of_tensors}".encode()).hexdigest()


def record(**changes: Any) -> dict[str, Any]:
    """Return metadata with one patch, Set(0.0) at Site('fc')."""
    patch: dict[str, Any] = {
        "site": {"name": "fc", "indices": {}},
        "hook_point": None,
        "edit": "Set",
        "operands": {"value": {"float": "0.0"}},
        "where": None,
    }
    return {"format": 3, "chanpatch": "0.1.0", "patches": [patch | changes], "receipt": None}


def refused(kind: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


# Exactly what was saved


def test_loaded_patches_of_every_verb_give_the_output_of_the_saved_ones_bit_for_bit(model: Model, file: Path) -> None:
    points, inputs = traced(model)
    site = points.site(model.site)
    _, cache = run_with_cache(points, *model.inputs(4), sites=site)
    activation = cache[site]
    first_row = torch.arange(len(activation)).view(-1, *[1] * (activation.dim() - 1)) == 0
    if points[model.site].batch_axis != 0:
        first_row = torch.rand_like(activation) < 0.5
    verbs = [
        zero_ablate(site, where=first_row),
        mean_ablate(site, cache),
        resample_ablate(site, cache, seed=3, where=first_row),
        patch_in(site, cache, where=first_row),
        steer(site, activation[:1].clone() if points[model.site].batch_axis == 0 else activation, -1.5),
        *(edit(site, each) for each in (Scale(activation), Clamp(low=-0.1), Clamp(-1.0, 0.1), Project(activation))),
    ]
    save(file, verbs, points)
    for patch, again in zip(verbs, load(file, points), strict=True):
        assert again.site == patch.site and again.site.point == points[model.site]
        assert type(again.edit) is type(patch.edit)
        outputs = []
        for each in (patch, again):
            with torch.no_grad(), patched(points, each):
                outputs.append(model.module(*inputs))
        assert_same_bits(outputs[0], outputs[1])


def assert_same_bits(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, Categorical):
        assert torch.equal(one.logits, other.logits)
    else:
        assert len(one) == len(other)
        for left, right in zip(
            *((each.values() if isinstance(each, dict) else each) for each in (one, other)), strict=True
        ):
            assert_same_bits(left, right)


NUMBERS = [0.1, -0.0, 1 / 3, 5e-324, 1.7976931348623157e308, float("inf"), float("-inf"), float("nan"), 2**70, -7, True]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_keeps_its_type_and_every_bit(number: float, file: Path) -> None:
    save(file, Patch(Site("fc"), Add(number, number)))
    (patch,) = load(file)
    for again in (patch.edit.vector, patch.edit.coefficient):
        assert type(again) is type(number)
        if isinstance(number, float):
            assert struct.pack("<d", again) == struct.pack("<d", number)
        else:
            assert again == number


def test_numbers_of_numpy_come_back_as_pythons(file: Path) -> None:
    save(file, [Patch(Site("fc"), Scale(np.float32(0.1))), Patch(Site("fc"), Set(np.int64(3)))])
    scale, constant = load(file)
    assert scale.edit.factor == float(np.float32(0.1)) and type(scale.edit.factor) is float
    assert constant.edit.value == 3 and type(constant.edit.value) is int


def test_bounds_that_are_missing_stay_missing(file: Path) -> None:
    save(file, [Patch(Site("fc"), Clamp(low=0.5)), Patch(Site("fc"), Clamp(high=2))])
    bounds = [(patch.edit.low, patch.edit.high) for patch in load(file)]
    assert bounds == [(0.5, None), (None, 2)]


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_keeps_its_dtype_and_every_bit(dtype: torch.dtype, file: Path) -> None:
    size = torch.empty(0, dtype=dtype).element_size()
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (2, 3 * size), dtype=torch.uint8)
    value = bits.view(dtype)
    save(file, Patch(Site("fc"), Set(value)))
    (patch,) = load(file)
    assert patch.edit.value.dtype == dtype and patch.edit.value.shape == (2, 3)
    assert torch.equal(patch.edit.value.view(torch.uint8), bits)


@pytest.mark.parametrize("shape", [(), (0, 3), (1, 1), (2, 3, 4)], ids=str)
def test_a_tensor_keeps_its_shape(shape: tuple[int, ...], file: Path) -> None:
    value = torch.randn(shape)
    save(file, Patch(Site("fc"), Set(value)))
    assert torch.equal(load(file)[0].edit.value, value) and load(file)[0].edit.value.shape == shape


def test_a_conjugate_that_was_not_computed_yet_is_saved_as_its_numbers(file: Path) -> None:
    value = torch.tensor([[1 + 2j]]).conj()
    save(file, [Patch(Site("fc"), Set(value)), Patch(Site("fc"), Set(value.imag))])
    assert value.is_conj() and value.imag.is_neg()
    assert [patch.edit.value.item() for patch in load(file)] == [1 - 2j, -2.0]


def test_operands_inside_a_graph_or_of_a_module_come_back_without_it(file: Path) -> None:
    parameter = nn.Parameter(torch.randn(1, 4))
    save(file, [Patch(Site("fc"), Set(parameter)), Patch(Site("fc"), Add(parameter * 2))])
    first, second = load(file)
    assert torch.equal(first.edit.value, parameter) and torch.equal(second.edit.vector, parameter * 2)
    assert not first.edit.value.requires_grad and not second.edit.vector.requires_grad


SITES = [
    Site("fc"),
    Site('lstm.out[0]["h"].logits', feature=3),
    Site("relu1", channel=[5, 2, -1], row=slice(1, None, 2), col=slice(-3, -1)),
    Site("relu1", channel=[True, False, True]),
    Site("bl\u00f6ck \n\x1b[31m", **{"self": 0, "an axis": [0, 1]}),
]


@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_site_keeps_its_name_and_every_kind_of_index(site: Site, file: Path) -> None:
    save(file, zero_ablate(site))
    assert load(file)[0].site == site


def test_the_order_of_patches_is_kept(file: Path) -> None:
    points, inputs = traced(build("plain_cnn"))
    site = points.site("fc")
    save(file, [Patch(site, Add(1.0)), Patch(site, Scale(2.0))])
    with patched(points, load(file)):
        output = points.model(*inputs)
    assert torch.equal(output, (points.model(*inputs) + 1.0) * 2.0)


def test_channels_last_stays_channels_last(file: Path) -> None:
    value = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    save(file, Patch(Site("conv"), Set(value)))
    again = load(file)[0].edit.value
    assert torch.equal(again, value) and again.stride() == value.stride()


def test_an_expanded_operand_is_saved_with_all_its_numbers(file: Path) -> None:
    value = torch.randn(1, 8, 1, 1).expand(3, 8, 4, 4)
    save(file, Patch(Site("conv"), Set(value)))
    again = load(file)[0].edit.value
    assert torch.equal(again, value)


def test_a_channels_last_activation_replays_bit_for_bit_through_a_mean(file: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    images = torch.randn(4, 3, 33, 33).contiguous(memory_format=torch.channels_last)
    points = hook_points(model, images)
    _, cache = run_with_cache(points, images, sites="1")
    save(file, patch_in(points.site("1"), cache), points, inputs=images)
    assert verify(file, points, images) == contents(file).receipt


def test_an_operand_of_many_patches_is_stored_once_and_is_one_tensor_again(file: Path) -> None:
    reference, mask = torch.randn(1000, 4), torch.rand(1000, 1) < 0.5
    save(file, [Patch(Site("fc"), Resample(reference, seed), mask) for seed in range(10)])
    patches = load(file)
    assert file.stat().st_size < 2 * 1000 * 4 * 4
    assert all(
        patch.edit.reference is patches[0].edit.reference and patch.where is patches[0].where for patch in patches
    )
    assert [patch.edit.seed for patch in patches] == [*range(10)]


def test_slices_of_one_tensor_are_saved_each_for_itself(file: Path) -> None:
    whole = torch.randn(4, 6)
    save(file, [Patch(Site("fc"), Set(whole[:, 1:3])), Patch(Site("fc"), Set(whole[1:3]))])
    first, second = load(file)
    assert torch.equal(first.edit.value, whole[:, 1:3]) and torch.equal(second.edit.value, whole[1:3])


def test_a_random_edit_replays_its_draws_whatever_the_order_of_the_rows(file: Path) -> None:
    points, (images,) = traced(build("plain_cnn"))
    site = points.site("fc")
    reference = torch.randn(50, 4)
    save(file, Patch(site, Resample(reference, 7)))
    (patch,) = load(file, points)
    with patched(points, patch):
        output = points.model(images)
    uniform = np.random.Generator(np.random.Philox(key=np.array([7, 0], dtype=np.uint64))).random(4)
    assert torch.equal(output, reference[torch.from_numpy((uniform * 50).astype(np.int64))])


def test_a_draw_per_step_is_saved_and_one_per_episode_is_the_default_as_in_older_files(file: Path) -> None:
    reference = torch.randn(5, 4)
    save(file, [Patch(Site("fc"), Resample(reference, 7, per=per)) for per in ("step", "episode")])
    assert [patch.edit.per for patch in load(file)] == ["step", "episode"]
    with safe_open(file, framework="pt") as archive:
        records = json.loads(archive.metadata()["chanpatch"])["patches"]
    assert [record["operands"].get("per") for record in records] == ["step", None]


def test_equal_patches_make_equal_files(tmp_path: Path) -> None:
    vector = torch.randn(1, 4)
    for name in ("one", "other"):
        save(tmp_path / name, [steer(Site("fc"), vector.clone(), 2.0), zero_ablate(Site("fc", feature=1))])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_the_file_is_plain_safetensors_with_json(file: Path) -> None:
    points, _ = traced(build("plain_cnn"))
    vector, mask = torch.randn(1, 1, 8, 8), torch.rand(4, 1, 1, 1) < 0.5
    save(file, steer(points.site("relu1", channel=5, row=slice(2, 4)), vector[:, :, :2], 0.1, where=mask))
    with safe_open(file, framework="pt") as archive:
        assert torch.equal(archive.get_tensor("0"), vector[:, :, :2]) and torch.equal(archive.get_tensor("1"), mask)
        assert sorted(archive.keys()) == ["0", "1"]
        metadata = json.loads(archive.metadata()["chanpatch"])
        assert metadata.pop("sha256") == checksum(metadata, {"0": vector[:, :, :2], "1": mask})
        assert metadata == {
            "format": 3,
            "chanpatch": VERSION,
            "patches": [
                {
                    "site": {"name": "relu1", "indices": {"channel": [5], "row": [2, 3]}, "basis": None},
                    "hook_point": "ReLU (batch, channel=8, row=8, col=8) float32",
                    "edit": "Add",
                    "operands": {
                        "vector": {"tensor": "0", "order": [0, 1, 2, 3]},
                        "coefficient": {"float": "0.1"},
                    },
                    "where": {"tensor": "1", "order": [0, 1, 2, 3]},
                }
            ],
            "receipt": None,
        }


def test_a_file_in_format_2_which_has_no_bases_is_read(file: Path) -> None:
    (patch,) = load(written(file, record() | {"format": 2}))
    assert patch.site == load(written(file, record()))[0].site and patch.site.basis is None


def test_with_points_operands_go_to_the_device_of_their_hook_point(file: Path) -> None:
    points = hook_points(nn.Linear(6, 4, device="meta"), torch.zeros(2, 6, device="meta"))
    save(file, steer(Site(".out"), torch.ones(1, 4), where=torch.ones(1, 1, dtype=torch.bool)))
    (patch,) = load(file, points)
    assert patch.edit.vector.device.type == "meta" and patch.where.device.type == "meta"
    assert load(file)[0].edit.vector.device.type == "cpu"


# What cannot be saved


def halved(activation: Tensor) -> Tensor:
    return activation / 2


class Doubled(Scale):
    def __call__(self, activation: Tensor) -> Tensor:
        return activation * 2


NOT_SAVED: dict[str, tuple[type[Exception], Callable[[Path], Any], str]] = {
    "a function, a subclass and a where that is one": (
        InterventionError,
        lambda file: save(
            file,
            [
                zero_ablate(Site("fc")),
                edit(Site("fc"), halved),
                edit(Site("fc"), Doubled(1.0)),
                zero_ablate(Site("fc"), where=lambda context: context.rows < 2),
            ],
        ),
        "3 errors:\n"
        "- Patch 2, Patch(Site('fc'), halved), cannot be saved: its edit halved is code, but a file can only contain "
        "data. Use one of Set, Add, Scale, Clamp, Project, Resample from chanpatch.patching, or "
        "several such patches at the same site, which are applied in order.\n"
        "- Patch 3, Patch(Site('fc'), Doubled), cannot be saved: its edit Doubled is code, but a file can only "
        "contain data. Use one of Set, Add, Scale, Clamp, Project, Resample from chanpatch.patching, or "
        "several such patches at the same site, which are applied in order.\n"
        "- Patch 4, Patch(Site('fc'), Set, where=...), cannot be saved: its `where` is a function, but a file can only "
        "contain data. Instead, pass the bool tensor that the function returns.",
    ),
    "a dtype that safetensors has not": (
        InterventionError,
        lambda file: save(file, Patch(Site("fc"), Add(torch.zeros(1, 4, dtype=torch.complex128)))),
        "Patch 1, Patch(Site('fc'), Add), cannot be saved: its vector has dtype torch.complex128, which "
        "safetensors cannot store. Convert the tensor first.",
    ),
    "a sparse operand": (
        InterventionError,
        lambda file: save(file, Patch(Site("fc"), Set(torch.eye(4).to_sparse()))),
        "Patch 1, Patch(Site('fc'), Set), cannot be saved: its value has layout torch.sparse_coo. Make the tensor "
        "dense: value.to_dense().",
    ),
    "an operand without numbers": (
        InterventionError,
        lambda file: save(file, Patch(Site("fc"), Set(torch.empty(1, 4, device="meta")))),
        "Patch 1, Patch(Site('fc'), Set), cannot be saved: its value is on the meta device, which stores "
        "no data. Pass a tensor with data.",
    ),
    "no patches": (
        InterventionError,
        lambda file: save(file, []),
        "There are no patches to save. Pass at least one patch.",
    ),
    "what is no patch": (
        TypeError,
        lambda file: save(file, [Site("fc")]),  # type: ignore[list-item]
        "Expected a Patch, such as zero_ablate(Site('conv1')); got Site.",
    ),
    "inputs without a model": (
        InterventionError,
        lambda file: save(file, zero_ablate(Site("fc")), inputs=torch.zeros(1)),
        "inputs were passed without a model. Call save(file, patches, points, inputs=inputs).",
    ),
    "a folder that is not there": (
        FileNotFoundError,
        lambda file: save(Path("no", "folder", "x.safetensors"), zero_ablate(Site("fc"))),
        f"Cannot save 'x.safetensors': the folder '{Path('no', 'folder')}' does not exist.",
    ),
    "a site that the model has not": (
        HookPointError,
        lambda file: save(file, zero_ablate(Site("relu3")), traced(build("plain_cnn"))[0]),
        "No hook point named 'relu3'. Did you mean 'relu2'? (12 hook points; print the HookPoints to list them.)",
    ),
}


@pytest.mark.parametrize("name", NOT_SAVED)
def test_what_cannot_be_saved_says_why_and_writes_nothing(name: str, file: Path) -> None:
    kind, fails, message = NOT_SAVED[name]
    assert refused(kind, lambda: fails(file)) == message
    assert not [*file.parent.iterdir()]


def test_without_safetensors_the_message_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(file, zero_ablate(Site("fc")))
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: save(file, zero_ablate(Site("fc"))), lambda: load(file)):
        assert refused(MissingPackageError, call) == "safetensors is not installed: pip install safetensors"


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_leaves_the_older_file_and_nothing_else(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(file, zero_ablate(Site("fc")))
    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(file, steer(Site("fc"), torch.ones(1, 4)))
    assert file.read_bytes() == before and [*file.parent.iterdir()] == [file]


def test_a_disk_that_is_full_leaves_the_older_file_and_nothing_else(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(file, zero_ablate(Site("fc")))
    before = file.read_bytes()

    class FullDisk(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(content[: len(content) // 2])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda path, mode="r", _open=Path.open, **more: (
        FullDisk(path, "x") if mode == "xb" else _open(path, mode, **more)
    ))  # fmt: skip
    with pytest.raises(OSError, match="No space left"):
        save(file, steer(Site("fc"), torch.ones(1, 4)))
    assert file.read_bytes() == before and [*file.parent.iterdir()] == [file]


@pytest.mark.parametrize("name", ["0" * 16, str(os.getpid())], ids=["random", "process"])
def test_a_link_that_somebody_planted_is_not_written_through(
    name: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    tmp_path.joinpath(f".{file.name}.{name}.partial").symlink_to(victim)
    with suppress(FileExistsError):
        save(file, zero_ablate(Site("fc")))
    assert victim.read_text() == "precious" and not file.is_symlink()


def test_threads_that_save_to_one_file_leave_one_whole_file(file: Path) -> None:
    def repeatedly(number: int) -> None:
        for _ in range(20):
            save(file, steer(Site("fc"), torch.full((1, 1000), float(number))))

    with ThreadPoolExecutor(8) as threads:
        [*threads.map(repeatedly, range(8))]
    assert load(file)[0].edit.vector.unique().numel() == 1 and [*file.parent.iterdir()] == [file]


KILLED_BEFORE_IT_ENDS = """
import os, signal, sys
from chanpatch import Site, save, zero_ablate
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
save(sys.argv[1], zero_ablate(Site("fc")))
"""


def test_what_a_killed_process_left_is_swept_by_a_save_a_minute_later(file: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED_BEFORE_IT_ENDS, str(file)], check=False)
    (left,) = file.parent.iterdir()
    of_another = file.parent / left.name.replace(file.name, f"{file.name}.2")
    of_another.touch()
    save(file, zero_ablate(Site("fc")))
    assert left.exists()  # it might be of a process that is still writing
    for each in (left, of_another):
        os.utime(each, (time.time() - 61,) * 2)
    save(file, zero_ablate(Site("fc")))
    assert {*file.parent.iterdir()} == {file, of_another}


def test_a_saved_file_has_the_permissions_of_any_new_file(file: Path) -> None:
    save(file, zero_ablate(Site("fc")))
    other = file.with_name("other")
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode


# Files that are not what they should be


@pytest.mark.parametrize("other", [zero_ablate(Site("fc")), [], None], ids=lambda each: type(each).__name__)
def test_a_path_that_is_something_else_is_one_error(other: Any) -> None:
    for call in (lambda: save(other, "x.safetensors"), lambda: load(other), lambda: contents(other)):  # type: ignore[arg-type]
        assert refused(TypeError, call) == (
            f"The first argument must be a path, as in save(file, patches) or load(file); got {type(other).__name__}."
        )


def test_swapped_arguments_of_load_and_verify_are_one_error() -> None:
    points: Any = traced(build("plain_cnn"))[0]
    for call in (lambda: load(points, "x"), lambda: verify(points, "x", torch.zeros(1))):  # type: ignore[arg-type]
        assert refused(TypeError, call) == "Expected HookPoints or a torch.nn.Module, not str."


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_a_folder_a_pipe_and_a_device_are_refused_at_once(kind: str, file: Path) -> None:
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file = Path("/dev/zero")
    for call in (load, contents, lambda file: save(file, zero_ablate(Site("fc")))):
        assert refused(InterventionError, lambda call=call: call(file)) == (  # type: ignore[misc]
            f"'{file}' is a folder, a pipe or a device. Pass the path of a regular file."
        )


@pytest.mark.slow
def test_a_site_of_a_million_indices_loads_within_a_few_seconds(file: Path) -> None:
    points = hook_points(nn.ReLU(), torch.zeros(1, 2_000_000))
    indices = range(0, 2_000_000, 2)
    save(file, [zero_ablate(Site(".out", axis1=indices))])
    began = time.process_time()
    (patch,) = load(file, points)
    repr(contents(file))
    with pytest.raises(InterventionError, match="does not match this model"):
        load(file, hook_points(nn.ReLU(), torch.zeros(1, 2)))
    assert time.process_time() - began < 6
    assert patch.site.indices == (("axis1", tuple(indices)),)


class Exploit:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def lying(length: int, header: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + header


BYTES = {
    "empty": b"",
    "text": b"site,edit\nfc,Set\n",
    "a header of 2**63 bytes": lying(2**63),
    "a header longer than the file": lying(10_000, b"{}"),
    "a header that is no json": lying(4, b"{{{{"),
    "a header nested without end": lying(1_000_000, b"[" * 1_000_000),
    "a tensor that lies outside": lying(
        76, b'{"0":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'.ljust(76)[:76]
    ),
    "a pickle": pickle.dumps(Exploit()),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_safetensors_are_one_error_and_run_nothing(
    name: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    file.write_bytes(BYTES[name])
    message = refused(InterventionError, lambda: load(file))
    assert message.startswith(f"'{file}' {NOT_OURS}SafetensorError: Error while deserializing header: ")
    assert [*file.parent.iterdir()] == [file]


def test_a_file_that_was_cut_short_is_one_error_wherever_it_was_cut(file: Path) -> None:
    save(file, steer(Site("fc"), torch.ones(1, 4)))
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        assert " is damaged, or was not written by chanpatch.save(): SafetensorError: " in refused(
            InterventionError, lambda: load(file)
        )


def test_a_header_larger_than_safetensors_allows_is_refused_before_it_is_read(file: Path) -> None:
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 2**30))
        stream.truncate(2**30 + 8)  # takes no room on the disk
    assert refused(InterventionError, lambda: load(file)) == (
        f"'{file}' {NOT_OURS}SafetensorError: Error while deserializing header: header too large"
    )


def test_a_file_that_is_not_there_is_pythons_own_error(file: Path) -> None:
    assert refused(FileNotFoundError, lambda: load(file)) == f"[Errno 2] No such file or directory: '{file}'"


NOT_OURS = "is damaged, or was not written by chanpatch.save(): "
DAMAGED = "is damaged: its contents do not match its SHA-256 checksum. Copy the file again, or save the patches again."
METADATA: dict[str, tuple[Any, str]] = {
    "a later format": (
        record() | {"format": 4},
        f"has format 4, but chanpatch {VERSION} reads formats 2 and 3. Use the version of chanpatch that saved the "
        "file.",
    ),
    "a format that is true": (
        record() | {"format": True},
        f"has format True, but chanpatch {VERSION} reads formats 2 and 3. Use the version of chanpatch that saved the "
        "file.",
    ),
    "no checksum": (record() | {"sha256": None}, DAMAGED),
    "another checksum": (record() | {"sha256": "0" * 64}, DAMAGED),
    "a format before checksums": (
        record() | {"format": 1},
        f"has format 1, but chanpatch {VERSION} reads formats 2 and 3. Use the version of chanpatch that saved the "
        "file.",
    ),
    "a name of another function": (
        record(edit="os.system", operands={"command": "mkdir ran"}),
        "contains a patch with the edit 'os.system', but this version of chanpatch supports only Set, Add, Scale, "
        "Clamp, Project, Resample.",
    ),
    "no json": (
        "{",
        NOT_OURS + "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    "json of another kind": (
        [1],
        NOT_OURS + "TypeError: list indices must be integers or slices, not str",
    ),
    "a format that is no number": (
        record() | {"format": "1"},
        f"has format '1', but chanpatch {VERSION} reads formats 2 and 3. Use the version of chanpatch that saved the "
        "file.",
    ),
    "no patches": ({"format": 3}, NOT_OURS + "KeyError: 'patches'"),
    "an edit that is a list": (
        record(edit=["Set"]),
        NOT_OURS + "TypeError: unhashable type: 'list'",
    ),
    "an operand of another edit": (
        record(operands={"factor": 2}),
        NOT_OURS + "TypeError: Set.__init__() got an unexpected keyword argument 'factor'",
    ),
    "an operand that is text": (
        record(operands={"value": "0"}),
        NOT_OURS + "EditError: Set: the value must be a real number (int or float) or a tensor; got '0'.",
    ),
    "a number that is none": (
        record(operands={"value": {"float": "__import__('os')"}}),
        NOT_OURS + "ValueError: could not convert string to float: \"__import__('os')\"",
    ),
    "a tensor that is not there": (
        record(operands={"value": {"tensor": "9", "order": []}}),
        NOT_OURS + "KeyError: '9'",
    ),
    "a where that is a number": (
        record(where=1),
        NOT_OURS + "EditError: `where` at Site('fc') must be a bool tensor (such as column < 12) or a function that "
        "returns a bool tensor; got int.",
    ),
    "an index that is none": (
        record(site={"name": "fc", "indices": {"feature": {"slice": ["\x1b[2J"]}}}),
        NOT_OURS + "SiteError: Site('fc', feature=slice(None, '\\x1b[2J', None)): slice bounds must be integers.",
    ),
    "an axis that commands a terminal": (
        record(site={"name": "fc", "indices": {"\x1b[2J": []}}),
        NOT_OURS + "SiteError: Site('fc', \\x1b[2J=[]) selects nothing. Omit \\x1b[2J to select the whole axis.",
    ),
    "a receipt of another kind": (
        record() | {"receipt": {"weights": "0"}},
        NOT_OURS + "TypeError: Receipt.__init__() missing 3 required positional arguments: 'inputs', 'output', and "
        "'environment'",
    ),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_chanpatch_did_not_write_is_one_error_and_runs_nothing(
    name: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    metadata, message = METADATA[name]
    written(file, metadata, {"0": torch.zeros(1, 4)})
    assert refused(InterventionError, lambda: load(file)) == f"'{file}' {message}"
    assert [*file.parent.iterdir()] == [file]


@pytest.mark.parametrize("order", [[0, 0], [2, 1], [0], 7], ids=str)
def test_an_order_of_axes_that_no_tensor_can_have_is_one_error(order: Any, file: Path) -> None:
    written(file, record(operands={"value": {"tensor": "0", "order": order}}), {"0": torch.zeros(1, 4)})
    assert refused(InterventionError, lambda: load(file)).startswith(f"'{file}' {NOT_OURS}")


def test_json_nested_without_end_is_one_error(file: Path) -> None:
    written(file, "[" * 1_000_000)
    assert refused(InterventionError, lambda: load(file)).startswith(f"'{file}' {NOT_OURS}RecursionError: ")


def test_a_safetensors_file_of_weights_holds_no_patches(file: Path) -> None:
    save_file({"weight": torch.zeros(2)}, file)
    assert refused(InterventionError, lambda: load(file)) == (
        f"'{file}' contains no patches: the file was not written by chanpatch.save()."
    )


# Checked against the model


class Renamed(nn.Module):
    """The CNN with the first ReLU under another name, twice as wide after it, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.rectifier1 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(8, 16, 3, padding=1), nn.GELU()
        self.fc = nn.Linear(16 * 64, 4)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.relu2(self.conv2(self.rectifier1(self.conv1(image))))
        return self.fc(hidden.flatten(1))


def test_a_model_that_differs_is_one_error_with_all_faults(file: Path) -> None:
    points, (images,) = traced(build("plain_cnn"))
    sites = [
        points.site("relu1", channel=[1, 2]),
        points.site("relu1"),
        points.site("relu2", channel=3),
        points.site("fc"),
    ]
    save(file, [zero_ablate(site) for site in sites])
    other = hook_points(Renamed().double(), images.double())
    assert refused(InterventionError, lambda: load(file, other)) == (
        f"'{file}' does not match this model. 3 errors:\n"
        "- No hook point named 'relu1'. Did you mean 'relu2'? (12 hook points; print the "
        "HookPoints to list them.)\n"
        "- Hook point 'relu2' is GELU (batch, channel=16, row=8, col=8) float64 in this model, but ReLU (batch, "
        "channel=8, row=8, col=8) float32 in the file.\n"
        "- Hook point 'fc' is Linear (batch, feature=4) float64 in this model, but Linear (batch, feature=4) float32 "
        "in the file.\n"
        "To load the patches without checks, call load(file) without points."
    )
    assert [repr(patch.site) for patch in load(file)] == [
        "Site('relu1', channel=[1, 2])", "Site('relu1')", "Site('relu2', channel=3)", "Site('fc')",
    ]  # fmt: skip


def test_a_model_is_traced_with_the_inputs_of_the_receipt(file: Path) -> None:
    model, inputs = nn.Sequential(nn.Linear(2, 3)), torch.ones(4, 2)
    save(file, zero_ablate(Site("0", feature=1)), model, inputs=inputs)
    assert verify(file, model, inputs) == verify(file, hook_points(model, inputs), inputs)


def test_a_model_without_inputs_to_trace_it_with_is_refused(file: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 3))
    save(file, zero_ablate(Site("0")))
    for call in (lambda: save(file, zero_ablate(Site("0")), model), lambda: load(file, model)):
        with pytest.raises(TypeError, match="There are no inputs to trace the Sequential with. Pass hook_points"):
            call()


def test_a_site_without_a_trace_is_checked_too(file: Path) -> None:
    points, _ = traced(build("plain_cnn"))
    save(file, [zero_ablate(Site("relu1", channel=8)), Patch(Site("fc"), Set(torch.zeros(1, 5)))])
    message = refused(InterventionError, lambda: load(file, points))
    assert message == (
        f"'{file}' does not match this model. 2 errors:\n"
        "- Site('relu1', channel=8): channel 8 is out of range; hook point 'relu1' has axes (batch, channel, row, col) "
        "and 8 channels (0 to 7).\n"
        "- Set at Site('fc'): the value has shape (1, 5), but the region has axes (batch, feature) = (any, 4). Each "
        "axis of the value must have the region's length or length 1.\n"
        "To load the patches without checks, call load(file) without points."
    )


def test_a_batch_of_another_length_fits(file: Path) -> None:
    points, _ = traced(build("plain_cnn"))
    save(file, zero_ablate(points.site("relu1")))
    assert len(load(file, traced(build("plain_cnn"), rows=7)[0])) == 1


# Repeated bit for bit


def digest(*tensors: tuple[str, Tensor]) -> str:
    """Return SHA-256 over tensors by name, as it is written by hand."""
    parts = (
        f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.detach().numpy().tobytes()
        for name, tensor in sorted(tensors, key=lambda pair: pair[0])
    )
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_a_receipt_is_what_its_digests_are_written_out_by_hand(file: Path) -> None:
    points, (images,) = traced(build("plain_cnn"))
    save(file, zero_ablate(points.site("fc", feature=1)), points, inputs=images)
    with torch.no_grad():
        output = points.model(images)
    output[:, 1] = 0.0
    receipt = verify(file, points, images)
    weights = [(f'["{name}"]', weight) for name, weight in points.model.state_dict().items()]
    assert receipt.weights == digest(*weights)
    assert receipt.inputs == digest(("[0][0]", images))
    assert receipt.output == digest(("", output))
    assert receipt.environment == (f"torch {torch.__version__}, cpu, {torch.get_num_threads()} threads, eval mode")
    assert contents(file).receipt == receipt


@pytest.mark.parametrize("name", MODELS)
def test_another_copy_of_each_model_repeats_the_run_of_the_file(name: str, file: Path) -> None:
    points, inputs = traced(build(name))
    site = points.site(build(name).site)
    _, cache = run_with_cache(points, *inputs, sites=site)
    save(
        file,
        [Patch(site, Scale(0.5)), patch_in(site, cache, where=torch.rand_like(cache[site]) < 0.5)],
        points,
        inputs=inputs,
    )
    twin = hook_points(build(name).module, *inputs)
    assert verify(file, twin, inputs) == contents(file).receipt


def test_inputs_may_be_keywords(file: Path) -> None:
    points, (images,) = traced(build("plain_cnn"))
    save(file, zero_ablate(points.site("fc")), points, inputs={"image": images})
    assert verify(file, points, {"image": images}).inputs == digest(('[1]["image"]', images))


class Wave(nn.Module):
    """Has a method of its own, which returns a conjugate that is not computed yet."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, vector: Tensor) -> Tensor:
        raise NotImplementedError

    def spectrum(self, vector: Tensor) -> Tensor:
        return torch.complex(self.fc(vector), vector[:, :4]).conj()


def test_the_run_is_of_the_method_that_was_traced(file: Path) -> None:
    vectors = torch.randn(3, 6)
    points = hook_points(Wave(), vectors, method="spectrum")
    save(file, zero_ablate(points.site("fc")), points, inputs=vectors)
    expected = torch.complex(torch.zeros(3, 4), -vectors[:, :4])
    assert verify(file, points, vectors).output == digest(("", expected))


class Sampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, vector: Tensor) -> Tensor:
        return Categorical(logits=self.fc(vector)).sample()


def test_a_policy_that_samples_repeats_and_the_users_generator_does_not_notice(file: Path) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(64, 6)
    points = hook_points(Sampling(), vectors)
    state = torch.get_rng_state()
    save(file, zero_ablate(points.site("fc", feature=0)), points, inputs=vectors)
    torch.manual_seed(123)
    verify(file, points, vectors)
    torch.set_rng_state(state)
    save(file, zero_ablate(points.site("fc", feature=0)), points, inputs=vectors)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_receipt_leaves_buffers_flags_hooks_and_inputs_as_they_were(file: Path) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(6)).train()
    vectors = torch.randn(8, 6)
    points = hook_points(model, vectors)
    before, given = {name: each.clone() for name, each in model.state_dict().items()}, vectors.clone()
    save(file, zero_ablate(points.site("0")), points, inputs=vectors)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert model.training and torch.equal(vectors, given)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class StaticOutput(nn.Module):
    """Returns one and the same buffer each time, as a captured graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.register_buffer("out", torch.zeros(3, 4))

    def forward(self, vector: Tensor) -> Tensor:
        return self.out.copy_(self.fc(vector))


def test_a_receipt_is_of_the_output_also_where_that_is_a_buffer_that_is_put_back(file: Path) -> None:
    vectors = torch.randn(3, 6)
    points = hook_points(StaticOutput(), vectors)
    patch = zero_ablate(points.site("fc", feature=0))
    save(file, patch, points, inputs=vectors)
    with torch.no_grad(), patched(points, patch):
        expected = points.model(vectors).clone()
    receipt = contents(file).receipt
    assert receipt is not None and receipt.output == digest(("", expected))


COUNT = itertools.count()  # nothing of the model's, so nothing that is put back


class Counting(nn.Module):
    """Returns something else in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, vector: Tensor) -> Tensor:
        return self.fc(vector) + next(COUNT)


def test_a_forward_that_does_not_repeat_gets_no_receipt_and_the_older_file_stays(file: Path) -> None:
    vectors = torch.randn(4, 6)
    points = hook_points(Counting(), vectors)
    patch = zero_ablate(points.site("fc", feature=0))
    save(file, patch)
    before = file.read_bytes()
    assert refused(InterventionError, lambda: save(file, patch, points, inputs=vectors)) == (
        "The patches were not saved: two forward passes gave different outputs, so the receipt could not be verified. "
        "Make the model deterministic, for example with torch.use_deterministic_algorithms(True), or save without "
        "inputs."
    )
    assert file.read_bytes() == before and [*file.parent.iterdir()] == [file]


def test_a_patch_that_never_ran_gets_no_receipt(file: Path) -> None:
    model = nn.ModuleDict({"used": nn.Linear(6, 4), "idle": nn.Linear(4, 4)})
    model.forward = lambda vector: model["idle" if vector.sum() > 0 else "used"](vector)
    points = hook_points(model, -torch.ones(2, 6))
    with pytest.raises(UnreachedError, match="The patch at 'used' never ran"):
        save(file, zero_ablate(points.site("used")), points, inputs=torch.ones(2, 4))
    assert not file.exists()


def test_an_output_without_a_tensor_gets_no_receipt(file: Path) -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, vector: Tensor) -> None:
            self.fc(vector)

    points = hook_points(Silent(), torch.randn(4, 6))
    assert refused(
        InterventionError, lambda: save(file, zero_ablate(points.site("fc")), points, inputs=torch.randn(4, 6))
    ) == (
        "The model's output (NoneType) contains no tensors, so there is nothing to compare. Save without inputs, or "
        "trace a method that returns a tensor: hook_points(..., method=...)."
    )


def test_verify_names_what_is_not_the_same(file: Path) -> None:
    points, (images,) = traced(build("plain_cnn"))
    save(file, zero_ablate(points.site("relu1", channel=1)), points, inputs=images)
    here = f"torch {torch.__version__}, cpu, {torch.get_num_threads()} threads, eval mode"
    environments = f"Environment in the file: {here}; environment here: {here}."

    assert refused(InterventionError, lambda: verify(file, points, images[:2])) == (
        f"The run in '{file}' was not reproduced. Different: inputs, output. Same: hook points, weights. {environments}"
    )
    torch.manual_seed(1)
    other = hook_points(PlainCNN().eval(), images)
    assert refused(InterventionError, lambda: verify(file, other, images)) == (
        f"The run in '{file}' was not reproduced. Different: weights, output. Same: hook points, inputs. {environments}"
    )
    points.model.fc.register_forward_hook(lambda module, inputs, output: output.nextafter(output + 1))
    assert refused(InterventionError, lambda: verify(file, points, images)) == (
        f"The run in '{file}' was not reproduced. Different: output. Same: hook points, weights, inputs. The "
        f"difference must therefore come from the model's code or the environment. {environments}"
    )


def test_one_bit_of_one_weight_is_not_the_same(file: Path) -> None:
    points, (images,) = traced(build("plain_cnn"))
    save(file, zero_ablate(points.site("fc")), points, inputs=images)  # the output is zero whatever the weights
    with torch.no_grad():
        points.model.conv1.bias[0] = points.model.conv1.bias[0].nextafter(torch.tensor(9.0))
    assert "Different: weights. Same: hook points, inputs, output." in refused(
        InterventionError, lambda: verify(file, points, images)
    )


def test_verify_without_a_receipt_says_how_to_get_one(file: Path) -> None:
    points, (images,) = traced(build("plain_cnn"))
    save(file, zero_ablate(points.site("fc")))
    assert refused(InterventionError, lambda: verify(file, points, images)) == (
        f"'{file}' has no receipt, so there is no output to compare with. Save the patches with inputs: save(file, "
        "patches, points, inputs=inputs)."
    )


# What a file holds


def test_the_contents_of_a_file_print_as_a_table(file: Path) -> None:
    points, (images,) = traced(build("plain_cnn"))
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    patches = [
        steer(points.site("relu1", channel=5), torch.ones(1, 1, 8, 8), 0.5, where=mask),
        zero_ablate(Site("fc", feature=[1, 3])),
    ]
    save(file, patches)
    traced_as = "ReLU (batch, channel=8, row=8, col=8) float32"
    edits = "Add(vector=float32 (1, 1, 8, 8), coefficient=0.5)", "Set(value=0.0)".ljust(49)
    assert repr(contents(file)).splitlines() == [
        f"2 patches, saved by chanpatch {VERSION}",
        f"patch  site                        {'edit'.ljust(49)}  where              hook point",
        f"1      Site('relu1', channel=5)    {edits[0]}  bool (1, 1, 8, 8)  {traced_as}",
        f"2      Site('fc', feature=[1, 3])  {edits[1]}  everywhere         not traced",
        f"Checksum: {contents(file).checksum}",
        "No receipt: saved without inputs.",
    ]
    save(file, zero_ablate(points.site("fc")), points, inputs=images)
    receipt = verify(file, points, images)
    assert repr(contents(file)).splitlines() == [
        f"1 patch, saved by chanpatch {VERSION}",
        "patch  site        edit            where       hook point",
        "1      Site('fc')  Set(value=0.0)  everywhere  Linear (batch, feature=4) float32",
        f"Checksum: {contents(file).checksum}",
        "Receipt:",
        f"  weights  {receipt.weights}",
        f"  inputs  {receipt.inputs}",
        f"  output  {receipt.output}",
        f"  environment  {receipt.environment}",
    ]


def test_what_a_file_says_of_a_hook_point_is_its_trace(file: Path) -> None:
    points, _ = traced(build("plain_cnn"))
    save(file, [zero_ablate(points.site("relu1")), zero_ablate(Site("fc"))])
    found = contents(file)
    assert found.hook_points == ("ReLU (batch, channel=8, row=8, col=8) float32", None)
    assert found.to_records()[1] == {
        "patch": 2,
        "site": "Site('fc')",
        "edit": "Set(value=0.0)",
        "where": "everywhere",
        "hook point": "not traced",
    }


def test_what_a_file_says_cannot_command_a_terminal(file: Path) -> None:
    bell = "\x1b]0;title\x07\x9b2J"
    site = {"name": bell, "indices": {bell: [0]}}
    receipt = dict.fromkeys(("weights", "inputs", "output", "environment"), bell)
    written(file, record(site=site, hook_point=bell) | {"chanpatch": bell, "receipt": receipt})
    assert not re.search(r"[^\n\x20-\x7e]", repr(contents(file)))
