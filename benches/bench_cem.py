"""The CEM loop's own work (noise, candidates, elites, refit) against the same in PyTorch; the cost is free."""

import numpy as np
import torch
from common import compare

from lewm._core import Planner

SAMPLES, ITERATIONS, ELITES, HORIZON, WIDTH = 300, 30, 30, 5, 10
BOUND, MIN_STD = 2.0, 0.05


def test_bookkeeping_of_a_paper_size_plan(benchmark):
    """Ours includes a call into Python and a copy of the candidates per iteration: a cost in Rust needs neither."""
    score = np.random.default_rng(0).random((1, SAMPLES))
    planner = Planner("cem", samples=SAMPLES, iterations=ITERATIONS, elites=ELITES, min_std=MIN_STD)
    scores = {SAMPLES: score, 1: score[:, :1].copy()}
    mean = np.zeros((1, HORIZON, WIDTH))
    bound = np.full(WIDTH, BOUND)

    def ours():
        return planner.solve(lambda candidates: scores[candidates.shape[1]], mean, low=-bound, high=bound)

    costs = torch.from_numpy(score)

    def reference():
        """What the peers' loop does each iteration for one environment, host sync included; and bounds and a floor."""
        mean, std = torch.zeros(1, HORIZON, WIDTH), torch.ones(1, HORIZON, WIDTH)
        for _ in range(ITERATIONS):
            candidates = torch.randn(1, SAMPLES, HORIZON, WIDTH) * std[:, None] + mean[:, None]
            candidates[:, 0] = mean
            candidates.clamp_(-BOUND, BOUND)
            values, index = torch.topk(costs, ELITES, dim=1, largest=False)
            elites = candidates[torch.arange(1)[:, None], index]
            mean, std = elites.mean(1), elites.std(1).clamp_(min=MIN_STD)
            values.mean(1).tolist()
        return mean

    ratio = compare(
        benchmark, ours, reference, shape=f"E1 S{SAMPLES} I{ITERATIONS} H{HORIZON} A{WIDTH}", torch=torch.__version__
    )
    us = {name: 1e3 * benchmark.extra_info[f"{name}_ms"] / ITERATIONS for name in ("ours", "reference")}
    benchmark.extra_info.update({f"{name}_us_per_iteration": round(value, 2) for name, value in us.items()})
    assert ratio > 1
