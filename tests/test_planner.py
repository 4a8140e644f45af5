import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_models import PointModel
from lewm import _core
from lewm.planner import CEM, ICEM, MPPI, plan

SMALL = CEM(samples=32, iterations=6, elites=6, horizon=3)


def positions(n, width=2, seed=0):
    return np.random.default_rng(seed).integers(-20, 20, (n, width)) / 10


def pictures(model, n, seed=0):
    return np.stack([model.picture(p) for p in positions(n, model.config.embed_dim, seed)])


# ------------------------------------------------------------------------------------------------------- what it finds


def test_plan_reaches_the_goal_and_says_so():
    model = PointModel()
    found = plan(model.picture([0.5, -0.5]), model.picture([-2.0, 1.5]), model=model, planner=CEM(horizon=3))
    assert found.cost < 0.05
    assert found.actions.shape == (6, 2)
    np.testing.assert_array_equal(found.action, found.actions[0])
    assert found.trace.shape == (30,)
    assert found.trace[-1] < found.trace[0]
    assert found.mean.shape == (3, 4)
    assert (found.backend, found.precision, found.iterations) == ("fake", "exact", 30)
    assert found.deadline_hit is False
    assert found.latency_ms > 0
    assert 0 < found.clipped < 1
    assert found.imagined is None


@pytest.mark.parametrize("planner", [ICEM(horizon=3), MPPI(horizon=3)], ids=["icem", "mppi"])
def test_the_other_planners_reach_it_too(planner):
    model = PointModel()
    found = plan(model.picture([0.5, -0.5]), model.picture([-2.0, 1.5]), model=model, planner=planner)
    assert found.cost < 0.05
    assert found.iterations == planner.iterations
    assert found.kept.shape == (3 if isinstance(planner, ICEM) else 0, 3, 4)


@pytest.mark.parametrize(
    ("meta", "iterations"),
    [
        ({"name": "cem", "iterations": 3}, 3),
        ({"name": "icem", "horizon": 2}, 30),
        ({"name": "mppi", "temperature": 1.0}, 6),
        (None, 30),
    ],
)
def test_the_model_file_names_its_planner(meta, iterations):
    model = PointModel(planner=meta)
    obs = model.picture([0, 0])
    assert plan(obs, obs, model=model).iterations == iterations


def test_a_model_file_that_names_no_planner_known_is_refused():
    model = PointModel(planner={"name": "adam"})
    obs = model.picture([0, 0])
    with pytest.raises(ValueError, match=r"planner's name must be one of 'cem', 'icem', 'mppi', got 'adam'"):
        plan(obs, obs, model=model)


def test_cost_is_that_of_the_actions_returned():
    model = PointModel()
    goal = model.picture([2, 1])
    found = plan(model.picture([0, 0]), goal, model=model, planner=SMALL, return_rollout=True)
    blocks = model.normalise(found.actions.reshape(1, 1, 3, 4))
    z = np.zeros((1, 1, 2))
    assert found.cost == pytest.approx(model.costs(z, model.encode(goal)[None], blocks)[0, 0], rel=1e-9)
    assert found.imagined.shape == (4, 2)
    np.testing.assert_array_equal(found.imagined[0], [0, 0])
    assert np.square(found.imagined[-1] - [2, 1]).sum() == pytest.approx(found.cost, rel=1e-9)


def test_goal_that_is_already_there_costs_nothing_more_than_the_mean_plan():
    model = PointModel()
    here = model.picture([1, 1])
    found = plan(here, here, model=model, planner=CEM(horizon=2))
    assert found.cost < 1e-2


def test_reference_is_the_official_update_unclipped():
    model = PointModel(stats={"mean": np.zeros(2), "std": np.ones(2), "low": np.full(2, -0.1), "high": np.full(2, 0.1)})
    planner = CEM(samples=32, iterations=4, elites=8, horizon=3, reference=True)
    z, goal = np.zeros((1, 1, 2)), np.full((1, 2), 5.0)
    found = plan(model.picture([0, 0]), goal[0], model=model, planner=planner, seed=3, plan_index=2)

    mean, std = np.zeros((3, 4)), np.ones((3, 4))
    for iteration in range(4):
        noise = _core.noise(3, np.array([0], np.uint32), 2, iteration, 32, 12).reshape(32, 3, 4)
        candidates = noise * std + mean
        candidates[0] = mean
        costs = model.costs(z, goal, candidates[None])[0]
        elites = np.argsort(costs, kind="stable")[:8]
        mean, std = candidates[elites].mean(0), candidates[elites].std(0, ddof=1)
        assert found.trace[iteration] == pytest.approx(costs[elites].mean(), rel=1e-12)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.actions.reshape(3, 4), mean, rtol=1e-12)
    assert found.cost == pytest.approx(costs[elites].mean(), rel=1e-12)
    assert np.abs(found.actions).max() > 0.1
    assert found.clipped == 0


