"""Why does a mouse trained with the cheese in the top right corner go to the corner when the cheese is elsewhere?

Study one channel of a maze-solving policy in six steps, in the real procgen environment:

  1. contrastive pairs: which channels respond when one moved wall changes the path to the cheese?
  2. channel sums: which channel predicts that the path to the cheese goes up, in and out of distribution?
  3. a threshold on that sum, fitted in distribution: how well does it transfer?
  4. a patched policy: the same weights with the channel set to zero, and controls
  5. paired rollouts on the same levels with the same random draws: does the mouse find the cheese more often?
  6. a figure

Each step prints its results. The figure and the table are written to a folder under --out. After Ctrl-C, the same
command picks up where it left off. The full study has its own command: python examples/maze/study.py --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from maze.command import UserError, exit_status

try:
    import numpy as np
    from matplotlib.figure import Figure

    from chanpatch import PatchedPolicy, ThresholdProbe, channel_sums, contrast, rollout, zero_ablate
    from chanpatch.controls import matched_channels
    from chanpatch.plots import effect_ranking, strip
    from chanpatch.policies import PairedRollouts
    from chanpatch.statistics import auc, mcnemar_exact, paired_counts, paired_difference_interval
    from maze.analysis.forwards import channel_of, frames, load_points
    from maze.environment.moved_walls import pairs_with_a_moved_wall
    from maze.environment.vector_env import MazeVectorEnv
    from maze.levels import draw_levels
    from maze.paths import Direction, first_steps, legal_first_steps, top_right
    from maze.report.trajectories import draw_trajectories, mouse_path
    from maze.results import check_folder, replace_table, replaced, settings_key, versions
    from maze.rollouts import kept
    from maze.states import read_mazes, write_mazes
except ImportError as error:
    missing: ImportError | None = error  # --help works without these packages
else:
    missing = None

STEPS = 256  # maximum length of an episode
LEVELS = 500  # number of levels for choosing the channel and scoring the probe

EXAMPLES = """examples:
  python examples/maze_goal_misgen.py                                 200 levels, the shipped policy with width 1
  python examples/maze_goal_misgen.py --n 1000 --controls 19          a larger run, with a p-value for the rank
  python examples/maze_goal_misgen.py --weights model_rand_region_5.pth     the published network
