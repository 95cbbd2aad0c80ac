"""Pictures of mazes with trajectories, and of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from maze.environment.vector_env import MazeVectorEnv
from maze.states import read_mazes

if TYPE_CHECKING:
    from maze.training.evaluation import Score

_STYLES = (("tab:blue", "-", "o"), ("tab:orange", "--", "s"))


def mouse_path(level: bytes, actions: NDArray[np.int8]) -> NDArray[np.int64]:
    """The mouse's cells under these actions in procgen: (step + 1, 2), the cheese last if it gets there."""
    envs = MazeVectorEnv([level], num_envs=1)
    envs.reset(seed=[0])
    cells = [envs.mouse_cells()[0]]
    for action in actions[actions >= 0]:
        terminated = envs.step(np.array([action]))[2]
        cells.append(read_mazes([level]).cheese[0] if terminated[0] else envs.mouse_cells()[0])
    envs.close()
    return np.array(cells)


def draw_trajectories(axes: Axes, level: bytes, paths: Mapping[str, NDArray[np.int64]]) -> None:
    """A maze with the paths of mice."""
    maze = read_mazes([level])
    axes.imshow(maze.free[0], origin="lower", cmap="gray", vmin=-0.6, vmax=1.0)
    for number, ((name, cells), (color, line, marker)) in enumerate(zip(paths.items(), _STYLES, strict=False)):
        shift = 0.16 * (number * 2 - 1)  # side by side if they overlap
        axes.plot(cells[:, 1] + shift, cells[:, 0] + shift, line, color=color, linewidth=1.8, alpha=0.8)
        end = f"{name}: {len(cells) - 1} steps"
        axes.plot(cells[-1, 1] + shift, cells[-1, 0] + shift, marker, color=color, markersize=9, label=end)
    row, col = maze.cheese[0]
    axes.plot(col, row, "*", color="gold", markeredgecolor="black", markersize=18, label="cheese")
    row, col = maze.mouse[0]
    axes.plot(col, row, "^", color="white", markeredgecolor="black", markersize=9, label="start")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False)


def evaluation_figure(scores: Sequence[Score], title: str) -> Figure:
    """Sampled scores against the size of the maze: the cheese found, and the choice at the decision square."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = {
        "found": "P(cheese within 256 steps)",
        "to_cheese": "decision square: P(first to the cheese)",
        "to_corner": "decision square: P(first to the corner)",
    }
    places = list(dict.fromkeys(score.cheese for score in scores))
    sizes = sorted({score.size for score in scores})
    for axes, (measure, label) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for number, place in enumerate(places):
            drawn = [s for s in scores if (s.cheese, s.measure, s.actions) == (place, measure, "sampled")]
            drawn.sort(key=lambda score: score.size)
            size = np.array([score.size for score in drawn]) + 0.15 * (number - len(places) / 2)  # side by side
            mean, low, high = ([getattr(s.mean, name) for s in drawn] for name in ("estimate", "low", "high"))
            (line,) = axes.plot(size, mean, "os^DvP"[number % 6] + "-", label=place)
            axes.vlines(size, low, high, color=line.get_color(), linewidth=2)
        axes.set(xlabel="side of the maze", title=label, xticks=sizes, ylim=(-0.02, 1.02))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(title="cheese", frameon=False, loc="lower left")
    figure.suptitle(title)
    return figure