# ----------------------------------------------------------------------------------------------------------- the noise


def test_same_seed_same_plan_bitwise_and_other_keys_other_plans():
    model = PointModel(dtype=np.float32)
    obs, goal = model.picture([0, 0]), model.picture([3, 3])

    def actions(**key):
        return plan(obs, goal, model=model, planner=SMALL, **key).actions

    np.testing.assert_array_equal(actions(seed=7), actions(seed=7))
    for other in ({"seed": 8}, {"seed": 7, "plan_index": 1}, {"seed": 7, "env_ids": [1]}):
        assert not np.array_equal(actions(seed=7), actions(**other))


@pytest.mark.parametrize("environments", [2, 8, SMALL.samples])
def test_an_environment_plans_alone_as_in_a_batch(environments):
    model = PointModel(history=3)
    obs = pictures(model, 3 * environments).reshape(environments, 3, 8, 8, 3)
    goals = pictures(model, environments, seed=1)
    past = np.random.default_rng(2).uniform(-1, 1, (environments, 2, 4))
    ids = np.arange(environments)[::-1] + 5
    batch = plan(obs, goals, model=model, planner=SMALL, env_ids=ids, past_actions=past)
    assert batch.actions.shape == (environments, 6, 2)
    assert batch.action.shape == (environments, 2)
    assert batch.trace.shape == (6, environments)
    for e in (0, 1, environments - 1):
        alone = plan(obs[e], goals[e], model=model, planner=SMALL, env_ids=[ids[e]], past_actions=past[e])
        np.testing.assert_allclose(alone.actions, batch.actions[e], rtol=0, atol=1e-9)
        assert alone.cost == pytest.approx(batch.cost[e], abs=1e-9)


def test_one_goal_serves_a_batch_and_latents_serve_as_goal():
    model = PointModel()
    obs, goal = pictures(model, 3), model.picture([1, -1])
    z = model.encode(goal)
    model.encoded.clear()
    by_picture = plan(obs, goal, model=model, planner=SMALL)
    assert [name for name, _ in model.encoded] == ["obs", "goal"]  # each once, whatever the iterations
    model.encoded.clear()
    for latents in (z, z[None], np.stack([z] * 3), z.astype(np.float32)):
        np.testing.assert_array_equal(plan(obs, latents, model=model, planner=SMALL).actions, by_picture.actions)
    assert {name for name, _ in model.encoded} == {"obs"}


# ---------------------------------------------------------------------------------------------------- bounds and units


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dims=st.integers(1, 8), block=st.integers(1, 5), dtype=st.sampled_from([np.float32, np.float64]))
@pytest.mark.parametrize("kind", [CEM, ICEM, MPPI])
def test_every_action_is_within_the_raw_bounds(kind, data, dims, block, dtype):
    number = st.floats(-5, 5).map(lambda x: round(x, 3))
    mean, low = (np.array(data.draw(st.lists(number, min_size=dims, max_size=dims))) for _ in range(2))
    width, std = (np.array(data.draw(st.lists(st.floats(0.01, 4), min_size=dims, max_size=dims))) for _ in range(2))
    model = PointModel(dims, block, dtype=dtype, stats={"mean": mean, "std": std, "low": low, "high": low + width})
    planner = kind(samples=8, iterations=2, elites=2, horizon=2, init_std=3.0)
    obs, goal = model.picture(np.zeros(dims)), np.full(dims, 50.0)
    first = plan(obs, goal, model=model, planner=planner)
    warm = plan(obs, goal, model=model, planner=planner, init=10 * first.mean, plan_index=1)
    for found in (first, warm):
        assert found.actions.dtype == dtype
        assert found.actions.shape == (2 * block, dims)
        assert (found.actions >= low).all()
        assert (found.actions <= low + width).all()


def test_warm_start_is_the_first_mean():
    model = PointModel()
    init = np.linspace(-0.5, 0.5, 12).reshape(3, 4)
    plan(model.picture([0, 0]), np.ones(2), model=model, planner=SMALL, init=init)
    np.testing.assert_array_equal(model.asked[0][1][0, 0], init)  # sample 0 is the mean
    plan(pictures(model, 2), np.ones(2), model=model, planner=SMALL, init=np.stack([init, -init]))
    np.testing.assert_array_equal(model.asked[7][1][1, 0], -init)


