"""The page's figures of steps and their counterfactuals, as plotly.js specifications."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from thermo_opt.lenses.results import Audited
from thermo_opt.plots.counterfactual import SERIES, looked_at
from thermo_opt.plots.crowd import crowd
from thermo_opt.report.spec import Figure, Spec, axis, behind, layout, line


def counterfactual(audits: Sequence[Audited]) -> Figure | None:
    """Above: loss bought per nat on the probe; below: the held-out share of each step's motion."""
    data: list[Spec] = []
    dashes = dict(zip(SERIES, ("solid", "dash", "dot"), strict=True))
    drawn = crowd(audits)
    for i in drawn.order:
        audit, style = audits[i], drawn.looks[i]
        steps = looked_at(audit)
        if steps is None:
            continue
        at = steps["step"].to_numpy(float)
        nats = steps["nats"].to_numpy(float)
        for key, (name, _, _) in SERIES.items():
            bought = steps[f"{key}_held"].to_numpy(float) / nats
            trace = line(style, i, audit, at, bought, f"{name}: " + "%{y:.3g} nats of loss per nat")
            trace["line"] = {"color": f"@{style.colour}", "width": 2, "dash": dashes[key]}
            data.append(behind(trace, style))
        share = steps["nats_held"].to_numpy(float) / nats
        trace = line(style, i, audit, at, share, "held-out share %{y:.3g}")
        data.append(behind(trace, style) | {"yaxis": "y2"})
    if not data:
        return None
    highest = max(float(np.nanmax([y for y in t["y"] if y is not None])) for t in data[3::4])
    return Figure(
        "counterfactual",
        "What steps bought, and what the natural gradient’s would have",
        "Above: fall of the loss on the probe per nat of KL on the step’s own minibatch: own steps "
        "(solid), steps of the natural gradient (dashed) and of K-FAC (dotted) of the same nats "
        "from the same states. Below: KL on the probe over KL on the minibatch; what it lacks of 1 "
        f"is memorised.{drawn.sentence(audits)}",
        "Line charts against the training step, one colour a run.",
        data,
        layout(
            xaxis=axis("training step", anchor="y2"),
            yaxis=axis("loss bought per nat", domain=[0.45, 1], zeroline=True),
            yaxis2=axis("held-out share", domain=[0, 0.35], range=[0, max(1.05, 1.05 * highest)]),
        ),
        520,
    )
