"""Studies and benchmarks that a person runs again: ``python -m analysis COMMAND``.

Only public names of thermo_opt are used.
"""