# ------------------------------------------------------------------------------------------------------------- history


@pytest.mark.parametrize("shape", [(2, 4), (2, 2, 2)])
def test_past_actions_reach_the_model_as_they_are(shape):
    model = PointModel(history=3)
    past = np.linspace(-0.9, 0.9, 8)
    planner = SMALL
    found = plan(pictures(model, 3), np.ones(2), model=model, planner=planner, past_actions=past.reshape(shape))
    want = model.normalise(past.reshape(1, 2, 4))
    assert len(model.asked) == planner.iterations + 1
    for z, candidates, given_past in model.asked:
        assert z.shape == (1, 3, 2)
        assert candidates.shape[2:] == (3, 4)  # nothing of the past among what is optimised
        np.testing.assert_array_equal(given_past, want)
    other = plan(pictures(model, 3), np.ones(2), model=model, planner=planner, past_actions=-past.reshape(shape))
    assert other.trace[0] != found.trace[0]


def test_a_short_history_is_taken_as_it_is():
    model = PointModel(history=3)
    plan(pictures(model, 2), np.ones(2), model=model, planner=SMALL, past_actions=np.zeros((1, 4)))
    assert model.asked[-1][0].shape == (1, 2, 2)
    plan(pictures(model, 1), np.ones(2), model=model, planner=SMALL, past_actions=np.zeros((0, 4)), return_rollout=True)
    assert model.asked[-1][0].shape == (1, 1, 2)
    assert model.asked[-1][2] is None


# ----------------------------------------------------------------------------------------------- defaults and deadline


def test_model_and_planner_have_defaults(monkeypatch):
    import lewm.model

    monkeypatch.setattr(lewm.model, "_current", None)
    monkeypatch.delenv("LEWM_MODEL", raising=False)
    model = PointModel(planner={"samples": 20, "iterations": 3, "elites": 4, "horizon": 2})
    obs = model.picture([0, 0])
    with pytest.raises(RuntimeError, match=r"no model is set.*lewm\.use.*LEWM_MODEL"):
        plan(obs, obs)
    monkeypatch.setattr(lewm.model, "_current", model)
    found = plan(obs, obs)
    assert found.actions.shape == (4, 2)
    assert found.iterations == 3


def test_deadline_ends_the_search_with_the_best_so_far():
    class Slow(PointModel):
        def costs(self, *args, **kwargs):
            time.sleep(0.02)
            return super().costs(*args, **kwargs)

    model = Slow()
    obs, goal = model.picture([0, 0]), model.picture([3, 3])
    found = plan(obs, goal, model=model, planner=CEM(iterations=50), deadline_ms=100)
    assert found.deadline_hit is True
    assert 1 <= found.iterations <= 5
    assert found.latency_ms < 1000
    assert plan(obs, goal, model=model, planner=CEM(iterations=50), deadline_ms=0.001).iterations == 1
    assert plan(obs, goal, model=model, planner=CEM(iterations=2), deadline_ms=60_000).deadline_hit is False


def test_an_interrupt_in_the_model_passes_through():
    class Interrupted(PointModel):
        def costs(self, *args, **kwargs):
            raise KeyboardInterrupt

    model = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        plan(model.picture([0, 0]), np.ones(2), model=model)


def test_a_tensor_in_gives_a_tensor_out():
    torch = pytest.importorskip("torch")
    model = PointModel()
    obs, goal = model.picture([0, 0]), model.picture([1, 1])
    found = plan(torch.from_numpy(obs), torch.from_numpy(goal), model=model, planner=SMALL)
    assert isinstance(found.action, torch.Tensor)
    np.testing.assert_array_equal(found.actions.numpy(), plan(obs, goal, model=model, planner=SMALL).actions)


