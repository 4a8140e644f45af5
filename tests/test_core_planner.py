"""The Rust planners against NumPy ones, and their promises: determinism, independence, bounds, errors."""

import _thread
import operator
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lewm import _core

SMALL = {"samples": 32, "iterations": 5, "elites": 6}
ARRAYS = ("actions", "cost", "mean", "std", "elite_cost", "trace", "kept", "clipped")
EXTRAS = {
    "cem": {},
    "reference": {"reference": True},
    "icem": {"beta": 2.0, "factor": 1.25, "keep": 0.4, "momentum": 0.1},
    "mppi": {"temperature": 0.5},
}
SETTINGS = {"samples", "iterations", "elites", "init_std", "min_std", "dtype", "reference"}
SETTINGS |= {"beta", "factor", "keep", "momentum", "temperature"}


def solve(cost, mean, *, method="cem", **options):
    """Makes a planner and plans with it."""
    options = EXTRAS[method] | options
    settings = {name: options.pop(name) for name in SETTINGS & options.keys()}
    return _core.Planner("cem" if method == "reference" else method, **settings).solve(cost, mean, **options)


class Quadratic:
    """Squared distance to a target per environment, (E, S); remembers its candidates."""

    def __init__(self, target):
        self.target = np.asarray(target, np.float64)
        self.seen = []

    def __call__(self, candidates):
        self.seen.append(candidates)
        shift = candidates.astype(np.float64) - self.target[:, None]
        # A sum of fixed order: the same bits whatever the batch.
        return np.add.accumulate((shift**2).reshape(*candidates.shape[:2], -1), axis=-1)[..., -1]


def targets(rng, envs, horizon=3, width=4):
    return rng.normal(size=(envs, horizon, width))


def numpy_cem(cost, mean, noise, elites, low=-np.inf, high=np.inf, init_std=1.0, min_std=0.05, reference=False):
    """The specification of `lewm._core.Planner` in float64."""
    std = np.full_like(mean, init_std)
    best, best_cost, trace = np.zeros_like(mean), np.full(len(mean), np.inf), []
    for z in noise:
        x = mean[:, None] + std[:, None] * z
        x[:, 0] = mean
        x = np.clip(x, low, high)
        c = cost(x)
        order = np.argsort(c, axis=1, kind="stable")[:, :elites]
        picked = np.take_along_axis(x, order[:, :, None, None], axis=1)
        values = np.take_along_axis(c, order, axis=1)
        better = values[:, 0] < best_cost
        best[better], best_cost[better] = picked[better, 0], values[better, 0]
        mean, std = picked.mean(axis=1), picked.std(axis=1, ddof=1)
        if not reference:
            std = np.maximum(std, min_std)
        trace.append(values.mean(axis=1))
    if reference:
        return {"actions": mean, "cost": trace[-1], "mean": mean, "std": std, "trace": np.array(trace)}
    final = cost(mean[:, None])[:, 0]
    better = final < best_cost
    best[better], best_cost[better] = mean[better], final[better]
    return {"actions": best, "cost": best_cost, "mean": mean, "std": std, "trace": np.array(trace)}


@pytest.mark.parametrize("generated", [False, True], ids=["injected", "generated"])
@pytest.mark.parametrize("mode", ["default", "bounded", "reference"])
def test_agrees_with_numpy(mode, generated):
    rng = np.random.default_rng(0)
    cost = Quadratic(targets(rng, 3))
    mean = 0.5 * targets(rng, 3)
    noise = rng.normal(size=(5, 3, 32, 3, 4))
    options = {"dtype": "float64", "reference": mode == "reference"}
    if mode == "bounded":
        options |= {"low": [-0.5, -0.1, -2.0, 0.2], "high": [0.4, 0.8, 2.0, 0.3], "init_std": 0.7, "min_std": 0.2}
    if generated:
        ids = [3, 1, 9]
        noise = np.stack([_core.noise(11, ids, 2, i, 32, 12).reshape(3, 32, 3, 4) for i in range(5)])
        got = solve(cost, mean, **SMALL, **options, seed=11, env_ids=ids, plan=2)
    else:
        got = solve(cost, mean, **SMALL, **options, noise=noise)
    options.pop("dtype")
    want = numpy_cem(cost, mean, noise, 6, **options)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-12, err_msg=name)
    np.testing.assert_array_equal(got["elite_cost"], got["trace"][-1])
    assert got["iterations"] == 5
    assert got["deadline_hit"] is False
    for name in ARRAYS:
        assert got[name].dtype == np.float64


