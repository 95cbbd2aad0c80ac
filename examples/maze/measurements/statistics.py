"""Do distances in the maze predict whether the mouse takes the path to the cheese?

Method: Mazes and cheese as procgen draws them, of all sizes, mouse on the decision square, the likeliest legal move. A
logistic regression (ridge penalty 1) on standardized distances, fitted on n levels and scored on n others; the AUC is
that of the predicted probability for the choices on these. The verdict: the gain in accuracy over the base rate is
above 0.

The post: Not in the post; the work on the cheese vector has a base rate of 0.848 and 0.904 predicted, for the network
trained with a 7x7 region.

Limits: The result does not show that a distance causes the choice: the distances are correlated, so the sign of a
coefficient can depend on the others.
"""

from __future__ import annotations

from chanpatch.probes import LogisticProbe
from chanpatch.statistics import Interval
from maze.analysis.cells import Row, Table, Tables, above, keyed, shown, verdict
from maze.analysis.decision_squares import DISTANCES, Decisions, at_decision_squares
from maze.analysis.drawing import Panel, chart
from maze.analysis.estimates import intervals, one_by_one
from maze.analysis.part import Finding, Study

ALL = "all distances"
RESAMPLES = 999


def measure(study: Study) -> dict[str, Table]:
    """The accuracy of regressions on other levels, and their standardized coefficients."""
    fit, score = (
        at_decision_squares(study.points, study.levels(f"statistics {use}", mouse="decision square"))
        for use in ("fit", "score")
    )
    models = {ALL: list(range(len(DISTANCES)))} | {name: [place] for place, name in enumerate(DISTANCES)}
    scores = [_score(name, fit, score, which) for name, which in models.items()]
    seed = study.seed_for("statistics bootstrap")
    together = _coefficients(fit, models[ALL], seed)
    coefficients = []
    for place, name in enumerate(DISTANCES):
        (alone,) = _coefficients(fit, [place], seed)
        distances = fit.distances[:, place]
        row = {"distance": name, "n": len(fit.chosen), "mean": float(distances.mean())}
        row["deviation"] = float(distances.std()) or 1.0
        coefficients.append(row | intervals(coefficient=together[place], alone_coefficient=alone))
    return {"scores": scores, "coefficients": coefficients}


def _score(name: str, fit: Decisions, score: Decisions, which: list[int]) -> Row:
    """A regression on some distances, fitted on one set of levels and scored on the other."""
    probe = LogisticProbe.fit(fit.distances[:, which], fit.took_cheese)
    scores = probe.score(score.distances[:, which], score.took_cheese)
    return {
        "model": name,
        "n_fit": len(fit.chosen),
        "n": scores.n,
        "always": "cheese" if probe.majority else "not the cheese",
        **intervals(base=scores.base_rate, accuracy=scores.accuracy, gain=scores.gain, auc=scores.auc),
    }


def _coefficients(seen: Decisions, which: list[int], seed: int) -> list[Interval]:
    features = seen.distances[:, which]
    probe = LogisticProbe.fit(features, seen.took_cheese)
    return one_by_one(probe.coefficient_interval(features, seen.took_cheese, resamples=RESAMPLES, seed=seed))


def finding(tables: Tables) -> Finding:
    model = tables["scores"][0]
    # Chosen on the levels for fitting; the accuracies are from the levels for scoring.
    strongest = max(tables["coefficients"], key=lambda row: abs(row["alone_coefficient"] or 0.0))
    best = keyed(tables["scores"], "model")[strongest["distance"]]
    signs = {row["distance"]: above(row, "coefficient") for row in tables["coefficients"]}
    named = ", ".join(
        f"{'more' if sign else 'less'} often with a larger '{name}'" for name, sign in signs.items() if sign is not None
    )
    return Finding(
        f"Base rate {shown(model, 'base')} ({model['always']}), predicted {shown(model, 'accuracy')}, gain "
        f"{shown(model, 'gain', '+.3f')}; fitted on {model['n_fit']} levels, scored on {model['n']} others.",
        verdict(above(model, "gain")),
        f"The AUC is {shown(model, 'auc', '.2f')}; '{best['model']}', the single distance with the largest "
        f"coefficient, predicts {shown(best, 'accuracy')}. At equal other distances, the mouse takes the cheese "
        f"{named or 'neither more nor less often with any distance'}, beyond the interval.",
    )


figure = chart(
    Panel("scores", "model", {"fit": "accuracy", "base rate": "base"}, "predicted right, %", scale=100, line=None),
    Panel("coefficients", "distance", {"all": "coefficient", "alone": "alone_coefficient"}, "log odds per deviation"),
    size=(6.5, 4.2),
)
