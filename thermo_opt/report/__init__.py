"""The audit as a page: one self-contained HTML file that opens offline."""

from thermo_opt.report.page import write_report

__all__ = ["write_report"]
