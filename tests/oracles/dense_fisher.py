"""A dense float64 Fisher made by plain loops: per-prediction Jacobians row by row, Λ as the Hessian
of a torch distribution's KL divergence."""

import torch
from torch import nn
from torch.nn import functional

DISTRIBUTIONS = {
    "categorical": lambda f, sigma2: torch.distributions.Categorical(logits=f),
    "bernoulli": lambda f, sigma2: torch.distributions.Independent(
        torch.distributions.Bernoulli(logits=f), 1
    ),
    "gaussian": lambda f, sigma2: torch.distributions.Independent(
        torch.distributions.Normal(f, sigma2**0.5), 1
    ),
    "poisson": lambda f, sigma2: torch.distributions.Independent(
        torch.distributions.Poisson(f.exp()), 1
    ),
    "heteroscedastic": lambda f, sigma2: torch.distributions.Independent(
        torch.distributions.Normal(f.chunk(2, -1)[0], (0.5 * f.chunk(2, -1)[1]).exp()), 1
    ),
}


def log_prob(f, y, likelihood="categorical", sigma2=1.0):
    """log p(y | f) of one prediction, f (c,)."""
    return DISTRIBUTIONS[likelihood](f, sigma2).log_prob(y)


def output_fisher(f, likelihood="categorical", sigma2=1.0):
    """Λ: the Hessian of KL(p_f ‖ p_t) in t, at t = f."""
    own = DISTRIBUTIONS[likelihood](f.detach(), sigma2)
    return torch.autograd.functional.hessian(
        lambda t: torch.distributions.kl_divergence(own, DISTRIBUTIONS[likelihood](t, sigma2)),
        f.detach(),
    )


def jacobians(model, x, y):
    """(f, J, target) of every counted prediction: one model call an example, one backward pass an
    output."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for i in range(len(x)):
        f = model(x[i : i + 1])[0]
        for position, target in zip(
            f.reshape(-1, f.shape[-1]), y[i].reshape(-1, *y.shape[f.dim() :]), strict=True
        ):
            if target.dim() == 0 and not target.is_floating_point() and target == -100:
                continue
            rows = []
            for value in position:
                grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                flat = [
                    torch.zeros_like(p) if g is None else g
                    for g, p in zip(grads, parameters, strict=True)
                ]
                rows.append(torch.cat([g.flatten() for g in flat]))
            found.append((position.detach(), torch.stack(rows), target))
    return found


def dense_fisher(model, x, y, likelihood="categorical", sigma2=1.0, empirical=False):
    """F = (1/n) Σ JᵀΛJ, or with the outer product of the data's scores for Λ."""
    total = 0.0
    found = jacobians(model, x, y)
    for f, jacobian, target in found:
        if empirical:
            score = torch.autograd.functional.jacobian(
                lambda t, y=target: log_prob(t, y, likelihood, sigma2), f
            )
            inner = torch.outer(score, score)
        else:
            inner = output_fisher(f, likelihood, sigma2)
        total = total + jacobian.T @ inner @ jacobian
    return total / len(found)


class Transformer(nn.Module):
    """Embedding tied to the output layer, one causal attention block with LayerNorm, a GELU layer
    and residuals."""

    def __init__(self, vocabulary=5, width=4, heads=2, context=4):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.heads = heads
        nn.init.normal_(self.embed.weight, std=0.5)  # predictions neither uniform nor certain

    def forward(self, tokens):
        n, t = tokens.shape
        h = self.embed(tokens) + self.place(torch.arange(t))
        q, k, v = self.qkv(self.norm1(h)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.mix(a.transpose(1, 2).reshape(n, t, -1))
        return self.head(h + self.down(functional.gelu(self.up(self.norm2(h)))))


def small_cases():
    """name → (model, inputs, targets), float64: MLP, CNN with groups and stride, transformer with
    tied weights."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    cnn = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    tokens, following = torch.randint(5, (2, 4)), torch.randint(5, (2, 4))
    following[0, 1] = following[1, 3] = -100
    return {
        "mlp": (mlp.double(), torch.randn(7, 4, dtype=torch.float64), torch.randint(3, (7,))),
        "cnn": (cnn.double(), torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.randint(3, (6,))),
        "transformer": (Transformer().double(), tokens, following),
    }
