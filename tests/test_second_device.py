"""The library and the training on a second device, in processes of their own, as torch cannot forget such a device."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("what", ["library", pytest.param("training", marks=pytest.mark.slow)])
def test_all_lies_on_a_second_device_and_has_the_cpus_numbers(what):
    file = HERE / "on_second_device" / f"{what}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
