"""Which passes a loss came from: found in whatever way the model is called, or refused in a
sentence before a weight moves."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import thermo_opt as to
from thermo_opt.fisher.likelihoods import Categorical as to_softmax
from thermo_opt.optim.forward_pass import ForwardPass, effective_terms, of_one_loss

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :4].argmax(1)


class Net(nn.Module):
    """Two parts, and a choice of what is returned."""

    def __init__(self, returns="tensor"):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 12), nn.Tanh())
        self.head = nn.Linear(12, 4)
        self.returns = returns

    def forward(self, x, y=None):
        h = self.body(x)
        out = self.head(h)
        loss = None if y is None else F.cross_entropy(out, y)
        return {
            "tensor": out,
            "tuple": (loss, out),
            "dict": {"prediction": out},
            "logits": {"loss": loss, "logits": out, "features": out.detach()},
            "loss": loss,
            "half copy": out.to(torch.bfloat16),
            "hidden states first": (h, out),
            "unused": (out, self.body(x)),
            "distribution": Categorical(logits=out),
        }[self.returns]


class Wrapper(nn.Module):
    """What many trainers are given: the network is a part of the module."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y):
        return F.cross_entropy(self.net(x), y)


def run(model, loss, steps=8, **options):
    """The optimizer after some steps, and the worst realised KL over the budget."""
    optimizer = to.NGDT(model, **options)
    worst = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        worst = max(worst, (optimizer.last_step["realised"] or 0.0) / 0.03)
    return optimizer, worst


class TwoHeads(nn.Module):
    """Two sets of classes, or classes and a value, in whatever container."""

    def __init__(self, width, returns):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 12), nn.Tanh())
        self.classes, self.more, self.returns = nn.Linear(12, 4), nn.Linear(12, width), returns

    def forward(self, x):
        h = self.body(x)
        return self.returns(self.classes(h), self.more(h))

    def each(self, x):
        """Predictions of both, however they are returned."""
        h = self.body(x)
        return self.classes(h), self.more(h)


TARGETS = {3: X[:, 3:].argmax(1), 1: X.sum(1, keepdim=True)}


def two(classes, more):
    """Two cross-entropies, or one and a squared error."""
    width = more.shape[1]
    other = F.cross_entropy if width > 1 else F.mse_loss
    return F.cross_entropy(classes, Y) + other(more, TARGETS[width])


def actor_and_critic(m):
    h = m.body(X)
    return two(m.classes(h), m.more(h))


FOUND = {
    "a tensor": (Net(), lambda m: F.cross_entropy(m(X), Y)),
    "a tuple that starts with the loss": (Net("tuple"), lambda m: m(X, Y)[0]),
    "a dictionary of one tensor": (Net("dict"), lambda m: F.cross_entropy(m(X)["prediction"], Y)),
    "a dictionary with logits": (Net("logits"), lambda m: m(X, Y)["loss"]),
    "a part that is called instead": (Wrapper(Net()), lambda m: F.cross_entropy(m.net(X), Y)),
    "a loss, the predictions inside": (Wrapper(Net()), lambda m: m(X, Y)),
    "a copy in another precision": (Net("half copy"), lambda m: F.cross_entropy(m(X).float(), Y)),
    "hidden states, then predictions": (
        Net("hidden states first"),
        lambda m: F.cross_entropy(m(X)[1], Y),
    ),
    "a tuple with outputs that the loss doesn't use": (
        Net("unused"),
        lambda m: F.cross_entropy(m(X)[0], Y),
    ),
    "a distribution": (Net("distribution"), lambda m: -m(X).log_prob(Y).mean()),
    "parts called one after the other": (Net(), lambda m: F.cross_entropy(m.head(m.body(X)), Y)),
    "a loss alone, of parts that follow on each other": (Net("loss"), lambda m: m(X, Y)),
}
HEADS = {
    "a tuple of two sets of classes": (TwoHeads(3, lambda a, b: (a, b)), lambda m: two(*m(X))),
    "a dictionary of two": (
        TwoHeads(3, lambda a, b: {"one": a, "other": b}),
        lambda m: two(*m(X).values()),
    ),
    "a policy and a value": (TwoHeads(1, lambda a, b: (a, b)), lambda m: two(*m(X))),
    "a value and a distribution": (
        TwoHeads(1, lambda a, b: (b[:, 0], Categorical(logits=a))),
        lambda m: two((out := m(X))[1].logits, out[0][:, None]),
    ),
    "two heads of one body, each part called": (TwoHeads(1, None), actor_and_critic),
}
FOUND |= HEADS


