"""The four studies: what is trained at which scale.

"small" takes minutes on two cores; "full" wants a GPU; "tiny" takes seconds, for
tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STRIDE = 10
"""Steps between recorded predictions."""


@dataclass(frozen=True)
class Scale:
    """How large a study is.

    Attributes:
        variants: options of the task for each variant; ``batch_size`` (default 128) goes to the
            training.
        length: optimizer steps.
        every: steps between recorded predictions.
        aligned: examples of a minibatch for the parameter lens; 0: no alignment.
        decay: whether the methods' weight decay is on.
        tuned: seeds of a tuning trial.
    """

    variants: Mapping[str, Mapping[str, Any]]
    length: int
    every: int = STRIDE
    aligned: int = 0
    decay: bool = False
    tuned: int = 1


@dataclass(frozen=True)
class Study:
    """A task of `analysis.tasks`, or of another module (``task``), at its scales."""

    name: str
    scales: Mapping[str, Scale]
    task: str = ""


_DIGITS = {"minibatch": {"batch_size": 128}, "full batch": {"batch_size": 0}}
_CIFAR10_FULL = {
    **{"network": "resnet18", "batch_size": 512, "augment": True},
    **{"validation": 5000, "whole_test": True},
}
_CIFAR10_TINY = {"batch_size": 16, "width": 4, "limit": 64, "probe": 32, "validation": 16}
_IMAGENET = {
    **{"batch_size": 32, "width": 8, "stem": "imagenet", "classes": 10},
    **{"probe": 250, "validation": 250},
}
_IMAGENET_TINY = {**_IMAGENET, "batch_size": 8, "width": 4, "size": 32, "probe": 8, "validation": 8}
_TRANSFORMER_FULL = {
    **{"layers": 6, "width": 384, "heads": 6, "context": 256, "dropout": 0.2},
    **{"batch_size": 64, "probe": 128, "text": "shakespeare"},
}
_TRANSFORMER_TINY = {"layers": 1, "width": 16, "context": 16, "batch_size": 8, "probe": 4}

STUDIES = {
    study.name: study
    for study in (
        Study(
            "digits",
            {
                "small": Scale(_DIGITS, 200, every=2, aligned=100, tuned=3),
                "full": Scale(_DIGITS, 400, every=2, aligned=100, tuned=3),
                "tiny": Scale(_DIGITS, 20, every=5, aligned=8),
            },
        ),
        Study(
            "cifar10",
            {
                "small": Scale({"": {"limit": 20_000}}, 250, aligned=16),
                "full": Scale({"": _CIFAR10_FULL}, 30 * 45_000 // 512, every=100, decay=True),
                "tiny": Scale({"": _CIFAR10_TINY}, 10, every=2, aligned=8),
            },
        ),
        Study(
            "imagenet",
            {
                "small": Scale({"": _IMAGENET}, 150, aligned=16),
                "full": Scale(
                    {"": {"batch_size": 256, "validation": 2500}}, 6000, every=100, decay=True
                ),
                "tiny": Scale({"": _IMAGENET_TINY}, 6, every=2, aligned=4),
            },
        ),
        Study(
            "transformer",
            {
                "small": Scale(
                    {"": {"layers": 3, "width": 64, "batch_size": 16, "probe": 32}}, 600, aligned=16
                ),
                "full": Scale({"": _TRANSFORMER_FULL}, 5000, every=100, decay=True),
                "tiny": Scale({"": _TRANSFORMER_TINY}, 20, every=5, aligned=4),
            },
        ),
    )
}

APART = {
    study.name: study
    for study in (
        Study(
            name,
            {
                "small": Scale({"": {"network": network, "batch_size": size}}, 240),
                "tiny": Scale({"": {"network": network, "batch_size": size}}, 6),
            },
            "analysis.more_tasks:untouched",
        )
        for name, network, size in (
            ("clouds", "deep set, point clouds", 32),
            ("sources", "gated transformer, source text", 16),
            ("spirals", "deep tanh net, spirals", 64),
            ("mixer", "mixer, digits", 48),
            ("brackets", "two-way LSTM, brackets", 24),
        )
    )
}
"""Tasks on which no rule or default of NGD-T was chosen; `analysis.evidence` alone knows them."""
