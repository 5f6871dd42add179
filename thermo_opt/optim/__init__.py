"""NGD-T, the natural-gradient optimizer on a dissipation budget: metric × regulator × null-space
policy (THEORY §7)."""

from thermo_opt.optim.ngdt import NGDT
from thermo_opt.optim.regulators import Dissipation, Fixed, Heat, Regulator

__all__ = ["NGDT", "Dissipation", "Fixed", "Heat", "Regulator"]
