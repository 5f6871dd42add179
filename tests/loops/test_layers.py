"""Which metric each kind of layer gets, row by row of the page's table: factors, or a diagonal that
is named once."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import thermo_opt as to
from tests.loops.test_models import MODELS
from tests.optim.test_bare_parameters import (
    Adapter,
    Attention,
    Bag,
    Cell,
    Experts,
    Pair,
    Positions,
    Recurrent,
    Together,
)
from thermo_opt.optim.kronecker.blocks import NormBlock, UnruledBlock
from thermo_opt.optim.kronecker.matrix import MatrixBlock

SERIES = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1))
VOLUMES = torch.randn(6, 2, 3, 3, 3, generator=torch.Generator().manual_seed(2))
WORDS = torch.randint(11, (6, 8), generator=torch.Generator().manual_seed(3))


class Mean(nn.Module):
    """Its layers, and the mean over all places."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x).flatten(2).mean(2)


class RootMeanSquare(nn.Module):
    """RMSNorm in somebody's own words."""

    def __init__(self):
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, x):
        return self.gain * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 0.1))

    def forward(self, x):
        return x * self.scale


class Power(nn.Module):
    """A parameter that is neither multiplied as a matrix nor added."""

    def __init__(self):
        super().__init__()
        self.power = nn.Parameter(torch.ones(3, 4))

    def forward(self, x):
        return (x.abs() + 0.1).pow(self.power).sum(1)


def language():
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2))


def lora():
    return get_peft_model(
        language(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )


def words(model):
    return F.cross_entropy(model(input_ids=WORDS).logits.flatten(0, 1), WORDS.flatten())


def over(*layers):
    return lambda: nn.Sequential(*(make() for make in layers))


M, N = MatrixBlock, NormBlock
LAYERS = {
    "Linear, transformers' Conv1D, LoRA's pairs": [
        (over(nn.Flatten, lambda: nn.Linear(12, 4)), SERIES, {M}),
        (lora, words, {M}),
    ],
    "Conv1d, Conv2d, Conv3d, with groups; ConvTranspose without (its bias keeps its diagonal)": [
        (lambda: Mean(nn.Conv1d(3, 4, 2)), SERIES, {M}),
        (lambda: Mean(nn.Conv2d(4, 4, 3, groups=2)), IMAGES, {M}),
        (lambda: Mean(nn.Conv3d(2, 4, 2)), VOLUMES, {M}),
        (lambda: Mean(nn.ConvTranspose2d(4, 4, 2, 2, bias=False)), IMAGES, {M}),
    ],
    "Embedding, EmbeddingBag (sum or mean, bags of one size, no weights of their own)": [
        (lambda: Mean(nn.Embedding(11, 4), nn.Flatten(), nn.Unflatten(1, (8, 4))), WORDS, {M}),
        (lambda: Bag("sum"), SERIES, {M}),
        (lambda: Bag("mean"), SERIES, {M}),
    ],
    "Bilinear": [(Pair, SERIES, {M})],
    "LayerNorm, RMSNorm by any name, GroupNorm, BatchNorm, InstanceNorm, layer scale": [
        (over(lambda: nn.LayerNorm(4), nn.Flatten), SERIES, {N}),
        (over(RootMeanSquare, nn.Flatten), SERIES, {N}),
        (over(LayerScale, nn.Flatten), SERIES, {N}),
        (lambda: Mean(nn.GroupNorm(2, 4), nn.Tanh()), IMAGES, {N}),
        (lambda: Mean(nn.BatchNorm2d(4), nn.Tanh()), IMAGES, {N}),
        (lambda: Mean(nn.InstanceNorm2d(4, affine=True), nn.Tanh()), IMAGES, {N}),
    ],
    "MultiheadAttention (packed, self or cross), LSTM, GRU and RNN layers and cells": [
        (Attention, SERIES, {M}),
        (lambda: Attention(True), SERIES, {M}),
        *((lambda kind=kind: Recurrent(kind), SERIES, {M}) for kind in (nn.LSTM, nn.GRU, nn.RNN)),
        *(
            (lambda kind=kind: Cell(kind), SERIES, {M})
            for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
        ),
    ],
    "a matrix that a module multiplies by itself (`F.linear`, `@`, from either side)": [
        (Adapter, SERIES, {M}),
    ],
    "a stack of matrices (experts), one at a time or by `bmm`, sides ≤ 2,048": [
        (Experts, SERIES, {M}),
        (Together, SERIES, {M}),
    ],
    "a table of positions that is added": [(lambda: Positions(3), SERIES, {M})],
    "anything else": [
        (Power, SERIES, {UnruledBlock}),
        (lambda: Mean(nn.ConvTranspose2d(4, 4, 2, 2)), IMAGES, {M, UnruledBlock}),
        (lambda: Mean(nn.PReLU(4), nn.Tanh()), IMAGES, {UnruledBlock}),
    ],
}
CASES = [(row, k) for row, cases in LAYERS.items() for k in range(len(cases))]


@pytest.mark.parametrize(("row", "k"), CASES)
def test_its_metric_is_the_tables(row, k):
    torch.manual_seed(0)
    make, x, kinds = LAYERS[row][k]
    model = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = to.NGDT(model)
        out = x(model) if callable(x) else F.cross_entropy(model(x), torch.arange(len(x)) % 4)
        out.backward()
        optimizer.step()
    assert {type(block) for block in optimizer.metric.blocks} == kinds
    assert all(block.inverse is not None for block in optimizer.metric.blocks)
    said = [str(w.message) for w in caught if "diagonal metric" in str(w.message)]
    assert len(said) == (UnruledBlock in kinds)


def test_a_parameter_beside_others_with_a_rule_is_named_itself():
    with pytest.warns(UserWarning, match=r"no layer rule for 1\.bias \(ConvTranspose2d\)"):
        to.NGDT(nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(4, 4, 2))).close()


def test_the_models_of_the_page_that_have_factors_throughout():
    """Most of what people train needs no diagonal."""
    diagonal = []
    for name in ("MLP", "CNN, BatchNorm", "LSTM", "GPT-2", "LLaMA", "Qwen 3", "T5"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = to.NGDT(MODELS[name][0]())
        if any(isinstance(block, UnruledBlock) for block in optimizer.metric.blocks):
            diagonal.append(name)
    assert diagonal == []
