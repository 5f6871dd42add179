"""The small architectures of the recorded runs in ``data/``, for replaying them: ``--model
thermo_opt.demo_models:digits_mlp``.
"""

from __future__ import annotations

from torch import nn


def digits_mlp() -> nn.Module:
    """A 64-16-10 tanh network for scikit-learn's 8x8 digits: inputs (n, 64) in [0, 1], logits (n,
    10), 1,210 parameters.
    """
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
