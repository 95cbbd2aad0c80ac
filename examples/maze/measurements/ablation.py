"""The post's causal experiment without sampling: channels ablated, and how often the mouse then finds the cheese."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chanpatch.patching import ActivationCache
from chanpatch.statistics import (
    PairedCounts,
    Rank,
    mcnemar_exact,
    paired_counts,
    paired_difference_interval,
    rank_among,
    wilson_interval,
)
from maze.analysis.ablation_grid import PLACES, ablation_grid, is_channel, named
from maze.analysis.effects import KINDS, ablation, activations, level_batches, mean_intervals
from maze.analysis.episodes import ORIGINAL
from maze.analysis.exact import first_hits, walk
from maze.analysis.off_distribution import METERED, absolute_z, background
from maze.analysis.part import Agrees, Cell, Finding, Part, Study, Table, Tables, above, interval_cells, shown, verdict
from maze.analysis.random_sets import random_sets, told_sets
from maze.analysis.selection import Selection
from maze.analysis.tables import SITE
from maze.environment.paths import Direction, top_right

SIZE = 15
ELSEWHERE = 50  # levels with the cheese in each of the other two places, or a quarter of n where that is more
REFERENCE = 200  # levels that give the means and the donors
REFERENCE_PLACES = {"cheese": "in distribution", "mouse": "anywhere"}
TOGETHER = 16  # channels that are ablated together
OUTCOMES = ("both", "only_modified", "only_original", "neither")  # of the walks, in the order of `PairedCounts`
NO_CORNER = dict.fromkeys(("corner_modified", "corner_modified_low", "corner_modified_high"))

Values = NDArray[np.float64]


def measure(study: Study) -> dict[str, Table]:
    """Every ablation with the cheese in every place; the post's table of counts; the same channels across places."""
    reference_levels = study.levels("ablation reference", REFERENCE, size=SIZE, **REFERENCE_PLACES)
    reference = activations(study.points, reference_levels, SITE)
    groups = _groups(study.selection, study.seed_for("ablation others"))
    roles = _roles(study.selection, groups)
    seed = study.seed_for("ablation donors")
    ablations = {
        f"{kind} {name}": ablation(study.points, kind, channels, reference, seed=seed)
        for kind in KINDS
        for name, channels in groups.items()
    }
    lowest = reference[study.points.site(SITE)].double().sum(dim=(2, 3)).amin(dim=0).numpy()
    far = _absolute_z(study, reference, seed)
    labels = {f"channel {channel}": study.labels[channel].label for channel in study.selection.live}
    effects: Table = []
    changes: dict[str, Values] = {}
    for place in PLACES:
        count = study.n if place == PLACES[0] else min(study.n, max(ELSEWHERE, study.n // 4))
        levels = study.levels("ablation", count, size=SIZE, cheese=place)
        posts = place == PLACES[0]
        found, corner, walked = _measured(study, levels, ablations, roles, _walking(study.selection) if posts else ())
        if posts:
            top = study.selection.ranked[:TOGETHER]
            sets = random_sets(study, levels, top, reference, seed=study.seed_for("ablation sets"))
            walks = _walks(study.selection, walked, found, list(ablations))
        changes[place] = found[1:] - found[0]
        rows = _rows(place, found, corner, groups, roles, far, lowest)
        effects += [{**row, "label": labels.get(row["ablated"])} for row in rows]
    effects.sort(
        key=lambda row: row["role"] == "control"
    )  # stable: what was chosen first, as tables are cut when shown
    across = _across(changes, list(ablations), roles)
    return {"effects": effects, "walks": walks, "across": across, **({"sets": sets} if sets else {})}


def _reference() -> str:
    """What gives the means and the donors, in words."""
    places = ", ".join(f"{what} {where}" for what, where in REFERENCE_PLACES.items())
    return f"{REFERENCE} levels of size {SIZE}, {places}"


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
        exact = mean_intervals(found[[0, 1 + names.index(name)]])
        rows.append(
            {
                "direction": direction.name,
                "channel": selection.best[direction],
                "n": len(walked[name]),
                **_counted(counts),
                "mcnemar_p": mcnemar_exact(counts.only_first, counts.only_second),
                **interval_cells("difference", paired_difference_interval(*counts)),
                **interval_cells("exact_original", exact[0]),
                **interval_cells("exact_modified", exact[1]),
            }
        )
    return rows


def _counted(counts: PairedCounts) -> dict[str, Cell]:
    """The four cells of the post's table: each count, and its share of the levels."""
    cells = dict(zip(OUTCOMES, counts, strict=True))
    shares = {f"{name}_share": wilson_interval(count, sum(counts)) for name, count in cells.items()}
    return cells | {end: cell for name, share in shares.items() for end, cell in interval_cells(name, share).items()}


def _rows(
    place: str,
    found: Values,
    corner: Values,
    groups: Mapping[str, Sequence[int]],
    roles: Mapping[str, str],
    far: Mapping[str, Mapping[int, float | None]],
    lowest: Values,
) -> Table:
    """One row per ablation: its effect, and its rank among the same ablation of the other live channels.

    A channel that is the same on all levels that tell what is usual is dead here: it is no control.
    """

    def varies(channels: Sequence[int]) -> bool:
        return far["zero"][channels[0]] is not None

    effects = mean_intervals(found[1:] - found[0])
    original, *modified = mean_intervals(found)
    first = mean_intervals(corner)  # of the corner; the controls have none
    ablated = [(kind, name) for kind in KINDS for name in groups]
    rows: Table = []
    for row, (kind, name) in enumerate(ablated):
        others = [
            effects[index].estimate
            for index, (other_kind, other) in enumerate(ablated)
            if other_kind == kind and other != name and other.startswith("channel") and varies(groups[other])
        ]
        ranked = name.startswith("channel") and varies(groups[name]) and others
        rank = rank_among(effects[row].estimate, others) if ranked else None
        distances = [far[kind][channel] for channel in groups[name] if far[kind][channel] is not None]
        rows.append(
            {
                "cheese": place,
                "kind": kind,
                "reference": None if kind == "zero" else _reference(),
                "ablated": name,
                "role": roles.get(name, "control"),
                "channels": " ".join(map(str, groups[name])),
                "n": found.shape[1],
                **interval_cells("original", original),
                **interval_cells("modified", modified[row]),
                **interval_cells("effect", effects[row]),
                **interval_cells("corner_original", first[0]),
                **(interval_cells("corner_modified", first[1 + row]) if name in roles else NO_CORNER),
                "rank": rank and rank.rank,
                "controls": rank and rank.controls,
                "rank_p": rank.p if rank and name in roles else None,  # of what was chosen before only
                "lowest_sum": lowest[groups[name][0]] if len(groups[name]) == 1 else None,
                "absolute_z": float(np.mean(distances)) if len(distances) == len(groups[name]) else None,
                "absolute_z_against": background(SIZE) if distances else None,
            }
        )
    return rows


def _across(changes: Mapping[str, Values], names: Sequence[str], roles: Mapping[str, str]) -> Table:
    """How much larger an effect is in the post's place than in another, over mazes that both have."""
    chosen = [row for row, name in enumerate(names) if name.split(" ", 1)[1] in roles]
    rows: Table = []
    for place in PLACES[1:]:
        n = changes[place].shape[1]
        intervals = mean_intervals(changes[PLACES[0]][chosen, :n] - changes[place][chosen])
        for row, interval in zip(chosen, intervals, strict=True):
            kind, name = names[row].split(" ", 1)
            known = {"minus": place, "kind": kind, "ablated": name, "role": roles[name], "n": n}
            rows.append({**known, **interval_cells("difference", interval)})
    return rows


def _absolute_z(study: Study, reference: ActivationCache, seed: int) -> dict[str, dict[int, float | None]]:
    """Per kind and live channel, how far the ablated sum lies from usual ones, in standard deviations.

    What is usual is told by other levels of the same kind than those of the donors, which would be near themselves.
    None for the mean: its sum is the mean of the reference levels, so about 0 would say nothing of how unusual it is.
    None for a channel that is the same on all of them, too.
    """
    live = list(study.selection.live)
    levels = study.levels("ablation", min(study.n, METERED), size=SIZE, cheese=PLACES[0])
    usual = study.levels("ablation usual", METERED, size=SIZE, **REFERENCE_PLACES)
    distances: dict[str, dict[int, float | None]] = {"mean": dict.fromkeys(live)}
    for kind in KINDS:
        if kind != "mean":
            far = absolute_z(study.points, ablation(study.points, kind, live, reference, seed=seed), levels, usual)
            distances[kind] = {channel: None if np.isnan(far[channel]) else far[channel] for channel in live}
    return distances


def finding(tables: Tables) -> Finding:
    walks = {row["direction"]: row for row in tables["walks"]}["UP"]
    up = f"channel {walks['channel']}"
    effects = {(row["cheese"], row["kind"], row["ablated"]): row for row in tables["effects"]}
    zeroed, by_mean, resampled = (effects[PLACES[0], kind, up] for kind in KINDS)
    elsewhere = [(place, effects[place, KINDS[0], up]) for place in PLACES[1:]]
    across = [row for row in tables["across"] if (row["ablated"], row["kind"]) == (up, KINDS[0])]
    counts = " / ".join(shown(walks, f"{name}_share", ".1%") for name in OUTCOMES)
    raised = raising_rank(tables["effects"], zeroed)
    ranked = "" if raised is None else f", rank {raised.rank} of {raised.controls + 1} live channels by increase"
    p = "" if raised is None or raised.p is None else f" (p = {raised.p:.2g})"
    others = ", ".join(f"{shown(row, 'effect', '+.3f')} {_where(place)}" for place, row in elsewhere)
    more = ", ".join(f"{shown(row, 'difference', '+.3f')} more than {_where(row['minus'])}" for row in across)
    return Finding(
        f"Channel {walks['channel']} (UP) zeroed, n={zeroed['n']}: P(cheese) {shown(zeroed, 'original')} becomes "
        f"{shown(zeroed, 'modified')}, effect {shown(zeroed, 'effect', '+.3f')}{ranked}{p}. Walks with common "
        f"draws, n={walks['n']}, both / only modified / only original / neither: {counts} "
        f"(McNemar p = {walks['mcnemar_p']:.2g}).",
        _agrees(zeroed, across),
        f"{_far(zeroed, resampled)}{_beside_controls(raised)}{_largest(effects, zeroed)}"
        f"{_never_zero(effects)}{_together(effects)}{told_sets(tables.get('sets', ()))}Mean ablation gives "
        f"{by_mean['effect']:+.3f} and resampling {resampled['effect']:+.3f}. Both use one set of "
        f"{by_mean['reference']}. Another set moves these effects by more than their intervals show, so neither "
        f"decides anything. Zeroed with the cheese elsewhere the effect is {others}; on the same mazes that in "
        f"the bottom right is {more}.",
        "That only this channel matters: the other live channels, ablated one by one, are the controls. Nor that the "
        "effect comes from the direction: zeroing may drive a channel to values that it never takes. The intervals of "
        "mean and resample ablation hold one set of reference levels fixed, so they are too narrow.",
    )


def raising_rank(effects: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> Rank | None:
    """The rank of a channel's effect among those of the other live channels, the largest increase first.

    The claim has a direction: without the channel the mouse finds the cheese more often. None without another channel.
    """
    same = [row for row in effects if all(row[name] == chosen[name] for name in ("cheese", "kind"))]
    others = [row["effect"] for row in same if row["rank"] is not None and row["ablated"] != chosen["ablated"]]
    if chosen["rank"] is None or not others:
        return None
    return rank_among(chosen["effect"], others, alternative="greater")


def _agrees(zeroed: Mapping[str, Any], across: Sequence[Mapping[str, Any]]) -> Agrees:
    """Whether zeroing helps as in the post and, if so, whether that is about the channel and about the place.

    If the channel holds the mouse back from a cheese below, it helps whatever takes the channel's place, and more than
    with the cheese elsewhere. The first stays open, as mean and resample ablation were measured with one reference.
    """
    helps = above(zeroed, "effect")
    return verdict(helps, *((None, *(above(row, "difference") for row in across)) if helps else ()))


def _beside_controls(raised: Rank | None) -> str:
    if raised is None:
        return "There is no other live channel to compare with. "
    special = raised.p is not None and raised.p < 0.05
    return (
        f"Of the {raised.controls} other live channels, zeroed one by one, {raised.rank - 1} raise P(cheese) "
        "as much or more, so the verdict is about this channel's effect"
        f"{', which few others have' if special else ' and not about its being special'}. "
    )


def _largest(effects: Mapping[tuple[Any, ...], Mapping[str, Any]], zeroed: Mapping[str, Any]) -> str:
    """The channel that changes most when it is zeroed, picked because it does, so without a p-value."""
    rows = [row for (place, kind, _), row in effects.items() if (place, kind) == (PLACES[0], KINDS[0])]
    row = max(filter(is_channel, rows), key=lambda row: abs(row["effect"]))
    if row["ablated"] == zeroed["ablated"]:
        return "No other channel changes more. "
    told = [f"{effects[PLACES[0], kind, row['ablated']]['effect']:+.3f} ({kind})" for kind in KINDS[1:]]
    told.insert(0, f"{shown(row, 'effect', '+.3f')} ({KINDS[0]})")
    chosen = "did not choose" if row["role"] == "control" else f"chose for {row['role']}"
    return (
        f"The one that changes most is {named(row)}, which the rule {chosen}: {', '.join(told)}; named here for its "
        "effect, so without a p-value. "
    )


def _far(zeroed: Mapping[str, Any], resampled: Mapping[str, Any]) -> str:
    """How unusual the ablated sum is: beside the effect, as what is unusual may break the policy."""
    if zeroed["absolute_z"] is None or resampled["absolute_z"] is None:
        return "How far its ablated sum is from what is usual was not measured: it does not vary on other levels. "
    return (
        f"Its sum then lies {zeroed['absolute_z']:.1f} (zero) and {resampled['absolute_z']:.1f} (resample) standard "
        f"deviations from those of {zeroed['absolute_z_against']}, on average (0.8 is usual); by the mean that is "
        "about 0 by construction, so it is left out. "
    )


def _never_zero(effects: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> str:
    """What zeroing does to channels that are never at zero by themselves, beside ablations that keep them usual."""
    rows = [row for (place, kind, _), row in effects.items() if (place, kind) == (PLACES[0], KINDS[0])]
    never = [row for row in filter(is_channel, rows) if row["lowest_sum"] > 0]
    if not never:
        return "Every live channel comes to 0 somewhere in the reference, so that zeroing is within what occurs. "
    told = [
        f"{row['ablated']} (at least {row['lowest_sum']:.2g}): "
        + ", ".join(f"{effects[PLACES[0], kind, row['ablated']]['effect']:+.3f} ({kind})" for kind in KINDS)
        for row in never
    ]
    return f"Channels whose sum is never 0 in the reference, so that zeroing is not usual: {'; '.join(told)}. "


def _together(effects: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> str:
    """What zeroing the groups does."""
    rows = [row for (place, kind, _), row in effects.items() if (place, kind) == (PLACES[0], KINDS[0])]
    told = [f"{row['ablated']} {shown(row, 'effect', '+.3f')}" for row in rows if not is_channel(row)]
    return f"Zeroed together, n={rows[0]['n']}: {', '.join(told)}. " if told else ""


def _where(place: str) -> str:
    return place if place.startswith("in ") else f"in the {place}"


PART = Part(
    name="ablation",
    question="Does the mouse find the cheese in the bottom right more often without the channel that says UP?",
    method="Size 15: P(cheese within 256 steps) of every level computed from the policy's table of states, not drawn. "
    "Every live channel, the 16 most telling ones and 16 others ablated: zero, mean, or another level's activation. "
    f"Means and donors are of {_reference()}.",
    post="Channel 121 zeroed, sampled, n=1000: both 36.6, only modified 15.7, only original 3.5, neither 42.2.",
    measure=measure,
    figure=ablation_grid,
    finding=finding,
)
