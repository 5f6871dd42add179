"""Recorded runs: what they are, how they are written while training, and how other tools' are
read."""

from thermo_opt.runs.probe import Probe, as_probe, load_probe
from thermo_opt.runs.probing import install, predict
from thermo_opt.runs.readers import load_run
from thermo_opt.runs.recorder import Recorder
from thermo_opt.runs.run import Run, RunInfo, Snapshot
from thermo_opt.runs.snapshot_schedule import log_spaced

__all__ = [
    "Probe",
    "Recorder",
    "Run",
    "RunInfo",
    "Snapshot",
    "as_probe",
    "install",
    "load_probe",
    "load_run",
    "log_spaced",
    "predict",
]
