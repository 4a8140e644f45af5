"""The planner on the device against the Rust loop, on the same noise: on a GPU, else in Triton's interpreter."""

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import lewm
from lewm import _core
from lewm.kernels.planner import CEM, refit
from lewm.kernels.rollout import Rollout, cost_launch, pack
from test_kernels_rollout import OTHER, network

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

SETTINGS = {"samples": 19, "iterations": 3, "elites": 5, "horizon": 2, "init_std": 1.0, "min_std": 0.05}
ONE_LAYER = {"predictor_depth": 1, "history": 2}


class Task:
    """The same search, for the device and for the Rust loop with the device's rollout as its cost."""

    def __init__(self, environments=2, frames=1, reference=False, bounds=0.8, seed=2**63 + 5, **overrides):
        self.settings = {**SETTINGS, "reference": reference}
        config, net = network(**{**ONE_LAYER, **overrides})
        self.config, self.weights = config, pack(config, net.state_dict(), "float32", DEVICE)
        draw = np.random.default_rng(3)
        shape = (environments, self.settings["horizon"], config.block_dim)
        self.z = draw.standard_normal((environments, frames, config.embed_dim), np.float32)
        self.goal = draw.standard_normal((environments, config.embed_dim), np.float32)
        self.past = draw.standard_normal((environments, frames - 1, config.block_dim), np.float32)
        self.past = self.past if frames > 1 else None
        self.mean = 0.3 * draw.standard_normal(shape)
        low = None if reference else -np.full(config.block_dim, bounds)
        self.call = {"low": low, "high": None if reference else np.full(config.block_dim, bounds + 0.1), "seed": seed}
        self.call |= {"env_ids": np.array([7, 2**32 - 1, 3][:environments], np.uint32), "plan": 11}

    def device(self, **change):
        planner = CEM(self.weights, len(self.z), self.z.shape[1], **self.settings)
        call = {"deadline": None, **self.call, **change}
        return planner, planner.solve(self.z, self.goal, self.past, self.mean, **call)

    def rust(self, cost=None):
        settings = {k: v for k, v in self.settings.items() if k != "horizon"}
        planner = _core.Planner("cem", dtype="float32", **settings)
        return planner.solve(cost or self.cost, self.mean, **self.call)

    def cost(self, candidates):
        e, samples = candidates.shape[:2]
        rollout = Rollout(self.weights, e * samples, self.z.shape[1], candidates.shape[2])
        rollout.candidates.copy_(torch.from_numpy(candidates).flatten(0, 1))
        past = None if self.past is None else torch.from_numpy(self.past).to(DEVICE)
        rollout.observe(torch.from_numpy(self.z).to(DEVICE), past)
        rollout.run()
        costs = torch.empty(e * samples, device=DEVICE)
        cost_launch(rollout.latents[-1], torch.from_numpy(self.goal).to(DEVICE), costs)()
        return costs.view(e, samples).cpu().numpy()


