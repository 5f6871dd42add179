"""The audit, or a front, as a page: one self-contained HTML file that opens offline."""

from thermo_opt.report.drift import write_drift_front
from thermo_opt.report.page import write_report

__all__ = ["write_drift_front", "write_report"]
