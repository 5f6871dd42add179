"""Sweeps: one model trained by several optimizers over settings and seeds, recorded, and drawn as a
speed-cost front."""

from thermo_opt.sweep.config import Method, Sweep, Trial, read_config
from thermo_opt.sweep.sweep import run_sweep

__all__ = ["Method", "Sweep", "Trial", "read_config", "run_sweep"]
