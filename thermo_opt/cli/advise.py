"""``thermo-opt advise``: what would lower a run's cost at equal loss, with a predicted saving."""

from __future__ import annotations

import json as encoder

from thermo_opt.cli.options import Format, Json, Model, Probe, RunPath


def advise(
    run: RunPath,
    json: Json = False,
    model: Model = None,
    probe: Probe = None,
    format: Format = None,
) -> None:
    """Say what would lower a run's cost at equal loss, and by how much: schedule, batch size,
    momentum, recording; "nothing to gain" where that is so."""
    from thermo_opt.audits import advise as advice
    from thermo_opt.audits import audit
    from thermo_opt.cli import terminal
    from thermo_opt.cli.terminal import Bars
    from thermo_opt.runs import load_run

    with Bars() as bars:
        found = audit(
            load_run(run, format=format), lens="outputs", model=model, probe=probe, progress=bars
        )
    given = advice(found)
    if json:
        said = {"run": found.run, "advice": [one.to_dict() for one in given]}
        terminal.print_json(encoder.dumps(said, indent=2, allow_nan=False))
        return
    for one in given:
        terminal.say(one.words)
