import numpy as np
import pytest

from lewm.diagnostics import collapse_grace, collapsing, distance_correlation, effective_rank, probe_r2, straightness


def test_effective_rank_counts_directions():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4000, 16))
    assert effective_rank(z) == pytest.approx(16, rel=0.02)
    assert effective_rank(z @ np.diag([1.0] * 4 + [0.0] * 12)) == pytest.approx(4, rel=0.02)
    assert effective_rank(np.ones((10, 5))) == 1.0


def test_probe_r2_sees_linear_states_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(600, 8)) * [1, 10, 0.1, 1, 1, 1, 1, 0]
    y = z @ rng.normal(size=(8, 2)) + [5, -300]
    assert probe_r2(z[:300], y[:300], z[300:], y[300:]) > 0.999
    noise = rng.normal(size=(600, 2))
    assert probe_r2(z[:300], noise[:300], z[300:], noise[300:]) < 0.05
    constant = np.c_[y, np.full(600, 3.0)]
    assert probe_r2(z[:300], constant[:300], z[300:], constant[300:]) > 0.999
    assert np.isnan(probe_r2(z[:300], constant[:300, 2:], z[300:], constant[300:, 2:]))


def test_distance_correlation_is_one_for_an_isometry_and_ignores_far_pairs():
    rng = np.random.default_rng(0)
    y = rng.uniform(0, 200, (500, 2))
    rotation = np.linalg.qr(rng.normal(size=(2, 2)))[0]
    assert distance_correlation(y @ rotation, y, rng) == pytest.approx(1, abs=1e-9)
    folded = np.abs(y - 100)  # near neighbours stay neighbours, far pairs come together
    assert 0.4 < distance_correlation(folded, y, rng) < 1
    assert abs(distance_correlation(rng.normal(size=(500, 4)), y, rng)) < 0.1
    assert np.isnan(distance_correlation(np.zeros((500, 4)), y, rng))


def test_straightness_is_one_on_lines_and_minus_one_where_paths_turn_back():
    line = np.arange(6.0)[:, None] * np.array([1.0, 2.0, -1.0])
    assert straightness(line) == pytest.approx(1)
    assert straightness(np.stack([line, line[::-1]])) == pytest.approx(1)
    assert straightness(np.array([[0.0], [1.0], [0.0], [1.0]])) == pytest.approx(-1)
    square = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    assert straightness(square) == pytest.approx(0, abs=1e-12)


def test_straightness_of_a_random_walk_is_about_zero_and_of_random_points_minus_a_half():
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((200, 20, 16))
    assert straightness(steps.cumsum(1)) == pytest.approx(0, abs=0.02)
    assert straightness(steps) == pytest.approx(-0.5, abs=0.02)


def test_straightness_leaves_out_steps_without_a_direction():
    assert straightness(np.array([[0.0, 0], [1, 0], [1, 0], [2, 0], [3, 0]])) == pytest.approx(1)
    assert np.isnan(straightness(np.zeros((4, 5, 3))))
    assert np.isnan(straightness(np.zeros((4, 2, 3))))


def test_effective_rank_of_more_numbers_than_rows_and_of_one():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(20, 3)) @ rng.normal(size=(3, 90)) + 4
    values = np.linalg.eigvalsh(np.cov(z, rowvar=False))
    p = values[values > 1e-9] / values[values > 1e-9].sum()
    assert effective_rank(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert effective_rank(rng.normal(size=(20, 1))) == pytest.approx(1)


def test_collapsing_is_a_point_a_line_or_far_from_a_gaussian():
    assert not collapsing(0.01, 0.9, 8.0)
    assert collapsing(0.25, 0.9, 8.0)
    assert collapsing(0.01, 0.05, 8.0)
    assert collapsing(0.01, 0.9, 1.1)
    assert not collapsing(None, 0.9, 8.0)
    assert collapse_grace(0.05, 1000) == 150
    assert collapse_grace(0.1, 5000) == 500
