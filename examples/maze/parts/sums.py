"""The sums of a direction's channel against that direction, in distribution and out of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from chanpatch import ThresholdProbe
from chanpatch.errors import ProbeError
from maze.channels import channel_sums
from maze.part import POOL, Finding, Part, Study, Table, Tables, above, open_to, shown, verdict
from maze.paths import Direction
from maze.tables import SITE

SPLITS = ("in distribution", "out of distribution")
SIZE = 25


def measure(study: Study) -> dict[str, Table]:
    """Sums per level, and per direction how a threshold on them fares out of distribution."""
    sums: Table = []
    transfer: Table = []
    pools = {
        split: study.levels(f"sums {split}", POOL * study.n, size=SIZE, cheese=split, mouse="anywhere")
        for split in SPLITS
    }
    for direction in Direction:
        channel = study.channel(direction)
        sets = {}
        for split, pool in pools.items():
            levels, labels = open_to(direction, pool, study.n)
            values = channel_sums(study.points, SITE, levels)[:, channel]
            sets[split] = values, labels
            sums += [
                {
                    "direction": direction.name,
                    "channel": channel,
                    "split": split,
                    "sum": float(each),
                    "is_it": bool(label),
                }
                for each, label in zip(values, labels, strict=True)
            ]
        transfer += _transfer(direction, channel, sets, study.seed_for("halves"))
    return {"sums": sums, "transfer": transfer}


def _transfer(direction: Direction, channel: int, sets: dict[str, tuple[Any, Any]], seed: int) -> Table:
    """The threshold of one half of the mazes in distribution, on the other half and on the mazes out of it."""
    inside, outside = (sets[split] for split in SPLITS)
    named = {"direction": direction.name, "channel": channel}
    try:
        probe = ThresholdProbe.fit(*inside, seed=seed)
        records = probe.transfer(*outside).to_records()
    except ProbeError as error:  # a label is too rare among so few mazes
        empty = {f"{which}{end}": None for which in ("fit", "shifted", "drop") for end in ("", "_low", "_high")}
        return [{**named, "threshold": None, "n_fit": 0, "n_shifted": 0, "quantity": f"not measured: {error}", **empty}]
    known = {**named, "threshold": probe.threshold, "n_fit": probe.held_out.n, "n_shifted": len(outside[0])}
    return [{**known, **{name.replace(" ", "_"): cell for name, cell in record.items()}} for record in records]


def figure(tables: Tables) -> Figure:
    """Sums by label and split, one panel per direction."""
    drawn = Figure(figsize=(13, 4.6), layout="constrained")
    panels = drawn.subplots(1, len(Direction))
    for axes, direction in zip(panels, Direction, strict=True):
        rows = [row for row in tables["sums"] if row["direction"] == direction.name]
        rng = np.random.default_rng(0)
        for place, (split, label) in enumerate((split, label) for split in SPLITS for label in (True, False)):
            sums = [row["sum"] for row in rows if row["split"] == split and row["is_it"] == label]
            jitter = place + rng.uniform(-0.3, 0.3, len(sums))
            axes.scatter(jitter, sums, s=7, marker="o" if label else "x", color="black", alpha=0.45, linewidths=0.7)
            axes.text(place, 1.01, f"n={len(sums)}", transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
        threshold = next((row["threshold"] for row in tables["transfer"] if row["direction"] == direction.name), None)
        if threshold is not None:
            axes.axhline(threshold, color="black", linestyle="--", linewidth=0.9)
        labels = [f"{direction.name}\nin", "not\nin", f"{direction.name}\nout", "not\nout"]
        axes.set(xticks=range(4), xticklabels=labels, ylabel=f"sum of channel {rows[0]['channel']}")
        axes.axvline(1.5, color="0.7", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    drawn.suptitle(
        "Is the way to the cheese in the channel's direction? Cheese in (left) and out of (right) the top right 5x5"
    )
    return drawn


def finding(tables: Tables) -> Finding:
    areas = [row for row in tables["transfer"] if row["quantity"] == "AUC"]
    alarms = [row for row in tables["transfer"] if row["quantity"] == "false-positive rate"]
    if not areas:
        return Finding("Too few mazes.", "not comparable", "Nothing.", "Raise --n.")
    up = {row["direction"]: row for row in areas}.get("UP", areas[0])
    false = {row["direction"]: row for row in alarms}.get(up["direction"], alarms[0])
    equal = [row for row in tables["transfer"] if row["quantity"].startswith("precision at the base rate")]
    precise = {row["direction"]: row for row in equal}[up["direction"]]
    both = [row["direction"] for row in areas if row["fit_low"] > 0.5 and row["shifted_low"] > 0.5]
    worse = [row["direction"] for row in areas if row["drop_low"] > 0]
    return Finding(
        f"Channel {up['channel']} ({up['direction']}): AUC in distribution {shown(up, 'fit')}, n={up['n_fit']}; "
        f"out of it {shown(up, 'shifted')}, n={up['n_shifted']}. At the threshold {up['threshold']:.1f}, false "
        "positives go from "
        f"{shown(false, 'fit', '.1%')} to {shown(false, 'shifted', '.1%')}, and precision at equal base rates from "
        f"{shown(precise, 'fit', '.1%')} to {shown(precise, 'shifted', '.1%')}.",
        verdict(above(up, "fit", 0.5), above(up, "shifted", 0.5), above(up, "drop")),
        f"The sums tell {', '.join(both) or 'no direction'} in both sets, intervals above 0.5; the drop in AUC from in "
        f"to out of distribution is beyond its interval for {', '.join(worse) or 'no direction'}.",
        "That the threshold is wrong out of distribution because its precision is lower there: the share of "
        "mazes in which the way starts in that direction differs too. The rates, and the precision at equal base "
        "rates, are in the table.",
    )


PART = Part(
    name="sums",
    question="Does the sum of a channel tell the way to the cheese, in distribution and out of it?",
    method="Size 25, mouse on a random square where the direction is free; per direction the channel chosen on "
    "other mazes, a threshold fitted on half of the mazes in distribution and scored on the other half and on those "
    "out of it.",
    post="Above 30, channel 121 means UP almost surely in distribution, and does not outside (n=1000 each).",
    measure=measure,
    figure=figure,
    finding=finding,
)
