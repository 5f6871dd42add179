"""The Fisher metric beside curvlinops and beside a forward pass: `python -m analysis bench fisher
[--quick]`.

Five questions, one small function each: what a product with F costs over curvlinops' on the same
model and batch; what a quadratic form costs over a forward pass; whether memory grows with the
batch at a fixed microbatch; how many products' time the certified bracket of Δ_λ takes at λ = 10⁻³
of the mean eigenvalue, before and during training; what K-FAC's and EKFAC's factors cost over
curvlinops', both from a model and a batch to every layer's factors. Random data and seed 0 for the
timings; scikit-learn's digits and CIFAR-10 for the brackets. Two threads, medians of interleaved
rounds. ``--quick``: fewer rounds, no CIFAR-10, no Kronecker factors.

Factors: the CNN and the MLP have only layers that both packages know; of the GPT both take the
linear layers, the only ones that curvlinops knows, and another row has ours on all.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from curvlinops import EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis import tasks
from analysis.networks import CharGPT, ConvNet
from analysis.timing import interleaved, ratio, report
from thermo_opt.fisher import gradient, make
from thermo_opt.sweep import Task


def cases() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Model, inputs, targets."""
    torch.manual_seed(0)
    mlp = nn.Sequential(
        nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)
    )
    tokens = torch.randint(0, 65, (32, 64))
    return {
        "MLP": (mlp, torch.randn(256, 64), torch.randint(0, 10, (256,))),
        "CNN": (ConvNet(), torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))),
        "GPT": (CharGPT(65), tokens, tokens.roll(-1, 1)),
    }


