import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chanpatch.errors import HookPointError
from maze import command
from maze.command import UserError, exit_status
from maze.environment.requirements import MissingRequirement

EXAMPLES = Path(command.__file__).parents[1]
COMMANDS = [EXAMPLES / name for name in ("maze_goal_misgen.py", "maze/study.py", "maze/evaluate.py", "maze/train.py")]


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (130, 130)])
def test_the_exit_status_is_the_commands_own_and_0_for_none(returned, status, capsys):
    assert exit_status(lambda: returned) == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("--n is 0."), "--n is 0."),
        (MissingRequirement("Type this."), "Type this."),
        (HookPointError("No hook point named 'x'."), "No hook point named 'x'."),
        (PermissionError(13, "Permission denied", "out"), "[Errno 13] Permission denied: 'out'"),
        (
            ModuleNotFoundError("No module named 'torch'"),
            "No module named 'torch'. Type: make study (or see 'Install' in the README)",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(error, message, capsys):
    assert exit_status(raising(error)) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


@pytest.mark.parametrize("error", [ValueError("ours"), KeyError("ours")])
def test_a_fault_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error), match="ours"):
        exit_status(raising(error))


def test_ctrl_c_ends_with_one_line_and_status_130(capsys):
    assert exit_status(lambda: os.kill(os.getpid(), signal.SIGINT)) == 130
    assert capsys.readouterr().err == "\nInterrupted. The same command continues from the results on disk.\n"


@pytest.mark.parametrize("script", COMMANDS, ids=lambda script: script.stem)
def test_a_command_without_its_packages_says_what_to_type(script, tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith("error: No module named '")
    assert line.endswith(". Type: make study (or see 'Install' in the README)")
