"""What a full training step costs with each optimizer, over torch's AdamW in the same run.

    python -m analysis bench step [--task cifar10|transformer|resnet18|all] [--steps 1000]
    [--others 40] [--threads 2] [--methods SOAP,Shampoo,Muon]

CIFAR-10 CNN (152 k parameters, batch 128) and character GPT (4 layers, width 128, context 64, batch
32); `--task resnet18` on CUDA: ResNet-18, bf16 autocast, batch 512, random images. A step is
forward, zero_grad, backward, optimizer step, refreshes included, default settings. All methods
train their own copy on the same batches and take turns at every step. Ratios are of mean step
times, which count each refresh: over ``all`` steps after three to warm up, over the ``first`` 300
of them (NGD-T refreshes and measures most at the start), and over the ``late`` half. Each is given
in wall seconds and in processor seconds (the latter don't count other work on the machine). The
other methods run ``--others`` steps only, compared with AdamW's on the same steps.
Memory: optimizer state in multiples of the parameters. Writes bench_step.csv.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from analysis import tasks
from analysis.methods import knob
from analysis.networks import resnet18
from analysis.study_memory import state_size
from analysis.timing import report
from analysis.trials import trial_of
from thermo_opt.sweep import Task, build_optimizer

FIRST = 300
BATCH_SIZE = {"cifar10": 128, "transformer": 32}
KNOBS = {"NGD-T": 0.03, "AdamW": 1e-3, "SGD": 0.1, "SOAP": 3e-3, "Muon": 1e-2, "Shampoo": 1e-3}


def bench(
    name: str, build: Callable[[], Task] | None, methods: list[str], steps: int, others: int
) -> list[dict[str, Any]]:
    """One row per method: step-time ratios over AdamW, and memory."""
    device = torch.device("cuda" if build is None else "cpu")
    generator = torch.Generator(device).manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        if build is not None:
            return iter(build().train(BATCH_SIZE[name], generator))
        images = torch.randn(512, 3, 32, 32, generator=generator, device=device)
        labels = torch.randint(10, (512,), generator=generator, device=device)
        return itertools.repeat((images, labels))

    names = ["AdamW", "NGD-T", *methods]
    nets, optimizers = {}, {}
    for m in names:
        torch.manual_seed(0)
        nets[m] = build().model if build is not None else resnet18().to(device)
        trial = trial_of(name, {}, m, {knob(m): KNOBS[m]}, 0, steps)
        optimizers[m] = build_optimizer(trial, nets[m])
    wall: dict[str, list[float]] = {m: [] for m in names}
    busy: dict[str, list[float]] = {m: [] for m in names}
    warm = 3
    for k, (x, y) in enumerate(itertools.islice(batches(), steps + warm)):
        for m in names if k < others + warm else names[:2]:
            net, optimizer = nets[m], optimizers[m]
            if device.type == "cuda":
                torch.cuda.synchronize()
            t, c = time.perf_counter(), time.process_time()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss = functional.cross_entropy(net(x).flatten(0, -2), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if k >= warm:
                wall[m].append(time.perf_counter() - t)
                busy[m].append(time.process_time() - c)
    parameters = sum(p.numel() * p.element_size() for p in nets["AdamW"].parameters())
    rows = []
    for m in names:
        count = len(wall[m])
        row: dict[str, Any] = {
            "task": name,
            "method": m,
            "steps": count,
            "parameters": parameters // 4,
        }
        for kind, times in (("wall", wall), ("processor", busy)):
            for label, part in (
                ("all", slice(0, count)),
                ("first", slice(0, FIRST)),
                ("late", slice(count // 2, count)),
            ):
                row[f"{kind}_{label}"] = statistics.mean(times[m][part]) / statistics.mean(
                    times["AdamW"][part]
                )
            row[f"{kind}_ms"] = 1e3 * statistics.median(times[m])
        row["memory_over_parameters"] = state_size(optimizers[m]) / parameters
        rows.append(row)
    return rows


def main(arguments: list[str]) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        prog="analysis bench step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--task", default="all", choices=["cifar10", "transformer", "resnet18", "all"]
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--others", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", default="SOAP,Shampoo,Muon")
    parser.add_argument("--data")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    builders: dict[str, Callable[[], Task] | None] = {
        "cifar10": lambda: tasks.cifar10(0, options.data, limit=6000, probe=10),
        "transformer": lambda: tasks.transformer(0, probe=4),
        "resnet18": None,
    }
    everything = ["cifar10", "transformer", *(["resnet18"] if torch.cuda.is_available() else [])]
    methods = [m for m in options.methods.split(",") if m]
    rows = [
        row
        for name in (everything if options.task == "all" else [options.task])
        for row in bench(name, builders[name], methods, options.steps, options.others)
    ]
    report("step time over AdamW", rows, "bench_step")