class Flat(nn.Module):
    """A sequence model with one row a token, as curvlinops' cross-entropy wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(0, -2)


def products(repeats: int) -> list[dict[str, Any]]:
    """F v over curvlinops' GGN (equal to F here): kept linearisation, and nothing kept from product
    to product."""
    found = []
    for name, (model, x, y) in cases().items():
        flat = Flat(model)
        judge = GGNLinearOperator(
            flat,
            nn.CrossEntropyLoss(),
            list(flat.parameters()),
            [(x, y.flatten())],
            check_deterministic=False,
            num_data=len(x),
        )
        kept, fresh = make("exact", model, (x, y)), make("exact", model, (x, y), cache=False)
        v = [torch.randn(shape) for shape in kept.shapes]

        def theirs(judge: Any = judge, v: list[Tensor] = v) -> None:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no forward-mode derivative
                judge @ v

        for _ in range(3):
            kept.matvec(v)
        seconds = interleaved(
            {
                "kept": lambda m=kept, v=v: m.matvec(v),
                "fresh": lambda m=fresh, v=v: m.matvec(v),
                "curvlinops": theirs,
            },
            repeats,
        )
        for way in ("kept", "fresh"):
            value = ratio(seconds, way, "curvlinops")
            found.append(
                {
                    "benchmark": f"matvec over curvlinops' GGN, {name}, {way}",
                    "value": value,
                    "target": "≤ 1",
                }
            )
    return found


def quadratics(repeats: int) -> list[dict[str, Any]]:
    """vᵀFv over a forward pass without gradients: the first (forward mode) and the later ones
    (linearised)."""
    found = []
    for name, (model, x, y) in cases().items():
        kept, fresh = make("exact", model, (x, y)), make("exact", model, (x, y), cache=False)
        v = [torch.randn(shape) for shape in kept.shapes]

        def forward(model: nn.Module = model, x: Tensor = x) -> None:
            with torch.no_grad():
                model(x)

        for _ in range(3):
            kept.quadratic(v)
        seconds = interleaved(
            {
                "repeated": lambda m=kept, v=v: m.quadratic(v),
                "single": lambda m=fresh, v=v: m.quadratic(v),
                "forward": forward,
            },
            repeats,
        )
        target = "≤ 3.5" if name == "MLP" else "≤ 2.5"
        for way in ("repeated", "single"):
            value = ratio(seconds, way, "forward")
            found.append(
                {
                    "benchmark": f"quadratic over a forward pass, {name}, {way}",
                    "value": value,
                    "target": target,
                }
            )
    return found


def _high_water() -> float:
    """This process's largest resident size so far, MiB (Linux; getrusage's figure would include the
    parent's)."""
    line = next(
        t for t in Path("/proc/self/status").read_text().splitlines() if t.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def _peak(n: int) -> float:
    """MiB that matvecs on n images add to a new process's peak, at 64 images a microbatch, beyond
    the images themselves."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x, y = ConvNet(), torch.randn(n, 3, 32, 32), torch.randint(0, 10, (n,))
    before = _high_water()
    metric = make("exact", model, (x, y), microbatch=64)
    v = [torch.ones(shape) for shape in metric.shapes]
    for _ in range(2):
        metric.matvec(v)
    return _high_water() - before


def memory() -> list[dict[str, Any]]:
    """Peak memory of the exact matvec on 1024 images over that on 128, 64 a microbatch.

    The C library keeps freed blocks below a threshold that it raises as it goes, so that the peak
    would grow with the number of allocations; here blocks of a megabyte go back to the system at
    once and the peak is what is in use.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # read by the new processes when they start
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        small, large = pool.map(_peak, [128, 1024], chunksize=1)
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return [
        {
            "benchmark": "matvec peak memory, 1024 over 128 images, microbatch 64",
            "value": large / small,
            "target": "≈ 1",
        },
        {"benchmark": "matvec peak memory, 1024 images (MiB)", "value": large, "target": ""},
    ]


def trained(task: Task, steps: int) -> nn.Module:
    """The task's model after Adam steps at 10⁻³, seed 0."""
    optimizer = torch.optim.Adam(task.model.parameters(), 1e-3)
    data = task.train(128, torch.Generator().manual_seed(0))
    for _, (x, y) in zip(range(steps), data, strict=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(task.model(x), y).backward()
        optimizer.step()
    return task.model


def certificates(quick: bool, repeats: int) -> list[dict[str, Any]]:
    """Time of the bracket of Δ_λ by `dual_norm`, to 10 % or better, over that of a product, in
    float64."""
    found = []
    stages = [("digits", step) for step in (0, 20, 100, 500)]
    stages += [] if quick else [("cifar10", step) for step in (0, 100, 300)]
    for name, steps in stages:
        torch.manual_seed(0)
        task = tasks.digits(0) if name == "digits" else tasks.cifar10(0, limit=10_000)
        model = trained(task, steps).double()
        x, y = next(task.train(128, torch.Generator().manual_seed(1)))
        batch = x.double(), y
        size = sum(p.numel() for p in model.parameters())
        trace = make("low-rank", model, batch).diagnostics()["trace"]
        metric = make("exact", model, batch, damping=1e-3 * trace / size)
        g = gradient(model, batch)
        bracket = metric.dual_norm(g)
        seconds = interleaved(
            {
                "bracket": functools.partial(metric.dual_norm, g),
                "product": functools.partial(metric.matvec, g),
            },
            repeats,
        )
        found.append(
            {
                "benchmark": f"products' time of a bracket, {name}, step {steps} "
                f"(width {bracket.relative_width:.1%})",
                "value": ratio(seconds, "bracket", "product"),
                "target": "≤ 30",
            }
        )
    return found


FAST = 40
"""Rounds for the perceptron, whose factors take two milliseconds."""


class ClassesFirst(nn.Module):
    """A sequence model with its logits as (n, classes, t), the layout curvlinops reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).mT


def factor_cases() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
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
    kind: str, model: nn.Module, x: Tensor, y: Tensor, fisher_type: str, kfac_approx: str
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
            fisher_type=fisher_type,
            kfac_approx=kfac_approx,
            separate_weight_and_bias=False,
            check_deterministic=False,
            num_data=len(x),
            num_per_example_loss_terms=y[0].numel(),
        )
        built.compute_kronecker_factors()
        if kind == "ekfac":
            built.compute_eigenvalue_correction()

    return {
        "ours": lambda: make(kind, model, (x, y), fisher_type=fisher_type, kfac_approx=kfac_approx),
        "curvlinops": judge,
    }


def factors(repeats: int = 3) -> list[dict[str, Any]]:
    """Factors' time over curvlinops', one row per model, kind and setting."""
    found = []
    for name, (model, x, y) in factor_cases().items():
        plans = [("kfac", "type-2", "expand"), ("kfac", "empirical", "expand")]
        if y.dim() == 1:
            plans += [("kfac", "type-2", "reduce"), ("ekfac", "type-2", "expand")]
        for kind, fisher, approx in plans:
            rounds = repeats if x.dim() > 2 or y.dim() > 1 else FAST
            seconds = interleaved(contenders(kind, model, x, y, fisher, approx), rounds)
            found.append(
                {
                    "benchmark": f"{kind} factors over curvlinops', {name}, {fisher}, {approx}",
                    "value": ratio(seconds, "ours", "curvlinops"),
                    "target": "" if "all layers" in name else "≤ 1",
                }
            )
    return found


def main(arguments: list[str]) -> None:
    """Print the table and write the CSV."""
    parser = argparse.ArgumentParser(
        prog="analysis bench fisher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds; no CIFAR-10, no factors"
    )
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(2)
    repeats = 5 if quick else 15
    rows = products(repeats) + quadratics(repeats) + memory() + certificates(quick, repeats)
    if not quick:
        rows += factors()
    print(report("Fisher metric", rows, "bench_fisher_quick" if quick else "bench_fisher"))
