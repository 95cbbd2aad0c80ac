"""`python -m chanpatch`."""

from __future__ import annotations

import subprocess
import sys
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


@pytest.mark.parametrize("has_checksum", [True, False])
def test_show_says_whether_a_file_has_a_checksum(
    has_checksum: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(__file__).parent / "saving" / "format_1.safetensors"
    if has_checksum:
        file = tmp_path / "patches.safetensors"
        save(file, zero_ablate(Site("relu1")))
    main(["show", str(file)])
    said = "Checksum: " if has_checksum else "No checksum in format 1: corrupted numbers would go unnoticed."
    assert f"\n{said}" in capsys.readouterr().out


def test_a_file_that_cannot_be_shown_is_one_line_on_stderr_and_a_status_of_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, foreign = tmp_path / "missing", tmp_path / "foreign"
    foreign.write_bytes(b"")
    for file, message in (
        (missing, f"[Errno 2] No such file or directory: '{missing}'\n"),
        (
            foreign,
            f"'{foreign}' is damaged: SafetensorError: Error while deserializing header: header too small\n",
        ),
    ):
        with pytest.raises(SystemExit) as end:
            main(["show", str(file)])
        printed = capsys.readouterr()
        assert (end.value.code, printed.out, printed.err) == (1, "", message)


@pytest.mark.parametrize(("arguments", "text"), [
    (["--help"], "Inspect patch files written by chanpatch.save()."),
    (["--help"], "print the contents of a patch file"),
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
