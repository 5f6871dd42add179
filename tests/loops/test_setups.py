"""NGD-T on what people train beside plain networks: some steps lower the loss, and no step spends
much more than its budget, measured apart from the optimizer; or a sentence refuses them before a
weight moves."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import SWALR, AveragedModel
from torch.utils.checkpoint import checkpoint

import thermo_opt as to
from thermo_opt.fisher.likelihoods import likelihood as named
from thermo_opt.models import repeated

STEPS, BUDGET = 10, 0.01
G = torch.Generator().manual_seed(0)
X = torch.randn(48, 8, generator=G)
Y = (X[:, :4] + 0.3 * X[:, 4:]).argmax(1)
WORDS = (torch.arange(12)[:, None] * 5 + torch.arange(13)) % 11
IMAGES = torch.randn(24, 3, 6, 6, generator=G)
SHADES = IMAGES.mean((2, 3)).argmax(1)


def net(inputs=8, out=4, hidden=16):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, out))


def classes(m):
    return F.cross_entropy(m(X), Y)


class Setup:
    """A model, its loss at a step, and predictions to hold against the budget."""

    def __init__(self, make, loss=classes, predict=lambda m: m(X), then=None, **options):
        self.make, self.loss, self.predict, self.options = make, loss, predict, options
        self.then = then or (lambda m, optimizer, loss: (loss.backward(), optimizer.step()))


def half(m):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = m(X)
    return F.cross_entropy(out.float(), Y)


def scaled(m, optimizer, loss):
    if not hasattr(optimizer, "scaler"):
        optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer.scaler.scale(loss).backward()
    optimizer.scaler.step(optimizer)
    optimizer.scaler.update()


def sharpness_aware(m, optimizer, loss):
    """SAM: the gradient at weights moved uphill."""
    loss.backward()
    params = list(m.parameters())
    length = torch.stack([p.grad.norm() for p in params]).norm()
    moves = [0.05 / length * p.grad for p in params]
    with torch.no_grad():
        torch._foreach_add_(params, moves)
    optimizer.zero_grad()
    classes(m).backward()
    with torch.no_grad():
        torch._foreach_sub_(params, moves)
    optimizer.step()


def averaged(m, optimizer, loss):
    if not hasattr(optimizer, "mean"):
        optimizer.mean, optimizer.rate = AveragedModel(m), SWALR(optimizer, swa_lr=0.5)
    loss.backward()
    optimizer.step()
    optimizer.mean.update_parameters(m)
    optimizer.rate.step()


def wrapped(wrap):
    def make():
        model = net()
        wrap(model[0])
        return model

    return make


class Kolmogorov(nn.Module):
    """A layer of learned functions of each input (KAN), by radial basis functions."""

    def __init__(self):
        super().__init__()
        self.weights, self.base = nn.Parameter(0.1 * torch.randn(4, 8, 5)), nn.Linear(8, 4)
        self.register_buffer("grid", torch.linspace(-2, 2, 5))

    def forward(self, x):
        basis = torch.exp(-2 * (x[..., None] - self.grid) ** 2)
        return self.base(F.silu(x)) + torch.einsum("bik,oik->bo", basis, self.weights)


class Equilibrium(nn.Module):
    """A fixed point found without gradients, and two steps with (DEQ)."""

    def __init__(self):
        super().__init__()
        self.into, self.turn = nn.Linear(8, 12), nn.Linear(12, 12, bias=False)
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        u = self.into(x)
        with torch.no_grad():
            z = u
            for _ in range(10):
                z = torch.tanh(0.5 * self.turn(z) + u)
        for _ in range(2):
            z = torch.tanh(0.5 * self.turn(z) + u)
        return self.out(z)


class Hyper(nn.Module):
    """A network that makes another one's weights."""

    def __init__(self):
        super().__init__()
        self.main = net(8, 4, 6).requires_grad_(False)
        self.code = nn.Parameter(torch.randn(3))
        self.maker = nn.Linear(3, sum(p.numel() for p in self.main.parameters()))

    def forward(self, x):
        made, weights = 0.3 * self.maker(self.code), {}
        for name, p in self.main.named_parameters():
            weights[name], made = made[: p.numel()].view_as(p), made[p.numel() :]
        return functional_call(self.main, weights, (x,))


class Mixture(nn.Module):
    """Experts of which some are never asked."""

    def __init__(self):
        super().__init__()
        self.gate, self.out = nn.Linear(8, 4), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        weight, which = self.gate(x)[:, :2].softmax(-1).max(-1)
        h = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (which == k).nonzero()[:, 0]
            if len(rows):
                h = h.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return self.out(h)


