"""The post's causal experiment without sampling: channels ablated, and how often the mouse then finds the cheese."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch import ActivationCache, mean_ablate, resample_ablate, zero_ablate
from chanpatch.controls import off_distribution
from chanpatch.plots import contingency
from chanpatch.statistics import PairedCounts, mcnemar_exact, paired_counts, paired_difference_interval, rank_among
from maze.effects import KINDS, ablation, activations, level_batches, mean_intervals
from maze.episodes import ORIGINAL
from maze.exact import first_hits, walk
from maze.levels import observe, policy_input
from maze.part import Finding, Part, Study, Table, Tables, above, interval_cells, shown, verdict
from maze.paths import Direction, top_right
from maze.selection import Selection
from maze.tables import SITE

SIZE = 15
PLACES = ("bottom right", "in distribution", "top left")  # of the cheese; the first is the post's
ELSEWHERE = 50  # levels with the cheese in each of the other two places, or a quarter of n where that is more
REFERENCE = 200  # levels that give the means and the donors
TOGETHER = 16  # channels that are ablated together

Values = NDArray[np.float64]


def measure(study: Study) -> dict[str, Table]:
    """Every ablation with the cheese in every place; the post's table of counts; the same channels across places."""
    reference_levels = study.levels(
        "ablation reference", REFERENCE, size=SIZE, cheese="in distribution", mouse="anywhere"
    )
    reference = activations(study.points, reference_levels, SITE)
    groups = _groups(study.selection, study.seed_for("ablation others"))
    roles = _roles(study.selection, groups)
    seed = study.seed_for("ablation donors")
    ablations = {
        f"{kind} {name}": ablation(study.points, kind, channels, reference, seed=seed)
        for kind in KINDS
        for name, channels in groups.items()
    }
    far = _absolute_z(study, reference, reference_levels, seed)
    effects: Table = []
    changes: dict[str, Values] = {}
    for place in PLACES:
        count = study.n if place == PLACES[0] else min(study.n, max(ELSEWHERE, study.n // 4))
        levels = study.levels("ablation", count, size=SIZE, cheese=place)
        posts = place == PLACES[0]
        found, corner, walked = _measured(study, levels, ablations, roles, _walking(study.selection) if posts else ())
        if posts:
            walks = _walks(study.selection, walked, found, list(ablations))
        changes[place] = found[1:] - found[0]
        effects += _rows(place, found, corner, groups, roles, far, study.seed_for("ablation bootstrap"))
    across = _across(changes, list(ablations), roles, study.seed_for("ablation bootstrap"))
    return {"effects": effects, "walks": walks, "across": across}


def _groups(selection: Selection, seed: int) -> dict[str, tuple[int, ...]]:
    """What is ablated together, by name: every live channel alone, the most telling ones, as many others."""
    groups = {f"channel {channel}": (channel,) for channel in selection.live}
    top, rest = selection.ranked[:TOGETHER], selection.ranked[TOGETHER:]
    groups[f"top {len(top)}"] = top
    if rest:
        drawn = np.random.default_rng(seed).permutation(rest)[:TOGETHER]
        groups[f"{len(drawn)} others"] = tuple(sorted(drawn.tolist()))
    return groups


def _roles(selection: Selection, groups: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """What a group was chosen for; those without are controls."""
    roles = {name: name for name, channels in groups.items() if not name.startswith("channel")}
    for direction in Direction:
        name = f"channel {selection.best[direction]}"
        roles[name] = f"{roles[name]}, {direction.name}" if name in roles else direction.name
    return roles


def _walking(selection: Selection) -> list[str]:
    """The policies that are walked as the post's were: the original, and each direction's channel zeroed."""
    return [ORIGINAL, *dict.fromkeys(f"zero channel {selection.best[direction]}" for direction in Direction)]


def _measured(
    study: Study,
    levels: Sequence[bytes],
    ablations: Mapping[str, Any],
    roles: Mapping[str, str],
    walking: Sequence[str],
) -> tuple[Values, Values, dict[str, NDArray[np.bool_]]]:
    """P(cheese) and P(corner before it) of the original and every ablation: (1 + ablation, level).

    The corner is left out for the controls (NaN). And, for the policies to be walked, whether an episode found the
    cheese: bool (level,) by name.
    """
    interventions = {ORIGINAL: (), **ablations}
    named = [name == ORIGINAL or name.split(" ", 1)[1] in roles for name in interventions]
    rows = {name: list(interventions).index(name) for name in walking}
    found, corner, walked = [], [], {name: [] for name in walking}
    for chains, tables in level_batches(study.points, levels, interventions):
        found.append(first_hits(chains, tables, [chains.cheese])[:, chains.start, 0])
        passed = np.full(found[-1].shape, np.nan)
        passed[named] = first_hits(chains, tables[named], [chains.at(top_right(chains.mazes))])[:, chains.start, 0]
        corner.append(passed)
        seed = study.seed_for(f"ablation draws {len(found)}")  # draws go by the index in the batch
        for name, row in rows.items():
            walked[name].append(walk(chains, tables[row], sampling_seed=seed)[0].found)
    episodes = {name: np.concatenate(each) for name, each in walked.items()}
    return np.concatenate(found, axis=1), np.concatenate(corner, axis=1), episodes


def _walks(selection: Selection, walked: Mapping[str, NDArray[np.bool_]], found: Values, names: Sequence[str]) -> Table:
    """The post's table of each direction's channel, from episodes with common draws, beside the exact shares."""
    rows: Table = []
    for direction in Direction:
        name = f"zero channel {selection.best[direction]}"
        counts = paired_counts(walked[name], walked[ORIGINAL])
        rows.append(
            {
                "direction": direction.name,
                "channel": selection.best[direction],
                "n": len(walked[name]),
                "both": counts.both,
                "only_modified": counts.only_first,
                "only_original": counts.only_second,
                "neither": counts.neither,
                "mcnemar_p": mcnemar_exact(counts.only_first, counts.only_second),
                **interval_cells("difference", paired_difference_interval(*counts)),
                "exact_original": float(found[0].mean()),
                "exact_modified": float(found[1 + names.index(name)].mean()),
            }
        )
    return rows


def _rows(
    place: str,
    found: Values,
    corner: Values,
    groups: Mapping[str, Sequence[int]],
    roles: Mapping[str, str],
    far: Mapping[str, Mapping[int, float]],
    seed: int,
) -> Table:
    """One row per ablation: its effect, and its rank among the same ablation of the other live channels."""
    effects = mean_intervals(found[1:] - found[0], seed)
    ablated = [(kind, name) for kind in KINDS for name in groups]
    rows: Table = []
    for row, (kind, name) in enumerate(ablated):
        others = [
            effects[index].estimate
            for index, (other_kind, other) in enumerate(ablated)
            if other_kind == kind and other != name and other.startswith("channel")
        ]
        rank = rank_among(effects[row].estimate, others) if name.startswith("channel") and others else None
        distances = [far[kind][channel] for channel in groups[name]]
        rows.append(
            {
                "cheese": place,
                "kind": kind,
                "ablated": name,
                "role": roles.get(name, "control"),
                "channels": " ".join(map(str, groups[name])),
                "n": found.shape[1],
                "original": float(found[0].mean()),
                "modified": float(found[1 + row].mean()),
                **interval_cells("effect", effects[row]),
                "corner_original": float(corner[0].mean()),
                "corner_modified": None if name not in roles else float(corner[1 + row].mean()),
                "rank": rank and rank.rank,
                "controls": rank and rank.controls,
                "rank_p": rank and rank.p,
                "absolute_z": None if np.isnan(distances).any() else float(np.mean(distances)),
            }
        )
    return rows


def _across(changes: Mapping[str, Values], names: Sequence[str], roles: Mapping[str, str], seed: int) -> Table:
    """How much larger an effect is in the post's place than in another, over mazes that both have."""
    chosen = [row for row, name in enumerate(names) if name.split(" ", 1)[1] in roles]
    rows: Table = []
    for place in PLACES[1:]:
        n = changes[place].shape[1]
        intervals = mean_intervals(changes[PLACES[0]][chosen, :n] - changes[place][chosen], seed)
        for row, interval in zip(chosen, intervals, strict=True):
            kind, name = names[row].split(" ", 1)
            known = {"minus": place, "kind": kind, "ablated": name, "role": roles[name], "n": n}
            rows.append({**known, **interval_cells("difference", interval)})
    return rows


def _absolute_z(
    study: Study, reference: ActivationCache, background: Sequence[bytes], seed: int
) -> dict[str, dict[int, float]]:
    """Per kind and live channel, how far the ablated sum lies from the reference levels, in standard deviations."""
    live = list(study.selection.live)
    site = study.points.site(SITE, channel=live)
    inputs = study.levels("ablation", min(study.n, REFERENCE), size=SIZE, cheese=PLACES[0])
    frames, usual = (torch.from_numpy(policy_input(observe(levels))) for levels in (inputs, background))
    patches = {
        "zero": zero_ablate(site),
        "mean": mean_ablate(site, reference),
        "resample": resample_ablate(site, reference, seed=seed),
    }
    distances = {}
    for kind, patch in patches.items():
        meter = off_distribution(study.points, patch, frames, usual)
        by_site = dict(zip(meter.sites, meter.absolute_z.tolist(), strict=True))
        distances[kind] = {channel: by_site[study.points.site(SITE, channel=channel)] for channel in live}
    return distances


def figure(tables: Tables) -> Figure:
    """The chosen channels by kind of ablation, the same zeroed with the cheese elsewhere, and the post's table."""
    drawn = Figure(figsize=(16, 5.2), layout="constrained")
    by_kind, by_place, mosaic = drawn.subplots(1, 3, width_ratios=(1.25, 1.1, 1.15))
    rows = tables["effects"]
    _draw_effects(by_kind, [row for row in rows if row["cheese"] == PLACES[0]], "kind", controls=True)
    by_kind.set_title(f"cheese in the bottom right, n={rows[0]['n']}")
    _draw_effects(by_place, [row for row in rows if row["kind"] == KINDS[0]], "cheese", controls=False)
    by_place.set_title("zeroed, by the place of the cheese")
    walks = {row["direction"]: row for row in tables["walks"]}["UP"]
    counts = PairedCounts(*(walks[name] for name in ("both", "only_modified", "only_original", "neither")))
    contingency(counts, mosaic, names=(f"{walks['channel']} zeroed", ORIGINAL))
    return drawn


def _draw_effects(axes: Axes, rows: Sequence[Mapping[str, Any]], by: str, *, controls: bool) -> None:
    """The effect of every chosen group with its interval, side by side by `by`; the controls as one row of dots."""
    chosen = [row for row in rows if row["role"] != "control"]
    names = list(dict.fromkeys((row["ablated"], row["role"]) for row in chosen))
    for number, value in enumerate(dict.fromkeys(row[by] for row in rows)):
        shift = 0.24 * (1 - number)
        style = {"marker": "os^"[number], "color": ("black", "tab:orange", "tab:blue")[number]}
        for row in (row for row in chosen if row[by] == value):
            height = len(names) - names.index((row["ablated"], row["role"])) + shift
            axes.plot([row["effect_low"] * 100, row["effect_high"] * 100], [height] * 2, color=style["color"])
            axes.plot(row["effect"] * 100, height, linestyle="none", markersize=6, **style)
        label = f"{value} (n={next(row['n'] for row in rows if row[by] == value)})"
        axes.plot([], [], linestyle="none", label=label, **style)
        if controls:
            others = [row["effect"] * 100 for row in rows if row["role"] == "control" and row[by] == value]
            axes.plot(others, [shift] * len(others), linestyle="none", markersize=3, alpha=0.6, **style)
    labels = [name if role == name else f"{name}\nbest for {role}" for name, role in names]
    if controls:
        many = len({row["ablated"] for row in rows if row["role"] == "control"})
        labels.append(f"{many} other live\nchannels, one each")
    axes.set_yticks(range(len(names), len(names) - len(labels), -1), labels)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of P(cheese within 256 steps),\npercentage points, 95% interval over levels")
    axes.set_ylim(len(names) - len(labels) - 1.2, len(names) + 0.6)  # the legend has a place of its own
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)


def finding(tables: Tables) -> Finding:
    walks = {row["direction"]: row for row in tables["walks"]}["UP"]
    up = [row for row in tables["effects"] if row["ablated"] == f"channel {walks['channel']}"]
    zeroed, by_mean, resampled = (row for row in up if row["cheese"] == PLACES[0])
    elsewhere = {row["cheese"]: row for row in up if row["kind"] == KINDS[0]}
    larger = [
        row["minus"]
        for row in tables["across"]
        if row["ablated"] == zeroed["ablated"] and row["kind"] == KINDS[0] and row["difference_low"] > 0
    ]
    counts = " / ".join(
        f"{walks[name] / walks['n']:.1%}" for name in ("both", "only_modified", "only_original", "neither")
    )
    ranked = "" if zeroed["rank"] is None else f", rank {zeroed['rank']} of {zeroed['controls'] + 1} live channels"
    p = "" if zeroed["rank_p"] is None else f" (p = {zeroed['rank_p']:.2g})"
    others = ", ".join(f"{shown(elsewhere[place], 'effect', '+.3f')} {_where(place)}" for place in PLACES[1:])
    than = " and than ".join(map(_where, larger)) or "in neither of the other places"
    return Finding(
        f"Channel {walks['channel']} (UP) zeroed, n={zeroed['n']}: P(cheese) {zeroed['original']:.3f} becomes "
        f"{zeroed['modified']:.3f}, effect {shown(zeroed, 'effect', '+.3f')}{ranked}{p}. Walks with common draws, both "
        f"/ only modified / only original / neither: {counts} (McNemar p = {walks['mcnemar_p']:.2g}).",
        verdict(above(zeroed, "effect")),
        f"{_beside_controls(zeroed)}By mean ablation the effect is {shown(by_mean, 'effect', '+.3f')}, by resampling "
        f"{shown(resampled, 'effect', '+.3f')}. Zeroed with the cheese elsewhere it is {others}. On the same mazes it "
        f"is larger in the bottom right than {than}.",
        "That only this channel matters: the other live channels, ablated one by one, are the controls. "
        "Nor that an effect of zeroing alone is about the direction: a channel that "
        "is never near zero is driven off its distribution, which the column absolute_z shows.",
    )


def _beside_controls(zeroed: Mapping[str, Any]) -> str:
    if zeroed["rank"] is None:
        return "There is no other live channel to compare with. "
    special = zeroed["rank_p"] is not None and zeroed["rank_p"] < 0.05
    return (
        f"Of the {zeroed['controls']} other live channels, zeroed one by one, {zeroed['rank'] - 1} change P(cheese) "
        "as much or more, up or down, so the verdict is about this channel's effect"
        f"{', which few others have' if special else ' and not about its being special'}. "
    )


def _where(place: str) -> str:
    return place if place.startswith("in ") else f"in the {place}"


PART = Part(
    name="ablation",
    question="Does the mouse find the cheese in the bottom right more often without the channel that says UP?",
    method="Size 15: P(cheese within 256 steps) of every level computed from the policy's table of states, not drawn. "
    "Every live channel, the 16 most telling ones and 16 others ablated: zero, mean, or another level's activation.",
    post="Channel 121 zeroed, sampled, n=1000: both 36.6, only modified 15.7, only original 3.5, neither 42.2.",
    measure=measure,
    figure=figure,
    finding=finding,
)
