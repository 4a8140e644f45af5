"""t-SNE, exact, in NumPy: a map of some hundred points (van der Maaten and Hinton, 2008)."""

from __future__ import annotations

import numpy as np

_EXAGGERATION, _EXAGGERATED = 12.0, 100  # clusters first find their places


def tsne(x: np.ndarray, *, perplexity: float = 30.0, steps: int = 500) -> np.ndarray:
    """Points of a plane whose neighbours are those of `x`; distances between far ones mean little.

    It starts from the first two principal components, so the same points give the same map.

    Args:
        x: (N, D), N from 4 to some hundred: time and memory grow with N squared.
        perplexity: How many neighbours a point has; lowered to (N - 1) / 3 where there are too few points.
        steps: Of gradient descent.

    Returns:
        (N, 2) float64.

    Raises:
        ValueError: There are fewer than 4 points, some are not finite, or all are the same.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < 4:
        raise ValueError(f"x must be at least 4 points (N, D), got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("x must be finite, got NaN or infinite numbers")
    centred = x - x.mean(0)
    _, spread, directions = np.linalg.svd(centred, full_matrices=False)
    if spread[0] <= 1e-9 * max(1.0, float(np.abs(x).max())):
        raise ValueError("x must be points that differ, got the same point everywhere")
    p = affinities(x, min(perplexity, (len(x) - 1) / 3))
    y = np.zeros((len(x), 2))
    scores = centred @ directions[:2].T
    y[:, : scores.shape[1]] = 1e-4 * scores / scores[:, 0].std()
    speed, gains = np.zeros_like(y), np.ones_like(y)
    rate = max(len(x) / _EXAGGERATION / 4, 50.0)
    for step in range(steps):
        early = step < _EXAGGERATED
        slope = gradient(p * (_EXAGGERATION if early else 1.0), y)
        # Each coordinate goes faster while it keeps its direction (Jacobs, 1988).
        gains = np.maximum(np.where(slope * speed < 0, gains + 0.2, gains * 0.8), 0.01)
        speed = (0.5 if early else 0.8) * speed - rate * gains * slope
        y = y + speed
    return y - y.mean(0)


def affinities(x: np.ndarray, perplexity: float) -> np.ndarray:
    """P of t-SNE (N, N): Gaussian neighbourhoods, each as wide as gives it this perplexity, symmetric, of sum 1."""
    squares = _squares(x)
    np.fill_diagonal(squares, np.inf)
    squares -= squares.min(1, keepdims=True)  # of each row the nearest: exp never vanishes
    low, high = np.zeros(len(x)), np.full(len(x), np.inf)
    mean = np.where(np.isfinite(squares), squares, 0).sum(1) / (len(x) - 1)
    precision = 1 / np.where(mean > 0, mean, 1.0)
    rows = np.empty_like(squares)
    for _ in range(60):  # bisection, all points at once
        rows = np.exp(-squares * precision[:, None])
        rows /= rows.sum(1, keepdims=True)
        entropy = -(rows * np.log(np.where(rows > 0, rows, 1.0))).sum(1)
        wide = entropy > np.log(perplexity)
        low, high = np.where(wide, precision, low), np.where(wide, high, precision)
        precision = np.where(np.isinf(high), 2 * precision, (low + high) / 2)
    return (rows + rows.T) / (2 * len(x))


def gradient(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """That of KL(P || Q) by y (N, 2), Q being Student's t neighbourhoods of one degree of freedom."""
    near = 1 / (1 + _squares(y))
    np.fill_diagonal(near, 0)
    pull = (p - near / near.sum()) * near
    return 4 * (pull.sum(1)[:, None] * y - pull @ y)


def _squares(x: np.ndarray) -> np.ndarray:
    norms = (x * x).sum(1)
    return np.maximum(norms[:, None] + norms - 2 * x @ x.T, 0)
