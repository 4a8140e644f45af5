"""t-SNE against its definition, and what it is for: neighbours stay neighbours."""

import numpy as np
import pytest

from lewm.tsne import affinities, gradient, tsne


def divergence(p, y):
    """KL(P || Q) pair by pair."""
    near = np.array([[1 / (1 + ((a - b) ** 2).sum()) if i != j else 0 for j, b in enumerate(y)]
                     for i, a in enumerate(y)])  # fmt: skip
    q, seen = near / near.sum(), p > 0
    return (p[seen] * np.log(p[seen] / q[seen])).sum()


def test_every_neighbourhood_has_the_perplexity():
    x = np.random.default_rng(0).normal(size=(41, 5)) * np.linspace(0.01, 100, 41)[:, None]
    for perplexity in (3.0, 10.0):
        p = affinities(x, perplexity)
        assert np.isclose(p.sum(), 1)
        np.testing.assert_array_equal(p, p.T)
        assert (np.diag(p) == 0).all()
    # One neighbourhood by itself: alone among far clones, its row of P is its own conditional distribution.
    squares = ((x[0] - x[1:]) ** 2).sum(1)

    def entropy(precision):
        q = np.exp(-precision * (squares - squares.min()))
        q /= q.sum()
        return -(q * np.log(np.maximum(q, 1e-300))).sum(), q

    low, high = 0.0, 1e9
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy(middle)[0] > np.log(10) else (low, middle)
    rest = 2 * len(x) * p[0, 1:] - entropy(low)[1]  # what the others say of point 0
    assert (rest > -1e-9).all()
    assert (rest < 1 + 1e-9).all()


def test_the_gradient_is_that_of_the_divergence():
    rng = np.random.default_rng(1)
    p, y = affinities(rng.normal(size=(7, 3)), 2.0), rng.normal(size=(7, 2))
    found, step = gradient(p, y), 1e-6
    for i in range(7):
        for c in range(2):
            nudge = np.zeros_like(y)
            nudge[i, c] = step
            slope = (divergence(p, y + nudge) - divergence(p, y - nudge)) / (2 * step)
            assert found[i, c] == pytest.approx(slope, abs=1e-8)


def test_clusters_stay_clusters_and_a_curve_a_curve():
    rng = np.random.default_rng(2)
    label = np.repeat(np.arange(4), 50)
    x = 8 * rng.normal(size=(4, 16))[label] + rng.normal(size=(200, 16))
    y = tsne(x)
    squares = ((y[:, None] - y) ** 2).sum(-1)
    np.fill_diagonal(squares, np.inf)
    assert (label[squares.argsort(1)[:, :10]] == label[:, None]).mean() > 0.99
    np.testing.assert_array_equal(tsne(x), y)
    assert divergence(affinities(x, 30), y) < 0.5 * divergence(affinities(x, 30), rng.normal(size=y.shape))

    t = np.linspace(0, 3, 120)
    y = tsne(np.c_[np.sin(t), np.cos(t), t**2], perplexity=10)
    squares = ((y[:, None] - y) ** 2).sum(-1)
    np.fill_diagonal(squares, np.inf)
    assert np.abs(squares.argsort(1)[:, :2] - np.arange(120)[:, None]).mean() < 3  # neighbours in time


def test_few_points_equal_points_and_what_is_none():
    assert np.isfinite(tsne(np.eye(5))).all()
    assert np.isfinite(tsne(np.arange(6.0)[:, None])).all()
    twice = np.repeat(np.random.default_rng(3).normal(size=(10, 3)), 2, axis=0)
    assert np.isfinite(tsne(twice)).all()
    for wrong, text in (
        (np.zeros((3, 2)), "at least 4 points"),
        (np.zeros(9), "at least 4 points"),
        (np.ones((9, 2)), "points that differ"),
        (np.full((9, 2), np.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=text):
            tsne(wrong)
