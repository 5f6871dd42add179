"""Recording inside other people's training loops: one module per trainer, each imported by its user
alone.

`thermo_opt.integrations.huggingface.ThermoCallback` needs the extra ``huggingface``,
`thermo_opt.integrations.lightning.ThermoCallback` the extra ``lightning``. A plain loop, or one of
Accelerate, needs neither: `thermo_opt.Recorder` with ``log=``.
"""
