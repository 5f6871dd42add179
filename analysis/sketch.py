"""A language model of a large vocabulary, recorded as sketches and whole: what the sketches cost,
and how far off they are (theory §13).

    python -m analysis sketch [--vocabulary 50257] [--tokens 2048] [--snapshots 20] [--width 16]

A small GPT-2 (two layers, width 64, of `transformers`) learns to predict the words of Python's own
standard library, and is recorded twice from one seed, each time in a process of its own: its
logits whole, and as ``--width`` random sums. Both runs are audited in processes of their own. Then
every number of the two summaries is set beside the other:

- losses and D*, which need log p(y) alone, must agree to 1e-6;
- estimates are held against the error that the audit states. It states two: one where predictions
  move in ways of their own, one where all move alike. The latter bounds both, and three of it are
  allowed; of a length half of it, of a ratio of two squared lengths that of both.

Memory is the most that a process held at once, libraries and mapped files included (``VmHWM``).
Prints two tables; exit status 1 where a number is farther off than its error allows, a sketched
process took more than a GiB, or the sketches take more than a 200th of the logits' bytes. Writes
sketch.csv and sketch_values.csv. Needs `transformers`; Linux.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import thermo_opt as to
from analysis.timing import report
from thermo_opt.manifold.sketch import relative_error

GIB = 2**30
CONTEXT, BATCH, EVERY = 64, 4, 5
SIDES = ("sketched", "whole")
EXACT = ("loss_start", "loss_end", "least_distance")
COUNTS = ("stride", "steps", "duration", "first_step", "last_step")
ROOTS = ("length", "distance")
RATIOS = ("straightness", "steadiness", "efficiency")
SQUARES = ("dissipation", "irreducible")
DIFFERENCES = ("detour", "pacing")
LEAST, ALLOWED = 200, 3.0


def words(vocabulary: int, least: int) -> torch.Tensor:
    """At least ``least`` tokens of the standard library's source: each word its rank by frequency,
    rare ones the last."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = (re.findall(r"\w+|[^\w\s]", file.read_text(errors="ignore")) for file in files)
    found = list(islice(chain.from_iterable(text), max(least, 400_000)))
    ranks = {w: i for i, (w, _) in enumerate(Counter(found).most_common(vocabulary - 1))}
    return torch.tensor([ranks.get(word, vocabulary - 1) for word in found])


def record(side: str, path: Path, vocabulary: int, tokens: int, snapshots: int, width: int) -> None:
    """Train, and record every fifth step."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    ids = words(vocabulary, tokens + 50_000)
    held, learnt = ids[: tokens + tokens // CONTEXT], ids[tokens + tokens // CONTEXT :]
    rows = held.reshape(-1, CONTEXT + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"sketch": width} if side == "sketched" else {}
    with to.Recorder(
        path, model=model, optimizer=optimizer, probe=(rows[:, :-1], rows[:, 1:]),
        every=EVERY, probe_batch_size=2, likelihood="categorical", **options,
    ) as recorder:  # fmt: skip
        for _ in range(EVERY * (snapshots - 1)):
            starts = torch.randint(len(learnt) - CONTEXT - 1, (BATCH, 1))
            batch = learnt[starts + torch.arange(CONTEXT + 1)]
            logits = model(batch[:, :-1]).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss.detach())


def peak() -> int:
    """Most bytes that this process held at once."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


def apart(*arguments: object) -> dict[str, Any]:
    """What this module does with these arguments in a process of its own, with its memory and
    seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "analysis.sketch", *map(str, arguments)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return {**json.loads(said), "seconds": time.perf_counter() - start}


def compared(sketched: dict[str, Any], whole: dict[str, Any], error: float) -> list[dict[str, Any]]:
    """Each number of the two summaries, its relative difference, and how many stated errors that
    is."""
    stated = {
        **dict.fromkeys(EXACT, 0.0),
        **dict.fromkeys(ROOTS, error / 2),
        **dict.fromkeys(SQUARES, error),
        **dict.fromkeys(RATIOS, error * 2**0.5),
    }
    rows = []
    for key, value in whole.items():
        if isinstance(value, bool) or not isinstance(value, float | int) or key in COUNTS:
            continue
        found = sketched[key]
        scale = abs(value)
        if key in DIFFERENCES:  # of squared lengths, whose errors they have
            scale = whole["dissipation"]
        allowed = stated.get(key, error)
        off = abs(found - value) / scale if scale else abs(found - value)
        rows.append(
            {
                "value": key,
                "whole": value,
                "sketched": found,
                "relative difference": off,
                "stated error": allowed,
                "within": off <= max(ALLOWED * allowed, 1e-6),
            }
        )
    return rows


def main(arguments: list[str]) -> int:
    """Record, audit, compare, report."""
    parser = argparse.ArgumentParser(
        prog="analysis sketch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--tokens", type=int, default=2_048, help=f"a multiple of {CONTEXT}")
    parser.add_argument("--snapshots", type=int, default=20)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args(arguments)
    if options.tokens % CONTEXT or options.snapshots < 2:
        raise to.InputError(f"--tokens must be a multiple of {CONTEXT}, --snapshots 2 or more")
    size = 4 * options.vocabulary * options.tokens
    rows: list[dict[str, Any]] = []
    summaries: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for side in SIDES:
            path = Path(name) / side
            recorded = apart(
                "--record", side, path, options.vocabulary, options.tokens, options.snapshots,
                options.width,
            )  # fmt: skip
            audited = apart("--audit", path)
            summaries[side] = audited["summary"]
            files = sorted((path / "snapshots").iterdir())
            bytes_each = sum(file.stat().st_size for file in files) / len(files)
            rows.append(
                {
                    "predictions": side,
                    "snapshots": len(files),
                    "bytes a snapshot": round(bytes_each),
                    "logits over them": size / bytes_each,
                    "MiB to record": recorded["peak"] / 2**20,
                    "MiB to audit": audited["peak"] / 2**20,
                    "seconds to record": recorded["seconds"],
                    "seconds to audit": audited["seconds"],
                }
            )
    values = compared(*(summaries[side] for side in SIDES), relative_error(options.width, 1))
    report(
        f"A vocabulary of {options.vocabulary:,}, {options.tokens:,} tokens, {options.width} sums",
        rows,
        "sketch",
    )
    report("Every number of the summaries", values, "sketch_values")
    small = rows[0]
    memory = 2**20 * max(small["MiB to record"], small["MiB to audit"])
    cheap = small["logits over them"] >= LEAST and memory <= GIB
    return 0 if cheap and all(row["within"] for row in values) else 1


def _in_this_process(arguments: list[str]) -> None:
    """One part of a measurement, in a process of its own."""
    match arguments:
        case ["--record", side, path, *numbers]:
            vocabulary, tokens, snapshots, width = map(int, numbers)
            record(side, Path(path), vocabulary, tokens, snapshots, width)
            print(json.dumps({"peak": peak()}))
        case ["--audit", path]:
            summary = to.audit(path, lens="outputs").summary
            print(json.dumps({"summary": dict(summary), "peak": peak()}, default=str))


if __name__ == "__main__":
    _in_this_process(sys.argv[1:])
