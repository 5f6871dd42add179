"""The command line."""

from thermo_opt.cli.app import main

__all__ = ["main"]
