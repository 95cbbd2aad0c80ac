"""Does the mouse find the cheese in the bottom right more often without the UP channel?

Method: Size 15: P(cheese within 256 steps) on every level, computed from the policy's table of states. Every live
channel and the 16 best predictors are zeroed, and with the cheese in the bottom right also ablated to the mean or to
another level's activation (one per episode; for the chosen channels also one per step, drawn from {DONORS}). Means and
donors come from {effects.REFERENCES} sets of {effects.REFERENCE_LEVELS} levels of size {SIZE}, cheese in distribution,
mouse anywhere. The levels take turns among the sets, and the sets are the clusters of the intervals. The UP channel is
ranked by increase, among the live channels whose label is not another direction. The verdict: the effect of zeroing the
UP channel, with the cheese in the bottom right, is above 0.

The post: Channel 121 zeroed, sampled, n=1000: both 36.6, only modified 15.7, only original 3.5, neither 42.2.

Limits: The result does not show that only this channel matters, nor that the effect comes from the direction: zeroing
may move a channel off distribution.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from chanpatch.plots import contingency
from chanpatch.statistics import PairedCounts, mcnemar_exact, paired_counts, paired_difference_interval
from maze.analysis import effects
from maze.analysis.cells import Row, Table, Tables, Values, above, chosen, keyed, shown, verdict
from maze.analysis.drawing import Panel, draw, panels
from maze.analysis.effects import KINDS, ablation, level_batches, mean_intervals, p_reached, rank_text, set_rows
from maze.analysis.estimates import intervals, rank_cells, share
from maze.analysis.exact import ORIGINAL, first_hits, walk
from maze.analysis.labels import directions_of
from maze.analysis.part import Finding, Study
from maze.analysis.tables import Intervention
from maze.paths import Direction

SIZE = 15
PLACES = ("bottom right", "in distribution", "top left")  # of the cheese, the post's first
ELSEWHERE = 50  # levels for each of the other two places, or a quarter of n if that is more
DONORS = 10  # levels that an ablation per step draws from, for each level
PER_STEP = "resample per step"
OTHER, CONTROL = "other direction", "control"
TOGETHER = 16  # channels that are ablated together
OUTCOMES = ("both", "only_modified", "only_original", "neither")  # of the walks, in the order of `PairedCounts`


def measure(study: Study) -> dict[str, Table]:
    """Every ablation, the post's table of counts, and differences between places of the cheese."""
    selection, seed = study.selection, study.seed_for("ablation donors")
    sets = effects.references(study, "ablation reference", size=SIZE, cheese="in distribution", mouse="anywhere")
    sums = sets.sum(dim=(3, 4)).flatten(0, 1).cpu().numpy()
    varying = {f"channel {channel}" for channel in np.flatnonzero(np.ptp(sums, axis=0) > 0)}
    top = selection.ranked[:TOGETHER]
    groups = {f"channel {channel}": (channel,) for channel in selection.live} | {f"top {len(top)}": top}
    labels = {f"channel {channel}": study.labels[channel].label for channel in selection.live}
    roles = _roles(study, f"top {len(top)}", labels)
    main = [name for name, role in roles.items() if role != OTHER]
    tables, changes = {"effects": []}, {}
    for place in PLACES:
        posts = place == PLACES[0]
        count = study.n if posts else min(study.n, max(ELSEWHERE, study.n // 4))
        levels = study.levels("ablation", count, size=SIZE, cheese=place)
        ablated = [(kind, name) for kind in (KINDS if posts else KINDS[:1]) for name in groups]
        ablations = {
            f"{kind} {name}": ablation(study.points, kind, groups[name], sets, seed=seed) for kind, name in ablated
        }
        found = p_reached(study.points, levels, ablations)
        changes[place] = dict(zip(groups, found[1:] - found[0], strict=False))  # `KINDS[0]` comes first
        if posts:
            tables["walks"] = [_walks(study, levels, ablations[f"{KINDS[0]} channel {study.channel(Direction.UP)}"])]
            tables["sets"] = set_rows(study, levels, top, sets, seed=study.seed_for("ablation sets"))
            found = np.concatenate([found, per_step(study, levels, [groups[name] for name in main], sets, seed=seed)])
            ablated += [(PER_STEP, name) for name in main]
        tables["effects"] += [
            row | {"label": labels.get(row["ablated"])} for row in _rows(ablated, found, roles, varying, place)
        ]
    # Stable; the report cuts long tables.
    tables["effects"].sort(key=lambda row: {OTHER: 1, CONTROL: 2}.get(row["role"], 0))
    tables["across"] = _across(changes, {name: roles[name] for name in main})
    return {name: table for name, table in tables.items() if table}


def per_step(
    study: Study, levels: Sequence[bytes], groups: Sequence[Sequence[int]], sets: Tensor, *, seed: int
) -> Values:
    """P(cheese) if every step draws one of `DONORS` levels for a group of channels: (group, level).

    With a fresh draw at every visit, the probability of an action in a state is the mean over the donors.
    """
    draws = {
        f"{number} {draw}": ablation(study.points, "resample", group, sets, seed=seed + draw)
        for number, group in enumerate(groups)
        for draw in range(DONORS)
    }
    parts = []
    for chains, tables in level_batches(study.points, levels, draws):
        drawn = tables[1:].reshape(len(groups), DONORS, *tables.shape[1:]).mean(axis=1)
        parts.append(first_hits(chains, drawn, [chains.cheese])[:, chains.start, 0])
    return np.concatenate(parts, axis=1)


def _roles(study: Study, top: str, labels: Mapping[str, str | None]) -> dict[str, str]:
    """The reason for choosing a group, or `OTHER` if its label is another direction; other groups are controls."""
    roles = {top: top}
    for direction in Direction:
        name = f"channel {study.channel(direction)}"
        roles[name] = f"{roles[name]}, {direction.name}" if name in roles else direction.name
    apart = [name for name, label in labels.items() if label and Direction.UP not in directions_of(label)]
    return dict.fromkeys(apart, OTHER) | roles


def _rows(
    ablated: Sequence[tuple[str, str]], found: Values, roles: Mapping[str, str], varying: Container[str], place: str
) -> Table:
    """One row per ablation: its effect, and the UP channel's rank by increase among the same ablation of the controls.

    Channels that do not vary on the reference levels are neither ranked nor controls.
    """
    (original,) = mean_intervals(found[:1])
    rows = []
    for number, (kind, name) in enumerate(ablated, 1):
        after, role = found[number], roles.get(name, CONTROL)
        mean, effect = mean_intervals(np.stack([after, after - found[0]]), effects.reference_of(kind, len(after)))
        controls = [
            float((found[index] - found[0]).mean())
            for index, (other_kind, other) in enumerate(ablated, 1)
            if other_kind == kind and other not in roles and other in varying
        ]
        row = {"cheese": place, "kind": kind, "ablated": name, "role": role, "n": len(after)}
        row |= intervals(original=original, modified=mean, effect=effect)
        is_up = name in varying and "UP" in role.split(", ")
        rows.append(row | rank_cells(effect.estimate, controls, ranked=is_up, increase=True))
    return rows


def _walks(study: Study, levels: Sequence[bytes], zeroed: Intervention) -> Row:
    """The post's table for the UP channel, from walks of both policies with common draws."""
    walks = []
    for number, (chains, tables) in enumerate(level_batches(study.points, levels, {"zeroed": zeroed}), 1):
        seed = study.seed_for(f"ablation draws {number}")  # draws depend on the index in the batch
        walks.append([walk(chains, table, sampling_seed=seed).terminated for table in tables])
    original, modified = np.concatenate(walks, axis=1)
    counts = paired_counts(modified, original)
    row = {"channel": study.channel(Direction.UP), "n": len(levels), **dict(zip(OUTCOMES, counts, strict=True))}
    row |= intervals(**{f"{name}_share": share(each, len(levels)) for name, each in zip(OUTCOMES, counts, strict=True)})
    row |= intervals(difference=paired_difference_interval(*counts))
    return row | {"mcnemar_p": mcnemar_exact(counts.only_first, counts.only_second)}


def _across(changes: Mapping[str, Mapping[str, Values]], roles: Mapping[str, str]) -> Table:
    """Effects of zeroing in the post's place minus those in another place, over the mazes that both places have."""
    rows = []
    for place in PLACES[1:]:
        for name, role in roles.items():
            change = changes[place][name]
            (difference,) = mean_intervals((changes[PLACES[0]][name][: len(change)] - change)[None])
            row = {"minus": place, "ablated": name, "role": role, "n": len(change)}
            rows.append(row | intervals(difference=difference))
    return rows


def figure(tables: Tables) -> Figure:
    drawn, (kinds, places, others, mosaic) = panels(20, 6.4, 4)
    effect = {"by": ("ablated", "role"), "prefix": "effect", "label": "change of P(cheese), points", "scale": 100}
    main = {"role": lambda role: role not in (OTHER, CONTROL)}
    at = {"cheese": PLACES[0]}
    draw(kinds, tables, Panel("effects", series="kind", where=main | at, title="cheese in the bottom right", **effect))
    draw(places, tables, Panel("effects", series="cheese", where=main | {"kind": KINDS[0]}, title="zeroed", **effect))
    rest = at | {"kind": KINDS[0], "role": lambda role: role in (OTHER, CONTROL)}
    draw(others, tables, Panel("effects", series="role", where=rest, title="other live channels, zeroed", **effect))
    (walks,) = tables["walks"]
    contingency(PairedCounts(*(walks[name] for name in OUTCOMES)), mosaic, names=("zeroed", ORIGINAL))
    mosaic.set_title(f"channel {walks['channel']} zeroed, walks with common draws")
    return drawn


def finding(tables: Tables) -> Finding:
    (walks,) = tables["walks"]
    up = f"channel {walks['channel']}"
    found = keyed(tables["effects"], "cheese", "kind", "ablated")
    zeroed, *others = (found[PLACES[0], kind, up] for kind in (*KINDS, PER_STEP))
    counts = " / ".join(shown(walks, f"{name}_share", ".1%") for name in OUTCOMES)
    rank = "" if zeroed["rank"] is None else f", rank {zeroed['rank']} of {zeroed['controls'] + 1} by increase"
    p = "" if zeroed["rank_p"] is None else f" (p = {zeroed['rank_p']:.2g})"
    elsewhere = ", ".join(f"{shown(found[place, KINDS[0], up], 'effect', '+.3f')} {place}" for place in PLACES[1:])
    sets = "; ".join(f"{row['kind']} {rank_text(row)}" for row in tables.get("sets", ()))
    return Finding(
        f"Channel {walks['channel']} (UP) zeroed, n={zeroed['n']}: P(cheese) {shown(zeroed, 'original')} becomes "
        f"{shown(zeroed, 'modified')}, effect {shown(zeroed, 'effect', '+.3f')}{rank}{p}. Walks, n={walks['n']}, "
        f"both / only modified / only original / neither: {counts} (McNemar p = {walks['mcnemar_p']:.2g}).",
        verdict(above(zeroed, "effect")),
        f"{_largest(found, zeroed)} With the cheese elsewhere the effect is {elsewhere}. Other ablations: "
        + ", ".join(f"{row['kind']} {shown(row, 'effect', '+.3f')}" for row in others)
        + (f"; the best predictors among random sets: {sets}." if sets else "."),
    )


def _largest(found: Mapping[Any, Row], zeroed: Row) -> str:
    """The channel with the largest effect, selected by this effect and therefore without a p-value."""
    rows = chosen(list(found.values()), cheese=PLACES[0], kind=KINDS[0])
    row = max((row for row in rows if row["ablated"].startswith("channel")), key=lambda row: abs(row["effect"]))
    if row["ablated"] == zeroed["ablated"]:
        return "No channel has a larger effect."
    rule = "not chosen by the rule" if row["role"] in (OTHER, CONTROL) else f"chosen for {row['role']}"
    effect = shown(row, "effect", "+.3f")
    return f"{row['ablated'].capitalize()} ({row['label'] or 'no label'}, {rule}) has the largest effect, {effect}."
