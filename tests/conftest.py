"""Fixtures that every test file may use."""

import os
import signal

import pytest

# Triton reads this when a kernel is defined, so it has to be set before any test imports one. The GPU is looked for
# without torch, because some tests check what runs where torch is not installed.
if not any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them are about.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` where there is none."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    try:
        import torch

        found = torch.cuda.is_available()
    except ImportError:
        found = False
    if not found:
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def poison(monkeypatch):
    """Fill what `torch.empty` and `torch.empty_like` return with NaN, so that an entry nobody wrote shows."""
    import torch

    def poisoned(function):
        def call(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() or tensor.is_complex() else tensor

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture
def naive_sigreg():
    """The formula of SIGReg as it is written, in float64, every intermediate kept: both backends are judged by it."""
    import torch

    def statistic(z, directions, knots=17):
        t = torch.linspace(0, 3, knots, dtype=torch.float64, device=z.device)
        weight = torch.full_like(t, 2 * 3 / (knots - 1))
        weight[[0, -1]] /= 2
        normal = torch.exp(-t.square() / 2)
        angle = (z.double() @ directions.double()).unsqueeze(-1) * t  # (T, B, P, K)
        error = (angle.cos().mean(1) - normal).square() + angle.sin().mean(1).square()
        return z.shape[1] * (error @ (weight * normal)).mean()

    return statistic
