"""Layer rules: per-example gradients from factor samples equal autograd's, and parameters ↔ matrix
is one-to-one."""

import pytest
import torch
from torch import nn

from thermo_opt.fisher.kronecker import factors
from thermo_opt.fisher.kronecker.rules import (
    EmbeddingRule,
    KroneckerRule,
    ScaleRule,
    register,
    rule_for,
)


def _gradients_one_by_one(module, x, g):
    """Autograd, one example at a time: the gradient of Σ g·y for each parameter."""
    out = []
    for i in range(x.shape[0]):
        module.zero_grad()
        (module(x[i : i + 1]) * g[i : i + 1]).sum().backward()
        out.append([p.grad.clone() for p in module.parameters() if p.requires_grad])
    return out


def _conv(*args, **kwargs):
    return nn.Conv2d(*args, **kwargs)


KRONECKER = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "linear over time": (lambda: nn.Linear(5, 3), (4, 6, 5)),
    "linear over two axes": (lambda: nn.Linear(5, 3, bias=False), (4, 2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (4, 3, 9)),
    "conv2d": (lambda: _conv(3, 4, 3, padding=1), (4, 3, 6, 5)),
    "stride and dilation": (
        lambda: _conv(3, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 1)),
        (4, 3, 7, 6),
    ),
    "grouped": (lambda: _conv(4, 6, 3, groups=2, stride=2, padding=1), (4, 4, 6, 6)),
    "depthwise": (lambda: _conv(4, 4, 3, groups=4, padding="same", bias=False), (4, 4, 5, 5)),
    "circular padding": (lambda: _conv(2, 3, 3, padding=1, padding_mode="circular"), (4, 2, 5, 5)),
    "reflect padding": (lambda: _conv(2, 3, 3, padding=1, padding_mode="reflect"), (4, 2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (4, 2, 3, 3, 4)),
}


@pytest.mark.parametrize("case", KRONECKER)
@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
def test_kronecker_samples_give_autograds_gradient(case, frozen):
    torch.manual_seed(0)
    build, shape = KRONECKER[case]
    module = build().double()
    if frozen is not None and module.bias is not None:
        getattr(module, frozen).requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64)
    g = torch.randn_like(module(x))
    rule = rule_for(module)
    assert isinstance(rule, KroneckerRule)
    gradients = rule.gradients(module, x, g)
    if rule.covers(module, "weight"):
        matrices = factors.example_gradients(
            rule.inputs(module, x), gradients, ones=rule.covers(module, "bias")
        )
    else:
        matrices = gradients.sum(-2).unsqueeze(-1)
    groups, out, inputs = rule.shape(module)
    assert matrices.shape == ((groups, 4, out, inputs) if groups > 1 else (4, out, inputs))
    for i, reference in enumerate(_gradients_one_by_one(module, x, g)):
        for mine, truth in zip(
            rule.from_matrix(module, matrices.select(-3, i)), reference, strict=True
        ):
            torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", KRONECKER)
def test_parameters_and_matrix_are_one_to_one(case):
    module = KRONECKER[case][0]()
    rule = rule_for(module)
    tensors = [p.detach() for _, p in rule.parameters(module)]
    matrix = rule.to_matrix(module, tensors)
    groups, out, inputs = rule.shape(module)
    assert matrix.shape == ((groups, out, inputs) if groups > 1 else (out, inputs))
    assert matrix.numel() == sum(t.numel() for t in tensors)
    for back, t in zip(rule.from_matrix(module, matrix), tensors, strict=True):
        assert torch.equal(back, t)


def test_embedding_samples_give_autograds_gradient_and_padding_gets_none():
    torch.manual_seed(0)
    module = nn.Embedding(7, 3, padding_idx=2).double()
    x = torch.tensor([[0, 1, 2, 1], [6, 2, 2, 0]])
    g = torch.randn(2, 4, 3, dtype=torch.float64)
    rule = rule_for(module)
    assert isinstance(rule, EmbeddingRule)
    one_hot = nn.functional.one_hot(rule.inputs(module, x), 7).double()
    matrices = factors.example_gradients(one_hot, rule.gradients(module, x, g))
    for i, (truth,) in enumerate(_gradients_one_by_one(module, x, g)):
        (mine,) = rule.from_matrix(module, matrices[i])
        torch.testing.assert_close(mine, truth)
        assert mine[2].abs().max() == 0
    moment = factors.input_moment(rule, module, x)
    assert torch.equal(moment.mean, torch.tensor([2, 2, 3, 0, 0, 0, 1], dtype=torch.float64) / 8)


