"""The networks that studies and benchmarks train."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional


class ConvNet(nn.Sequential):
    """Three 3×3 convolutions with pooling and a linear read-out for 32×32 images: 151,290
    parameters at full width."""

    def __init__(self, classes: int = 10, width: int = 32) -> None:
        super().__init__(
            *(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4)),
            *(nn.Flatten(), nn.Linear(16 * width, 112), nn.ReLU(), nn.Linear(112, classes)),
        )


class Residual(nn.Module):
    """A basic residual block: two 3×3 convolutions with batch normalisation, and a projection where
    the shape changes."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()),
            *(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)),
        )
        same = stride == 1 and inside == out
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet18(classes: int = 10, width: int = 64, stem: str = "small") -> nn.Module:
    """ResNet-18 (He et al. 2016), written out: torchvision is not needed.

    ``width``: channels of the first of its four stages. ``stem``: "small", one 3×3 convolution at
    full resolution, as is usual for 32×32 images; "imagenet", a 7×7 convolution of stride 2 and a
    pooling of stride 2.
    """
    first: list[nn.Module]
    if stem == "small":
        first = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    else:
        first = [
            *(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            nn.MaxPool2d(3, 2, 1),
        ]
    layers = first
    for i, (inside, out) in enumerate(
        itertools.pairwise((width, width, 2 * width, 4 * width, 8 * width))
    ):
        layers += [Residual(inside, out, 1 if i == 0 else 2), Residual(out, out, 1)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes)
    )


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .view(n, t, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(n, t, width)))
        return x + self.drop(self.down(functional.gelu(self.up(self.norm2(x)))))


class CharGPT(nn.Module):
    """A decoder-only character transformer with learned positions and an untied read-out."""

    def __init__(
        self,
        vocabulary: int,
        layers: int = 4,
        width: int = 128,
        context: int = 64,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p,
                    std=0.02 / (2 * layers) ** 0.5
                    if name.endswith(("out.weight", "down.weight"))
                    else 0.02,
                )

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.drop(self.tokens(x) + self.positions(places)))))
