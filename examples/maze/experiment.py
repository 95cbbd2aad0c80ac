"""The experiment in procgen from end to end: load, choose a channel, roll out, write and print what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from chanpatch import HookPoints, hook_points
from chanpatch.controls import matched_channels
from chanpatch.statistics import Interval
from maze.analysis.ablation import Comparison, compare, play, ranked, told_rank, zeroed
from maze.analysis.channels import ChannelChoice, channel_of, choose_channel, pair_sums
from maze.analysis.episodes import ORIGINAL, STEPS, Episodes
from maze.analysis.tables import SITE
from maze.command import UserError
from maze.environment.levels import draw_levels, observe, policy_input
from maze.environment.paths import Direction, first_steps
from maze.environment.states import Mazes, read_mazes
from maze.policy.network import load_policy
from maze.report.figures import ablation_figure
from maze.results import check_folder, locked, replace_table, replace_text, replaced, settings_key, versions

_CHOICE_LEVELS = 500  # mazes that the channel is chosen on


class SettingsError(UserError):
    """Settings that the study cannot run with."""


@dataclass(frozen=True)
class Settings:
    """What `examples/maze_goal_misgen.py` takes; its `--help` says what each is.

    Raises:
        SettingsError: a number outside what makes sense.
        UserError: a folder that cannot be written to.
    """

    n: int
    seed: int
    size: int
    site: str
    channel: int | None
    controls: int
    weights: Path | None
    out: Path

    def __post_init__(self) -> None:
        for name, low, high in (("n", 1, 1_000_000), ("seed", 0, 2**31 - 1), ("controls", 0, 1000)):
            if not low <= getattr(self, name) <= high:
                raise SettingsError(f"--{name} is {getattr(self, name)}, but it is {low} to {high}.")
        if self.channel is not None and self.channel < 0:
            raise SettingsError(f"--channel is {self.channel}, but channels are counted from 0.")
        if self.size % 2 == 0 or not 7 <= self.size <= 25:
            raise SettingsError(f"--size is {self.size}, but the side of a maze is odd, and 7 to 25 in this study.")
        check_folder(self.out)


def run_rollouts(settings: Settings) -> Path:
    """Run the study and return the folder with its results."""
    policy, weights = load_policy(settings.weights)
    policy = policy.to(memory_format=torch.channels_last)  # convolutions run about twice as fast so on a CPU
    choice_seed, level_seed, control_seed = _seeds(settings.seed, 3)
    points = hook_points(policy, _example_input())
    site = points.site(settings.site)  # a wrong name ends here, before anything is drawn
    if "channel" not in points[site.name].axes:
        raise SettingsError(
            f"--site is '{settings.site}', which has no channels: its axes are ({', '.join(points[site.name].axes)}). "
            f"Name one that has, such as '{SITE}'."
        )
    points.site(settings.site, channel=settings.channel or 0)
    print(f"weights {weights['name']} (width {weights['width']}, sha256 {weights['sha256'][:12]})")
    levels = draw_levels(settings.n, size=settings.size, seed=level_seed, cheese="bottom right")
    others = _other_levels(settings, choice_seed, read_mazes(levels))
    choice = _chosen(settings, points, others)
    pairs = _shown_pairs(points, settings.site, choice)

    controls, no_p = _controls(settings, points, choice, others, control_seed)
    channels = {_name(channel): channel for channel in (choice.channel, *controls)}
    known = {**_plain(settings), "weights": weights["sha256"], "versions": versions()}
    folder = settings.out / f"ablation-size{settings.size}-n{settings.n}-seed{settings.seed}-{settings_key(known)}"
    print(f"\nSize {settings.size}, cheese in the bottom right corner, {settings.n} levels, {STEPS} steps at most:")
    policies: dict[str, nn.Module] = {ORIGINAL: policy}
    policies |= {name: zeroed(points, settings.site, channel) for name, channel in channels.items()}
    with locked(folder):
        episodes = play(policies, levels, sampling_seed=settings.seed, keep=folder / "parts")
        comparisons = compare(episodes, channels, choice.channel, no_p)
        rank = ranked(comparisons)
        summary = {
            **known,
            "weights": weights,
            "choice": asdict(choice),
            "pair_sums": pairs,
            "original_found": int(episodes[ORIGINAL].found.sum()),
            "comparisons": [asdict(each) | {"counts": each.counts._asdict()} for each in comparisons],
            "rank": rank and asdict(rank),
        }
        _write(folder, summary, comparisons, episodes, levels, settings)
    _print_table(comparisons, settings)
    print(f"\nResults in {folder}")
    return folder


def _seeds(seed: int, count: int) -> list[int]:
    """Independent seeds for the parts of a run, in procgen's range."""
    return [int(word) % 2**31 for word in np.random.SeedSequence(seed).generate_state(count)]