@pytest.mark.parametrize(
    "options",
    [{}, {"frames": 2}, {"reference": True}, {"environments": 1, "action_dim": 3, "action_block": 3, **OTHER}],
    ids=str,
)
def test_it_is_the_rust_loop(options):
    """Every iteration's elites, and so its mean, are those of the Rust loop on the same noise."""
    task = Task(**options)
    _, found = task.device()
    want = task.rust()
    assert found.keys() == want.keys() - {"elite_cost"}
    for name in ("actions", "mean", "std", "cost", "trace", "kept", "clipped"):
        assert found[name].shape == want[name].shape, name
        np.testing.assert_allclose(found[name], want[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert found["iterations"] == want["iterations"]
    assert not found["deadline_hit"]
    if not options.get("reference"):
        assert found["clipped"].min() > 0
        low, high = task.call["low"], task.call["high"]
        assert (found["actions"] >= low).all()
        assert (found["actions"] <= high).all()


def test_candidates_are_those_of_the_rust_loop():
    task, seen = Task(), []
    task.rust(lambda candidates: seen.append(candidates.copy()) or task.cost(candidates))
    planner, _ = task.device()
    planner._start()
    for want in seen[: task.settings["iterations"]]:
        planner._iterate()
        got = planner._search.candidates.view(want.shape).cpu().numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_an_environment_gets_the_same_plan_in_any_batch():
    together, alone = Task(environments=3), Task(environments=3)
    _, found = together.device()
    for name in ("z", "goal", "mean"):
        setattr(alone, name, getattr(alone, name)[1:2])
    _, one = alone.device(env_ids=alone.call["env_ids"][1:2])
    np.testing.assert_allclose(one["actions"][0], found["actions"][1], atol=1e-5)


def test_again_is_the_same():
    planner, first = (task := Task(environments=1)).device()
    again = planner.solve(task.z, task.goal, task.past, task.mean, deadline=None, **task.call)
    other = planner.solve(task.z, task.goal, task.past, task.mean, deadline=None, **task.call | {"plan": 12})
    assert np.array_equal(first["actions"], again["actions"])
    assert not np.array_equal(first["actions"], other["actions"])


def test_deadline():
    task = Task(environments=1)
    _, found = task.device(deadline=1e-9)
    assert found["deadline_hit"]
    assert found["iterations"] == 1
    assert found["trace"].shape == (1, 1)
    planner, whole = task.device()
    patient = planner.solve(task.z, task.goal, task.past, task.mean, deadline=1e3, **task.call)
    assert not patient["deadline_hit"]
    assert np.array_equal(patient["actions"], whole["actions"])


def test_costs_that_are_no_numbers():
    task = Task()
    task.goal[1] = np.nan
    with pytest.raises(
        ValueError, match="cost must be a number or .inf, got nan for environment row 1, sample 0, iter"
    ):
        task.device()
    task.goal[1] = np.inf
    with pytest.raises(ValueError, match=r"at least 2 samples, got 0 of 19 \(environment row 1, iteration 0\)"):
        task.device()


@pytest.mark.parametrize("samples", [2, 3, 31, 64, 300])
def test_elites_with_ties(samples):
    """Ties go to the lower sample, costs of +inf are no elites."""
    draw = np.random.default_rng(samples)
    environments, width, elites = 2, 6, max(2, samples // 3)
    costs = draw.integers(0, 4, (environments, samples)).astype(np.float32)
    costs[:, 2::5] = np.inf
    candidates = draw.standard_normal((environments, samples, width), np.float32)

    def on_device(array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)

    def zeros(*shape, dtype=torch.float64):
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    low, high = on_device(np.full(width, -9, np.float32)), on_device(np.full(width, 9, np.float32))
    order, step = zeros(environments, elites, dtype=torch.int32), zeros(environments, dtype=torch.int32)
    mean, std, actions = (zeros(environments, width) for _ in range(3))
    best, trace, clipped = (
        torch.full((environments,), np.inf, dtype=torch.float64, device=DEVICE),
        zeros(1, 2),
        zeros(2),
    )
    moved, fault = zeros(environments, samples, dtype=torch.int32) + 1, zeros(environments, 4)
    refit(
        on_device(costs), on_device(candidates), moved, low, high, order, mean, std, actions, best, trace, clipped,
        fault, step, elites, zeros(1),
    )  # fmt: skip
    for e in range(environments):
        chosen = [s for s in np.argsort(costs[e], kind="stable")[:elites] if costs[e, s] < np.inf]
        rows = candidates[e, chosen].astype(np.float64)
        np.testing.assert_allclose(mean[e].cpu(), rows.mean(0), atol=1e-12)
        np.testing.assert_allclose(std[e].cpu(), rows.std(0, ddof=1), atol=1e-12)
        np.testing.assert_array_equal(actions[e].cpu(), rows[0])
        assert best[e] == costs[e, chosen[0]]
        assert trace[0, e] == pytest.approx(costs[e, chosen].mean())
    assert clipped.tolist() == [samples] * environments
    assert step.tolist() == [1] * environments
    assert not fault.any()


def test_settings_of_the_planner():
    """What `lewm.CEM` holds is what this takes."""
    import dataclasses
    import inspect

    names = {field.name for field in dataclasses.fields(lewm.CEM)}
    assert names <= set(inspect.signature(CEM).parameters)
