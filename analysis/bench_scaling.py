"""How NGD-T's step and memory grow with a network, over torch's AdamW in the same run.

    python -m analysis bench scaling [--rows GPT-1M,GPT-11M] [--steps 300] [--threads 2]
    [--device cpu|cuda] [--precision float32|bfloat16]

Transformers on the words of the standard library's source, the commonest of which have a number
each, and ResNets on random images of as many classes as they tell apart (`ROWS`). Both optimizers
train their own copy on the same batches and take turns at every step: mean step time over AdamW's
over the ``first`` 150 steps, over ``all``, and the ratio of medians, in wall seconds and in
processor seconds; and the mean loss of the last tenth of the steps. NGD-T at its defaults, AdamW
at the learning rate of the row. ``state``: the optimizer's own tensors over the parameters.
``peak_gib``: peak memory of three steps from the first, above what the process held before the
model was built, each measured in a process of its own. Writes scaling.csv (scaling_cuda.csv).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import thermo_opt as to
from analysis.networks import CharGPT, resnet18
from analysis.study_memory import ALLOCATOR, release, reset_peak, state_size, status_bytes
from analysis.timing import report
from thermo_opt.models import outputs_of

FIRST = 150
PEAK_STEPS = 3
LETTERS = 12_000_000
"""Of text; they have some 55,000 different words."""
METHODS = ("AdamW", "NGD-T")
HERE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """A network and its minibatch. ``inputs``: "words" (with ``size`` words of context) or "images"
    (of ``size`` × ``size`` pixels); ``outputs``: words or classes."""

    build: Callable[[], nn.Module]
    inputs: str
    size: int
    outputs: int
    batch: int
    lr: float = 1e-3


def gpt(vocabulary: int, layers: int, width: int, batch: int) -> Row:
    """A transformer with 256 words of context."""
    heads = max(1, width // 64)
    build = functools.partial(CharGPT, vocabulary, layers, width, 256, heads)
    return Row(build, "words", 256, vocabulary, batch, 3e-4 if width >= 768 else 1e-3)


def gpt2_small() -> nn.Module:
    """GPT-2 small (Radford et al. 2019): 124 M parameters, tied, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def resnet50() -> nn.Module:
    """ResNet-50 (He et al. 2016): 25.6 M parameters, 1,000 classes."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig()
    config.num_labels = 1000
    return ResNetForImageClassification(config)


ROWS = {
    "GPT-0.3M": gpt(256, 4, 64, 16),
    "GPT-1M": gpt(256, 4, 128, 16),
    "GPT-11M": gpt(256, 6, 384, 8),
    "GPT-55M": gpt(4096, 4, 1024, 4),
    "GPT-2-small": Row(gpt2_small, "words", 256, 50_257, 2, 3e-4),
    "ResNet-18": Row(functools.partial(resnet18, 10), "images", 32, 10, 128),
    "ResNet-50": Row(resnet50, "images", 224, 1000, 16),
}
ON_CPU = tuple(name for name in ROWS if name.startswith("GPT"))


@functools.cache
def words(vocabulary: int) -> Tensor:
    """Numbers of the words of the standard library's source, the commonest first; all rarer ones
    share the last."""
    folder, text = Path(sysconfig.get_paths()["stdlib"]), ""
    for path in (*sorted(folder.glob("*.py")), *sorted(folder.glob("[a-r]*/*.py"))):
        text += path.read_text(errors="ignore")
        if len(text) > LETTERS:
            break
    found = re.findall(r"\w+|[^\w\s]|\s+", text)
    number = {word: i for i, (word, _) in enumerate(Counter(found).most_common(vocabulary - 1))}
    return torch.tensor([number.get(word, vocabulary - 1) for word in found])


def batches(row: Row, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Minibatches without end, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    if row.inputs == "images":
        while True:
            x = torch.randn(row.batch, 3, row.size, row.size, generator=generator)
            y = torch.randint(row.outputs, (row.batch,), generator=generator)
            yield x.to(device), y.to(device)
    ids, window = words(row.outputs), torch.arange(row.size + 1)
    while True:
        starts = torch.randint(len(ids) - row.size - 1, (row.batch, 1), generator=generator)
        part = ids[starts + window].to(device)
        yield part[:, :-1], part[:, 1:]


class Side:
    """One method's copy of a row's network."""

    def __init__(self, row: Row, method: str, device: torch.device, precision: str) -> None:
        torch.manual_seed(0)
        self.model = row.build().to(device).train()
        self.optimizer: torch.optim.Optimizer = (
            to.NGDT(self.model)
            if method == "NGD-T"
            else torch.optim.AdamW(self.model.parameters(), lr=row.lr, betas=(0.9, 0.95))
        )
        self.device, self.mixed = device, precision == "bfloat16"

    def step(self, x: Tensor, y: Tensor) -> float:
        """A whole training step; returns its loss."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.mixed):
            outputs = outputs_of(self.model(x))
            loss = functional.cross_entropy(outputs.flatten(0, -2), y.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def bench(name: str, steps: int, device: torch.device, precision: str) -> list[dict[str, Any]]:
    """A row's lines, one for each method."""
    row = ROWS[name]
    sides = {method: Side(row, method, device, precision) for method in METHODS}
    size = sum(p.nbytes for p in sides["AdamW"].model.parameters())
    seconds: dict[str, dict[str, list[float]]] = {
        clock: {method: [] for method in METHODS} for clock in ("wall", "processor")
    }
    losses: dict[str, list[float]] = {method: [] for method in METHODS}
    data = batches(row, device)
    for _ in range(steps):
        x, y = next(data)
        for method, side in sides.items():
            start, busy = time.perf_counter(), time.process_time()
            losses[method].append(side.step(x, y))  # reading the loss waits for the device
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds["wall"][method].append(time.perf_counter() - start)
            seconds["processor"][method].append(time.process_time() - busy)
    lines = []
    for method, side in sides.items():
        line: dict[str, Any] = {"network": name, "method": method, "parameters": size // 4}
        line |= {"batch": row.batch, "precision": precision, "steps": steps}
        for clock, of in seconds.items():
            mine, base = of[method], of["AdamW"]
            line[f"{clock}_first"] = statistics.mean(mine[:FIRST]) / statistics.mean(base[:FIRST])
            line[f"{clock}_all"] = statistics.mean(mine) / statistics.mean(base)
            line[f"{clock}_median"] = statistics.median(mine) / statistics.median(base)
        line["ms"] = 1e3 * statistics.median(seconds["wall"][method])
        line["loss"] = statistics.mean(losses[method][-max(1, steps // 10) :])
        line["state"] = state_size(side.optimizer) / size
        line["peak_gib"] = peak_of(name, method, device, precision)
        lines.append(line)
    return lines


def peak_of(name: str, method: str, device: torch.device, precision: str) -> float:
    """Peak memory of a method's first steps, in GiB, measured in another process."""
    command = [sys.executable, "-m", "analysis", "bench", "scaling", "--rows", name, "--peak"]
    command += [method, "--device", device.type, "--precision", precision]
    command += ["--threads", str(torch.get_num_threads())]
    surroundings = os.environ | ALLOCATOR
    done = subprocess.run(
        command, cwd=HERE, env=surroundings, capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak(name: str, method: str, device: torch.device, precision: str) -> float:
    """Peak memory of a method's first steps in this process, in GiB."""
    row = ROWS[name]
    data = batches(row, device)
    x, y = next(data)
    release()
    if device.type == "cpu":
        reset_peak()
    held = status_bytes("VmRSS")
    side = Side(row, method, device, precision)
    for _ in range(PEAK_STEPS):
        side.step(x, y)
        x, y = next(data)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return (status_bytes("VmHWM") - held) / 2**30


def main(arguments: list[str]) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        prog="analysis bench scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", default=",".join(ON_CPU), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--peak", choices=METHODS, help="print one method's peak memory alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device, names = torch.device(options.device), options.rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        raise to.InputError(f"{unknown[0]!r} is no row: use some of {', '.join(ROWS)}")
    if options.peak:
        print(json.dumps(peak(names[0], options.peak, device, options.precision)))
        return
    lines = []
    for name in names:
        lines += bench(name, options.steps, device, options.precision)
        report(f"up to {name}", lines, "scaling" if device.type == "cpu" else "scaling_cuda")
