"""SIGReg, forward and backward, against the official formula in eager PyTorch."""

import pytest
import torch
from common import compare

from lewm.losses import Directions, sigreg, sigreg_directions

SHAPES = {"paper": (4, 128, 192, 1024), "tiny": (4, 64, 32, 256)}


def official(z, directions, knots=17):
    """The formula as the official code evaluates it: every (T, B, P, K) tensor in memory."""
    t = torch.linspace(0, 3, knots)
    weights = torch.full((knots,), 2 * 3 / (knots - 1))
    weights[[0, -1]] /= 2
    normal = torch.exp(-t.square() / 2)
    h = (z @ directions)[..., None] * t
    error = (h.cos().mean(1) - normal).square() + h.sin().mean(1).square()
    return (error @ (weights * normal)).mean() * z.shape[1]


@pytest.mark.parametrize("name", SHAPES)
def test_sigreg_forward_and_backward(benchmark, name):
    steps, batch, dim, count = SHAPES[name]
    torch.manual_seed(0)
    z = torch.randn(steps, batch, dim, requires_grad=True)
    # Ours makes them again from their key in every pass; the reference is given them.
    keyed, given = Directions(count, seed=0, step=0), sigreg_directions(dim, count, seed=0, step=0)

    def run(statistic, directions):
        z.grad = None
        statistic(z, directions).backward()
        return z.grad

    torch.testing.assert_close(run(sigreg, keyed), run(official, given), rtol=1e-3, atol=1e-5)
    compare(
        benchmark,
        lambda: run(sigreg, keyed),
        lambda: run(official, given),
        shape=f"T{steps} B{batch} D{dim} P{count} K17",
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
