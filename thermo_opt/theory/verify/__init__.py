"""Check the theory's claims on toy problems, and check that the checks bite.

thermo_opt.theory.verify.run_claims()                      # every claim, measured against predicted
thermo_opt.theory.verify.run_mutants()                     # wrong twins, each to be rejected by its
    claim
    thermo_opt.theory.verify.scorecard("my.module:factory")    # an optimizer beside SGD, Adam and
    NGD-T
"""

from thermo_opt.theory.verify.runner import (
    Rejection,
    claim_names,
    describe,
    run_claims,
    run_mutants,
)
from thermo_opt.theory.verify.scorecard import Score, scorecard
from thermo_opt.theory.verify.verdict import Verdict

__all__ = [
    "Rejection",
    "Score",
    "Verdict",
    "claim_names",
    "describe",
    "run_claims",
    "run_mutants",
    "scorecard",
]
