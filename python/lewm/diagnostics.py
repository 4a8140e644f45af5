"""What tells a healthy latent space from a collapsed or a tangled one. NumPy only."""

from __future__ import annotations

import numpy as np

# SIGReg of a latent collapsed to a point is 0.402 per sample of the batch (measured, any batch size); a Gaussian one
# gives about 1 / batch. Half of it, once training is under way, means that something has gone wrong.
COLLAPSED_SIGREG_PER_SAMPLE = 0.402


def collapsing(sigreg_per_sample: float | None, embedding_std: float, effective_rank: float) -> bool:
    """Whether latents with these numbers are near a point or a line.

    Args:
        sigreg_per_sample: SIGReg / batch; None where it is no term of the loss, as nothing else keeps the mean of
            latents at 0.
        embedding_std: Standard deviation of the latents' dimensions, averaged.
        effective_rank: Of the latents.
    """
    far = sigreg_per_sample is not None and sigreg_per_sample > COLLAPSED_SIGREG_PER_SAMPLE / 2
    return far or embedding_std < 0.1 or effective_rank < 1.2


def collapse_grace(warmup: float, steps: int) -> float:
    """Steps of a run in which latents are still spreading out, so that `collapsing` says nothing yet."""
    return max(150, warmup * steps)


def effective_rank(z: np.ndarray) -> float:
    """Exponential of the entropy of the covariance spectrum of latents (N, D): from 1 to D (Roy and Vetterli, 2007)."""
    z = z - np.mean(z, axis=0, dtype=np.float64)
    # Of the two products, the smaller: their eigenvalues above 0 are the same.
    values = np.clip(np.linalg.eigvalsh(z.T @ z if z.shape[1] <= len(z) else z @ z.T), 0, None)
    total = values.sum()
    if total <= 0:
        return 1.0
    p = values[values > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def straightness(z: np.ndarray) -> float:
    """Temporal straightness of latents (..., T, D): the mean cosine between steps that follow each other, from -1 to 1.

    S of the paper's appendix H, `cos(z[t+1] - z[t], z[t+2] - z[t+1])` averaged over t and sequences. Steps of length 0
    have no direction and are left out; NaN if no two steps that follow each other have one.
    """
    steps = np.diff(np.asarray(z, np.float64), axis=-2)
    lengths = np.linalg.norm(steps, axis=-1)
    products = (steps[..., :-1, :] * steps[..., 1:, :]).sum(-1)
    scales = lengths[..., :-1] * lengths[..., 1:]
    moving = scales > 0
    return float((products[moving] / scales[moving]).mean()) if moving.any() else float("nan")


def probe_r2(z_fit: np.ndarray, y_fit: np.ndarray, z_test: np.ndarray, y_test: np.ndarray) -> float:
    """R2 on held-out rows of a linear (ridge) map from latents (N, D) to states (N, C), averaged over C.

    State dimensions that do not vary in the test rows are left out; NaN if none varies.
    """
    mean, scale = z_fit.mean(0), z_fit.std(0) + 1e-8
    fit = np.c_[(z_fit - mean) / scale, np.ones(len(z_fit))].astype(np.float64)
    test = np.c_[(z_test - mean) / scale, np.ones(len(z_test))].astype(np.float64)
    penalty = 1e-3 * len(fit) * np.eye(fit.shape[1])
    penalty[-1, -1] = 0
    weights = np.linalg.solve(fit.T @ fit + penalty, fit.T @ y_fit)
    residual = ((y_test - test @ weights) ** 2).mean(0)
    variance = y_test.var(0)
    varies = variance > 1e-12
    return float((1 - residual[varies] / variance[varies]).mean()) if varies.any() else float("nan")


def distance_correlation(z: np.ndarray, y: np.ndarray, rng: np.random.Generator, pairs: int = 20000) -> float:
    """Pearson correlation of latent with true distance over near pairs of rows; NaN if there are too few.

    Near is below 0.8 of the states' total standard deviation (in TwoRoom about 60 pixels), the range in which a
    terminal latent cost has to rank candidates. With the probe's R2 it predicts planning success; the losses do not.
    """
    i, j = rng.integers(0, len(z), (2, pairs))
    true = np.linalg.norm(y[i] - y[j], axis=1)
    near = (true < 0.8 * np.sqrt(y.var(0).sum())) & (i != j)
    if near.sum() < 10:
        return float("nan")
    latent = np.linalg.norm(z[i[near]] - z[j[near]], axis=1)
    if latent.std() == 0 or true[near].std() == 0:
        return float("nan")
    return float(np.corrcoef(latent, true[near])[0, 1])
