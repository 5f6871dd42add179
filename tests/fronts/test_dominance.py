"""Non-dominated sets, dominated area and hulls against their definitions, counted by brute
force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.spatial import ConvexHull

from thermo_opt.fronts.dominance import attainable_hypervolume, hull, hypervolume, pareto_mask

GRID = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), min_size=1, max_size=14)


@given(GRID)
@settings(max_examples=120)
def test_the_nondominated_set_is_what_no_point_beats(points):
    x, y = np.array(points, dtype=float).T
    beaten = [
        any(a <= x[i] and b <= y[i] and (a < x[i] or b < y[i]) for a, b in zip(x, y, strict=True))
        for i in range(len(x))
    ]
    assert pareto_mask(x, y).tolist() == [not b for b in beaten]


@given(GRID, st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=120)
def test_the_dominated_area_is_the_count_of_dominated_cells(points, right, top):
    x, y = np.array(points, dtype=float).T
    cells = sum(any(a <= i and b <= j for a, b in points) for i in range(right) for j in range(top))
    assert hypervolume(x, y, (right, top)) == cells


@given(GRID)
@settings(max_examples=60)
def test_removing_a_dominated_point_changes_neither_set_nor_area(points):
    x, y = np.array(points, dtype=float).T
    kept = pareto_mask(x, y)
    assert pareto_mask(x[kept], y[kept]).all()
    assert hypervolume(x[kept], y[kept], (12, 12)) == hypervolume(x, y, (12, 12))


def test_unknown_points_are_never_in_the_set_and_hide_nothing():
    x, y = np.array([np.nan, 1.0, 2.0, np.inf]), np.array([0.0, 5.0, 4.0, 0.0])
    assert pareto_mask(x, y).tolist() == [False, True, True, False]


def test_no_points_dominate_no_area():
    assert hypervolume([3.0], [1.0], (2.0, 2.0)) == 0.0


@pytest.mark.parametrize(
    ("product", "corner"), [(1.0, (3.0, 2.0)), (0.2, (40.0, 7.0)), (5.0, (1.0, 2.0))]
)
def test_the_attainable_area_is_the_integral_above_the_hyperbola(product, corner):
    left = product / corner[1]
    expected = (
        quad(lambda t: corner[1] - product / t, left, corner[0])[0] if left < corner[0] else 0.0
    )
    assert attainable_hypervolume(product, corner) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_hull_has_the_corners_that_qhull_finds(seed):
    points = np.random.default_rng(seed).normal(size=(30, 2))
    assert sorted(hull(*points.T)) == sorted(ConvexHull(points).vertices)


@pytest.mark.parametrize(
    ("points", "ends"),
    [([(1, 1)], {0}), ([(0, 0), (1, 1), (3, 3), (2, 2)], {0, 2}), ([(2, 2), (2, 2)], {0, 1})],
)
def test_points_without_area_have_their_ends_for_a_hull(points, ends):
    found = set(hull(*np.array(points, dtype=float).T).tolist())
    assert found
    assert found <= ends
