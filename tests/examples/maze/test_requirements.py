import subprocess
import sys
from pathlib import Path

import pytest

from maze.command import exit_status
from maze.environment import requirements
from maze.environment.requirements import MissingRequirement, policy_models, procgen_mazes

EXAMPLES = Path(requirements.__file__).parents[2]
INSTALL = 'Type `pip install "chanpatch[maze]"`.'


def test_a_missing_procgen_is_told_with_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "procgen", None)
    with pytest.raises(MissingRequirement) as error:
        procgen_mazes(1)
    assert str(error.value) == (
        "The maze study needs procgen, which cannot be imported (import of procgen halted; None in sys.modules). "
        + INSTALL
    )
    assert isinstance(error.value, ImportError) and isinstance(error.value.__cause__, ImportError)


def test_a_missing_procgen_tools_is_told_with_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "procgen_tools.models", None)
    with pytest.raises(MissingRequirement) as error:
        policy_models()
    assert str(error.value) == (
        "The maze study needs procgen-tools, which cannot be imported "
        "(import of procgen_tools.models halted; None in sys.modules). Type `pip install --no-deps "
        "procgen-tools==0.1 ipywidgets` (its own pins no longer install)."
    )


def test_a_python_without_procgen_is_named_before_anything_else(monkeypatch, capsys):
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    monkeypatch.setattr(requirements.sys, "version_info", (3, 12, 1, "final", 0))
    assert exit_status(lambda: pytest.fail("the command ran")) == 2
    assert capsys.readouterr().err == (
        "error: The maze study needs procgen, which has builds for Python 3.10 and 3.11 only, and this is Python "
        "3.12: run `make study PYTHON=python3.11`.\n"
    )


def test_the_whole_layer_is_imported_and_used_without_a_word_on_the_terminal():
    program = (
        "from maze import levels, paths, states; from maze.environment import pairs, requirements, vector_env;"
        "from maze.policy import network; import sys;"
        "assert not {'procgen', 'procgen_tools'} & set(sys.modules), 'imported before it is needed';"
        "levels.observe(levels.draw_levels(1, seed=0)); network.load_policy()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        cwd=EXAMPLES,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_environment_left_to_the_garbage_collector_does_not_block_the_next():
    # The later the collector runs, the further the next environment is; somewhere it holds cffi's lock.
    program = (
        "import gc; from maze.environment.requirements import procgen_mazes\n"
        "for threshold in range(20, 400, 20):\n"
        "    gc.set_threshold(100_000); gc.collect()\n"
        "    environment = procgen_mazes(1)\n"
        "    environment.cycle = environment; del environment\n"
        "    gc.set_threshold(threshold)\n"
        "    procgen_mazes(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=EXAMPLES, check=False, timeout=60)
    assert done.returncode == 0
