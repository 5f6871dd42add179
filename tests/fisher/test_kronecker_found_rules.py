"""Rules that are found by what a module does, and transposed convolutions."""

import pytest
import torch
from torch import nn

from thermo_opt.fisher import make
from thermo_opt.fisher.kronecker import ScaleRule, rule_for


class RootMeanSquare(nn.Module):
    """RMSNorm as language models write it, in their own words."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5 - offset)
        self.variance_epsilon, self.offset = 1e-3, offset

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        variance = hidden.float().pow(2).mean(-1, keepdim=True)
        normal = hidden.float() * torch.rsqrt(variance + self.variance_epsilon)
        return ((self.offset + self.gain) * normal).type_as(hidden)


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(1e-3 * torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.lambda1


class Tanh(LayerScale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.lambda1 * 1e3).tanh()


class Shift(LayerScale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.lambda1


@pytest.mark.parametrize(
    "norm", [RootMeanSquare(6), RootMeanSquare(6, 1.0), LayerScale(6), RootMeanSquare(6).bfloat16()]
)
def test_a_scale_over_the_last_axis_is_known_by_what_it_does(norm: nn.Module) -> None:
    rule = rule_for(norm)
    assert isinstance(rule, ScaleRule)
    p = rule.parameters(norm)[0][1]
    x = torch.randn(5, 6, dtype=p.dtype, requires_grad=True)
    g = torch.randn(5, 6, dtype=p.dtype)
    (wanted,) = torch.autograd.grad((norm(x) * g).sum(), p)
    rows = rule.rows(norm, rule.normalised(norm, x.detach()), g)
    tolerance = 1e-5 if p.dtype == torch.float32 else 0.05
    torch.testing.assert_close(rows.sum(0), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("module", [Tanh(6), Shift(6), nn.PReLU(6)])
def test_other_modules_with_one_vector_are_not(module: nn.Module) -> None:
    assert rule_for(module) is None


TRANSPOSED = [
    (nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, output_padding=1), (3, 5)),
    (nn.ConvTranspose2d(2, 3, (2, 3), stride=(2, 1), dilation=(1, 2)), (2, 4, 5)),
    (nn.ConvTranspose3d(2, 2, 2, bias=False), (2, 3, 2, 2)),
]


@pytest.mark.parametrize(("module", "shape"), TRANSPOSED)
def test_transposed_convolutions_give_the_gradient_of_each_example(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    rule = rule_for(module)
    assert rule is not None
    x = torch.randn(4, *shape)
    y = module(x)
    g = torch.randn_like(y)
    a, samples = rule.inputs(module, x), rule.gradients(module, x, g)
    for k in range(4):
        (wanted,) = torch.autograd.grad(module(x[k : k + 1]), module.weight, g[k : k + 1])
        found = rule.weight_tensor(module, samples[k].mT @ a[k])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    matrix = rule.weight_matrix(module, module.weight)
    assert matrix.shape == rule.shape(module)[1:]
    assert torch.equal(rule.weight_tensor(module, matrix), module.weight)


def test_both_have_blocks_and_a_scales_is_the_fishers_own() -> None:
    """Of a scale, whose block is dense: it equals the dense Fisher's."""
    torch.manual_seed(0)
    scale = RootMeanSquare(6).double()
    model = nn.Sequential(scale, nn.Unflatten(1, (6, 1)), nn.ConvTranspose1d(6, 4, 1, bias=False))
    model = model.append(nn.Flatten()).double()
    batch = (torch.randn(7, 6, dtype=torch.float64), torch.randint(4, (7,)))
    kfac = make("kfac", model, batch)
    dense = make("dense", model, batch).dense()
    first = slice(0, 6)
    torch.testing.assert_close(kfac.dense()[first, first], dense[first, first])
    assert [type(one.block).__name__ for one in kfac.blocks] == ["DenseBlock", "KroneckerBlock"]
    assert kfac.diagnostics()["trace"] == pytest.approx(
        float(kfac.dense().diagonal().sum()), rel=1e-9
    )
