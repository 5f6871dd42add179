"""``python -m analysis COMMAND …``: studies, benchmarks and tables that a person runs again."""

from __future__ import annotations

import sys
from importlib import import_module

from thermo_opt.errors import InputError

COMMANDS = {
    "study": "a study: NGD-T beside AdamW, SGD, SOAP and Muon on one task",
    "evidence": "every method tuned alike over its own knobs, beside none tuned, at every step",
    "table": "the studies' ratios to AdamW in one table",
    "ablate": "what each part of NGD-T contributes; its default damping",
    "alignment": "alignment of optimizers' steps with the natural gradient, at the same points",
    "budget": "realised KL over NGD-T's budget, step by step, over twelve networks and losses",
    "critical-batch": "the critical batch size of audits against brute force over batch sizes",
    "schedules": "schedules read from audits against cosine, linear decay and refinement",
    "splits": "noise, housekeeping and transport of data/ and of the studies' tasks",
    "ensembles": "hundreds of runs in the space of predictions",
    "bought": "what steps buy beside the natural gradient's for the same nats",
    "bench": "speed and memory of a step, an audit, a front, Fisher products",
    "figures": "the README's two pictures",
    "campaign": "kills and full disks at random moments, with counts",
    "fuzz": "damaged run folders of every layout, read one after the other, with counts",
    "states": "damaged states of NGD-T, loaded one after the other, with counts",
    "installs": "the lowest and newest allowed dependencies; the wheel outside the checkout",
    "large": "audits of runs larger than memory: their memory and time",
    "sketch": "a vocabulary of 50,257 as sketches: bytes, memory, and how far each number is off",
    "readme": "the tables of analysis/README.md from the CSVs",
}
MODULES = {
    "table": "study_table",
    "alignment": "study_alignment",
    "critical-batch": "critical_batch",
    "states": "damaged_states",
}
"""Where a command's module is called otherwise."""


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names."""
    if not arguments or arguments[0] not in COMMANDS:
        width = max(map(len, COMMANDS))
        print("usage: python -m analysis COMMAND [--help]\n")
        print("\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()))
        return 0 if arguments[:1] in ([], ["--help"], ["-h"]) else 2
    name, *rest = arguments
    try:
        return int(import_module(f"analysis.{MODULES.get(name, name)}").main(rest) or 0)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
