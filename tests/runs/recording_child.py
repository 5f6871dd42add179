"""Records as fast as it can in freshly forked children, each killed at a random moment: `python
recording_child.py FOLDER COUNT SEED`.
"""

import os
import random
import signal
import sys
import time

import torch
from torch import nn

from thermo_opt.runs import Recorder


def record(path: str, steps: float) -> None:
    """Train for ``steps`` (perhaps without end), recording everything at each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.randn(64, 8), torch.randint(0, 4, (64,))
    options = {
        "model": model,
        "optimizer": optimizer,
        "probe": (x, y),
        "params": True,
        "grads": True,
        "moments": True,
    }
    with Recorder(path, **options) as recorder:
        while recorder.steps_done < steps:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss, examples=64)


def main(folder: str, count: int, seed: int) -> None:
    """Fork ``count`` recordings one after the other and kill each; its process has no chance to
    clean up."""
    torch.set_num_threads(1)
    record(
        f"{folder}/warm-up", 3
    )  # what torch imports on first use takes longer than a child lives
    moments = random.Random(seed)
    for number in range(count):
        child = os.fork()
        if child == 0:
            record(f"{folder}/{number}", float("inf"))
        time.sleep(moments.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, f"recording {number} ended by itself"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
