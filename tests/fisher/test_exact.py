"""The matrix-free Fisher: independent judge, fall-backs, memory, recorded parameters, and bad
input."""

import copy
import math
import warnings

import pytest
import torch
import torch.utils.checkpoint
from curvlinops import EFLinearOperator, GGNLinearOperator
from torch import nn

from tests.oracles.dense_fisher import dense_fisher, small_cases
from thermo_opt.errors import InputError
from thermo_opt.fisher import Batch, gradient, kl, loss, make
from thermo_opt.fisher.certificate import gradient_norm
from thermo_opt.fisher.metric import flatten, unflatten

CASES = small_cases()


def randn_like(metric, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(metric.dtype)
        for s in metric.shapes
    ]


@pytest.mark.parametrize(
    ("kind", "operator"), [("exact", GGNLinearOperator), ("empirical", EFLinearOperator)]
)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_agrees_with_curvlinops(name, kind, operator):
    model, x, y = CASES[name]
    judge = operator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], check_deterministic=False
    )
    metric = make(kind, model, (x, y))
    for _ in range(4):
        v = randn_like(metric)
        torch.testing.assert_close(metric.matvec(v), list(judge @ v), rtol=1e-8, atol=1e-12)


def test_sequences_agree_with_curvlinops_where_every_position_counts():
    model, x, y = CASES["transformer"]
    y = y.clamp(min=0)

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, tokens):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return self.inner(tokens).flatten(0, 1)

    flat = Flat()
    judge = GGNLinearOperator(
        flat,
        nn.CrossEntropyLoss(),
        list(flat.parameters()),
        [(x, y.flatten())],
        check_deterministic=False,
        num_data=2,
    )
    metric = make("exact", model, (x, y))
    v = randn_like(metric)
    torch.testing.assert_close(metric.matvec(v), list(judge @ v), rtol=1e-8, atol=1e-12)


