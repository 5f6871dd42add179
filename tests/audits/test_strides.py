"""The same run recorded at every step and thinned: what an audit says of the thinned run is true of
the whole."""

import re

import numpy as np
import pytest

import thermo_opt as to
from thermo_opt.describe.sentences import closest, explanation, headline
from thermo_opt.describe.standing import standing

RNG = np.random.default_rng(4)
Y = RNG.integers(0, 3, 30)


def wandering(shape, pull):
    return np.cumsum(0.15 * RNG.normal(size=(101, *shape)) + 0.03 * pull, axis=0)


RUNS = {
    "classes": lambda: (wandering((30, 3), np.eye(3)[Y]), Y, {}),
    "bfloat16": lambda: (
        (wandering((30, 3), np.eye(3)[Y]).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(
            np.float32
        ),
        Y,
        {},
    ),
    "means": lambda: (wandering((30, 2), 1.0), np.ones((30, 2)), {"kind": "mean", "sigma2": 0.5}),
    "labels": lambda: (
        wandering((30, 4), 1.0),
        RNG.integers(0, 2, (30, 4)),
        {"likelihood": "bernoulli"},
    ),
}
TOLERANCE = 1e-9
SIDES = {
    "exact": lambda seen, whole: seen == pytest.approx(whole, rel=1e-9),
    "at least": lambda seen, whole: seen <= whole * (1 + TOLERANCE),
    "at most": lambda seen, whole: seen >= whole * (1 - TOLERANCE),
}


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("stride", [2, 5, 10, 50])
def test_every_number_and_sentence_of_a_thinned_run_is_true_of_the_whole(kind, stride):
    z, y, options = RUNS[kind]()
    steps = np.arange(len(z))
    whole = to.audit_predictions(z, y, steps=steps, **options).summary
    thinned = to.audit_predictions(z[::stride], y, steps=steps[::stride], **options)
    seen = thinned.summary
    for key, value in seen.items():
        side = standing(seen, key)
        if isinstance(value, float) and side in SIDES and key not in ("stride",):
            assert SIDES[side](value, whole[key]), (key, side, value, whole[key])
    assert seen["alignment"] is seen["alignment_lower"] is None
    said = " ".join([headline(seen), *explanation(closest(thinned))]).replace("\u00a0", " ")
    assert "lay along" not in said
    assert f"at least {headline(seen).split('at least ')[1].split(' ')[0]}" in said
    most = float(re.search(r"at most ([\d.]+) % of it was unavoidable", said).group(1))
    assert most >= 100 * whole["efficiency"] * 0.98
    amount = float(re.search(r"dissipated at least ([\d.]+) ", said).group(1))
    assert amount <= whole["dissipation"] * 1.005


@pytest.mark.parametrize("name", ["digits-sgd", "digits-adam-minibatch"])
def test_a_recorded_run_at_every_stride(name):
    run = to.load_run(f"data/{name}")
    whole = to.audit(run, lens="outputs").summary
    for stride in (2, 5, 10, 50):
        seen = to.audit(run, lens="outputs", stride=stride).summary
        for key, value in seen.items():
            side = standing(seen, key)
            if isinstance(value, float) and side in SIDES and key != "stride":
                assert SIDES[side](value, whole[key]), (stride, key, side)
