"""Studies and benchmarks a person re-runs: ``python -m analysis.<name>``. Only public names of
thermo_opt are used."""
