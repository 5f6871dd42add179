"""Sweeps: one model trained by several optimizers over settings and seeds, recorded, and drawn as a
speed-cost front."""

from thermo_opt.sweep.config import Method, Sweep, Training, Trial, read_config
from thermo_opt.sweep.records import add_to_result, finished, read_result
from thermo_opt.sweep.sweep import read_table, run_sweep
from thermo_opt.sweep.tasks import Task, build_task, minibatches
from thermo_opt.sweep.training import Step, Trainer, build_optimizer, train

__all__ = [
    "Method",
    "Step",
    "Sweep",
    "Task",
    "Trainer",
    "Training",
    "Trial",
    "add_to_result",
    "build_optimizer",
    "build_task",
    "finished",
    "minibatches",
    "read_config",
    "read_result",
    "read_table",
    "run_sweep",
    "train",
]
