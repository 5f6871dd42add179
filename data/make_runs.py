"""Make the recorded runs of this folder again: ``python data/make_runs.py --output
some-new-folder``.

Four trainings of one small network on scikit-learn's digits from the same start, recorded at every
step, and one Hugging Face Trainer run of a tiny causal transformer on the text of Python's standard
library. About a minute on one core. The data card is README.md; run on the versions it names, the
snapshots come out bit for bit the same.
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from thermo_opt.demo_models import digits_mlp
from thermo_opt.runs import Recorder
from thermo_opt.runs.format import PROBE_FILE, write_tensors

START_SEED = 0
"""Seed of the weights every digits run starts from, and of the shuffle of the digits."""
BATCH_SEED = 1
"""Seed of the order of minibatches."""
TRAIN, PROBE, STEPS = 1024, 200, 120
"""Training digits; the first of them that are the probe; optimizer steps of each digits run."""

DIGITS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, float], int | None]] = {
    "digits-sgd": (torch.optim.SGD, {"lr": 0.5}, None),
    "digits-sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 64),
    "digits-adam": (torch.optim.Adam, {"lr": 0.01}, None),
    "digits-adam-minibatch": (torch.optim.Adam, {"lr": 0.01}, 64),
}
"""Run → optimizer, its settings, and minibatch size (None: all training digits at once)."""

TEXT_MODULES = (
    "argparse.py",
    "ast.py",
    "dataclasses.py",
    "pathlib.py",
    "statistics.py",
    "subprocess.py",
    "textwrap.py",
)
"""Standard-library files whose text the transformer reads."""
CONTEXT, TEXT_STEPS, SAVE_EVERY, TEXT_BATCH, TEXT_PROBE = 64, 200, 20, 16, 32


def digits() -> tuple[Tensor, Tensor]:
    """The training digits, (1024, 64) in [0, 1], and their labels, in the shuffled order; the probe
    is the first 200.
    """
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(START_SEED).permutation(len(pixels))[:TRAIN]
    return torch.tensor(pixels[order] / 16, dtype=torch.float32), torch.tensor(labels[order])


def batches(size: int | None) -> Iterator[Tensor]:
    """Indices of the minibatches: shuffled passes over the training digits, without end."""
    generator = torch.Generator().manual_seed(BATCH_SEED)
    while True:
        order = torch.randperm(TRAIN, generator=generator) if size else torch.arange(TRAIN)
        yield from order.split(size or TRAIN)


def record_digits(path: Path, name: str, steps: int = STEPS) -> None:
    """Train and record one of the digits runs."""
    optimizer_class, settings, batch_size = DIGITS[name]
    pixels, labels = digits()
    torch.manual_seed(START_SEED)
    model = digits_mlp()
    optimizer = optimizer_class(model.parameters(), **settings)
    recorder = Recorder(
        path,
        model=model,
        optimizer=optimizer,
        probe=(pixels[:PROBE], labels[:PROBE]),
        params=True,
        moments=optimizer_class is torch.optim.Adam,
        batch_size=batch_size or TRAIN,
        factory="thermo_opt.demo_models:digits_mlp",
        name=name,
        notes={
            "dataset": "scikit-learn digits",
            "start_seed": START_SEED,
            "batch_seed": BATCH_SEED,
        },
    )
    with recorder:
        for _, batch in zip(range(steps), batches(batch_size), strict=False):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(pixels[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss, examples=len(batch))


def standard_library_text() -> Tensor:
    """Bytes of `TEXT_MODULES` one after the other, as whole numbers below 128, other characters
    left out."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join((folder / name).read_text(encoding="utf-8") for name in TEXT_MODULES)
    return torch.tensor([ord(character) for character in text if ord(character) < 128])


def train_text(path: Path) -> None:
    """Train a tiny GPT-2 with the Hugging Face Trainer, keep what an audit can use, and lay a probe
    beside the checkpoints.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    text = standard_library_text()
    sequences = text[: len(text) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    set_seed(START_SEED)
    config = GPT2Config(
        vocab_size=128,
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            max_steps=TEXT_STEPS,
            save_steps=SAVE_EVERY,
            logging_steps=1,
            learning_rate=3e-3,
            per_device_train_batch_size=TEXT_BATCH,
            include_num_input_tokens_seen=True,
            seed=START_SEED,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in sequences]
        Trainer(GPT2LMHeadModel(config), arguments, train_dataset=rows).train()
        for folder in sorted(Path(scratch).glob("checkpoint-*")):
            kept = path / folder.name
            kept.mkdir(parents=True)
            for name in ("config.json", "model.safetensors", "optimizer.pt", "trainer_state.json"):
                (kept / name).write_bytes((folder / name).read_bytes())
    probe = sequences[:TEXT_PROBE]
    targets = torch.cat([probe[:, 1:], torch.full((TEXT_PROBE, 1), -100)], dim=1)
    write_tensors(path / PROBE_FILE, {"inputs/input_ids": probe.contiguous(), "targets": targets})


def write_hashes(folder: Path) -> None:
    """SHA-256 of every file of the runs, in the form ``sha256sum --check`` reads."""
    files = sorted(
        file
        for run in folder.iterdir()
        if run.is_dir()
        for file in run.rglob("*")
        if file.is_file()
    )
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder).as_posix()}\n"
        for file in files
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def main() -> None:
    """Make all runs in a new or empty folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make the runs in")
    output: Path = parser.parse_args().output
    torch.set_num_threads(1)
    for name in DIGITS:
        record_digits(output / name, name)
    train_text(output / "text-gpt2-trainer")
    write_hashes(output)


if __name__ == "__main__":
    main()
