"""Pictures of mazes with trajectories."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from maze.environment.vector_env import MazeVectorEnv
from maze.states import read_mazes

_STYLES = (("tab:blue", "-", "o"), ("tab:orange", "--", "s"))


def mouse_path(level: bytes, actions: NDArray[np.int8]) -> NDArray[np.int64]:
    """The mouse's cells under these actions in procgen: (step + 1, 2), with the cheese last if the mouse gets there."""
    envs = MazeVectorEnv([level], num_envs=1)
    envs.reset(seed=[0])
    path = [envs.mouse_cells()[0]]
    for action in actions[actions >= 0]:
        terminated = envs.step(np.array([action]))[2]
        path.append(read_mazes([level]).cheese[0] if terminated[0] else envs.mouse_cells()[0])
    envs.close()
    return np.array(path)


def draw_trajectories(axes: Axes, level: bytes, paths: Mapping[str, NDArray[np.int64]]) -> None:
    """Draw a maze with the paths of mice."""
    maze = read_mazes([level])
    axes.imshow(maze.free[0], origin="lower", cmap="gray", vmin=-0.6, vmax=1.0)
    for number, ((name, path), (color, line, marker)) in enumerate(zip(paths.items(), _STYLES, strict=False)):
        shift = 0.16 * (number * 2 - 1)  # side by side if they overlap
        axes.plot(path[:, 1] + shift, path[:, 0] + shift, line, color=color, linewidth=1.8, alpha=0.8)
        end = f"{name}: {len(path) - 1} steps"
        axes.plot(path[-1, 1] + shift, path[-1, 0] + shift, marker, color=color, markersize=9, label=end)
    row, col = maze.cheese[0]
    axes.plot(col, row, "*", color="gold", markeredgecolor="black", markersize=18, label="cheese")
    row, col = maze.mouse[0]
    axes.plot(col, row, "^", color="white", markeredgecolor="black", markersize=9, label="start")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False)