class Branching(nn.Module):
    """Control flow that depends on the data: torch.func can't vectorise it over examples."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x) if float(x[0, 0]) > 0 else self.b(torch.tanh(x))


def test_data_dependent_control_flow():
    torch.manual_seed(0)
    model = Branching().double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    x[0, 0] = x[1, 0].abs() + 0.1
    whole = make("exact", model, (x, y))
    v = randn_like(whole)
    assert whole.matvec(v)[2].abs().max() == 0  # the batch took the first branch as one
    one_by_one = make("exact", model, (x, y), microbatch=1)
    torch.testing.assert_close(one_by_one.dense(), dense_fisher(model, x, y))
    with pytest.warns(UserWarning, match="one backward pass a row"):
        scores = make("low-rank", model, (x, y))
    torch.testing.assert_close(scores.dense(), dense_fisher(model, x, y), rtol=1e-8, atol=1e-12)
    assert any("one backward pass a row" in note for note in scores.notes)


class _NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, u):
        return u * ctx.saved_tensors[0].cos()


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, u):
        return u * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, t):
        return t * ctx.saved_tensors[0].cos()


class _Neither(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, u):
        return u * ctx.saved_tensors[0].cos()


class _Hidden(_NoSecondDerivative):
    """A backward that multiplies outside autograd's sight: second derivatives come out silently
    wrong."""

    @staticmethod
    def backward(ctx, u):
        return u.detach() * ctx.saved_tensors[0].cos() + 0 * u


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 5), nn.Linear(5, 3), function

    def forward(self, x):
        return self.last(self.function.apply(self.first(x)))


@pytest.mark.parametrize(
    ("function", "note"),
    [
        (_NoForwardMode, "double-backward used"),
        (_NoSecondDerivative, "forward mode used throughout"),
        (_Hidden, "forward mode used throughout"),
    ],
)
def test_falls_back_by_name_where_an_operation_lacks_a_derivative(function, note):
    torch.manual_seed(0)
    model = Custom(function).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    F = dense_fisher(model, x, y)
    metric = make("exact", model, (x, y))

    def check():
        for seed in range(4):
            v = randn_like(metric, seed)
            assert metric.quadratic(v) == pytest.approx(float(flatten(v) @ F @ flatten(v)))
            torch.testing.assert_close(flatten(metric.matvec(v)), F @ flatten(v))

    with pytest.warns(UserWarning, match=note):
        check()
    assert sum(note in n for n in metric.notes) == 1


def test_no_way_to_differentiate_is_an_error_with_a_remedy():
    torch.manual_seed(0)
    model = Custom(_Neither)
    metric = make("exact", model, (torch.randn(5, 4), torch.randint(3, (5,))))
    with (
        pytest.warns(UserWarning, match="double-backward"),
        pytest.raises(InputError, match="neither in forward mode nor twice"),
    ):
        metric.matvec(randn_like(metric))
    with pytest.warns(UserWarning, match="one backward pass a row"):
        remedy = make("low-rank", model, metric.predictor.batch)
    assert remedy.quadratic(randn_like(metric)) > 0


def test_dropout_and_batchnorm_are_frozen_and_said_so():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 3)
    )
    model = model.double().train()
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    with pytest.warns(UserWarning, match="BatchNorm1d, Dropout evaluated in evaluation mode"):
        metric = make("exact", model, (x, y))
    frozen = copy.deepcopy(model).eval()
    torch.testing.assert_close(metric.dense(), dense_fisher(frozen, x, y))
    assert all(m.training for m in model.modules())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("exact", frozen, (x, y)).matvec(randn_like(metric))


def test_in_place_modules():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    in_place = nn.Sequential(plain[0], nn.ReLU(inplace=True), plain[2])
    batch = (torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,)))
    for kind in ("exact", "low-rank", "empirical", "diagonal"):
        metric = make(kind, in_place, batch)
        v = randn_like(metric)
        for _ in range(4):
            torch.testing.assert_close(metric.matvec(v), make(kind, plain, batch).matvec(v))


def test_values_are_those_when_built_and_recorded_values_override():
    model, x, y = CASES["mlp"]
    model = copy.deepcopy(model)
    metric = make("exact", model, (x, y))
    v = randn_like(metric)
    recorded = {name: p.detach().clone() for name, p in model.named_parameters()}
    before, start = metric.quadratic(v), loss(model, (x, y))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3)
    for _ in range(4):
        assert metric.quadratic(v) == pytest.approx(before, rel=1e-12)
    assert make("exact", model, (x, y), parameters=recorded).quadratic(v) == before
    assert make("exact", model, (x, y)).quadratic(v) != pytest.approx(before)
    assert loss(model, (x, y), parameters=recorded) == start
    assert loss(model, (x, y)) != pytest.approx(start)
    with pytest.raises(InputError, match="no parameter or buffer 'nope'"):
        make("exact", model, (x, y), parameters={"nope": torch.zeros(1)})
    with pytest.raises(InputError, match="has shape"):
        make("exact", model, (x, y), parameters={"0.weight": torch.zeros(1)})


@pytest.mark.parametrize("name", CASES)
def test_kl_is_half_the_quadratic_form_of_a_small_step(name):
    model, x, y = CASES[name]
    metric = make("exact", model, (x, y))
    step = [1e-4 * t for t in randn_like(metric)]
    moved = {n: p.detach() + d for (n, p), d in zip(model.named_parameters(), step, strict=True)}
    half = 0.5 * metric.quadratic(step)
    assert kl(model, (x, y), None, moved) == pytest.approx(half, rel=5e-3)
    assert kl(model, (x, y), None, None) == 0.0
    predicted = float(flatten(gradient(model, (x, y))) @ flatten(step))
    change = loss(model, (x, y), parameters=moved) - loss(model, (x, y))
    assert change == pytest.approx(predicted, abs=1e-6)


def test_loss_and_gradient_do_not_depend_on_microbatches():
    for model, x, y in CASES.values():
        f = model(x).flatten(0, -2)
        truth = nn.functional.cross_entropy(f, y.flatten())
        grads = torch.autograd.grad(truth, list(model.parameters()))
        for microbatch in (None, 1, 2):
            assert loss(model, (x, y), microbatch=microbatch) == pytest.approx(
                float(truth.detach())
            )
            torch.testing.assert_close(gradient(model, (x, y), microbatch=microbatch), list(grads))


class Structured(nn.Module):
    """Takes keyword inputs and returns an object with .logits, a tuple or a mapping."""

    def __init__(self, form):
        super().__init__()
        self.layer, self.form = nn.Linear(4, 3), form

    def forward(self, x, scale):
        f = self.layer(x * scale)
        if self.form == "tuple":
            return f, x
        return {"logits": f} if self.form == "mapping" else type("Output", (), {"logits": f})()


@pytest.mark.parametrize("form", ["tuple", "mapping", "object"])
def test_structured_inputs_and_outputs(form):
    torch.manual_seed(0)
    model = Structured(form)
    x, s, y = torch.randn(6, 4), torch.rand(6, 1), torch.randint(3, (6,))
    reference = make("exact", model.layer, (x * s, y))
    v = randn_like(reference)
    for inputs in ((x, s), {"x": x, "scale": s}):
        for kind in ("exact", "low-rank"):
            for options in ({}, {"microbatch": 4}):
                metric = make(kind, model, Batch(inputs, y), **options)
                torch.testing.assert_close(
                    metric.matvec(v), reference.matvec(v), rtol=1e-4, atol=1e-6
                )


def test_frozen_parameters_and_tied_weights_count_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    model[3].weight.requires_grad_(False)
    metric = make("exact", model, (torch.randn(5, 4), torch.randint(3, (5,))))
    assert metric.names == ("0.weight", "0.bias", "2.bias", "3.bias")
    assert metric.size == 16 + 4 + 4 + 3


def test_memory_does_not_grow_with_the_batch_at_fixed_microbatch():
    model = nn.Sequential(
        nn.Linear(8, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 3)
    )

    def saved(n):
        """Most bytes autograd holds at once during a matvec."""
        metric = make("exact", model, (torch.randn(n, 8), torch.randint(3, (n,))), microbatch=16)
        v, held, peak = randn_like(metric), {}, [0]

        def pack(t):
            held[id(t)] = t.numel()
            peak[0] = max(peak[0], max(held.values()))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            for _ in range(3):
                metric.matvec(v)
        assert metric._linear is None
        return peak[0]

    assert saved(32) == saved(256)


def test_zero_gradient_and_zero_fisher():
    model = nn.Linear(3, 2).double()
    metric = make(
        "exact",
        model,
        (torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.long)),
        damping=0.1,
    )
    zero = metric.zeros()
    for kind in ("exact", "low-rank", "dense", "diagonal"):
        m = make(
            kind,
            model,
            (torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.long)),
            damping=0.1,
        )
        assert m.dual_norm(zero) == (0.0, 0.0)
        assert m.quadratic(zero) == 0.0
    sure = nn.Linear(3, 2).double()
    nn.init.zeros_(sure.weight)
    sure.bias.data = torch.tensor([800.0, -800.0], dtype=torch.float64)
    batch = (torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.long))
    for kind in ("exact", "low-rank", "dense"):
        m = make(kind, sure, batch)  # p = (1, 0): F = 0 and g = 0
        v = randn_like(m)
        assert m.quadratic(v) == 0.0
        assert m.dual_norm(v) == (0.0, 0.0)  # F⁺ = 0
        inside, outside = m.split(v)
        assert float(flatten(inside).norm()) == 0.0
        torch.testing.assert_close(outside, v)
        facts = m.diagnostics()
        assert facts["rank"] == 0
        assert facts["condition"] is None
        assert "F = 0" in facts["reason"]
    assert gradient_norm(make("exact", sure, batch, damping=1e-3)) == (0.0, 0.0)


def test_probabilities_as_logits_are_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.Softmax(-1))
    with pytest.raises(InputError, match="look like probabilities"):
        make("exact", model, (torch.randn(4, 3), torch.zeros(4, dtype=torch.long)))


def test_non_finite_activations_name_their_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batch = (torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
    model[0].bias.data[:] = 1e38
    model[2].weight.data[:] = 1e10
    with pytest.raises(InputError, match=r"first appear in module 2 \(Linear\)"):
        make("exact", model, batch)
    model[2].weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match=r"parameter '2\.weight' holds NaN"):
        make("exact", model, batch)
    clean = nn.Linear(3, 2)
    with pytest.raises(InputError, match="inputs hold NaN"):
        make("exact", clean, (torch.full((4, 3), math.nan), batch[1]))


def test_large_finite_outputs_are_no_overflow():
    model = nn.Linear(3, 2)
    model.bias.data[:] = 3e38
    assert (
        make("exact", model, (torch.randn(4, 3), torch.zeros(4, dtype=torch.long))).predictor.count
        == 4
    )


def test_bad_arguments():
    model, x, y = CASES["mlp"]
    with pytest.raises(InputError, match="not one of exact"):
        make("fisher", model, (x, y))
    with pytest.raises(InputError, match="damping"):
        make("exact", model, (x, y), damping=-1.0)
    with pytest.raises(InputError, match="microbatch"):
        make("exact", model, (x, y), microbatch=0)
    with pytest.raises(InputError, match="7 inputs but targets"):
        make("exact", model, (x, y[:3]))
    with pytest.raises(InputError, match="empty"):
        make("exact", model, (x[:0], y[:0]))
    with pytest.raises(InputError, match="needs targets"):
        make("empirical", model, x)
    with pytest.raises(InputError, match="fisher_type must be one of"):
        make("low-rank", model, (x, y), fisher_type="real")
    with pytest.raises(InputError, match="no trainable parameters"):
        make("exact", nn.Tanh(), (x, y))
    metric = make("exact", model, x)  # targets aren't needed for the true Fisher
    with pytest.raises(InputError, match=r"for parameter '0\.weight'"):
        metric.matvec([t.T if t.dim() == 2 else t for t in metric.zeros()])
    with pytest.raises(InputError, match="tensors but the model has"):
        metric.solve(metric.zeros()[1:])
    with pytest.raises(InputError, match="needs targets"):
        gradient_norm(make("exact", model, x, damping=1.0))


def test_null_space_of_a_batch_too_large_to_decompose_is_refused(monkeypatch):
    model, x, y = CASES["mlp"]
    monkeypatch.setattr("thermo_opt.fisher.exact.ENTRIES_LIMIT", 10)
    metric = make("exact", model, (x, y))
    for method in (metric.solve, metric.dual_norm, metric.split):
        with pytest.raises(InputError, match="score matrix, too large here"):
            method(metric.zeros())
    monkeypatch.setattr("thermo_opt.fisher.exact.SPECTRUM_WORK", 10)
    facts = metric.diagnostics()
    assert facts["rank"] is None
    assert facts["trace"] == pytest.approx(float(dense_fisher(model, x, y).trace()))


def test_flatten_and_unflatten_are_inverse():
    metric = make("exact", *CASES["mlp"][:2])
    v = randn_like(metric)
    torch.testing.assert_close(unflatten(flatten(v), metric.shapes), v, rtol=0, atol=0)


def assert_products(metric, F):
    """Five products, the first two in forward mode and the others linearised."""
    for seed in range(5):
        v = randn_like(metric, seed)
        torch.testing.assert_close(flatten(metric.matvec(v)), F @ flatten(v))


@pytest.mark.parametrize(
    "activation",
    [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.SiLU(inplace=True), nn.Mish(), nn.ELU()],
)
def test_linearised_products_with_slopes_computed_once(activation):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), activation, nn.Linear(5, 5), activation, nn.Linear(5, 3)
    ).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    F = dense_fisher(model, x, y)
    metric = make("exact", model, (x, y))
    assert_products(metric, F)
    assert metric._linear is not None


@pytest.mark.parametrize("activation", [torch.tanh, nn.functional.gelu])
def test_a_model_that_maps_itself_over_its_examples(activation):
    """Inside the model's own vmap the rules for single operations step aside."""

    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 5), nn.LayerNorm(5)

        def forward(self, x):
            return torch.func.vmap(lambda row: activation(self.norm(self.linear(row))))(x)

    torch.manual_seed(0)
    model = Mapped().double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 5
    F = dense_fisher(model, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = make("exact", model, (x, y))
        assert_products(metric, F)


@pytest.mark.parametrize("activation", [torch.tanh, nn.functional.gelu])
def test_checkpointed_layers_are_not_replaced(activation):
    """Square shapes: a recomputed layer that saved other tensors than before would go unnoticed."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.head = nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 5)

        def body(self, x):
            return activation(self.norm(self.linear(x)))

        def forward(self, x):
            return self.head(torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False))

    torch.manual_seed(0)
    model = Checkpointed().double()
    x, y = torch.randn(5, 5, dtype=torch.float64), torch.arange(5)
    F = dense_fisher(model, x, y)
    metric = make("exact", model, (x, y))
    assert_products(metric, F)
    assert metric._linear is not None