@pytest.mark.parametrize("case", HEADS)
def test_every_head_is_measured(case):
    model, loss = copy.deepcopy(HEADS[case][0]), HEADS[case][1]
    calibration = to.optim.Calibration(predictions=None)
    optimizer, softmax = to.NGDT(model, calibration=calibration), to_softmax()
    for _ in range(6):
        before = model.each(X)
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        parts = [
            softmax.kl(f, now) if f.shape[1] > 1 else 0.5 * (f - now).square().sum(1)
            for f, now in zip(before, model.each(X), strict=True)
        ]
        mean = float(torch.stack(parts).mean().detach())
        assert optimizer.last_step["realised"] == pytest.approx(mean, rel=0.05)


@pytest.mark.parametrize("case", FOUND)
def test_predictions_are_found_in(case):
    model, loss = copy.deepcopy(FOUND[case][0]), FOUND[case][1]
    optimizer, worst = run(model, loss)
    assert optimizer.last_step["kappa"] != 1.0
    assert worst < 2
    assert loss(model) < loss(FOUND[case][0]) - 0.1


@pytest.mark.parametrize("case", [c for c in FOUND if c not in HEADS and "precision" not in c])
def test_training_is_the_same_however_predictions_are_returned(case):
    torch.manual_seed(0)
    plain = Net()
    run(plain, lambda m: F.cross_entropy(m(X), Y))
    model = Wrapper(Net()) if isinstance(FOUND[case][0], Wrapper) else Net(FOUND[case][0].returns)
    run(model, FOUND[case][1])
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


class InsideLoss(Net):
    """Mixed precision as trainers do it: the loss from the model's own half-precision predictions,
    and a float32 copy of them returned."""

    def forward(self, x, y):
        out = self.head(self.body(x)).to(torch.bfloat16)
        return {"loss": F.cross_entropy(out.float(), y), "logits": out.float()}


def test_a_returned_copy_outside_the_graph_of_the_loss_is_seen_through():
    _, worst = run(InsideLoss(), lambda m: m(X, Y)["loss"])
    assert worst < 2


class Ends(nn.Module):
    """Question answering: logits of where the answer starts and ends."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 10)

    def forward(self, x):
        start, end = self.layer(x).chunk(2, -1)
        return {"start_logits": start, "end_logits": end}


def test_the_two_predictions_of_question_answering_are_both_counted():
    def loss(model):
        out = model(X)
        return (F.cross_entropy(out["start_logits"], Y) + F.cross_entropy(out["end_logits"], Y)) / 2

    model = Ends()
    optimizer, worst = run(model, loss)
    assert worst < 2
    loss(model).backward()
    assert optimizer._recorder.used()[0].terms == 2 * len(X)


class Packed(nn.Module):
    """Sequences of unequal length, packed inside the model, or returned packed."""

    def __init__(self, returns):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 4)
        self.returns = returns

    def forward(self, x):
        given = x if self.returns else pack_padded_sequence(x, LENGTHS, batch_first=True)
        data, *order = self.layer(given)[0]
        return PackedSequence(self.head(data), *order) if self.returns else self.head(data)


LENGTHS = torch.tensor([6] * 4 + [3] * 8)


@pytest.mark.parametrize("returns", [False, True])
def test_packed_sequences_are_repeated_whole_and_nothing_is_said_of_them(returns):
    rows = X[:, None].expand(48, 6, 6)[:12] + torch.arange(6)[:, None] / 10
    packed = pack_padded_sequence(rows, LENGTHS, batch_first=True)
    labels = packed.data[:, :4].argmax(1)
    given = packed if returns else rows

    def loss(model):
        out = model(given)
        return F.cross_entropy(out.data if returns else out, labels)

    model = Packed(returns)
    before = loss(model).item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, worst = run(model, loss)
    assert optimizer.meter.way == "whole"
    assert worst < 2
    assert loss(model).item() < before


def test_parameters_of_no_dimension_are_trained():
    """A temperature and an offset, as of CLIP and of DeepONet."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 4)
            self.temperature = nn.Parameter(torch.tensor(0.5))
            self.offset = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.temperature.exp() * self.layer(x).tanh() + self.offset

    model = Scaled()
    with pytest.warns(UserWarning, match="diagonal"):
        _, worst = run(model, lambda m: F.cross_entropy(m(X), Y))
    assert worst < 2
    assert float(model.temperature.detach()) != 0.5


