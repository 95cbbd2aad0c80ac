"""Does the mouse find the cheese in the bottom right more often without the UP channel?

Method: Size 15: P(cheese within 256 steps) on every level, computed from the policy's table of states. Every live
channel, the 16 best predictors and 16 others are ablated: to zero, to the mean, or to another level's activation. Means
and donors are from {REFERENCE} levels of size {SIZE}, cheese in distribution, mouse anywhere.

The post: Channel 121 zeroed, sampled, n=1000: both 36.6, only modified 15.7, only original 3.5, neither 42.2.

Limits: The result does not show that only this channel matters, nor that the effect comes from the direction: zeroing
may move a channel off distribution. The intervals for mean and resample ablation are too narrow, because both use one
fixed reference set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from chanpatch.patching import ActivationCache
from chanpatch.plots import contingency
from chanpatch.statistics import (
    PairedCounts,
    Rank,
    mcnemar_exact,
    paired_counts,
    paired_difference_interval,
    rank_among,
)
from maze.analysis.cells import Agrees, Flags, Row, Table, Tables, Values, above, chosen, keyed, shown, verdict
from maze.analysis.drawing import Panel, draw, panels
from maze.analysis.effects import KINDS, ablation, level_batches, mean_intervals, rank_text, set_rows
from maze.analysis.estimates import intervals, rank_cells, share
from maze.analysis.exact import ORIGINAL, first_hits, walk
from maze.analysis.forwards import SITE, activations
from maze.analysis.off_distribution import METERED, absolute_z, background
from maze.analysis.part import Finding, Study
from maze.analysis.selection import Selection
from maze.paths import Direction, top_right

SIZE = 15
PLACES = ("bottom right", "in distribution", "top left")  # of the cheese, the post's first
ELSEWHERE = 50  # levels for each of the other two places, or a quarter of n if that is more
REFERENCE = 200  # levels for means and donors
REFERENCE_PLACES = {"cheese": "in distribution", "mouse": "anywhere"}
TOGETHER = 16  # channels that are ablated together
OUTCOMES = ("both", "only_modified", "only_original", "neither")  # of the walks, in the order of `PairedCounts`


def measure(study: Study) -> dict[str, Table]:
    """Every ablation with the cheese in every place, the post's table of counts, and differences between places."""
    selection = study.selection
    reference_levels = study.levels("ablation reference", REFERENCE, size=SIZE, **REFERENCE_PLACES)
    reference = activations(study.points, reference_levels, SITE)
    groups = _groups(selection, study.seed_for("ablation others"))
    roles = _roles(selection, groups)
    seed = study.seed_for("ablation donors")
    ablations = {
        f"{kind} {name}": ablation(study.points, kind, channels, reference, seed=seed)
        for kind in KINDS
        for name, channels in groups.items()
    }
    lowest = reference[study.points.site(SITE)].double().sum(dim=(2, 3)).amin(dim=0).numpy()
    far = _absolute_z(study, reference, seed)
    labels = {f"channel {channel}": study.labels[channel].label for channel in selection.live}
    effects = []
    changes = {}
    for place in PLACES:
        posts = place == PLACES[0]
        count = study.n if posts else min(study.n, max(ELSEWHERE, study.n // 4))
        levels = study.levels("ablation", count, size=SIZE, cheese=place)
        found, corner, walked = _measured(study, levels, ablations, roles, _walking(selection) if posts else ())
        if posts:
            top = selection.ranked[:TOGETHER]
            sets = set_rows(study, levels, top, reference, seed=study.seed_for("ablation sets"))
            walks = _walks(selection, walked, found, list(ablations))
        changes[place] = found[1:] - found[0]
        rows = _rows(place, found, corner, groups, roles, far, lowest)
        effects += [{**row, "label": labels.get(row["ablated"])} for row in rows]
    effects.sort(key=lambda row: row["role"] == "control")  # stable; the report cuts long tables
    across = _across(changes, list(ablations), roles)
    return {"effects": effects, "walks": walks, "across": across, **({"sets": sets} if sets else {})}


def _reference() -> str:
    places = ", ".join(f"{name} {place}" for name, place in REFERENCE_PLACES.items())
    return f"{REFERENCE} levels of size {SIZE}, {places}"


def _groups(selection: Selection, seed: int) -> dict[str, tuple[int, ...]]:
    """The channels of each ablation: every live channel alone, the best predictors, and as many other channels."""
    groups = {f"channel {channel}": (channel,) for channel in selection.live}
    top, rest = selection.ranked[:TOGETHER], selection.ranked[TOGETHER:]
    groups[f"top {len(top)}"] = top
    if rest:
        drawn = np.random.default_rng(seed).permutation(rest)[:TOGETHER]
        groups[f"{len(drawn)} others"] = tuple(sorted(drawn.tolist()))
    return groups


def _roles(selection: Selection, groups: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The reason for which a group was chosen; groups without a reason are controls."""
    roles = {name: name for name in groups if not name.startswith("channel")}
    for direction in Direction:
        name = f"channel {selection.best[direction]}"
        roles[name] = f"{roles[name]}, {direction.name}" if name in roles else direction.name
    return roles


def _walking(selection: Selection) -> list[str]:
    """The policies to walk as in the post: the original, and each direction's channel zeroed."""
    return [ORIGINAL, *dict.fromkeys(f"zero channel {selection.best[direction]}" for direction in Direction)]


def _measured(
    study: Study,
    levels: Sequence[bytes],
    ablations: Mapping[str, Any],
    roles: Mapping[str, str],
    walking: Sequence[str],
) -> tuple[Values, Values, dict[str, Flags]]:
    """P(cheese) and P(corner before it), (1 + ablation, level), and whether walks found the cheese, by policy.

    The corner is NaN for controls.
    """
    names = [ORIGINAL, *ablations]
    wanted = [name == ORIGINAL or name.split(" ", 1)[1] in roles for name in names]
    found, corner, walked = [], [], {name: [] for name in walking}
    for chains, tables in level_batches(study.points, levels, ablations):
        found.append(first_hits(chains, tables, [chains.cheese])[:, chains.start, 0])
        passed = np.full(found[-1].shape, np.nan)
        passed[wanted] = first_hits(chains, tables[wanted], [chains.at(top_right(chains.mazes))])[:, chains.start, 0]
        corner.append(passed)
        seed = study.seed_for(f"ablation draws {len(found)}")  # draws depend on the index in the batch
        for name, each in walked.items():
            each.append(walk(chains, tables[names.index(name)], sampling_seed=seed).found)
    episodes = {name: np.concatenate(each) for name, each in walked.items()}
    return np.concatenate(found, axis=1), np.concatenate(corner, axis=1), episodes


def _walks(selection: Selection, walked: Mapping[str, Flags], found: Values, names: Sequence[str]) -> Table:
    """The post's table for each direction's channel, from walks with common draws, beside the exact probabilities."""
    rows = []
    for direction in Direction:
        name = f"zero channel {selection.best[direction]}"
        counts = paired_counts(walked[name], walked[ORIGINAL])
        original, modified = mean_intervals(found[[0, 1 + names.index(name)]])
        row = {"direction": direction.name, "channel": selection.best[direction], "n": len(walked[name])}
        row |= dict(zip(OUTCOMES, counts, strict=True))
        row |= intervals(
            **{f"{name}_share": share(count, sum(counts)) for name, count in zip(OUTCOMES, counts, strict=True)}
        )
        row["mcnemar_p"] = mcnemar_exact(counts.only_first, counts.only_second)
        difference = paired_difference_interval(*counts)
        rows.append(row | intervals(difference=difference, exact_original=original, exact_modified=modified))
    return rows


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

    A channel that does not vary on the levels for `far` is not a control.
    """

    def varies(name: str) -> bool:
        return name.startswith("channel") and far["zero"][groups[name][0]] is not None

    effects = mean_intervals(found[1:] - found[0])
    original, *modified = mean_intervals(found)
    first = mean_intervals(corner)
    ablated = [(kind, name) for kind in KINDS for name in groups]
    rows = []
    for number, (kind, name) in enumerate(ablated):
        others = [
            effects[index].estimate
            for index, (other_kind, other) in enumerate(ablated)
            if other_kind == kind and other != name and varies(other)
        ]
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
                **intervals(original=original, modified=modified[number], effect=effects[number]),
                **intervals(corner_original=first[0], corner_modified=first[1 + number] if name in roles else None),
                **rank_cells(effects[number].estimate, others, ranked=varies(name), p=name in roles),
                "lowest_sum": lowest[groups[name][0]] if len(groups[name]) == 1 else None,
                "absolute_z": float(np.mean(distances)) if len(distances) == len(groups[name]) else None,
                "absolute_z_against": background(SIZE) if distances else None,
            }
        )
    return rows


def _across(changes: Mapping[str, Values], names: Sequence[str], roles: Mapping[str, str]) -> Table:
    """Effects in the post's place minus those in another place, over the mazes that both places have."""
    numbers = [number for number, name in enumerate(names) if name.split(" ", 1)[1] in roles]
    rows = []
    for place in PLACES[1:]:
        n = changes[place].shape[1]
        differences = mean_intervals(changes[PLACES[0]][numbers, :n] - changes[place][numbers])
        for number, difference in zip(numbers, differences, strict=True):
            kind, name = names[number].split(" ", 1)
            row = {"minus": place, "kind": kind, "ablated": name, "role": roles[name], "n": n}
            rows.append(row | intervals(difference=difference))
    return rows


def _absolute_z(study: Study, reference: ActivationCache, seed: int) -> dict[str, dict[int, float | None]]:
    """The absolute z of each live channel under each kind of ablation; None if the channel does not vary.

    None for mean ablation, for which absolute z is near 0 by construction.
    """
    live = list(study.selection.live)
    levels = study.levels("ablation", min(study.n, METERED), size=SIZE, cheese=PLACES[0])
    usual = study.levels("ablation usual", METERED, size=SIZE, **REFERENCE_PLACES)
    distances = {"mean": dict.fromkeys(live)}
    for kind in KINDS:
        if kind != "mean":
            far = absolute_z(study.points, ablation(study.points, kind, live, reference, seed=seed), levels, usual)
            distances[kind] = {channel: None if np.isnan(far[channel]) else far[channel] for channel in live}
    return distances


def figure(tables: Tables) -> Figure:
    drawn, (kinds, places, others, mosaic) = panels(20, 6.4, 4)
    effect = {"by": ("ablated", "role"), "prefix": "effect", "label": "change of P(cheese), points", "scale": 100}
    main = {"role": lambda role: role != "control"}
    at = {"cheese": PLACES[0]}
    title = "cheese in the bottom right\n(one reference: too narrow for mean and resample)"
    draw(kinds, tables, Panel("effects", series="kind", where=main | at, title=title, **effect))
    draw(places, tables, Panel("effects", series="cheese", where=main | {"kind": KINDS[0]}, title="zeroed", **effect))
    controls = at | {"kind": KINDS[0], "role": "control"}
    draw(others, tables, Panel("effects", where=controls, title="other live channels, zeroed", **effect))
    walks = keyed(tables["walks"], "direction")["UP"]
    contingency(PairedCounts(*(walks[name] for name in OUTCOMES)), mosaic, names=("zeroed", ORIGINAL))
    mosaic.set_title(f"channel {walks['channel']} zeroed, walks with common draws")
    return drawn


def finding(tables: Tables) -> Finding:
    walks = keyed(tables["walks"], "direction")["UP"]
    up = f"channel {walks['channel']}"
    effects = keyed(tables["effects"], "cheese", "kind", "ablated")
    zeroed, by_mean, resampled = (effects[PLACES[0], kind, up] for kind in KINDS)
    across = chosen(tables["across"], ablated=up, kind=KINDS[0])
    counts = " / ".join(shown(walks, f"{name}_share", ".1%") for name in OUTCOMES)
    raised = raising_rank(tables["effects"], zeroed)
    rank = "" if raised is None else f", rank {raised.rank} of {raised.controls + 1} live channels by increase"
    p = "" if raised is None or raised.p is None else f" (p = {raised.p:.2g})"
    elsewhere = ", ".join(f"{shown(effects[place, KINDS[0], up], 'effect', '+.3f')} {place}" for place in PLACES[1:])
    sets = "; ".join(f"{row['kind']} {rank_text(row)}" for row in tables.get("sets", ()))
    return Finding(
        f"Channel {walks['channel']} (UP) zeroed, n={zeroed['n']}: P(cheese) {shown(zeroed, 'original')} becomes "
        f"{shown(zeroed, 'modified')}, effect {shown(zeroed, 'effect', '+.3f')}{rank}{p}. Walks, n={walks['n']}, "
        f"both / only modified / only original / neither: {counts} (McNemar p = {walks['mcnemar_p']:.2g}).",
        _agrees(zeroed, across),
        f"{_largest(effects, zeroed)} With the cheese elsewhere the effect is {elsewhere}; mean ablation gives "
        f"{by_mean['effect']:+.3f} and resampling {resampled['effect']:+.3f}"
        + (f"; the best predictors among random sets: {sets}." if sets else "."),
    )


def raising_rank(effects: Sequence[Row], one: Row) -> Rank | None:
    """The rank of a channel's effect among the other live channels, the largest increase first; None without any."""
    same = chosen(effects, cheese=one["cheese"], kind=one["kind"])
    others = [row["effect"] for row in same if row["rank"] is not None and row["ablated"] != one["ablated"]]
    if one["rank"] is None or not others:
        return None
    return rank_among(one["effect"], others, alternative="greater")


def _agrees(zeroed: Row, across: Sequence[Row]) -> Agrees:
    """Whether zeroing helps, and helps more in the post's place; whether only this channel does is always left open."""
    helps = above(zeroed, "effect")
    return verdict(helps, *((None, *(above(row, "difference") for row in across)) if helps else ()))


def _largest(effects: Mapping[Any, Row], zeroed: Row) -> str:
    """The channel with the largest effect, selected by this effect and therefore without a p-value."""
    rows = chosen(list(effects.values()), cheese=PLACES[0], kind=KINDS[0])
    row = max((row for row in rows if row["ablated"].startswith("channel")), key=lambda row: abs(row["effect"]))
    if row["ablated"] == zeroed["ablated"]:
        return "No channel has a larger effect."
    rule = "not chosen by the rule" if row["role"] == "control" else f"chosen for {row['role']}"
    effect = shown(row, "effect", "+.3f")
    return f"{row['ablated'].capitalize()} ({row['label'] or 'no label'}, {rule}) has the largest effect, {effect}."
