"""The post's causal experiment without sampling: P(cheese) with channels ablated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch.patching import ActivationCache
from chanpatch.plots import contingency
from chanpatch.statistics import (
    PairedCounts,
    Rank,
    mcnemar_exact,
    paired_counts,
    paired_difference_interval,
    rank_among,
    wilson_interval,
)
from maze.analysis.cells import (
    Agrees,
    Row,
    Table,
    Tables,
    above,
    cells,
    chosen,
    intervals,
    keyed,
    rank_cells,
    shown,
    verdict,
)
from maze.analysis.drawing import Panel, draw, panels
from maze.analysis.effects import KINDS, Values, ablation, level_batches, mean_intervals, rank_text, set_rows
from maze.analysis.episodes import ORIGINAL
from maze.analysis.exact import first_hits, walk
from maze.analysis.forwards import SITE, activations
from maze.analysis.off_distribution import METERED, absolute_z, background
from maze.analysis.part import Finding, Part, Study
from maze.analysis.selection import Selection
from maze.paths import Direction, top_right

SIZE = 15
PLACES = ("bottom right", "in distribution", "top left")  # of the cheese; the first is the post's
ELSEWHERE = 50  # levels with the cheese in each of the other two places, or a quarter of n if that is more
REFERENCE = 200  # levels for means and donors
REFERENCE_PLACES = {"cheese": "in distribution", "mouse": "anywhere"}
TOGETHER = 16  # channels that are ablated together
OUTCOMES = ("both", "only_modified", "only_original", "neither")  # of the walks, in the order of `PairedCounts`

_STYLES = [{"color": color} for color in ("black", "tab:orange", "tab:blue")]


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
    effects: Table = []
    changes: dict[str, Values] = {}
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
    """The channels of each ablation: every live channel alone, the best predictors, and as many others."""
    groups = {f"channel {channel}": (channel,) for channel in selection.live}
    top, rest = selection.ranked[:TOGETHER], selection.ranked[TOGETHER:]
    groups[f"top {len(top)}"] = top
    if rest:
        drawn = np.random.default_rng(seed).permutation(rest)[:TOGETHER]
        groups[f"{len(drawn)} others"] = tuple(sorted(drawn.tolist()))
    return groups


def _roles(selection: Selection, groups: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The reason for which a group was chosen; groups without one are controls."""
    roles = {name: name for name in groups if not name.startswith("channel")}
    for direction in Direction:
        name = f"channel {selection.best[direction]}"
        roles[name] = f"{roles[name]}, {direction.name}" if name in roles else direction.name
    return roles


def _walking(selection: Selection) -> list[str]:
    """The policies to walk as the post did: the original, and each direction's channel zeroed."""
    return [ORIGINAL, *dict.fromkeys(f"zero channel {selection.best[direction]}" for direction in Direction)]


def _measured(
    study: Study,
    levels: Sequence[bytes],
    ablations: Mapping[str, Any],
    roles: Mapping[str, str],
    walking: Sequence[str],
) -> tuple[Values, Values, dict[str, NDArray[np.bool_]]]:
    """P(cheese) and P(corner before it), (1 + ablation, level), and whether walks found the cheese, by policy.

    The corner is NaN for controls.
    """
    interventions = {ORIGINAL: (), **ablations}
    wanted = [name == ORIGINAL or name.split(" ", 1)[1] in roles for name in interventions]
    rows = {name: list(interventions).index(name) for name in walking}
    found, corner, walked = [], [], {name: [] for name in walking}
    for chains, tables in level_batches(study.points, levels, interventions):
        found.append(first_hits(chains, tables, [chains.cheese])[:, chains.start, 0])
        passed = np.full(found[-1].shape, np.nan)
        passed[wanted] = first_hits(chains, tables[wanted], [chains.at(top_right(chains.mazes))])[:, chains.start, 0]
        corner.append(passed)
        seed = study.seed_for(f"ablation draws {len(found)}")  # draws depend on the index in the batch
        for name, row in rows.items():
            walked[name].append(walk(chains, tables[row], sampling_seed=seed)[0].found)
    episodes = {name: np.concatenate(each) for name, each in walked.items()}
    return np.concatenate(found, axis=1), np.concatenate(corner, axis=1), episodes


