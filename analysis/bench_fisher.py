"""The exact Fisher beside curvlinops and beside a forward pass: `python -m analysis.bench_fisher
[--quick]`.

Four questions, one small function each: what a product with F costs over curvlinops' on the same
model and batch; what a quadratic form costs over a forward pass; whether memory grows with the
batch at a fixed microbatch; how many products the certified bracket of Δ_λ takes to 10 % width at λ
= 10⁻³ · tr F / P, before and during training. Then the Kronecker factors
(`analysis.bench_kronecker`). Random data and seed 0 for the timings; scikit-learn's digits and
CIFAR-10 for the brackets, seed 0. Two threads, medians of interleaved rounds. ``--quick``: fewer
rounds, no CIFAR-10, no Kronecker factors.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
from curvlinops import GGNLinearOperator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis import bench_kronecker
from analysis.tasks import CharGPT, ConvNet, Task, cifar10, cross_entropy, digits
from analysis.timing import interleaved, ratio, report
from thermo_opt.fisher import make
from thermo_opt.fisher.certificate import gradient_brackets
from thermo_opt.fisher.exact import JacobianMetric
from thermo_opt.fisher.krylov import brackets
from thermo_opt.fisher.metric import flatten
from thermo_opt.fisher.predictor import Predictor
from thermo_opt.fisher.scores import score_rows

WIDTH = 0.1
"""Relative width at which a bracket counts as found."""


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
    model = task.build(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _, (x, y) in zip(range(steps), task.batches(0), strict=False):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def certificates(quick: bool) -> list[dict[str, Any]]:
    """Products until the bracket of Δ_λ is within 10 %: `gradient_norm` with no rows known or a
    quarter of them, and `dual_norm`.

    `gradient_norm` by default takes the quarter for the convolutions and none for the perceptron,
    whose products are too cheap to be worth saving. Forming the rows of m of n examples with c
    outputs counts as the m·c/2n products whose backward passes it is; their Gram matrix and its use
    are not counted.
    """
    found = []
    plans = [(digits(), (0, 20, 100, 500))]
    if not quick:
        plans.append((cifar10(limit=10_000), (0, 100, 300)))
    for task, stages in plans:
        for steps in stages:
            model = trained(task, steps)
            batch = next(task.batches(1))
            predictor = Predictor(model, batch)
            trace = (
                sum(float(b.double().square().sum()) for b in score_rows(predictor))
                / predictor.count
            )
            metric = JacobianMetric(
                predictor.double(), damping=1e-3 * trace / sum(p.numel() for p in predictor.values)
            )
            loss, g = metric.predictor.loss_and_gradient()
            plain = brackets(metric._flat_product, flatten(g), metric.damping, max_iterations=60)
            quarter = predictor.examples // 4
            forming = 10 * quarter / (2 * predictor.examples)
            ways = {
                "no rows": (gradient_brackets(metric, 60, known=0), 0.0),
                "a quarter's rows": (gradient_brackets(metric, 60, known=quarter), forming),
                "without χ²": (plain, 0.0),
            }
            for way, (sequence, before) in ways.items():
                count = next((k for k, b in enumerate(sequence) if b.relative_width <= WIDTH), None)
                found.append(
                    {
                        "benchmark": (
                            f"products to a 10 % bracket, {task.name}, step {steps} "
                            f"(loss {loss:.2f}), {way}"
                        ),
                        "value": float("inf") if count is None else count + before,
                        "target": "≤ 30" if way == "a quarter's rows" else "",
                    }
                )
    return found


def main() -> Path:
    """Print the table and write the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds; no CIFAR-10, no Kronecker factors"
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(2)
    repeats = 5 if quick else 15
    rows = products(repeats) + quadratics(repeats) + memory() + certificates(quick)
    if not quick:
        rows += [
            {"benchmark": r["benchmark"], "value": r["ratio"], "target": r["target"]}
            for r in bench_kronecker.rows()
        ]
    return report("Exact Fisher", rows, "bench_fisher_quick" if quick else "bench_fisher")


if __name__ == "__main__":
    print(main())
