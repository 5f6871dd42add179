"""NGD-T, the natural-gradient optimizer on a dissipation budget: metric × regulator × null-space
policy (theory §7)."""

from thermo_opt.optim.budget import Dissipation, Fixed, Heat, Regulator
from thermo_opt.optim.calibration import Calibration
from thermo_opt.optim.metrics import EKFAC, KFAC, Minibatch
from thermo_opt.optim.ngdt import NGDT

__all__ = [
    "EKFAC",
    "KFAC",
    "NGDT",
    "Calibration",
    "Dissipation",
    "Fixed",
    "Heat",
    "Minibatch",
    "Regulator",
]
