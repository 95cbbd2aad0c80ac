import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from maze.command import UserError
from maze.results import Damaged, check_folder, locked, read_arrays, read_manifest, replace_table, write_manifest

EXAMPLES = Path(__file__).parents[3] / "examples"


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


def test_a_manifest_gives_back_its_facts_with_the_digest_of_each_table(tmp_path):
    replace_table(tmp_path / "a.csv", [{"x": 1}])
    write_manifest(tmp_path, {"n": 3, "sizes": (7, 9), "seconds": 0.1})
    found = read_manifest(tmp_path)
    assert found.pop("files") == {"a.csv": hashlib.sha256(b"x\r\n1\r\n").hexdigest()}
    assert found == {"n": 3, "sizes": [7, 9], "seconds": 0.1}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"n": 3}',
        b'{"digest": 1}',
        b'{"digest": [], "files": 3}',
    ],
)
def test_a_manifest_that_is_damaged_is_one_error(content, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(Damaged) as error:
        read_manifest(tmp_path)
    assert str(error.value) == "manifest.json is damaged, or is from an older version that did not store digests"


def test_a_bit_that_is_flipped_anywhere_in_a_manifest_or_table_is_noticed(tmp_path):
    replace_table(tmp_path / "a.csv", [{"x": 1, "y": 0.25}])
    write_manifest(tmp_path, {"n": 3, "seconds": 0.1})
    facts = read_manifest(tmp_path)
    for name in ("a.csv", "manifest.json"):
        content = (tmp_path / name).read_bytes()
        for place in range(8 * len(content)):
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            (tmp_path / name).write_bytes(flipped)
            try:
                assert read_manifest(tmp_path) == facts  # one blank for another
                assert name == "manifest.json"
            except Damaged:
                pass
        (tmp_path / name).write_bytes(content)


def test_a_folder_is_locked_until_the_block_ends_with_an_error_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "new"):
        with pytest.raises(UserError) as error, locked(tmp_path / "new"):
            pass
        raise KeyboardInterrupt
    with locked(tmp_path / "new"):
        pass
    assert str(error.value) == (
        f"'{tmp_path / 'new'}' is in use by another run. Wait until that run ends, or name another folder with --out."
    )


def test_the_lock_of_a_dead_process_does_not_count(tmp_path):
    script = f"import os, maze.results as r; r.locked(r.Path({str(tmp_path)!r})).__enter__(); os._exit(3)"
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 3
    with locked(tmp_path):
        pass


def test_of_many_runs_one_works_at_a_time(tmp_path):
    def attempt(number):
        try:
            with locked(tmp_path):
                inside.append(number)
                assert len(inside) == 1
                inside.remove(number)
        except UserError:
            return False
        return True

    inside = []
    with ThreadPoolExecutor(8) as pool:
        for _ in range(30):
            assert any(list(pool.map(attempt, range(8))))  # all of them, before the next round


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: b"\xff" * len(data),
                                    lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:]])  # fmt: skip
def test_kept_arrays_that_are_damaged_are_computed_again_and_a_line_says_so(damage, tmp_path, capsys):
    file = tmp_path / "kept.npz"
    np.savez_compressed(file, found=np.arange(100) % 3)
    assert list(read_arrays(file)["found"]) == list(np.arange(100) % 3)
    file.write_bytes(damage(file.read_bytes()))
    assert read_arrays(file) is None
    assert capsys.readouterr().out == "    'kept.npz' is damaged, so it is computed again\n"


def test_a_link_that_somebody_planted_is_not_written_through(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a.partial.csv").symlink_to(tmp_path / "victim")
    replace_table(tmp_path / "a.csv", [{"x": 1}])
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "a.csv").read_bytes() == b"x\r\n1\r\n" and not (tmp_path / "a.csv").is_symlink()
    assert not (tmp_path / "a.partial.csv").exists()
