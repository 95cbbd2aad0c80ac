"""Behavioural statistics: do distances in the maze tell whether the mouse takes the way to the cheese?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch.errors import StatisticsError
from chanpatch.statistics import auc, bootstrap_interval, paired_counts, paired_difference_interval, wilson_interval
from maze.analysis.decision_squares import DISTANCES, Decisions, at_decision_squares, cells, said
from maze.analysis.logistic import PENALTY, fit_logistic, predicted
from maze.analysis.part import Finding, Part, Study, Table, Tables, above, verdict

ALL = "all distances"
RESAMPLES = 999

Floats = NDArray[np.float64]


def measure(study: Study) -> dict[str, Table]:
    """How well regressions predict the choice on other levels, and their standardised coefficients."""
    fit, score = (
        at_decision_squares(study.points, study.levels(f"statistics {use}", mouse="decision square"))
        for use in ("fit", "score")
    )
    mean, deviation = fit.distances.mean(axis=0), fit.distances.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    scaled = {use: (seen.distances - mean) / deviation for use, seen in (("fit", fit), ("score", score))}
    models = {ALL: list(range(len(DISTANCES)))} | {name: [place] for place, name in enumerate(DISTANCES)}
    scores = [_score(name, scaled, fit, score, which) for name, which in models.items()]
    seed = study.seed_for("statistics bootstrap")
    together = _coefficients(scaled["fit"], fit, seed)
    coefficients: Table = []
    for place, name in enumerate(DISTANCES):
        alone = _coefficients(scaled["fit"][:, [place]], fit, seed)[0]
        coefficients.append(
            {
                "distance": name,
                "n": len(fit.chosen),
                "mean": float(mean[place]),
                "deviation": float(deviation[place]),
                **together[place],
                **{f"alone_{key}": cell for key, cell in alone.items()},
            }
        )
    return {"scores": scores, "coefficients": coefficients}


def _score(name: str, scaled: dict[str, Floats], fit: Decisions, score: Decisions, which: list[int]) -> dict[str, Any]:
    """A regression on some distances, fitted on one set of levels and scored on the other, beside the base rate."""
    usual = bool(fit.took_cheese.mean() >= 0.5)
    shares = predicted(fit_logistic(scaled["fit"][:, which], fit.took_cheese), scaled["score"][:, which])
    right, base = (shares > 0.5) == score.took_cheese, score.took_cheese == usual
    n = len(right)
    try:
        area = auc(shares, score.took_cheese)
    except StatisticsError:  # all mice, or all but one, do the same
        area = None
    return {
        "model": name,
        "n_fit": len(fit.chosen),
        "n": n,
        "always": "cheese" if usual else "not the cheese",
        **cells("base", wilson_interval(int(base.sum()), n)),
        **cells("accuracy", wilson_interval(int(right.sum()), n)),
        **cells("gain", paired_difference_interval(*paired_counts(right, base))),
        **cells("auc", area),
    }


def _coefficients(features: Floats, seen: Decisions, seed: int) -> Table:
    """The coefficient of every feature with its interval over levels."""
    sample = np.column_stack([features, seen.took_cheese])
    interval = bootstrap_interval(
        sample, lambda rows: fit_logistic(rows[:, :-1], rows[:, -1] > 0)[1:], resamples=RESAMPLES, seed=seed
    )
    ends = zip(interval.estimate, interval.low, interval.high, strict=True)
    names = ("coefficient", "coefficient_low", "coefficient_high")
    return [
        {name: None if np.isnan(value) else float(value) for name, value in zip(names, each, strict=True)}
        for each in ends
    ]


def figure(tables: Tables) -> Figure:
    """The accuracy of every regression against the base rate, and the coefficients, together and alone."""
    drawn = Figure(figsize=(13, 4.2), layout="constrained")
    accuracy, coefficient = drawn.subplots(1, 2)
    rows = tables["scores"]
    heights = range(len(rows), 0, -1)
    accuracy.axvspan(100 * rows[0]["base_low"], 100 * rows[0]["base_high"], color="0.9")
    accuracy.axvline(100 * rows[0]["base"], color="black", linestyle="--", linewidth=0.9, label="base rate")
    for row, height in zip(rows, heights, strict=True):
        accuracy.plot([100 * row["accuracy_low"], 100 * row["accuracy_high"]], [height] * 2, color="0.5")
        accuracy.plot(100 * row["accuracy"], height, "o", color="black")
    accuracy.set_yticks(heights, [row["model"] for row in rows])
    title = f"fitted on n={rows[0]['n_fit']}, scored on n={rows[0]['n']} others"
    accuracy.set(xlabel="choices predicted right, %, 95% interval", title=title)
    accuracy.legend(frameon=False, fontsize=8, loc="best")
    rows = tables["coefficients"]
    for number, prefix in enumerate(("coefficient", "alone_coefficient")):
        for place, row in enumerate(rows):
            height = len(rows) - place + 0.13 * (1 - 2 * number)
            if row[f"{prefix}_low"] is not None:
                coefficient.plot([row[f"{prefix}_low"], row[f"{prefix}_high"]], [height] * 2, color="0.5")
            coefficient.plot(row[prefix], height, "ox"[number], color="black")
        coefficient.plot([], [], "ox"[number], color="black", label=("all together", "alone")[number])
    coefficient.set_yticks(range(len(rows), 0, -1), [row["distance"] for row in rows])
    coefficient.axvline(0, color="black", linewidth=0.8)
    coefficient.set_xlabel(f"log odds of the cheese per standard deviation,\n95% interval, n={rows[0]['n']}")
    coefficient.legend(frameon=False, fontsize=8, loc="best")
    for axes in (accuracy, coefficient):
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def finding(tables: Tables) -> Finding:
    model = tables["scores"][0]
    # Chosen on the levels fitted on, as the accuracies are of the levels scored on.
    strongest = max(tables["coefficients"], key=lambda row: abs(row["alone_coefficient"] or 0.0))
    best = next(row for row in tables["scores"] if row["model"] == strongest["distance"])
    signs = {row["distance"]: _sign(row) for row in tables["coefficients"]}
    named = [f"{'more' if sign > 0 else 'less'} often with a larger '{name}'" for name, sign in signs.items() if sign]
    return Finding(
        f"Base rate {said(model, 'base', '.3f')} ({model['always']}), predicted {said(model, 'accuracy', '.3f')}, gain "
        f"{said(model, 'gain', '+.3f')}; fitted on {model['n_fit']} levels, scored on {model['n']} others.",
        verdict(above(model, "gain"), above(model, "auc", 0.5)),
        f"Held out, the probabilities rank the choices with AUC {said(model, 'auc', '.2f')}. The single distance "
        f"with the largest coefficient, '{best['model']}', predicts "
        f"{said(best, 'accuracy', '.3f')}. With the other distances held equal, the mouse takes the cheese "
        f"{', '.join(named) or 'neither more nor less often with any of them'}, beyond the interval.",
        "That a distance causes the choice: they are tied to each other, so a coefficient can change its sign with the "
        "company it is in, as the coefficients alone show. The reference is of a network trained with a 7x7 region, so "
        "its base rate is another.",
    )


def _sign(row: dict[str, Any]) -> int:
    low, high = row["coefficient_low"], row["coefficient_high"]
    return 0 if low is None else int(low > 0) - int(high < 0)


PART = Part(
    name="statistics",
    question="Do distances in the maze tell whether the mouse takes the way to the cheese?",
    method="Mazes and cheese as procgen draws them, of all sizes, mouse on the decision square, the likeliest legal "
    f"move. A logistic regression (ridge penalty {PENALTY:g}) on standardised distances, fitted on n levels and scored "
    "on n others; its AUC is of its probability for the choices on these.",
    post="Not in the post; the work on the cheese vector has a base rate of 0.848 and 0.904 predicted, for the network "
    "trained with a 7x7 region.",
    measure=measure,
    figure=figure,
    finding=finding,
)
