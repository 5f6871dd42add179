"""Check the theory's claims on toy problems, and check that the checks bite.

thermo_opt.verify.run_claims()                      # every claim, measured against predicted
thermo_opt.verify.run_mutants()                     # wrong twins, each to be rejected by its claim
    thermo_opt.verify.scorecard("my.module:factory")    # an optimizer beside SGD, Adam and NGD-T
"""

from thermo_opt.verify.runner import Rejection, claim_names, describe, run_claims, run_mutants
from thermo_opt.verify.scorecard import Score, scorecard
from thermo_opt.verify.verdict import Verdict

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
