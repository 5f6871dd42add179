"""What is unusual about a loss is said: its scale, weights, clipping, another likelihood, unseen
predictions."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import thermo_opt as to


def net(out: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, out))


def trained(
    loss: Callable[[Tensor, Tensor], Tensor], steps: int = 3, **options: object
) -> tuple[to.NGDT, list[str]]:
    """(the optimizer after some steps, what it warned of)."""
    model = net()
    optimizer = to.NGDT(model, **options)
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(steps):
            x = torch.randn(48, 10, generator=generator)
            y = torch.randint(5, (48,), generator=generator)
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    return optimizer, [str(one.message) for one in said]


@pytest.mark.parametrize("factor", [0.02, 1.0, 4.0, 300.0])
def test_the_factor_of_a_scaled_loss_is_found_exactly(factor: float) -> None:
    optimizer, said = trained(lambda f, y: factor * functional.cross_entropy(f, y))
    assert optimizer.last_step["loss_scale"] == pytest.approx(factor, rel=1e-3)
    assert any("times the mean negative log-likelihood" in text for text in said) == (factor != 1)


def test_binary_cross_entropies_tell_their_factor_too() -> None:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        hot = functional.one_hot(y, 5).float()
        return (
            7 * functional.binary_cross_entropy_with_logits(f, hot, reduction="none").sum(1).mean()
        )

    optimizer, _ = trained(loss, likelihood="bernoulli")
    assert optimizer.last_step["loss_scale"] == pytest.approx(7.0, rel=1e-3)


def test_predictions_too_certain_for_a_gradient_tell_no_scale() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1e3)
    x = torch.randn(48, 10, generator=torch.Generator().manual_seed(1))
    optimizer = to.NGDT(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f = model(x)
        functional.cross_entropy(f, f.detach().argmax(1)).backward()
        assert 0 < float(model[2].weight.grad.abs().max()) < 1e-2
        optimizer.step()
    assert optimizer.last_step["loss_scale"] is None


def test_accumulated_parts_have_the_scale_of_their_mean() -> None:
    model = net()
    optimizer = to.NGDT(model)
    for _ in range(2):
        part = functional.cross_entropy(model(torch.randn(24, 10)), torch.randint(5, (24,)))
        (part / 2).backward()
    optimizer.step()
    assert optimizer.last_step["loss_scale"] == pytest.approx(1.0, rel=1e-3)


def test_class_weights_are_no_scale() -> None:
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    _, said = trained(lambda f, y: functional.cross_entropy(f, y, weights, reduction="none").mean())
    assert any("weighted" in text for text in said)


BCE = functional.binary_cross_entropy
BCE_OF_LOGITS = functional.binary_cross_entropy_with_logits
SQUASHED = {
    "softmax twice": ("categorical", lambda f, y, hot: functional.cross_entropy(f.softmax(-1), y)),
    "sigmoid twice": ("bernoulli", lambda f, y, hot: BCE_OF_LOGITS(f.sigmoid(), hot)),
    "right classes": ("categorical", lambda f, y, hot: functional.cross_entropy(f, y)),
    "right labels": ("bernoulli", lambda f, y, hot: BCE(f.sigmoid(), hot)),
    "weighted labels": (
        "bernoulli",
        lambda f, y, hot: BCE_OF_LOGITS(f, hot, pos_weight=torch.tensor(9.0)),
    ),
}


@pytest.mark.parametrize("name", SQUASHED)
def test_a_softmax_or_sigmoid_too_many_is_named_as_what_it_is(name: str) -> None:
    likelihood, loss = SQUASHED[name]

    def of(f: Tensor, y: Tensor) -> Tensor:
        return loss(f, y, functional.one_hot(y, 5).float())

    _, said = trained(of, likelihood=likelihood)
    text = " ".join(said)
    assert ("for logits: drop that" in text) == name.endswith("twice"), said
    assert not (name.endswith("twice") and "weighted" in text)


def test_probabilities_taken_for_logits_are_named_as_such() -> None:
    model = nn.Sequential(net(1), nn.Sigmoid())
    optimizer = to.NGDT(model, likelihood="bernoulli")
    x = torch.randn(48, 10)
    y = (x[:, :1] > 0).float()
    functional.binary_cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="leave the model's sigmoid out"):
        optimizer.step()


def test_a_summed_loss_is_refused_and_returns_of_a_hundred_are_not() -> None:
    with pytest.raises(to.InputError, match="looks summed over its 48 terms"):
        trained(lambda f, y: functional.cross_entropy(f, y, reduction="sum"))
    returns = 100 * torch.rand(48)
    trained(lambda f, y: (returns * functional.cross_entropy(f, y, reduction="none")).mean())


@pytest.mark.parametrize(
    ("loss", "hint"),
    [
        (lambda f, y: functional.mse_loss(f, 3 * torch.ones_like(f)), "gaussian"),
        (lambda f, y: functional.nll_loss(f.abs().log(), y), "likelihood"),
    ],
)
def test_another_loss_than_the_likelihoods_is_named(loss: Callable, hint: str) -> None:
    _, said = trained(loss)
    assert any("no softmax cross-entropy" in text and hint in text for text in said)


def test_a_loss_that_is_spent_is_still_the_likelihoods() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([25.0, 0.0, 1.0, 2.0, 3.0]))
    optimizer = to.NGDT(model)
    loss = functional.cross_entropy(model(torch.randn(48, 10)), torch.zeros(48, dtype=torch.long))
    assert float(loss.detach()) < 1e-6
    loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_clipped_gradients_are_noticed_and_whole_ones_are_not() -> None:
    for most in (1e-3, 1e6):
        model = net()
        optimizer = to.NGDT(model)
        functional.cross_entropy(model(torch.randn(48, 10)), torch.randint(5, (48,))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), most)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.step()
        assert any("between backward() and step()" in str(w.message) for w in said) == (most < 1)
        assert optimizer.last_step["bound_by_eta_max"] == float(most < 1)


class Wrapped(nn.Module):
    """A model that returns its predictions beside something else, under any name."""

    def __init__(self, cast: bool = False) -> None:
        super().__init__()
        self.net, self.cast = net(), cast

    def forward(self, x: Tensor) -> dict[str, Tensor] | Tensor:
        f = self.net(x)
        if self.cast:  # what is returned is not what the loss is made of
            self.inner = f
            return f.double().float()
        return {"prediction": f, "features": x.square()}


def spent(model: nn.Module, predict: Callable[[Tensor], Tensor], steps: int = 12) -> list[float]:
    """Realised KL over the budget, step by step."""
    optimizer = to.NGDT(model, budget=0.01)
    x, y, ratios = torch.randn(64, 10), torch.randint(5, (64,)), []
    for _ in range(steps):
        before = predict(x)
        optimizer.zero_grad()
        functional.cross_entropy(before, y).backward()
        optimizer.step()
        p, q = before.detach().log_softmax(1), predict(x).detach().log_softmax(1)
        ratios.append(float((p.exp() * (p - q)).sum(1).mean()) / 0.01)
    return ratios


def test_predictions_under_any_name_are_found_by_backward() -> None:
    model = Wrapped()
    assert max(spent(model, lambda x: model(x)["prediction"])) < 1.3


def test_predictions_outside_the_losss_graph_are_used_all_the_same() -> None:
    model = Wrapped(cast=True)

    def predict(x: Tensor) -> Tensor:
        model(x)
        return model.inner

    assert max(spent(model, predict)) < 1.3


def test_a_part_that_is_called_instead_of_the_model_keeps_the_budget() -> None:
    model = Wrapped()
    assert max(spent(model, lambda x: model.net(x))) < 1.3


def test_last_step_keeps_its_keys_after_a_skipped_step() -> None:
    model = net()
    optimizer = to.NGDT(model)
    keys = []
    for x in (torch.randn(8, 10), torch.full((8, 10), torch.nan)):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), torch.randint(5, (8,))).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        keys.append(set(optimizer.last_step))
    assert keys[0] == keys[1]