class Autoencoder(nn.Module):
    """A VAE: reconstruction, mean and log-variance of the code."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 4), net(2, 8)

    def forward(self, x):
        mean, log_variance = self.encoder(x).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return {"rebuilt": self.decoder(code), "mean": mean, "log_variance": log_variance}


def evidence_bound(m):
    torch.manual_seed(1)
    out = m(X)
    mean, log_variance = out["mean"], out["log_variance"]
    rest = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return 0.5 * (out["rebuilt"] - X).square().sum(1).mean() + rest


def rebuilt(m):
    torch.manual_seed(1)
    return m(X)["rebuilt"]


class Flow(nn.Module):
    """Two affine couplings: the latent variables, and log|det|."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(net(4, 8) for _ in range(2))

    def forward(self, x):
        total = 0.0
        for part in self.nets:
            a, b = x.chunk(2, 1)
            scale, shift = part(a).chunk(2, 1)
            x, total = (
                torch.cat([b * scale.tanh().exp() + shift, a], 1),
                total + scale.tanh().sum(1),
            )
        return x, total


def flow(m):
    z, log_det = m(X)
    return (0.5 * z.square().sum(1) - log_det).mean()


class Graph(nn.Module):
    """Nodes with a dense adjacency; half of them have labels."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("adjacency", (torch.rand(48, 48) < 0.1) / 5 + 0.5 * torch.eye(48))

    def forward(self, x):
        return self.second(self.adjacency @ (self.adjacency @ self.first(x)).relu())


class Language(nn.Module):
    """Tied words, sequences of any length."""

    def __init__(self, **embedding):
        super().__init__()
        self.words, self.head = nn.Embedding(11, 8, **embedding), nn.Linear(8, 11, bias=False)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.layer(self.words(x)))


def lengths(m):
    m.step = getattr(m, "step", 0) + 1
    x = WORDS[:, : 4 + m.step % 9]
    return F.cross_entropy(m(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def growing(m):
    m.step = getattr(m, "step", 0) + 1
    return F.cross_entropy(m(X[: 4 * m.step]), Y[: 4 * m.step])


class Quantised(nn.Module):
    """Weights rounded to four bits, with the gradient passed straight through."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 4)])

    def forward(self, x):
        for layer in self.layers:
            unit = layer.weight.detach().abs().max() / 7
            rounded = (
                layer.weight + (torch.round(layer.weight / unit) * unit - layer.weight).detach()
            )
            x = F.linear(x.tanh(), rounded, layer.bias)
        return x


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2)), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False).tanh())


class Ensemble(nn.Module):
    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList(net() for _ in range(3))

    def forward(self, x):
        return torch.stack([member(x) for member in self.members], 1)


def critic(m):
    """WGAN-GP's: three passes, one of which a penalty differentiates."""
    x = X[:24].clone().requires_grad_()
    (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    penalty = (slope.norm(dim=1) - 1).square().mean()
    return m(X[24:]).mean() - m(X[:24] + 1).mean() + 10 * penalty


def real_and_made(m):
    return torch.cat([m(X[24:]), m(X[:24] + 1)])


class Siamese(nn.Module):
    """Own predictions of another view's embedding by a slow copy (BYOL)."""

    def __init__(self):
        super().__init__()
        self.online, self.own = net(8, 6), nn.Linear(6, 6)
        self.slow = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, a, b):
        p = self.own(self.online(a))
        with torch.no_grad():
            target = self.slow(b)
        return (2 - 2 * F.cosine_similarity(p, target, dim=-1)).mean()


def q_learning(m):
    with torch.no_grad():
        goal = X[:, 0] + 0.9 * m(X.flip(0)).max(1).values
    return F.smooth_l1_loss(m(X).gather(1, Y[:, None])[:, 0], goal)


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.policy, self.value = net(8, 12), nn.Linear(12, 4), nn.Linear(12, 1)

    def forward(self, x):
        h = self.body(x).tanh()
        return torch.distributions.Categorical(logits=self.policy(h)), self.value(h)[:, 0]


def clipped_policy(m):
    policy, value = m(X)
    ratio = (policy.log_prob(Y) - torch.log(torch.tensor(0.25))).exp()
    gain = torch.min(ratio * X[:, 5], ratio.clamp(0.8, 1.2) * X[:, 5]).mean()
    return 0.5 * F.mse_loss(value, X[:, 6]) - gain - 0.01 * policy.entropy().mean()


def on_meta():
    with torch.device("meta"):
        model = net()
    model.to_empty(device="cpu")
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return model


def conv():
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def ignored(m):
    """Only the first half of each sequence is counted."""
    return F.cross_entropy(m(WORDS)[:, :6].flatten(0, 1), WORDS[:, 1:7].flatten())


