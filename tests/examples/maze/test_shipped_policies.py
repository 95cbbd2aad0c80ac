"""The names of the shipped policies."""

import hashlib

from maze.policy import shipped
from maze.policy.network import SHIPPED_WEIGHTS
from maze.policy.shipped import FILES, shipped_name


def test_every_weights_file_has_a_name():
    assert {*FILES.values()} == {*SHIPPED_WEIGHTS.parent.glob("*.safetensors")}
    assert next(iter(FILES)) == "width4"
    for name, file in FILES.items():
        assert shipped_name(hashlib.sha256(file.read_bytes()).hexdigest()) == name


def test_a_file_that_is_not_shipped_has_no_name():
    assert shipped_name("0" * 64) is None


def test_without_the_shipped_weights_no_file_has_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FILES", {"imitation": tmp_path / "policy.safetensors"})
    assert shipped_name("1" * 64) is None
