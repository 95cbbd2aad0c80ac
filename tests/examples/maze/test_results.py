import os

import pytest

from maze.command import UserError
from maze.results import check_folder


def test_a_folder_that_is_there_or_can_be_created_passes_and_is_not_created(tmp_path):
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "newer")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "results"])
def test_a_file_in_the_place_of_the_folder_is_named(below, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError) as error:
        check_folder(file / below)
    assert str(error.value) == f"--out is '{file / below}', but '{file}' is a file. Name a folder."


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    # Asked through os.access, since the permission bits do not hold for root.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError) as error:
        check_folder(tmp_path / "new")
    assert (
        str(error.value)
        == f"--out is '{tmp_path / 'new'}', but '{tmp_path}' cannot be written to. Name another folder."
    )