def _example_input() -> torch.Tensor:
    return torch.from_numpy(policy_input(observe(draw_levels(2, size=9, seed=0))))


def _other_levels(settings: Settings, seed: int, used: Mazes) -> list[bytes]:
    """Mazes to choose the channel and the controls on, of which none is among the experiment's."""
    drawn = draw_levels(_CHOICE_LEVELS, size=settings.size, seed=seed, cheese="in distribution", mouse="anywhere")
    taken = {_walls(used, index) for index in range(len(used))}
    mazes = read_mazes(drawn)
    return [level for index, level in enumerate(drawn) if _walls(mazes, index) not in taken]


def _chosen(settings: Settings, points: HookPoints, levels: Sequence[bytes]) -> ChannelChoice:
    """Choose the channel and print what is known of it."""
    choice = choose_channel(points, settings.site, levels, Direction.UP, settings.channel)
    how = "chosen as the best of" if settings.channel is None else "given; there are"
    print(
        f"{settings.site} channel {choice.channel}, {how} {len(choice.live)} live channels: its sum tells that the "
        f"way to the cheese is UP with AUC {_shown(choice.auc)}\n  (on {choice.n} other mazes of size {settings.size}, "
        f"cheese in the top right 5x5, mouse where UP is legal; UP in {choice.positives})"
    )
    return choice


def _walls(mazes: Mazes, index: int) -> bytes:
    free: NDArray[np.bool_] = mazes.free[index]
    return free.tobytes()


def _shown_pairs(points: HookPoints, site: str, choice: ChannelChoice) -> list[list[dict[str, Any]]]:
    """Print the contrastive pair and the channel's sums, and return them."""
    pairs, sums = pair_sums(points, site)
    print(f"\nThe contrastive pair (M mouse, C cheese), and the sum of channel {choice.channel} in four rotations:\n")
    for lines in zip(*(pairs[0].picture(index).splitlines() for index in range(2)), strict=True):
        print("    " + "      ".join(lines))
    shown = []
    for rotation, pair in enumerate(pairs):
        steps = first_steps(pair, pair.cheese)
        row = [
            {
                "first_step": next(move.name for move in Direction if steps[maze, move]),
                "sum": float(sums[rotation, maze, choice.channel]),
            }
            for maze in range(2)
        ]
        print("    " + "   ".join(f"{each['first_step']:>5} {each['sum']:8.1f}" for each in row))
        shown.append(row)
    return shown


def _controls(
    settings: Settings, points: HookPoints, choice: ChannelChoice, levels: Sequence[bytes], seed: int
) -> tuple[list[int], str]:
    """Other live channels of about the same mean activation, and why a rank among them has no p, or an empty text.

    Channels with a larger mean may matter more whatever they encode.
    """
    others = [channel for channel in choice.live if channel != choice.channel]
    if settings.controls > len(others):
        raise SettingsError(f"--controls is {settings.controls}, but there are only {len(others)} other live channels.")
    if not settings.controls:
        return [], ""
    site, background = (
        points.site(settings.site, channel=choice.channel),
        torch.from_numpy(policy_input(observe(levels))),
    )
    matched = matched_channels(points, site, background, count=settings.controls, seed=seed)
    return sorted(channel_of(each) for each in matched), matched.no_p


def _name(channel: int) -> str:
    return f"channel {channel} zeroed"