def _walks(selection: Selection, walked: Mapping[str, NDArray[np.bool_]], found: Values, names: Sequence[str]) -> Table:
    """The post's table for each direction's channel, from walks with common draws, beside the exact probabilities."""
    rows: Table = []
    for direction in Direction:
        name = f"zero channel {selection.best[direction]}"
        counts = paired_counts(walked[name], walked[ORIGINAL])
        exact = mean_intervals(found[[0, 1 + names.index(name)]])
        row: Row = {"direction": direction.name, "channel": selection.best[direction], "n": len(walked[name])}
        row |= dict(zip(OUTCOMES, counts, strict=True))
        for outcome, count in zip(OUTCOMES, counts, strict=True):
            row |= cells(f"{outcome}_share", wilson_interval(count, sum(counts)))
        row |= {"mcnemar_p": mcnemar_exact(counts.only_first, counts.only_second)}
        row |= cells("difference", paired_difference_interval(*counts))
        rows.append(row | cells("exact_original", exact[0]) | cells("exact_modified", exact[1]))
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
    rows: Table = []
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
    """Effects in the post's place minus those in another, over the mazes that both have."""
    numbers = [number for number, name in enumerate(names) if name.split(" ", 1)[1] in roles]
    rows: Table = []
    for place in PLACES[1:]:
        n = changes[place].shape[1]
        intervals = mean_intervals(changes[PLACES[0]][numbers, :n] - changes[place][numbers])
        for number, interval in zip(numbers, intervals, strict=True):
            kind, name = names[number].split(" ", 1)
            row = {"minus": place, "kind": kind, "ablated": name, "role": roles[name], "n": n}
            rows.append(row | cells("difference", interval))
    return rows


def _absolute_z(study: Study, reference: ActivationCache, seed: int) -> dict[str, dict[int, float | None]]:
    """How far off distribution each live channel is under each kind of ablation; None if it does not vary.

    None for mean ablation, which is near 0 by construction.
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


def is_channel(row: Mapping[str, Any]) -> bool:
    """Whether a row describes one channel alone."""
    return str(row["ablated"]).startswith("channel")


def figure(tables: Tables) -> Figure:
    """The chosen channels by kind of ablation, the same zeroed by place of the cheese, the controls, and the walks."""
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
    elsewhere = ", ".join(
        f"{shown(effects[place, KINDS[0], up], 'effect', '+.3f')} with the cheese {place}" for place in PLACES[1:]
    )
    more = ", ".join(f"{shown(row, 'difference', '+.3f')} more than with it {row['minus']}" for row in across)
    sets = "; ".join(f"{row['kind']} {rank_text(row)}" for row in tables.get("sets", ()))
    return Finding(
        f"Channel {walks['channel']} (UP) zeroed, n={zeroed['n']}: P(cheese) {shown(zeroed, 'original')} becomes "
        f"{shown(zeroed, 'modified')}, effect {shown(zeroed, 'effect', '+.3f')}{rank}{p}. Walks with common "
        f"draws, n={walks['n']}, both / only modified / only original / neither: {counts} "
        f"(McNemar p = {walks['mcnemar_p']:.2g}).",
        _agrees(zeroed, across),
        f"{_far(zeroed, resampled)}{_beside_controls(raised)}{_largest(effects, zeroed)}{_never_zero(effects)}"
        + "".join(
            f"{row['ablated'].capitalize()} zeroed together: {shown(row, 'effect', '+.3f')}. "
            for row in chosen(tables["effects"], cheese=PLACES[0], kind=KINDS[0])
            if not is_channel(row)
        )
        + (f"The top channels among random sets of as many live channels: {sets}. " if sets else "")
        + f"Mean ablation gives {by_mean['effect']:+.3f} and resampling {resampled['effect']:+.3f}. Both use one set "
        f"of {by_mean['reference']}; another set moves them by more than their intervals, so they decide "
        f"nothing. Zeroing has the effect {elsewhere}; on the same mazes the effect in the bottom right is {more}.",
        "It does not follow that only this channel matters, nor that the effect comes from the direction: zeroing may "
        "move a channel off distribution. The intervals of mean and resample ablation are too narrow, as they hold one "
        "reference set fixed.",
    )


def raising_rank(effects: Sequence[Row], one: Row) -> Rank | None:
    """The rank of a channel's effect among the other live channels, the largest increase first; None without any."""
    same = chosen(effects, cheese=one["cheese"], kind=one["kind"])
    others = [row["effect"] for row in same if row["rank"] is not None and row["ablated"] != one["ablated"]]
    if one["rank"] is None or not others:
        return None
    return rank_among(one["effect"], others, alternative="greater")


