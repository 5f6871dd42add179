"""K-FAC factors beside curvlinops' on the same models and batches: `python -m
analysis.bench_kronecker`.

Both start from a model and a batch and end with every layer's A and G: a new operator each time.
The CNN and the MLP have only layers that both packages know; of the GPT both take the linear
layers, the only ones that curvlinops knows, and another row has ours on all. Seed 0, random data
(factors cost the same whatever the data), two threads, medians of interleaved rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from torch import Tensor, nn

from analysis.tasks import CharGPT, ConvNet
from analysis.timing import interleaved, ratio, report
from thermo_opt.fisher import make

FAST = 40
"""Rounds for the perceptron, whose factors take two milliseconds."""

FISHER_TYPES = {"exact": "type-2", "empirical": "empirical"}


class ClassesFirst(nn.Module):
    """A sequence model with its logits as (n, classes, t), the layout curvlinops reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).mT


def cases() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Model, inputs, targets."""
    torch.manual_seed(0)
    mlp = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)
    )
    gpt, linear = CharGPT(65, layers=2), CharGPT(65, layers=2)
    for module in linear.modules():
        for p in module.parameters(recurse=False):
            p.requires_grad_(isinstance(module, nn.Linear))
    tokens = torch.randint(0, 65, (4, 64))
    return {
        "digits MLP": (mlp, torch.randn(128, 64), torch.randint(0, 10, (128,))),
        "CNN": (ConvNet(), torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))),
        "char GPT": (linear, tokens, tokens.roll(-1, 1)),
        "char GPT, ours on all layers": (gpt, tokens, tokens.roll(-1, 1)),
    }


def contenders(
    kind: str, model: nn.Module, x: Tensor, y: Tensor, targets: str, setting: str
) -> dict[str, Callable[[], object]]:
    """One call each that computes the factors from scratch."""
    linear = [
        p for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) for p in m.parameters()
    ]
    theirs = ClassesFirst(model) if y.dim() > 1 else model
    operator: Any = KFACLinearOperator if kind == "kfac" else EKFACLinearOperator

    def judge() -> None:
        built = operator(
            theirs,
            nn.CrossEntropyLoss(),
            linear,
            [(x, y)],
            fisher_type=FISHER_TYPES[targets],
            kfac_approx=setting,
            separate_weight_and_bias=False,
            check_deterministic=False,
            num_data=len(x),
            num_per_example_loss_terms=y[0].numel(),
        )
        built.compute_kronecker_factors()
        if kind == "ekfac":
            built.compute_eigenvalue_correction()

    return {
        "ours": lambda: make(kind, model, (x, y), targets=targets, setting=setting),
        "curvlinops": judge,
    }


def rows(repeats: int = 3) -> list[dict[str, Any]]:
    """Ratios of our time to curvlinops', one row a model, kind and setting. Wanted: at most 1."""
    found = []
    for name, (model, x, y) in cases().items():
        plans = [("kfac", "exact", "expand"), ("kfac", "empirical", "expand")]
        if y.dim() == 1:
            plans += [("kfac", "exact", "reduce"), ("ekfac", "exact", "expand")]
        for kind, targets, setting in plans:
            rounds = repeats if x.dim() > 2 or y.dim() > 1 else FAST
            seconds = interleaved(contenders(kind, model, x, y, targets, setting), rounds)
            found.append(
                {
                    "benchmark": f"{kind} factors over curvlinops', {name}, {targets}, {setting}",
                    "ratio": ratio(seconds, "ours", "curvlinops"),
                    "ours (s)": min(seconds["ours"]),
                    "curvlinops (s)": min(seconds["curvlinops"]),
                    "target": "" if "all layers" in name else "≤ 1",
                }
            )
    return found


def main() -> Path:
    """Print the table and write the CSV."""
    torch.set_num_threads(2)
    return report("Kronecker factors", rows(), "bench_kronecker")


if __name__ == "__main__":
    print(main())