def _plain(settings: Settings) -> dict[str, Any]:
    """Settings that decide the numbers, as JSON has them."""
    return {name: value for name, value in asdict(settings).items() if name not in ("out", "weights")}


def _write(
    folder: Path,
    summary: Mapping[str, Any],
    comparisons: Sequence[Comparison],
    episodes: Mapping[str, Episodes],
    levels: Sequence[bytes],
    settings: Settings,
) -> None:
    """Write every result under a temporary name first."""
    replace_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    replace_table(folder / "table.csv", _rows(comparisons))
    replace_table(
        folder / "episodes.csv",
        (
            {"policy": name, "level": level, "found": int(found), "steps": int(steps)}
            for name, each in episodes.items()
            for level, (found, steps) in enumerate(zip(each.found, each.lengths, strict=True))
        ),
    )
    shown = _telling_level(episodes[_name(comparisons[0].channel)], episodes[ORIGINAL])
    figure = ablation_figure(
        levels[shown],
        {name: episodes[name].actions[shown] for name in (ORIGINAL, _name(comparisons[0].channel))},
        comparisons,
        f"{settings.site}: one channel zeroed, mazes of size {settings.size}, cheese in the bottom right corner "
        f"(level {shown} of {len(levels)} is drawn)",
    )
    with replaced(folder / "ablation.png") as partial:
        figure.savefig(partial, dpi=110)


def _telling_level(modified: Episodes, original: Episodes) -> int:
    """The first level that only the modified policy solves, else only the original, else the first."""
    for differs in (modified.found & ~original.found, original.found & ~modified.found):
        if differs.any():
            return int(np.argmax(differs))
    return 0


def _rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """One row per channel; the rank is that of the channel under test among the controls."""
    rank = ranked(comparisons)
    ranks = {"rank": rank and rank.rank, "rank_of": rank and rank.controls + 1, "rank_p": rank and rank.p}
    return [_row(each) | (dict.fromkeys(ranks) if each.control else ranks) for each in comparisons]


def _row(each: Comparison) -> dict[str, Any]:
    return {
        "channel": each.channel,
        "control": int(each.control),
        "both": each.counts.both,
        "only_modified": each.counts.only_first,
        "only_original": each.counts.only_second,
        "neither": each.counts.neither,
        "mcnemar_p": each.p,
        "found": each.found.estimate,
        "found_low": each.found.low,
        "found_high": each.found.high,
        "difference": each.difference.estimate,
        "difference_low": each.difference.low,
        "difference_high": each.difference.high,
    }


def _print_table(comparisons: Sequence[Comparison], settings: Settings) -> None:
    first = comparisons[0]
    n = sum(first.counts)
    both, modified, original, neither = (f"{count} ({count / n:.1%})" for count in first.counts)
    print(f"\n{'':32}{'original found it':>20}{'original did not':>20}")
    print(f"{f'channel {first.channel} zeroed: found it':32}{both:>20}{modified:>20}")
    print(f"{f'channel {first.channel} zeroed: did not':32}{original:>20}{neither:>20}")
    found = (first.counts.both + first.counts.only_second) / n
    print(f"\nn = {n} levels, seed {settings.seed}; the original found the cheese in {found:.1%}.")
    print("With one channel zeroed:")
    print(f"{'':12}{'found it (95%)':>24}{'difference (95%)':>28}{'McNemar p':>12}")
    for each in comparisons:
        label = f"{each.channel}{' control' if each.control else ''}"
        low, high = each.difference.low, each.difference.high
        ends = "-" if np.isnan(low) else f"{low:+.1%} to {high:+.1%}"
        difference = f"{each.difference.estimate:+.1%} ({ends})"
        share = f"{each.found.estimate:.1%} ({each.found.low:.1%} to {each.found.high:.1%})"
        print(f"{label:12}{share:>24}{difference:>28}{each.p:>12.2g}")
    if rank := ranked(comparisons):
        print(f"The difference of channel {first.channel}, up or down, is {told_rank(rank)}.")


def _shown(interval: Interval) -> str:
    ends = "-" if np.isnan(interval.low) else f"{interval.low:.3f} to {interval.high:.3f}"
    return f"{interval.estimate:.3f} ({ends})"