def _agrees(zeroed: Row, across: Sequence[Row]) -> Agrees:
    """Whether zeroing helps, and helps more in the post's place; whether it is this channel is always left open."""
    helps = above(zeroed, "effect")
    return verdict(helps, *((None, *(above(row, "difference") for row in across)) if helps else ()))


def _far(zeroed: Row, resampled: Row) -> str:
    if zeroed["absolute_z"] is None or resampled["absolute_z"] is None:
        return "How far off distribution it goes was not measured: the channel does not vary on other levels. "
    return (
        f"Its sum then lies {zeroed['absolute_z']:.1f} (zero) and {resampled['absolute_z']:.1f} (resample) standard "
        f"deviations from those of {zeroed['absolute_z_against']}, on average (0.8 is usual). "
    )


def _beside_controls(raised: Rank | None) -> str:
    if raised is None:
        return "There is no other live channel to compare with. "
    special = "so few others do" if raised.p is not None and raised.p < 0.05 else "so it is not special"
    return (
        f"Zeroed one by one, {raised.rank - 1} of the {raised.controls} other live channels raise P(cheese) as much "
        f"or more, {special}. "
    )


def _largest(effects: Mapping[Any, Row], zeroed: Row) -> str:
    """The channel with the largest effect, picked for it and therefore without a p-value."""
    rows = chosen(list(effects.values()), cheese=PLACES[0], kind=KINDS[0])
    row = max(filter(is_channel, rows), key=lambda row: abs(row["effect"]))
    if row["ablated"] == zeroed["ablated"]:
        return "It has the largest effect. "
    rule = "did not choose" if row["role"] == "control" else f"chose for {row['role']}"
    return (
        f"The largest effect is that of {row['ablated']} ({row['label'] or 'no label'}), which the rule {rule}: "
        f"{shown(row, 'effect', '+.3f')} (zero), {_by_kind(effects, row, KINDS[1:])}. "
    )


def _by_kind(effects: Mapping[Any, Row], row: Row, kinds: Sequence[str]) -> str:
    return ", ".join(f"{effects[PLACES[0], kind, row['ablated']]['effect']:+.3f} ({kind})" for kind in kinds)


def _never_zero(effects: Mapping[Any, Row]) -> str:
    """The effects on channels that are never at zero by themselves, for which zeroing is unusual."""
    rows = chosen(list(effects.values()), cheese=PLACES[0], kind=KINDS[0])
    named = [
        f"{row['ablated']} (at least {row['lowest_sum']:.2g}): {_by_kind(effects, row, KINDS)}"
        for row in filter(is_channel, rows)
        if row["lowest_sum"] > 0
    ]
    if not named:
        return "Every live channel comes to 0 somewhere in the reference. "
    return f"Channels whose sum is never 0 in the reference: {'; '.join(named)}. "


PART = Part(
    name="ablation",
    question="Does the mouse find the cheese in the bottom right more often without the UP channel?",
    method="Size 15: P(cheese within 256 steps) on every level, computed from the policy's table of states. Every live "
    "channel, the 16 best predictors and 16 others are ablated: to zero, to the mean, or to another level's "
    f"activation. Means and donors are of {_reference()}.",
    post="Channel 121 zeroed, sampled, n=1000: both 36.6, only modified 15.7, only original 3.5, neither 42.2.",
    measure=measure,
    figure=figure,
    finding=finding,
)
