"""Check the theory's claims on toy problems, and check that the checks bite.

thermo_opt.verify.run_claims()                      # every claim, measured against predicted
thermo_opt.verify.run_mutants()                     # wrong twins, each to be rejected by its claim
"""

from thermo_opt.verify.runner import Rejection, claim_names, describe, run_claims, run_mutants
from thermo_opt.verify.verdict import Verdict

__all__ = ["Rejection", "Verdict", "claim_names", "describe", "run_claims", "run_mutants"]