METHODS = ["cem", "icem", "mppi"]


@pytest.mark.parametrize("method", METHODS)
def test_converges(method):
    cost = Quadratic(targets(np.random.default_rng(1), 2))
    got = solve(cost, np.zeros((2, 3, 4)), method=method, samples=300, iterations=30, elites=30, min_std=1e-3)
    np.testing.assert_allclose(got["actions"], cost.target, atol=0.05)
    assert (got["trace"][10] < got["trace"][0] / 10).all()


def colour(beta, horizon):
    """(H, H) map of white noise to noise of a power-law spectrum, by the fast Fourier transform."""
    gain = np.maximum(np.abs(np.fft.fftfreq(horizon) * horizon), 1.0) ** (-beta / 2)
    matrix = np.fft.ifft(gain[:, None] * np.fft.fft(np.eye(horizon), axis=0), axis=0).real
    return matrix / np.sqrt((matrix**2).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("horizon", [1, 2, 3, 5, 30])
def test_icem_noise_has_unit_variance_and_the_spectrum_asked_for(beta, horizon):
    cost = Quadratic(np.zeros((1, horizon, 4)))
    options = {"samples": 3000, "elites": 2, "iterations": 2, "dtype": "float64", "seed": 5, "beta": beta}
    solve(cost, np.zeros((1, horizon, 4)), method="icem", **options)
    got = cost.seen[0][0]
    white = _core.noise(5, [0], 0, 0, 3000, 4 * horizon).reshape(3000, horizon, 4).astype(np.float64)
    np.testing.assert_allclose(got, np.einsum("tu,sua->sta", colour(beta, horizon), white), rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.var(axis=(0, 2)), 1.0, atol=0.08)
    power = np.square(np.abs(np.fft.rfft(got, axis=1))).mean(axis=(0, 2))[1:]
    want = np.arange(1, len(power) + 1) ** -beta
    if len(power):
        np.testing.assert_allclose(power / power[0], want, rtol=0.15)


def numpy_icem(cost, mean, noise, samples, elites, beta, factor, keep, momentum, min_std=0.05):
    """iCEM of one environment in float64, as the module says."""
    std, kept, keep = np.ones_like(mean), np.zeros((0, *mean.shape)), int(keep * elites + 1e-9)
    matrix = colour(beta, len(mean))
    for i, z in enumerate(noise):
        count = min(max(int(samples * factor**-i), 2 * elites), samples)
        lead = mean[None] if i + 1 == len(noise) else mean[None][:0]
        fresh = mean + std * np.einsum("tu,sua->sta", matrix, z[len(lead) : count - len(kept)])
        x = np.concatenate([lead, fresh, kept])
        c = cost(x[None])[0]
        order = np.argsort(c, kind="stable")[:elites]
        kept = x[order[:keep]]
        mean = momentum * mean + (1 - momentum) * x[order].mean(axis=0)
        std = np.maximum(momentum * std + (1 - momentum) * x[order].std(axis=0, ddof=1), min_std)
    return mean, std, kept


def test_icem_agrees_with_numpy():
    rng = np.random.default_rng(7)
    cost, mean, noise = Quadratic(targets(rng, 1)), 0.5 * targets(rng, 1), rng.normal(size=(5, 1, 32, 3, 4))
    got = solve(cost, mean, method="icem", **SMALL, noise=noise, dtype="float64")
    want = numpy_icem(cost, mean[0], noise[:, 0], 32, 6, **EXTRAS["icem"])
    for name, value in zip(("mean", "std", "kept"), want, strict=True):
        np.testing.assert_allclose(got[name][0], value, rtol=0, atol=1e-12, err_msg=name)


def test_mppi_agrees_with_numpy():
    rng = np.random.default_rng(8)
    cost, noise = Quadratic(targets(rng, 1)), rng.normal(size=(1, 1, 32, 3, 4))
    got = solve(cost, np.zeros((1, 3, 4)), method="mppi", **SMALL | {"iterations": 1}, noise=noise, dtype="float64")
    x, c = cost.seen[0][0], cost(cost.seen[0])[0]
    elites = np.argsort(c, kind="stable")[:6]
    weights = np.exp(-(c[elites] - c.min()) / (0.5 * (c[elites] - c.min()).mean()))
    mean = np.average(x[elites], axis=0, weights=weights)
    std = np.sqrt(np.average((x[elites] - mean) ** 2, axis=0, weights=weights))
    np.testing.assert_allclose(got["mean"][0], mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got["std"][0], np.maximum(std, 0.05), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_mppi_does_not_mind_the_scale_of_costs(scale):
    cost = Quadratic(targets(np.random.default_rng(9), 1))
    plans = [solve(lambda x, s=s: 7 + s * cost(x), np.zeros((1, 3, 4)), method="mppi", **SMALL) for s in (1.0, scale)]
    np.testing.assert_allclose(plans[0]["mean"], plans[1]["mean"], atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_float32_follows_float64(method):
    cost = Quadratic(targets(np.random.default_rng(10), 2))
    single, double = (
        solve(cost, np.zeros((2, 3, 4)), method=method, **SMALL, dtype=dtype) for dtype in ("float32", "float64")
    )
    for name in ("mean", "std", "trace"):
        np.testing.assert_allclose(single[name], double[name], rtol=0, atol=1e-4)


def test_a_planner_is_for_one_plan_at_a_time_and_can_be_used_again():
    planner = _core.Planner("cem", **SMALL)

    def nested(x):
        with pytest.raises(RuntimeError, match="this planner is at work"):
            planner.solve(lambda x: np.zeros(x.shape[:2]), np.zeros((1, 3, 4)))
        return x[..., 0, 0]

    first = planner.solve(nested, np.zeros((1, 3, 4)))
    planner.solve(lambda x: x[..., 0, 0], np.zeros((4, 2, 3)))
    again = planner.solve(lambda x: x[..., 0, 0], np.zeros((1, 3, 4)))
    for name in ARRAYS:
        assert first[name].tobytes() == again[name].tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", list(EXTRAS))
def test_same_seed_same_bits_other_seed_other_plan(dtype, method):
    cost = Quadratic(targets(np.random.default_rng(2), 2))

    def plan(**keys):
        return solve(cost, np.zeros((2, 3, 4)), method=method, **SMALL, **({"seed": 5, "dtype": dtype} | keys))

    first, again = plan(), plan()
    for name in ARRAYS:
        assert first[name].tobytes() == again[name].tobytes(), name
    for other in (plan(seed=6), plan(plan=1), plan(env_ids=[7, 8])):
        assert (other["mean"] != first["mean"]).all()


@pytest.mark.parametrize("method", list(EXTRAS))
def test_environment_alone_or_in_a_batch_of_8(method):
    rng = np.random.default_rng(3)
    target, mean, ids = targets(rng, 8), targets(rng, 8), np.array([5, 3, 11, 2, 7, 0, 4294967295, 6])
    options = dict(**SMALL, method=method, seed=1)
    if method != "reference":
        options |= {"low": [-0.5] * 4, "high": [1.0] * 4}
    batch = solve(Quadratic(target), mean, env_ids=ids, **options)
    for e in range(8):
        one = slice(e, e + 1)
        alone = solve(Quadratic(target[one]), mean[one], env_ids=ids[one], **options)
        for name in ARRAYS:
            got = batch[name][:, one] if name == "trace" else batch[name][one]
            assert got.tobytes() == alone[name].tobytes(), (name, e)


@settings(deadline=None, max_examples=60)
@given(
    bounds=st.lists(st.tuples(st.floats(-5, 5), st.floats(1e-4, 5)), min_size=4, max_size=4),
    start=st.floats(-6, 6),
    goal=st.floats(-20, 20),
    seed=st.integers(0, 2**64 - 1),
    dtype=st.sampled_from(["float32", "float64"]),
    method=st.sampled_from(["cem", "icem", "mppi"]),
)
def test_bounds_hold(bounds, start, goal, seed, dtype, method):
    low = np.array([b[0] for b in bounds])
    high = low + [b[1] for b in bounds]
    cost = Quadratic(np.full((2, 3, 4), goal))
    options = {"method": method, "low": low, "high": high, "seed": seed, "dtype": dtype, **SMALL}
    got = solve(cost, np.full((2, 3, 4), start), **options)
    warm = solve(cost, 2 * got["mean"], kept=2 * got["kept"], plan=1, **options)
    for x in [*cost.seen, *(found[name] for found in (got, warm) for name in ("actions", "mean", "kept"))]:
        x = x.astype(np.float64)
        assert (low <= x).all()
        assert (x <= high).all()
    assert (got["clipped"] >= 0).all()
    assert (got["clipped"] <= 1).all()


@pytest.mark.parametrize(("low", "high"), [(0.5, None), (None, 0.5)], ids=["low", "high"])
def test_one_sided_bounds(low, high):
    cost = Quadratic(np.zeros((1, 1, 2)))
    bounds = {name: [b] * 2 for name, b in (("low", low), ("high", high)) if b is not None}
    got = solve(cost, np.full((1, 1, 2), 0.5), **bounds, **SMALL)
    seen = np.concatenate([x.ravel() for x in cost.seen])
    assert (seen.min() == 0.5) == (low is not None)
    assert (seen.max() == 0.5) == (high is not None)
    assert got["clipped"][0] > 0.1


def test_clipped_counts_moved_entries():
    noise = np.zeros((1, 1, 4, 1, 2))
    noise[0, 0, :, 0, 0] = [9.0, 1.0, -1.0, 0.0]  # that of sample 0 is not used
    got = solve(
        lambda x: x[..., 0, 0],
        np.zeros((1, 1, 2)),
        low=[-0.5, -1],
        high=[0.5, 1],
        samples=4,
        iterations=1,
        elites=2,
        noise=noise,
    )
    np.testing.assert_array_equal(got["clipped"], [2 / 8])
    unbounded = solve(lambda x: x[..., 0, 0], np.zeros((1, 1, 2)), samples=4, iterations=1, elites=2, noise=noise)
    np.testing.assert_array_equal(unbounded["clipped"], [0.0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("iterations", [1, 4])
def test_cost_is_the_cost_of_the_returned_actions(dtype, iterations):
    cost = Quadratic(targets(np.random.default_rng(4), 5))
    got = solve(cost, np.zeros((5, 3, 4)), samples=32, iterations=iterations, elites=6, dtype=dtype)
    np.testing.assert_array_equal(got["cost"], cost(got["actions"].astype(dtype)[:, None])[:, 0])
    np.testing.assert_array_equal(got["actions"], got["actions"].astype(dtype))
    everything = np.concatenate([cost(x) for x in cost.seen[: iterations + 1]], axis=1)
    np.testing.assert_array_equal(got["cost"], everything.min(axis=1))


def test_what_the_cost_is_handed():
    seen = []

    def cost(x):
        assert x.flags.c_contiguous
        assert x.flags.writeable
        seen.append(x)
        return np.zeros(x.shape[:2], np.float32)

    solve(cost, np.full((2, 3, 4), 0.1), **SMALL)
    assert [x.shape for x in seen] == [(2, 32, 3, 4)] * 5 + [(2, 1, 3, 4)]
    assert all(x.dtype == np.float32 for x in seen)
    assert (seen[0][:, 0] == np.float32(0.1)).all(), "sample 0 is the mean"
    assert not any(np.shares_memory(seen[0], x) for x in seen[1:]), "the callable may keep what it gets"
    seen.clear()
    solve(cost, np.zeros((2, 3, 4)), **SMALL, dtype="float64", reference=True)
    assert [x.shape for x in seen] == [(2, 32, 3, 4)] * 5, "reference mode does not score the last mean"
    assert all(x.dtype == np.float64 for x in seen)


def test_ties_go_to_the_lower_sample():
    noise = np.random.default_rng(5).normal(size=(1, 1, 32, 3, 4))
    got = solve(
        lambda x: np.zeros(x.shape[:2]),
        np.zeros((1, 3, 4)),
        samples=32,
        iterations=1,
        elites=6,
        noise=noise,
        dtype="float64",
    )
    noise[0, 0, 0] = 0
    np.testing.assert_allclose(got["mean"], noise[0, :, :6].mean(axis=1), atol=1e-15)
    np.testing.assert_array_equal(got["actions"], np.zeros((1, 3, 4)))


def test_infinite_costs_are_left_out():
    got = solve(lambda x: np.where(x[..., 0, 0] < 1, np.inf, x[..., 0, 0]), np.zeros((1, 3, 4)), **SMALL)
    assert got["actions"][0, 0, 0] >= 1
    assert np.isfinite(got["trace"]).all()


def test_deadline():
    cost = Quadratic(targets(np.random.default_rng(6), 1))

    def slow(x):
        time.sleep(0.02)
        return cost(x)

    options = {"samples": 32, "iterations": 1000, "elites": 6}
    start = time.perf_counter()
    got = solve(slow, np.zeros((1, 3, 4)), **options, deadline=0.1)
    assert 0.04 <= time.perf_counter() - start < 0.15, "an iteration that would end late is not started"
    assert got["deadline_hit"] is True
    assert 1 <= got["iterations"] <= 5
    assert got["trace"].shape == (got["iterations"], 1)
    best = min(cost(x).min() for x in cost.seen[: got["iterations"]])
    assert got["cost"][0] == best == cost(got["actions"][:, None])[0, 0]
    assert solve(cost, np.zeros((1, 3, 4)), **options, deadline=0.0)["iterations"] == 1
    assert solve(cost, np.zeros((1, 3, 4)), **SMALL, deadline=3600.0)["deadline_hit"] is False


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("mine"), SystemExit(3)], ids=repr)
def test_exceptions_pass_through(error):
    calls = []

    def cost(x):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return np.zeros(x.shape[:2])

    with pytest.raises(type(error)) as caught:
        solve(cost, np.zeros((1, 3, 4)), **SMALL)
    assert caught.value is error
    assert len(calls) == 3


def test_ctrl_c_reaches_a_cost_that_runs_no_python():
    sent = []
    timer = threading.Timer(0.2, lambda: (sent.append(time.perf_counter()), _thread.interrupt_main()))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        solve(operator.itemgetter((..., 0, 0)), np.zeros((1, 5, 10)), samples=300, iterations=65536, elites=30)
    assert time.perf_counter() - sent[0] < 0.15
    timer.join()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"method": "icem", "beta": -1.0}, ValueError, "beta must be finite and not negative, got -1"),
        ({"method": "icem", "beta": None}, TypeError, "icem needs beta"),
        ({"method": "icem", "temperature": 1.0}, TypeError, "icem has no temperature: it is one of mppi"),
        ({"method": "icem", "factor": 0.5}, ValueError, "factor must be finite and at least 1, got 0.5"),
        ({"method": "icem", "keep": 1.0}, ValueError, "keep must be at least 0 and below 1, got 1"),
        (
            {"method": "icem", "kept": np.zeros((1, 1, 3, 4))},
            ValueError,
            r"kept .* = \(1, 2, 3, 4\), got \(1, 1, 3, 4\)",
        ),
        ({"method": "icem", "kept": np.full((1, 2, 3, 4), np.nan)}, ValueError, "kept must be finite, got NaN"),
        ({"method": "mppi", "temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0"),
        ({"beta": 2.0}, TypeError, "cem has no beta: it is one of icem"),
        ({"cost": 3}, TypeError, "cost must be callable, got <class 'int'>"),
        ({"mean": np.zeros((3, 4))}, ValueError, r"mean must have shape \(E, H, A\), got \(3, 4\)"),
        ({"mean": np.zeros((1, 0, 4))}, ValueError, "horizon must be at least 1, got 0"),
        ({"mean": np.zeros((1, 3, 0))}, ValueError, "mean's action width must be at least 1"),
        ({"mean": np.zeros((0, 3, 4))}, ValueError, "mean's number of environments must be at least 1"),
        ({"mean": np.full((1, 3, 4), np.nan)}, ValueError, r"mean\[0, 0, 0\] must be finite, got NaN"),
        ({"mean": np.full((1, 3, 4), 1e300)}, ValueError, r"mean\[0, 0, 0\] must be finite"),
        ({"mean": np.full((1, 3, 4), "x")}, TypeError, "mean must be an array of real numbers, got dtype <U1"),
        ({"mean": None}, TypeError, "mean must be an array of real numbers, got dtype object"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"samples": -3}, ValueError, "samples must be an integer .* got -3"),
        ({"samples": 32.0}, TypeError, "samples must be an integer, got <class 'float'>"),
        ({"samples": 2**32, "mean": np.zeros((1, 1, 2**18))}, ValueError, "samples: no memory"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"iterations": 65537}, ValueError, "iterations must be at most 65536, got 65537"),
        ({"elites": 1}, ValueError, r"elites must be in 2\.\.=samples \(32\), got 1"),
        ({"elites": 33}, ValueError, r"elites must be in 2\.\.=samples \(32\), got 33"),
        ({"init_std": 0.0}, ValueError, "init_std must be positive and finite as float32, got 0"),
        ({"init_std": -1.0}, ValueError, "init_std must be positive and finite as float32, got -1"),
        ({"init_std": "1"}, TypeError, "init_std must be a number, got <class 'str'>"),
        ({"min_std": None}, TypeError, "min_std must be a number, got <class 'NoneType'>"),
        ({"deadline": "1"}, TypeError, "deadline must be a number, got <class 'str'>"),
        ({"reference": 1}, TypeError, "reference must be True or False, got 1"),
        ({"init_std": np.nan}, ValueError, "init_std must be positive and finite as float32, got NaN"),
        ({"min_std": -0.1}, ValueError, "min_std must be finite as float32 and not negative, got -0.1"),
        ({"min_std": np.inf}, ValueError, "min_std must be finite as float32 and not negative, got inf"),
        ({"low": np.zeros(3)}, ValueError, r"low must have shape \(4,\), got \(3,\)"),
        ({"high": 0.0}, ValueError, r"high must have shape \(4,\), got \(\)"),
        ({"high": [0, np.nan, 0, 0]}, ValueError, r"high\[1\] must be finite, got NaN"),
        ({"low": [0, 0, -np.inf, 0]}, ValueError, r"low\[2\] must be finite, got -inf"),
        ({"low": [0, 0, 0, 1], "high": [1, 1, 1, 0.5]}, ValueError, r"low\[3\] = 1 must not exceed high\[3\] = 0\.5"),
        ({"low": [0.1] * 4, "high": [0.1] * 4}, ValueError, "no float32 number between"),
        ({"low": [-1] * 4, "reference": True}, ValueError, "low must be None with reference=True"),
        ({"high": [1] * 4, "reference": True}, ValueError, "high must be None with reference=True"),
        ({"seed": -1}, ValueError, r"seed must be an integer in 0\.\.2\^64, got -1"),
        ({"seed": None}, TypeError, "seed must be an integer"),
        ({"plan": 2**32}, ValueError, r"plan must be an integer in 0\.\.2\^32"),
        ({"env_ids": [0, 1]}, ValueError, r"env_ids must have shape \(1,\), got \(2,\)"),
        ({"env_ids": [-1]}, ValueError, r"env_ids must hold numbers in 0\.\.2\^32, got -1"),
        ({"dtype": "float16"}, ValueError, 'dtype must be "float32" or "float64", got "float16"'),
        (
            {"noise": np.zeros((5, 1, 31, 3, 4))},
            ValueError,
            r"noise .* = \(5, 1, 32, 3, 4\), got \(5, 1, 31",
        ),
        ({"noise": np.full((5, 1, 32, 3, 4), np.inf)}, ValueError, "noise must be finite, got inf"),
        ({"deadline": -1.0}, ValueError, "deadline must be a number of seconds of at least 0, got -1"),
        ({"deadline": np.nan}, ValueError, "deadline must be a number of seconds"),
        ({"cost": lambda x: np.zeros(32)}, ValueError, r"cost returned shape \(32,\), want \(E, S\) = \(1, 32\)"),
        ({"cost": lambda x: None}, TypeError, "cost's result must be an array of real numbers, got dtype object"),
        ({"cost": lambda x: np.zeros((1, 32), complex)}, TypeError, "cost's result .* complex128"),
        ({"cost": lambda x: np.full((1, 32), np.inf)}, ValueError, "at least 2 samples, got 0 of 32"),
        ({"cost": lambda x: np.full((1, 32), -np.inf)}, ValueError, "got -inf for environment row 0, sample 0"),
    ],
)
def test_bad_input(change, error, match):
    good = dict(cost=lambda x: np.zeros(x.shape[:2]), mean=np.zeros((1, 3, 4)), **SMALL) | change
    with pytest.raises(error, match=match):
        solve(good.pop("cost"), good.pop("mean"), **good)


def test_nan_cost_is_named():
    def cost(x):
        out = np.zeros(x.shape[:2])
        out[1, 5] = np.nan
        return out

    with pytest.raises(ValueError, match="got NaN for environment row 1, sample 5, iteration 0"):
        solve(cost, np.zeros((2, 3, 4)), **SMALL)


def test_costs_may_come_in_any_order_of_memory():
    def found(order):
        def cost(candidates):
            return np.array((candidates**2).sum((-1, -2)) + np.arange(3)[:, None] * candidates[..., 0, 0], order=order)

        planner = _core.Planner("cem", samples=8, iterations=3, elites=2)
        return planner.solve(cost, np.zeros((3, 2, 2)), env_ids=[0, 1, 2])

    rows, columns = found("C"), found("F")
    assert all(np.array_equal(rows[name], columns[name]) for name in rows)