SETUPS = {
    "mixed precision, bfloat16": Setup(net, half),
    "mixed precision, float16 with a GradScaler": Setup(net, then=scaled),
    "float64": Setup(
        lambda: net().double(),
        lambda m: F.cross_entropy(m(X.double()), Y),
        lambda m: m(X.double()),
    ),
    "DataParallel": Setup(lambda: nn.DataParallel(net())),
    "sharpness-aware minimisation (SAM)": Setup(net, then=sharpness_aware),
    "averaged weights (SWA, EMA) with SWALR": Setup(net, then=averaged),
    "a batch that grows": Setup(net, growing, None),
    "sequences of changing length, tied words": Setup(Language, lengths, None),
    "padding that isn't counted": Setup(Language, ignored, lambda m: m(WORDS)[:, :6]),
    "checkpointed layers with dropout": Setup(Checkpointed, predict=None),
    "weight norm": Setup(wrapped(parametrizations.weight_norm)),
    "spectral norm": Setup(wrapped(parametrizations.spectral_norm)),
    "orthogonal weights": Setup(wrapped(parametrizations.orthogonal)),
    "pruned weights": Setup(wrapped(lambda m: prune.l1_unstructured(m, "weight", 0.5))),
    "quantisation-aware": Setup(Quantised),
    "channels last": Setup(
        conv,
        lambda m: F.cross_entropy(m(IMAGES.to(memory_format=torch.channels_last)), SHADES),
        lambda m: m(IMAGES),
    ),
    "initialised after the meta device": Setup(on_meta),
    "a hypernetwork": Setup(Hyper),
    "functional_call": Setup(
        net,
        lambda m: F.cross_entropy(functional_call(m, dict(m.named_parameters()), (X,)), Y),
    ),
    "a fixed point (DEQ)": Setup(Equilibrium),
    "experts, some never asked": Setup(Mixture),
    "a deep ensemble": Setup(
        Ensemble,
        lambda m: F.cross_entropy(m(X).flatten(0, 1), Y.repeat_interleave(3)),
    ),
    "learned functions (KAN)": Setup(Kolmogorov),
    "a graph, dense adjacency, half of the nodes labelled": Setup(
        Graph, lambda m: F.cross_entropy(m(X)[:24], Y[:24]), lambda m: m(X)[:24]
    ),
    "variational autoencoder": Setup(Autoencoder, evidence_bound, rebuilt, likelihood="gaussian"),
    "normalising flow": Setup(Flow, flow, lambda m: m(X)[0], likelihood="gaussian"),
    "critic with a gradient penalty (WGAN-GP)": Setup(
        lambda: net(8, 1), critic, real_and_made, likelihood="gaussian"
    ),
    "a model that returns its loss, with a slow copy (BYOL)": Setup(
        Siamese, lambda m: m(X, X + 0.1), lambda m: m.own(m.online(X)), likelihood="gaussian"
    ),
    "Q-learning": Setup(net, q_learning, likelihood="gaussian"),
    "clipped policy gradient and value (PPO)": Setup(
        ActorCritic, clipped_policy, lambda m: m(X)[0].logits
    ),
}


def predicted(setup, model):
    """Predictions now, without a trace; None where they are drawn anew each time."""
    if setup.predict is None:
        return None
    with torch.no_grad(), repeated(model):
        return setup.predict(model)


@pytest.mark.parametrize("name", SETUPS)
def test_some_steps_lower_the_loss_within_the_budget(name):
    torch.manual_seed(0)
    setup = SETUPS[name]
    model, kind = setup.make(), named(setup.options.get("likelihood", "categorical"), None)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # diagonals and weighted losses are named
        optimizer = to.NGDT(model, budget=BUDGET, **setup.options)
        for _ in range(STEPS):
            optimizer.zero_grad()
            before = predicted(setup, model)
            loss = setup.loss(model)
            setup.then(model, optimizer, loss)
            losses.append(float(loss.detach()))
            assert (optimizer.last_step["realised"] or 0.0) < 1.5 * BUDGET
            if before is not None:
                after = predicted(setup, model)
                assert float(kind.kl(before.double(), after.double()).mean()) < 3 * BUDGET
    assert sum(losses[-3:]) < sum(losses[:3])
    assert optimizer.steps == STEPS


REFUSED = {
    "sparse gradients of an embedding": (
        lambda: nn.Sequential(nn.Embedding(11, 4, sparse=True), nn.Linear(4, 11)),
        "sparse=False",
    ),
    "complex weights": (
        lambda: nn.ParameterDict({"w": torch.zeros(3, dtype=torch.complex64)}),
        "view_as_real",
    ),
    "TorchScript": (lambda: torch.jit.trace(nn.Linear(13, 11), torch.ones(2, 13)), "afterwards"),
    "lazy layers not called yet": (lambda: nn.LazyLinear(11), "call the model once"),
    "a model still on the meta device": (lambda: nn.Linear(4, 11, device="meta"), "to_empty"),
}


def of_func(model):
    """Gradients without a backward pass."""
    own = {name: p.detach() for name, p in model.named_parameters()}
    loss = torch.func.grad(lambda p: F.cross_entropy(functional_call(model, p, (X,)), Y))
    return loss(own).values()


@pytest.mark.parametrize("gradients", [of_func, lambda m: map(torch.ones_like, m.parameters())])
def test_gradients_that_came_through_no_backward_pass_are_refused(gradients):
    model = net()
    optimizer = to.NGDT(model)
    for p, g in zip(model.parameters(), gradients(model), strict=True):
        p.grad = g
    with pytest.raises(to.InputError, match="or set by hand"):
        optimizer.step()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_remedy(name):
    make, says = REFUSED[name]
    model = make()

    def train():
        optimizer = to.NGDT(model)
        F.cross_entropy(model(WORDS).flatten(0, 1), WORDS.flatten()).backward()
        optimizer.step()

    with pytest.raises(to.InputError, match=says):
        train()