"""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=200, help="number of levels for rollouts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed for levels, actions and controls (default: 0)")
    parser.add_argument("--size", type=int, default=15, help="maze side length, odd, 7 to 25 (default: %(default)s)")
    parser.add_argument("--weights", type=Path, help="a .pth or .safetensors file, of any width (default: shipped)")
    parser.add_argument("--site", default="embedder.relu3", help="hook point with the channel (default: %(default)s)")
    parser.add_argument("--channel", type=int, help="channel to ablate (default: the best predictor of UP)")
    parser.add_argument("--controls", type=int, default=3, help="number of matched control channels (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for results (default: results)")
    return parser


def check(given: argparse.Namespace) -> None:
    """Raise an error if a package is missing or an option is invalid."""
    if missing is not None:
        raise missing
    for name, low, high in (("n", 10, 1_000_000), ("seed", 0, 2**31 - 1), ("controls", 1, 1000), ("size", 7, 25)):
        if not low <= getattr(given, name) <= high:
            raise UserError(f"--{name} must be between {low} and {high}; got {getattr(given, name)}.")
    if given.size % 2 == 0:
        raise UserError(f"--size must be odd; got {given.size}.")
    if given.channel is not None and given.channel < 0:
        raise UserError(f"--channel must be at least 0; got {given.channel}.")
    check_folder(given.out)


def main() -> int:
    given = arguments().parse_args()
    return exit_status(lambda: study(given), resumes=False)


def study(given: argparse.Namespace) -> None:
    """Run the six steps of the study."""
    check(given)
    points, weights = load_points(given.weights)
    points.site(given.site, channel=given.channel or 0)  # raises an error if the name or the channel does not exist
    choice, drawn, control, pair = map(int, np.random.SeedSequence(given.seed).generate_state(4) % 2**30)
    print(f"Policy: {weights['name']}, width {weights['width']}, sha256 {weights['sha256'][:12]}")

    contrastive_pairs(points, given.site, pair)
    channel, inside, outside = best_channel(points, given, choice)
    probe = transferred_probe(channel, inside, outside)

    site = points.site(given.site, channel=channel)
    background = frames(draw_levels(LEVELS, size=given.size, seed=choice, mouse="anywhere"))
    controls = matched_channels(points, site, background, count=given.controls, seed=control)
    print(f"\n4. Control channels: active channels with about the same mean activation.\n\n{controls}")
    policies = {"original": points.model}
    for each in (site, *controls):
        policies[f"channel {channel_of(each)} zeroed"] = PatchedPolicy(points, zero_ablate(each))

    levels = draw_levels(given.n, size=given.size, seed=drawn, cheese="bottom right")
    known = vars(given) | {"weights": weights["sha256"], "versions": versions(), "out": None}
    folder = given.out / f"channel{channel}-size{given.size}-n{given.n}-seed{given.seed}-{settings_key(known)}"
    rollouts = played(policies, levels, given.seed, folder)
    rows = compared(rollouts, controls)
    replace_table(folder / "table.csv", rows)
    with replaced(folder / "channel.png") as partial:
        figure(channel, (inside, outside), probe, rollouts, rows, levels).savefig(partial, dpi=110)
    print(f"\nFigure and table: {folder}")


# 1. Which channels respond when one moved wall changes the first step to the cheese from UP to RIGHT?


def contrastive_pairs(points: Any, name: str, seed: int) -> None:
    levels = draw_levels(64, size=15, seed=seed, cheese="in distribution")
    up, right, kept_levels = pairs_with_a_moved_wall(levels, clean=Direction.UP, corrupted=Direction.RIGHT, seed=seed)
    base = [levels[index] for index in kept_levels]  # both mazes in a pair have the textures of their level
    clean, corrupted = (frames(write_mazes(mazes, base)) for mazes in (up, right))
    background = frames(draw_levels(200, size=15, seed=seed + 1, mouse="anywhere"))
    found = contrast(points, clean, corrupted, name, background=background)
    print("\n1. A contrastive pair of mazes (M: mouse, C: cheese). One moved wall changes the path to the cheese:\n")
    for lines in zip(up.picture(0).splitlines(), right.picture(0).splitlines(), strict=True):
        print("    " + "      ".join(lines))
    print(f"\nThe channels with the largest effects over {len(base)} such pairs:\n\n{found.top(5)}")


# 2. Which channel predicts that the path to the cheese goes up?


def best_channel(points: Any, given: argparse.Namespace, seed: int) -> tuple[int, dict[str, Any], dict[str, Any]]:
    inside = sums(points, given, seed, "in distribution")
    outside = sums(points, given, seed + 1, "out of distribution")
    live = np.flatnonzero(np.ptp(inside["sums"], axis=0) > 0)
    candidates = live if given.channel is None else [given.channel]
    channel = int(max(candidates, key=lambda each: auc(inside["sums"][:, each], inside["cheese"]).estimate))
    chosen = "the best of the" if given.channel is None else "given by --channel;"
    first, second = len(inside["cheese"]), len(outside["cheese"])
    print(f"\n2. Channel {channel} of {given.site} ({chosen} {len(live)} active channels). AUC of its sum for")
    print(f"   predicting that the first step is UP (n = {first} and {second} mazes that allow UP):\n")
    apart = outside["cheese"] != outside["corner"]
    for target, mazes, goal, rows in (
        ("step to the cheese, cheese in the top right 5x5", inside, "cheese", slice(None)),
        ("step to the cheese, cheese elsewhere", outside, "cheese", slice(None)),
        ("step to the corner, cheese elsewhere", outside, "corner", slice(None)),
        (f"step to the cheese, {apart.sum()} mazes where only one of the two is UP", outside, "cheese", apart),
    ):
        score = auc(mazes["sums"][rows, channel], mazes[goal][rows])
        print(f"   {target:62} {score.estimate:.3f} ({score.low:.3f} to {score.high:.3f})")
    return channel, inside, outside


def sums(points: Any, given: argparse.Namespace, seed: int, cheese: str) -> dict[str, Any]:
    """Return channel sums, and whether the paths to cheese and corner start with UP, for mazes in which UP is free."""
    levels = draw_levels(LEVELS, size=given.size, seed=seed, cheese=cheese, mouse="anywhere")
    mazes = read_mazes(levels)
    free = legal_first_steps(mazes)[:, Direction.UP]
    to_cheese, to_corner = (first_steps(mazes, target)[:, Direction.UP] for target in (mazes.cheese, top_right(mazes)))
    found = channel_sums(points, frames(levels), given.site)
    return {"sums": found[free], "cheese": to_cheese[free], "corner": to_corner[free]}


# 3. A threshold on the sum, fitted in distribution, and its transfer out of distribution


def transferred_probe(channel: int, inside: dict[str, Any], outside: dict[str, Any]) -> Any:
    probe = ThresholdProbe.fit(inside["sums"][:, channel], inside["cheese"])
    print(f"\n3. A threshold of {probe.threshold:.1f} on the sum, fitted in distribution, and how it transfers:\n")
    print(probe.transfer(outside["sums"][:, channel], outside["cheese"]))
    return probe


# 4 and 5. Rollouts on the same levels with the same random draws: original, ablated and control policies


def played(policies: dict[str, Any], levels: list[bytes], seed: int, folder: Path) -> Any:
    print(f"\n5. Rollouts on {len(levels)} levels with the cheese in the bottom right corner, at most {STEPS} steps:\n")
    envs = MazeVectorEnv(levels, num_envs=min(len(levels), 256))
    done = {}
    for name, policy in policies.items():
        print(f"   {name}", flush=True)
        play = partial(rollout, policy, envs, range(len(levels)), max_steps=STEPS, sampling_seed=seed)
        done[name] = kept(folder / f"{name.replace(' ', '-')}.npz", play)
    envs.close()
    return PairedRollouts(done)


def compared(rollouts: Any, controls: Any) -> list[dict[str, Any]]:
    """Compare, level by level, how often each patched policy and the original find the cheese. Return the rows."""
    original, *others = rollouts
    rows = []
    for name in others:
        counts = paired_counts(rollouts[name].terminated, rollouts[original].terminated)
        difference = paired_difference_interval(*counts)
        row = {"label": name, "found": rollouts[name].terminated.mean(), **counts._asdict()}
        row |= {"effect": difference.estimate, "low": difference.low, "high": difference.high}
        rows.append(row | {"p": mcnemar_exact(counts.only_first, counts.only_second), "control": len(rows) > 0})
    print(f"\n   The original policy finds the cheese in {rollouts[original].terminated.mean():.1%} of the levels.")
    for row in rows:
        change = f"{row['effect']:+.1%} ({row['low']:+.1%} to {row['high']:+.1%})"
        print(f"   {row['label']:20} {row['found']:6.1%}   {change:28} exact McNemar p = {row['p']:.2g}")
    rank = controls.rank(rows[0]["effect"], [row["effect"] for row in rows[1:]], alternative="greater")
    print(f"   Increase with {rows[0]['label']}, among the controls: {rank}.")
    return rows


# 6. A figure


def figure(channel: int, mazes: Sequence[Any], probe: Any, rollouts: Any, rows: Any, levels: Sequence[bytes]) -> Any:
    drawn = Figure(figsize=(15, 5), layout="constrained")
    left, middle, right = drawn.subplots(1, 3, width_ratios=(1.2, 1, 1))
    labels = np.concatenate([np.where(each["cheese"], "UP", "other") for each in mazes])
    split = np.repeat(["in distribution", "out of distribution"], [len(each["cheese"]) for each in mazes])
    both = np.concatenate([each["sums"][:, channel] for each in mazes])
    strip(both, labels, split, probe.threshold, left)
    left.set(xlabel="first step to the cheese", ylabel=f"sum of channel {channel}")
    original, zeroed, *_ = rollouts
    shown = int(np.argmax(rollouts[zeroed].terminated & ~rollouts[original].terminated))
    paths = {name: mouse_path(levels[shown], rollouts[name].actions[shown]) for name in (original, zeroed)}
    draw_trajectories(middle, levels[shown], paths)
    effect_ranking(rows, right, label="change in the fraction of levels in which the cheese is found")
    return drawn


if __name__ == "__main__":
    sys.exit(main())