SCALES = {
    "layer norm": (lambda: nn.LayerNorm(5), (4, 6, 5), "eval"),
    "layer norm over two axes": (lambda: nn.LayerNorm((3, 5)), (4, 3, 5), "eval"),
    "layer norm without shift": (lambda: nn.LayerNorm(5, bias=False), (4, 5), "eval"),
    "rms norm": (lambda: nn.RMSNorm(5), (4, 6, 5), "eval"),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 4, 3, 3), "eval"),
    "batch norm, running statistics": (lambda: nn.BatchNorm2d(4), (4, 4, 3, 3), "eval"),
    "batch norm on vectors": (lambda: nn.BatchNorm1d(4), (4, 4), "eval"),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 4, 3, 3), "train"),
}


@pytest.mark.parametrize("case", SCALES)
def test_scale_rows_give_autograds_gradient(case):
    torch.manual_seed(0)
    build, shape, mode = SCALES[case]
    module = build().double().train(mode == "train")
    for p in module.parameters():
        nn.init.normal_(p)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    x = torch.randn(shape, dtype=torch.float64)
    g = torch.randn_like(module(x))
    rule = rule_for(module)
    assert isinstance(rule, ScaleRule)
    rows = rule.rows(module, rule.normalised(module, x), g)
    for i, reference in enumerate(_gradients_one_by_one(module, x, g)):
        torch.testing.assert_close(
            rows[i], torch.cat([t.flatten() for t in reference]), rtol=1e-10, atol=1e-12
        )
    positions = rule.rows(module, rule.normalised(module, x), g, "expand")
    torch.testing.assert_close(positions.sum(0), rows.sum(0))


def test_a_frozen_scale_leaves_only_the_shift():
    module = nn.LayerNorm(4)
    module.weight.requires_grad_(False)
    rule = rule_for(module)
    x, g = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(rule.rows(module, rule.normalised(module, x), g), g)


def test_a_subclass_keeps_the_rule_only_with_the_parents_forward():
    class Renamed(nn.Linear):
        pass

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert rule_for(Renamed(2, 2)) is rule_for(nn.Linear(2, 2))
    assert rule_for(Scaled(2, 2)) is None
    assert rule_for(nn.PReLU()) is None
    register(Scaled, rule_for(nn.Linear(2, 2)))
    assert rule_for(Scaled(2, 2)) is rule_for(nn.Linear(2, 2))


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
def test_moments_follow_their_definition(setting, bias):
    """A = mean of a aᵀ, G = Σ g gᵀ, with the sharing positions expanded or reduced (Eschenhagen et
    al. 2023)."""
    torch.manual_seed(1)
    module = nn.Linear(3, 2, bias=bias).double()
    x, g = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(4, 5, 2, dtype=torch.float64)
    a = torch.cat([x, torch.ones(4, 5, 1)], -1) if bias else x
    if setting == "reduce":
        a, gs = a.mean(1, keepdim=True), g.sum(1, keepdim=True)
    else:
        gs = g
    A = torch.einsum("nri,nrj->ij", a, a) / (a.shape[0] * a.shape[1])
    G = torch.einsum("nri,nrj->ij", gs, gs)
    rule = rule_for(module)
    torch.testing.assert_close(factors.input_moment(rule, module, x, setting).mean, A)
    torch.testing.assert_close(factors.gradient_moment(rule, module, x, g, setting), G)


def test_moments_accumulate_over_batches_and_half_precision_sums_in_float32():
    module = nn.Linear(3, 2)
    rule = rule_for(module)
    x = torch.randn(6, 3)
    whole, parts = factors.input_moment(rule, module, x), factors.input_moment(rule, module, x[:2])
    parts.add(factors.input_moment(rule, module, x[2:]))
    torch.testing.assert_close(parts.mean, whole.mean)
    assert factors.input_moment(rule, module, x.bfloat16()).total.dtype == torch.float32


def test_gpt2_conv1d_is_a_transposed_linear_layer():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    module = Conv1D(3, 5).double()
    rule = rule_for(module)
    x, g = torch.randn(4, 2, 5, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    matrices = factors.example_gradients(
        rule.inputs(module, x), rule.gradients(module, x, g), ones=True
    )
    for i, reference in enumerate(_gradients_one_by_one(module, x, g)):
        for mine, truth in zip(rule.from_matrix(module, matrices[i]), reference, strict=True):
            torch.testing.assert_close(mine, truth)