def test_planning_imports_no_torch():
    code = "import sys, lewm.planner, lewm.controller, lewm.evaluation; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"elites": 400}, ValueError, r"elites must be at most samples \(300\), got 400"),
        ({"elites": 1}, ValueError, r"elites must be at least 2 .*got 1"),
        ({"horizon": 0}, ValueError, r"horizon must be an integer of at least 1, got 0"),
        ({"iterations": 0}, ValueError, r"iterations must be .*at least 1.*got 0"),
        ({"iterations": 65536}, ValueError, r"iterations must be .*below 65536, got 65536"),
        ({"samples": 1, "elites": 1}, ValueError, r"samples must be .*at least 2, got 1"),
        ({"samples": 30.0}, TypeError, r"samples must be an integer.*got 30\.0"),
        ({"init_std": 0}, ValueError, r"init_std must be a positive number, got 0"),
        ({"init_std": float("nan")}, ValueError, r"init_std must be .*got nan"),
        ({"min_std": -1}, ValueError, r"min_std must be .*got -1"),
    ],
)
def test_cem_refuses(settings, error, match):
    with pytest.raises(error, match=match):
        CEM(**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        (ICEM, {"elites": 400}, r"elites must be at most samples \(100\), got 400"),
        (ICEM, {"beta": -1}, r"beta must be zero or a positive number, got -1"),
        (ICEM, {"factor": 0.5}, r"factor must be a number of at least 1, got 0\.5"),
        (ICEM, {"keep": 1}, r"keep must be at least 0 and below 1, got 1"),
        (ICEM, {"momentum": float("nan")}, r"momentum must be at least 0 and below 1, got nan"),
        (MPPI, {"temperature": 0}, r"temperature must be a positive number, got 0"),
        (MPPI, {"min_std": -1}, r"min_std must be .*got -1"),
    ],
)
def test_the_others_refuse(kind, settings, match):
    with pytest.raises(ValueError, match=match):
        kind(**settings)


FRAME = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model": "m.safetensors"}, TypeError, r"model must be a lewm\.Model, got 'm\.safetensors'; lewm\.load reads"),
        ({"obs": FRAME.astype(np.float32)}, ValueError, r"obs must be uint8 in \[0, 255\], got float32"),
        ({"obs": FRAME.astype(np.int64)}, ValueError, r"obs must be uint8 in \[0, 255\], got int64"),
        (
            {"obs": np.moveaxis(FRAME, -1, 0)},
            ValueError,
            r"obs must be .*\(3, 8, 8\).*channels first: use np\.moveaxis",
        ),
        ({"obs": FRAME[..., 0]}, ValueError, r"obs must be of shape \(H, W, 3\) or \(E, H, W, 3\), got \(8, 8\)"),
        ({"obs": FRAME[..., :2]}, ValueError, r"obs must be of shape .*got \(8, 8, 2\)"),
        ({"obs": FRAME[None, None]}, ValueError, r"obs must be of shape .*got \(1, 1, 8, 8, 3\)"),
        ({"obs": FRAME[None][:0]}, ValueError, r"obs must be of shape .*got \(0, 8, 8, 3\)"),
        ({"goal": FRAME.astype(np.float32)}, ValueError, r"goal must be uint8 in \[0, 255\], got float32"),
        ({"goal": np.moveaxis(FRAME, -1, 0)}, ValueError, r"goal must be .*channels first"),
        ({"goal": np.zeros(3)}, ValueError, r"goal latents must be of shape \(2,\) or \(E, 2\), got \(3,\)"),
        ({"goal": np.array([0, np.nan])}, ValueError, r"goal latents must be finite, got 1"),
        ({"goal": np.zeros((3, 2))}, ValueError, r"goal must be of 1 or 1 environments, as obs is, got 3"),
        ({"obs": FRAME[None].repeat(2, 0), "goal": FRAME[None].repeat(3, 0)}, ValueError, r"1 or 2 .*got 3"),
        ({"planner": {"samples": 3}}, TypeError, r"planner must be a lewm\.CEM, lewm\.ICEM or lewm\.MPPI, got dict"),
        ({"seed": -1}, ValueError, r"seed must be .*got -1"),
        ({"seed": 2**64}, ValueError, r"seed must be .*got 18446744073709551616"),
        ({"seed": 0.5}, TypeError, r"seed must be an integer.*got 0\.5"),
        ({"plan_index": -1}, ValueError, r"plan_index must be .*got -1"),
        ({"env_ids": [0, 1]}, ValueError, r"env_ids must be 1 integers .*got \[0, 1\]"),
        ({"env_ids": [-1]}, ValueError, r"env_ids must be .*got \[-1\]"),
        ({"env_ids": [0.0]}, ValueError, r"env_ids must be .*got \[0\.0\]"),
        ({"deadline_ms": "20"}, ValueError, r"deadline_ms must be a positive number of milliseconds, got '20'"),
        ({"deadline_ms": 0}, ValueError, r"deadline_ms must be a positive number of milliseconds, got 0"),
        ({"init": np.zeros((2, 4))}, ValueError, r"init must be of shape \(3, 4\) or \(1, 3, 4\).*got \(2, 4\)"),
        ({"init": np.full((3, 4), np.nan)}, ValueError, r"init must be finite"),
        (
            {"obs": FRAME[None].repeat(3, 0), "past_actions": np.zeros((1, 4))},
            ValueError,
            r"past_actions must be of shape \(2, 4\) or \(2, 2, 2\).*3 frames of obs, got \(1, 4\)",
        ),
        (
            {"obs": FRAME[None].repeat(2, 0), "past_actions": np.full((1, 4), np.nan)},
            ValueError,
            r"past_actions must be finite",
        ),
        ({"past_actions": np.zeros((1, 4))}, ValueError, r"obs must be of shape \(T, H, W, 3\) or \(E, T, H, W, 3\)"),
        (
            {"obs": FRAME[None].repeat(4, 0), "past_actions": np.zeros((3, 4))},
            ValueError,
            r"obs has 4 frames of history, but this model's history is 3",
        ),
    ],
)
def test_plan_refuses(change, error, match):
    arguments = {"obs": FRAME, "goal": FRAME, "planner": SMALL, **change}
    with pytest.raises(error, match=match):
        plan(arguments.pop("obs"), arguments.pop("goal"), **{"model": PointModel(history=3), **arguments})