def test_predictions_that_cannot_be_put_beside_the_first_are_named():
    class Tagger(nn.Module):
        """Classes of each place, and of the whole."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.places, self.whole = nn.Linear(1, 4), nn.Linear(6, 4)

        def forward(self, x):
            return {"places": self.places(x[..., None]), "whole": self.whole(x), "x": x}

    model = Tagger()
    optimizer = to.NGDT(model)
    out = model(X)
    (
        F.cross_entropy(out["places"].mT, (X > 0).long()) + F.cross_entropy(out["whole"], Y)
    ).backward()
    with pytest.warns(UserWarning, match=r"those like the first, \(48, 6, 4\)"):
        optimizer.step()


@pytest.mark.parametrize("case", ["a policy and a value", "hidden states, then predictions"])
def test_a_metric_of_the_minibatch_takes_one_tensor_of_predictions(case):
    model, loss = copy.deepcopy(FOUND[case][0]), FOUND[case][1]
    optimizer = to.NGDT(model, metric="exact")
    loss(model).backward()
    with pytest.raises(to.InputError, match="return the predictions alone"):
        optimizer.step()


def test_labels_are_drawn_for_every_head():
    model, loss = copy.deepcopy(HEADS["a policy and a value"][0]), HEADS["a policy and a value"][1]
    before = loss(model)
    optimizer, worst = run(model, loss, metric=to.optim.KFAC(fisher_type="mc"))
    assert worst < 2
    assert loss(model) < before - 0.1
    assert all(float(block.trace()) > 1e-3 for block in optimizer.metric.blocks)


REFUSED = {
    "parts with something computed between them": (
        Net(),
        lambda m: F.cross_entropy(m.head(m.body(X).relu()), Y),
        "'head' was given something that was computed between",
    ),
    "a part's result that was changed in place": (
        Net(),
        lambda m: F.cross_entropy(m.head(m.body[0](X).add_(1)), Y),
        "'head' was given something that was computed between",
    ),
    "parameters used without any module": (
        Net(),
        lambda m: F.cross_entropy(F.linear(X[:, :4], m.head.weight[:, :4]), Y),
        "none came through predictions",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_weight_moves(case):
    model, loss, says = REFUSED[case]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = to.NGDT(model)
    loss(model).backward()
    with pytest.raises(to.InputError, match=says):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_train_as_without_checkpoints(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=reentrant))

    plain, checkpointed = Net(), Checkpointed()
    x = X.clone().requires_grad_()  # reentrant checkpoints need it
    run(plain, lambda m: F.cross_entropy(m(x), Y))
    run(checkpointed, lambda m: F.cross_entropy(m(x), Y))
    for p, q in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("order", [1, -1])
def test_all_passes_of_one_loss_are_measured(order):
    """The last, or the largest, may hardly change where another one changes much."""
    views = (X, 0.01 * X[:30])[::order]

    def predictions(m):
        return [m(x) for x in views]

    model, softmax = Net(), to_softmax()
    optimizer = to.NGDT(model, calibration=to.optim.Calibration(predictions=None))
    for _ in range(6):
        before = predictions(model)
        optimizer.zero_grad()
        sum(F.cross_entropy(f, Y[: len(f)]) / 2 for f in before).backward()
        optimizer.step()
        after = predictions(model)
        kl = torch.cat([softmax.kl(f, now) for f, now in zip(before, after, strict=True)])
        assert optimizer.last_step["realised"] == pytest.approx(float(kl.mean()), rel=0.05)


def test_of_an_accumulated_batch_one_part_is_measured():
    model = Net()
    optimizer = to.NGDT(model)
    for part in range(3):
        F.cross_entropy(model(X[16 * part :][:16]), Y[16 * part :][:16]).div(3).backward()
    seen = of_one_loss(optimizer._recorder.used())
    assert [len(one.outputs) for one in seen] == [16]
    assert torch.equal(seen[0].args[0], X[32:])


# ---- parts of unequal size


def part(terms, weight):
    """A pass whose terms each have the weight ``weight`` in the loss."""
    seen = ForwardPass(nn.Identity(), (), {}, torch.zeros(terms, 4))
    g = torch.full((terms, 4), weight / 4)
    seen.receive(0, g)
    return seen


def test_the_effective_number_of_terms_is_their_number_where_all_weigh_the_same():
    assert effective_terms([part(24, 1 / 64), part(24, 1 / 64), part(16, 1 / 64)]) == pytest.approx(
        64
    )


def test_means_of_unequal_parts_average_over_fewer_terms_than_there_are():
    parts = [part(24, 1 / 72), part(24, 1 / 72), part(16, 1 / 48)]
    harmonic = 3**2 / (1 / 24 + 1 / 24 + 1 / 16)
    assert effective_terms(parts) == pytest.approx(harmonic)
    assert effective_terms(parts) < 64


@pytest.mark.parametrize("normalised", ["per part", "over all"])
def test_a_smaller_last_part_changes_little(normalised):
    def parts(model):
        loss = 0.0
        for chunk in (slice(0, 20), slice(20, 40), slice(40, 48)):
            size = chunk.stop - chunk.start
            weight = 1 / 3 if normalised == "per part" else size / 48
            loss = loss + weight * F.cross_entropy(model(X[chunk]), Y[chunk])
        return loss

    _, worst = run(Net(), parts, steps=12)
    assert worst < 2


def test_two_passes_of_different_size_in_one_loss_are_one_step():
    def loss(model):
        return F.cross_entropy(model(X), Y) + F.cross_entropy(model(X[:7]), Y[:7])

    _, worst = run(Net(), loss, steps=12)
    assert worst < 2
