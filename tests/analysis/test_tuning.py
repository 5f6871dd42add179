"""The tuner: central settings first, then towards the optimum; the best of what was tried, and
whether it is bracketed."""

import itertools
import math

import pytest

from analysis.tuning import TRIALS, best, bracketed, next_setting, thrifty

CENTRAL = (0.01, 0.03, 0.1)


def tune(loss, central=CENTRAL):
    """The scores after all trials on a known loss."""
    scores = {}
    for _ in range(TRIALS):
        setting = next_setting(central, scores)
        assert setting not in scores
        scores[setting] = loss(setting)
    return scores


def bowl(optimum):
    return lambda setting: math.log(setting / optimum) ** 2


@pytest.mark.parametrize("optimum", [0.001, 0.002, 0.005, 0.02, 0.03, 0.05, 0.2, 0.6, 1.0])
def test_an_optimum_within_a_decade_of_the_central_settings_is_approached_to_a_half_decade(optimum):
    scores = tune(bowl(optimum))
    assert len(scores) == TRIALS
    assert abs(math.log10(best(scores) / optimum)) <= 0.51
    assert scores[best(scores)] == min(scores.values())


@pytest.mark.parametrize("optimum", [0.02, 0.03, 0.05])
def test_an_interior_optimum_is_refined(optimum):
    scores = tune(bowl(optimum))
    assert bracketed(scores)
    assert (
        abs(math.log10(best(scores) / optimum)) <= 0.13
    )  # half of the quarter-decade that refinement leaves


def test_from_an_edge_it_goes_on_in_half_decades_and_says_when_it_has_not_arrived():
    rising = tune(lambda setting: -setting)
    assert sorted(rising) == [0.01, 0.03, 0.1, 0.3, 1.0]
    assert best(rising) == 1.0
    assert not bracketed(rising)
    assert sorted(tune(lambda setting: setting)) == [0.001, 0.003, 0.01, 0.03, 0.1]


def test_runs_that_diverge_lose_and_lead_to_lower_settings():
    for bad in (math.nan, math.inf):
        scores = tune(lambda setting, bad=bad: bad if setting > 0.004 else -setting)
        assert best(scores) == 0.003
        assert bracketed(scores)
        assert best(tune(lambda _, bad=bad: bad)) == 0.001


def test_every_method_of_the_studies_starts_from_three_half_decades():
    from analysis.methods import METHODS, grid

    for method in METHODS:
        assert len(grid(method)) == 3
        steps = [math.log10(b / a) for a, b in itertools.pairwise(grid(method))]
        assert steps == pytest.approx([0.5, 0.5], abs=0.03)


def test_the_thrifty_setting_is_the_smallest_that_is_good_enough():
    scores = {0.01: 1.2, 0.03: 0.9, 0.1: 0.8, 0.3: math.nan}
    assert thrifty(scores, {1.0: 0.95, 3.0: 2.0}) == 0.03
    assert thrifty(scores, {1.0: 0.8}) is None  # the best alone
    assert thrifty(scores, {1.0: 0.7}) is None  # not even that
    assert thrifty(scores, {1.0: math.nan}) is None