def test_a_model_without_statistics_is_refused():
    model = PointModel()
    model.stats = None
    with pytest.raises(ValueError, match=r"no action statistics.*stats=dict\(mean="):
        plan(FRAME, FRAME, model=model)


def test_latents_that_are_not_finite_are_refused():
    class Broken(PointModel):
        def encode(self, frames, *, name="frames"):
            z = super().encode(frames, name=name)
            z[-1] = np.nan
            return z

    with pytest.raises(ValueError, match=r"embedding of obs is not finite for environments \[1\]"):
        plan(FRAME[None].repeat(2, 0), np.zeros(2), model=Broken())


def test_costs_that_are_not_numbers_are_refused():
    class Broken(PointModel):
        def costs(self, *args, **kwargs):
            return super().costs(*args, **kwargs) * np.nan

    with pytest.raises(ValueError, match=r"(?i)nan"):
        plan(FRAME, FRAME, model=Broken())


# ----------------------------------------------------------------------------------------------------- the real network


@pytest.fixture(scope="module")
def tiny():
    torch = pytest.importorskip("torch")
    from lewm.config import configure
    from lewm.model import Model
    from lewm.network import LeWM

    torch.manual_seed(0)
    config, _ = configure("tiny", 2, {"history": 3})
    network = LeWM(config)
    for parameter in network.parameters():  # fresh gates are shut: actions would not matter
        parameter.data += 0.05 * torch.randn_like(parameter)
    stats = {"mean": [0.1, 0.0], "std": [0.5, 0.7], "low": [-1, -1], "high": [1, 0.5]}
    return Model(config, network.state_dict(), stats=stats, precision="float64")


def test_the_network_plans_alone_as_in_a_batch(tiny):
    rng = np.random.default_rng(0)
    obs, goals = rng.integers(0, 256, (8, 2, 64, 64, 3), np.uint8), rng.integers(0, 256, (8, 64, 64, 3), np.uint8)
    past = rng.uniform(-1, 1, (8, 1, 10))
    batch = plan(obs, goals, model=tiny, planner=SMALL, past_actions=past, return_rollout=True)
    alone = plan(obs[5], goals[5], model=tiny, planner=SMALL, past_actions=past[5], env_ids=[5], return_rollout=True)
    np.testing.assert_allclose(alone.actions, batch.actions[5], rtol=0, atol=1e-9)
    np.testing.assert_allclose(alone.imagined, batch.imagined[5], rtol=0, atol=1e-9)
    assert (alone.actions <= [1, 0.5]).all()
    goal = tiny.encode(goals[5])
    assert np.square(alone.imagined[-1] - goal).sum() == pytest.approx(alone.cost, rel=1e-9)


def test_the_network_in_float32_gives_the_same_plan_for_the_same_seed_bitwise(tiny, tmp_path):
    from lewm.model import load

    tiny.save(tmp_path / "m.safetensors")
    model = load(tmp_path / "m.safetensors", device="cpu")
    assert model.precision == "float32"
    obs, goal = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    one, again, other = (plan(obs, goal, model=model, planner=SMALL, seed=seed) for seed in (7, 7, 8))
    assert one.actions.dtype == np.float32
    np.testing.assert_array_equal(one.actions, again.actions)
    assert one.cost == again.cost
    assert not np.array_equal(one.actions, other.actions)


def test_the_network_refuses_another_shape_of_picture(tiny):
    frame = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match=r"obs must be square.*48x64"):
        plan(frame[:48], frame, model=tiny)
    with pytest.raises(ValueError, match=r"goal must be square.*48x64"):
        plan(frame, frame[:48], model=tiny)
    found = plan(frame.repeat(2, 0).repeat(2, 1), frame, model=tiny, planner=SMALL)
    assert found.actions.shape == (15, 2)
