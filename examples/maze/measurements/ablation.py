"""Does the mouse find the cheese in the bottom right more often without the UP channel?

Method: Size 15: P(cheese within 256 steps) on every level, computed from the policy's table of states. Every live
channel and the 16 best predictors are zeroed, and with the cheese in the bottom right also ablated to the mean or to
another level's activation. Means and donors are from {REFERENCE} levels of size {SIZE}, cheese in distribution, mouse
anywhere. A rank is among the other live channels, the largest increase first.

The post: Channel 121 zeroed, sampled, n=1000: both 36.6, only modified 15.7, only original 3.5, neither 42.2.

Limits: The result does not show that only this channel matters, nor that the effect comes from the direction: zeroing
may move a channel off distribution. The intervals for mean and resample ablation are too narrow, because both use one
fixed reference set.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from chanpatch.plots import contingency
from chanpatch.statistics import PairedCounts, mcnemar_exact, paired_counts, paired_difference_interval
from maze.analysis.cells import Agrees, Row, Table, Tables, Values, above, chosen, keyed, shown, verdict
from maze.analysis.drawing import Panel, draw, panels
from maze.analysis.effects import KINDS, ablation, level_batches, mean_intervals, p_reached, rank_text, set_rows
from maze.analysis.estimates import intervals, rank_cells, share
from maze.analysis.exact import ORIGINAL, walk
from maze.analysis.forwards import SITE, activations
from maze.analysis.part import Finding, Study
from maze.analysis.selection import Selection
from maze.analysis.tables import Intervention
from maze.paths import Direction

SIZE = 15
PLACES = ("bottom right", "in distribution", "top left")  # of the cheese, the post's first
ELSEWHERE = 50  # levels for each of the other two places, or a quarter of n if that is more
REFERENCE = 200  # levels for means and donors
TOGETHER = 16  # channels that are ablated together
OUTCOMES = ("both", "only_modified", "only_original", "neither")  # of the walks, in the order of `PairedCounts`


def measure(study: Study) -> dict[str, Table]:
    """Every ablation, the post's table of counts, and differences between places of the cheese."""
    selection, seed = study.selection, study.seed_for("ablation donors")
    places = {"size": SIZE, "cheese": "in distribution", "mouse": "anywhere"}
    reference = activations(study.points, study.levels("ablation reference", REFERENCE, **places), SITE)
    sums = reference[SITE].sum(dim=(2, 3)).numpy()
    varying = {f"channel {channel}" for channel in np.flatnonzero(np.ptp(sums, axis=0) > 0)}
    top = selection.ranked[:TOGETHER]
    groups = {f"channel {channel}": (channel,) for channel in selection.live} | {f"top {len(top)}": top}
    roles = _roles(selection, f"top {len(top)}")
    labels = {f"channel {channel}": study.labels[channel].label for channel in selection.live}
    tables, changes = {"effects": []}, {}
    for place in PLACES:
        posts = place == PLACES[0]
        count = study.n if posts else min(study.n, max(ELSEWHERE, study.n // 4))
        levels = study.levels("ablation", count, size=SIZE, cheese=place)
        ablated = [(kind, name) for kind in (KINDS if posts else KINDS[:1]) for name in groups]
        ablations = {
            f"{kind} {name}": ablation(study.points, kind, groups[name], reference, seed=seed) for kind, name in ablated
        }
        found = p_reached(study.points, levels, ablations)
        tables["effects"] += [
            row | {"label": labels.get(row["ablated"])} for row in _rows(ablated, found, roles, varying, place)
        ]
        changes[place] = dict(zip(groups, found[1:] - found[0], strict=False))  # `KINDS[0]` comes first
        if posts:
            tables["walks"] = [_walks(study, levels, ablations[f"{KINDS[0]} channel {study.channel(Direction.UP)}"])]
            tables["sets"] = set_rows(study, levels, top, reference, seed=study.seed_for("ablation sets"))
    tables["effects"].sort(key=lambda row: row["role"] == "control")  # stable; the report cuts long tables
    tables["across"] = _across(changes, roles)
    return {name: table for name, table in tables.items() if table}


def _roles(selection: Selection, top: str) -> dict[str, str]:
    """The reason for which a group was chosen; groups without a reason are controls."""
    roles = {top: top}
    for direction in Direction:
        name = f"channel {selection.best[direction]}"
        roles[name] = f"{roles[name]}, {direction.name}" if name in roles else direction.name
    return roles


def _rows(
    ablated: Sequence[tuple[str, str]], found: Values, roles: Mapping[str, str], varying: Container[str], place: str
) -> Table:
    """One row per ablation: its effect, and its rank by increase among the same ablation of the other live channels.

    Channels that do not vary on the reference levels have no rank and are not controls.
    """
    original, *modified = mean_intervals(found)
    effects = mean_intervals(found[1:] - found[0])
    rows = []
    for (kind, name), mean, effect in zip(ablated, modified, effects, strict=True):
        others = [
            other.estimate
            for (other_kind, other_name), other in zip(ablated, effects, strict=True)
            if other_kind == kind and other_name != name and other_name in varying
        ]
        row = {"cheese": place, "kind": kind, "ablated": name, "role": roles.get(name, "control"), "n": found.shape[1]}
        row |= intervals(original=original, modified=mean, effect=effect)
        rank = rank_cells(effect.estimate, others, ranked=name in varying, p=name in roles, increase=True)
        rows.append(row | rank)
    return rows


def _walks(study: Study, levels: Sequence[bytes], zeroed: Intervention) -> Row:
    """The post's table for the UP channel, from walks of both policies with common draws."""
    walks = []
    for number, (chains, tables) in enumerate(level_batches(study.points, levels, {"zeroed": zeroed}), 1):
        seed = study.seed_for(f"ablation draws {number}")  # draws depend on the index in the batch
        walks.append([walk(chains, table, sampling_seed=seed).found for table in tables])
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
    main = {"role": lambda role: role != "control"}
    at = {"cheese": PLACES[0]}
    title = "cheese in the bottom right\n(one reference: too narrow for mean and resample)"
    draw(kinds, tables, Panel("effects", series="kind", where=main | at, title=title, **effect))
    draw(places, tables, Panel("effects", series="cheese", where=main | {"kind": KINDS[0]}, title="zeroed", **effect))
    controls = at | {"kind": KINDS[0], "role": "control"}
    draw(others, tables, Panel("effects", where=controls, title="other live channels, zeroed", **effect))
    (walks,) = tables["walks"]
    contingency(PairedCounts(*(walks[name] for name in OUTCOMES)), mosaic, names=("zeroed", ORIGINAL))
    mosaic.set_title(f"channel {walks['channel']} zeroed, walks with common draws")
    return drawn


def finding(tables: Tables) -> Finding:
    (walks,) = tables["walks"]
    up = f"channel {walks['channel']}"
    effects = keyed(tables["effects"], "cheese", "kind", "ablated")
    zeroed, by_mean, resampled = (effects[PLACES[0], kind, up] for kind in KINDS)
    across = chosen(tables["across"], ablated=up)
    counts = " / ".join(shown(walks, f"{name}_share", ".1%") for name in OUTCOMES)
    rank = (
        ""
        if zeroed["rank"] is None
        else f", rank {zeroed['rank']} of {zeroed['controls'] + 1} live channels by increase"
    )
    p = "" if zeroed["rank_p"] is None else f" (p = {zeroed['rank_p']:.2g})"
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
