"""Small runs recorded at every step, as people's tools record them, and copies with fewer
snapshots."""

import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import thermo_opt as to
from tests.integrations.small_worlds import TOKENS, Module, gpt2, lightning_trainer, loader, trainer

STEPS = 100
DATA = Path(__file__).parents[2] / "data"


@dataclass(eq=False)
class Recorded:
    """A run's folder, and what an audit of it needs beside."""

    path: Path
    options: dict = field(default_factory=dict)
    parameters_from: int = 10**9  # the stride from which the parameter lens looks at it, too

    @cached_property
    def run(self) -> to.Run:
        """The run, read once."""
        return to.load_run(self.path)


def thinned(run: Recorded, target: Path, stride: int) -> Path | None:
    """A copy of the run with every ``stride``-th snapshot, the last among them; None where these
    are no path."""
    snapshots = run.run.snapshots
    kept = {snapshot.path for snapshot in snapshots[::-1][::stride]}
    if len(kept) < 2:
        return None
    shutil.copytree(run.path, target, copy_function=os.link)
    for snapshot in snapshots:
        if snapshot.path not in kept:
            gone = target / snapshot.path.relative_to(run.path)
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    return target


def huggingface(folder: Path) -> Recorded:
    """The real Trainer, a checkpoint every step."""
    trainer(folder / "run", gpt2(), STEPS, save_strategy="steps", save_steps=1).train()
    np.savez(folder / "probe.npz", input_ids=TOKENS[:6].numpy(), labels=TOKENS[:6].numpy())
    return Recorded(folder / "run", {"probe": folder / "probe.npz", "batch_size": 32})


def lightning_epochs(folder: Path) -> Recorded:
    """The real Lightning Trainer, five steps an epoch, a checkpoint every step: every fifth is the
    end of an epoch."""
    saves = ModelCheckpoint(folder / "run", every_n_train_steps=1, save_top_k=-1)
    training = lightning_trainer(folder, [saves], max_steps=STEPS, enable_checkpointing=True)
    training.fit(Module(), loader(40))
    x, y = next(iter(loader(24, 24, shuffle=False)))
    np.savez(folder / "probe.npz", inputs=x.numpy(), targets=y.numpy())
    architecture = "tests.integrations.small_worlds:Module"
    return Recorded(
        folder / "run", {"probe": folder / "probe.npz", "model": architecture}, parameters_from=10
    )


def two_layers(outputs: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))


def in_bfloat16() -> nn.Module:
    return two_layers().to(torch.bfloat16)


def bfloat16(folder: Path) -> Recorded:
    """A loop of one's own in bfloat16 that saves state dicts."""
    x, y = next(iter(loader(40, 40)))
    model = in_bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.8)
    (folder / "run").mkdir()
    for step in range(STEPS + 1):
        torch.save(model.state_dict(), folder / "run" / f"step_{step}.pt")
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.bfloat16()).float(), y).backward()
        optimizer.step()
    np.savez(folder / "probe.npz", inputs=x[:24].numpy(), targets=y[:24].numpy())
    architecture = "tests.audits.recorded_every_step:in_bfloat16"
    return Recorded(folder / "run", {"probe": folder / "probe.npz", "model": architecture})


def _recorded(folder: Path, likelihood: str, targets: torch.Tensor, loss) -> Recorded:
    x, _ = next(iter(loader(40, 40)))
    model = two_layers(targets.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    probe = (x[:20], targets[:20])
    options = {"model": model, "optimizer": optimizer, "probe": probe, "likelihood": likelihood}
    with to.Recorder(folder / "run", every=1, **options) as recorder:
        for _ in range(STEPS):
            pick = torch.randint(0, 40, (10,))
            optimizer.zero_grad()
            value = loss(model(x[pick]), targets[pick])
            value.backward()
            optimizer.step()
            recorder.step(loss=value)
    return Recorded(folder / "run")


def squared_errors(folder: Path) -> Recorded:
    """Regression by mean squared errors; the variance is said by nobody."""
    torch.manual_seed(2)
    return _recorded(folder, "gaussian", torch.randn(40, 2), nn.functional.mse_loss)


def multi_label(folder: Path) -> Recorded:
    """Several independent labels per example."""
    torch.manual_seed(3)
    labels = (torch.randn(40, 4) > 0).float()
    return _recorded(folder, "bernoulli", labels, nn.functional.binary_cross_entropy_with_logits)


def digits(name: str):
    return lambda folder: Recorded(DATA / name)


def text(folder: Path) -> Recorded:
    path = DATA / "text-gpt2-trainer"
    return Recorded(path, {"probe": path / "probe.safetensors"})


RUNS = {
    "huggingface": huggingface,
    "lightning": lightning_epochs,
    "bfloat16": bfloat16,
    "squared errors": squared_errors,
    "multi-label": multi_label,
    "digits-sgd": digits("digits-sgd"),
    "digits-sgd-momentum": digits("digits-sgd-momentum"),
    "digits-adam": digits("digits-adam"),
    "digits-adam-minibatch": digits("digits-adam-minibatch"),
    "text-gpt2-trainer": text,
}
"""The five kinds of runs that people have, and every run of ``data/``."""
