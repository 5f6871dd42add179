"""Kronecker-factored curvature: layer rules, factor statistics, blocks; the same pieces serve the
metrics and NGD-T."""

from thermo_opt.fisher.kronecker.blocks import (
    Block,
    DenseBlock,
    DiagonalBlock,
    EigenvalueCorrectedBlock,
    KroneckerBlock,
)
from thermo_opt.fisher.kronecker.factor import Factor, factored_damping, nearest_product
from thermo_opt.fisher.kronecker.factors import Moment, gradient_moment, input_moment
from thermo_opt.fisher.kronecker.rules import (
    RULES,
    KroneckerRule,
    Rule,
    ScaleRule,
    register,
    rule_for,
)

__all__ = [
    "RULES",
    "Block",
    "DenseBlock",
    "DiagonalBlock",
    "EigenvalueCorrectedBlock",
    "Factor",
    "KroneckerBlock",
    "KroneckerRule",
    "Moment",
    "Rule",
    "ScaleRule",
    "factored_damping",
    "gradient_moment",
    "input_moment",
    "nearest_product",
    "register",
    "rule_for",
]
