"""What a run's steps bought beside the natural gradient's, in words (§3, §7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thermo_opt.describe.quantities import Quantity, number, percent

COUNTERFACTUAL = (
    Quantity("steps", "", "Steps looked at", "", "Steps recorded with their minibatch."),
    Quantity("nats", "", "KL on the minibatch", "nats", "Realised KL of these steps, summed."),
    Quantity("nats_held", "", "KL held out", "nats", "The same on the probe."),
    Quantity(
        "held_share",
        "",
        "Held-out share",
        "ratio",
        "KL on fresh examples over KL on the step’s own minibatch; what it lacks of 1 is memory.",
    ),
    Quantity("decrease", "", "Loss bought, minibatch", "nats", "Fall of the loss, summed."),
    Quantity("decrease_held", "", "Loss bought, held out", "nats", "The same on the probe."),
    Quantity(
        "natural_decrease",
        "",
        "By the natural gradient",
        "nats",
        "What steps of the natural gradient buy on the minibatch for the same KL on it.",
    ),
    Quantity(
        "natural_decrease_held", "", "By it, held out", "nats", "What the same steps buy held out."
    ),
    Quantity("kfac_decrease", "", "By K-FAC", "nats", "The same with K-FAC’s metric."),
    Quantity("kfac_decrease_held", "", "By K-FAC, held out", "nats", "The same held out."),
    Quantity(
        "natural_share",
        "",
        "Own over natural",
        "ratio",
        "What the run’s own steps bought over what the natural gradient’s buy, on the minibatch.",
    ),
    Quantity("natural_share_held", "", "Own over natural, held out", "ratio", "Held out."),
)
"""Quantities of ``summary["counterfactual"]``."""


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """What the steps bought, and what natural-gradient steps would have, in two sentences."""
    found = summary["counterfactual"]
    if found is None:
        return []
    said = [
        f"In {found['steps']} steps looked at, the run moved its predictions by "
        f"{number(found['nats'])} nats on its own minibatches and {number(found['nats_held'])} on "
        f"the probe; the loss fell by {number(found['decrease'])} on the minibatches and by "
        f"{number(found['decrease_held'])} on the probe."
    ]
    if found["natural_decrease"] is not None:
        share, held = found["natural_share"], found["natural_share_held"]
        own = "" if share is None else f": the run’s own steps bought {percent(share)} of that"
        own += "" if held is None or share is None else f", {percent(held)} on the probe"
        said.append(
            "For the same nats from the same states, steps of the minibatch’s natural gradient buy "
            f"{number(found['natural_decrease'])} on the minibatches and "
            f"{number(found['natural_decrease_held'])} on the probe{own}."
        )
    return said
