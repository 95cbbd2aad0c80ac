"""The command `chanpatch`, which `python -m chanpatch` runs too."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import chanpatch
from chanpatch import Site, zero_ablate
from chanpatch.__main__ import main
from chanpatch.saving import contents, save


def test_show_prints_what_a_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "patches.safetensors"
    save(file, zero_ablate(Site("relu1", channel=5)))
    main(["show", str(file)])
    assert capsys.readouterr().out == f"{contents(file)}\n"


def test_show_prints_the_checksum_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "patches.safetensors"
    save(file, zero_ablate(Site("relu1")))
    main(["show", str(file)])
    assert "\nChecksum: " in capsys.readouterr().out


def test_a_file_that_cannot_be_shown_is_one_line_on_stderr_and_a_status_of_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, foreign = tmp_path / "missing", tmp_path / "foreign"
    foreign.write_bytes(b"")
    for file, message in (
        (missing, f"[Errno 2] No such file or directory: '{missing}'\n"),
        (
            foreign,
            f"'{foreign}' is damaged, or was not written by chanpatch.save(): SafetensorError: Error while "
            "deserializing header: header too small\n",
        ),
    ):
        with pytest.raises(SystemExit) as end:
            main(["show", str(file)])
        printed = capsys.readouterr()
        assert (end.value.code, printed.out, printed.err) == (1, "", message)


@pytest.mark.parametrize(("arguments", "text"), [
    (["--help"], "List a model's hook points, and inspect and verify patch files written by chanpatch.save()."),
    (["--help"], "print the contents of a patch file"),
    (["--help"], "chanpatch points my_model:example"),
    (["points", "--help"], "a tuple (model, *inputs), in which the inputs are a batch of at least one example."),
    (["verify", "--help"], "compare the run with the file's receipt."),
    (["show", "--help"], "No code from the file is executed."),
])  # fmt: skip
def test_help_says_what_there_is(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert text in " ".join(capsys.readouterr().out.split())


def test_without_a_command_it_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "the following arguments are required: command" in capsys.readouterr().err


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "chanpatch", "--version"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == f"chanpatch {chanpatch.__version__}\n"


MODEL = """
import torch
from torch import nn


def example():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.ones(2, 3)


def changed():
    model, x = example()
    return model, x + 1


def alone():
    return example()[0]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file that defines a model."""
    (tmp_path / "my_model.py").write_text(MODEL)
    (tmp_path / "broken.py").write_text("import not_installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    return tmp_path


def test_points_lists_the_hook_points_of_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["points", "my_model:example"])
    printed = capsys.readouterr().out
    assert printed.startswith("6 hook points of Sequential, in execution order\n")
    names = [line.split()[0] for line in printed.splitlines()[2:]]
    assert names == [".in[0]", "0.in[0]", "0", "1.in[0]", "1", ".out"]


def test_verify_compares_a_run_with_the_receipt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(folder))
    import my_model  # type: ignore[import-not-found]

    model, x = my_model.example()
    points = chanpatch.hook_points(model, x)
    save("patch.safetensors", zero_ablate(points.site("1", feature=0)), points, inputs=x)
    main(["verify", "patch.safetensors", "--model", "my_model:example"])
    reproduced = "The run in 'patch.safetensors' was reproduced bit for bit: same weights, inputs and output.\n"
    assert capsys.readouterr().out == reproduced
    with pytest.raises(SystemExit) as end:
        main(["verify", "patch.safetensors", "--model", "my_model:changed"])
    assert end.value.code == 1
    assert "was not reproduced. Different: inputs, output. Same: hook points, weights." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        *(
            (
                reference,
                f"{reference!r} does not have the form module:callable, such as my_model:example for a function in "
                "my_model.py.\n",
            )
            for reference in ("my_model", "./my_model.py:example", "my_model.py:example")
        ),
        ("broken:example", "The module broken imports a module that is missing: No module named 'not_installed'.\n"),
        ("my_modle:example", "No module named 'my_modle'. Run the command in the folder that contains my_modle.py.\n"),
        ("my_model:exampel", "The module my_model has no callable 'exampel'. Did you mean 'example'?\n"),
        (
            "my_model:alone",
            "my_model:alone must return a tuple (model, *inputs), with at least one input; got Sequential.\n",
        ),
    ],
)
def test_a_model_that_cannot_be_found_is_one_line_and_a_status_of_1(
    folder: Path, reference: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["points", reference])
    assert (end.value.code, capsys.readouterr().err) == (1, message)


def test_doctor_lists_versions_and_optional_packages(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    printed = capsys.readouterr().out
    assert f"\nchanpatch {chanpatch.__version__}\ntorch {version('torch')}\n" in printed
    assert "\n  installed  safetensors        saving and loading patches (extra: save)\n" in printed
