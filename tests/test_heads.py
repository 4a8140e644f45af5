"""The heads on frozen latents: what they learn, that plans use them, and that all back ends give the same."""

import dataclasses
import json
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import lewm
from lewm import heads, trainer
from lewm.config import ModelConfig, configure
from lewm.heads import Episodes, train_heads
from lewm.model_file import read_tensors, tensor_shapes, write_tensors
from lewm.network import LeWM
from test_trainer import TINY, write_store

STATS = {"mean": [0.1, -0.2], "std": [0.5, 0.4], "low": [-1.0, -1.0], "high": [1.0, 1.0]}
HEADS = {"distance_head": True, "action_prior": True}
# Widths that are no multiples of anything, and those that the kernels take.
ODD = {"embed_dim": 37, "predictor_dim": 29, "head_hidden": 45, "prior_blocks": 3, "projector_hidden": 33}
EVEN = {"embed_dim": 48, "predictor_dim": 48, "predictor_mlp": 96, "projector_hidden": 64, "head_hidden": 80}
SMALL = {"image_size": 16, "encoder_dim": 32, "encoder_depth": 1, "encoder_mlp": 32, "predictor_depth": 1,
         "predictor_heads": 2, "action_hidden": 32, **HEADS}  # fmt: skip


def made(backend, sizes, precision="float32", **overrides):
    config, _ = configure("tiny", 2, {**SMALL, **sizes, **overrides})
    torch.manual_seed(0)
    network = LeWM(config)
    for parameter in network.parameters():
        if parameter.dim() == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # else no action would have an effect
    device = "cpu" if backend == "torch" else None
    return lewm.Model(config, network.state_dict(), stats=STATS, backend=backend, precision=precision, device=device)


def others():
    found = ["cpu"]
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        found.append("cuda")
    return found


def case(model, environments=2, samples=19, horizon=3, frames=1):
    draw, c = np.random.default_rng(0), model.config
    shapes = (environments, frames, c.embed_dim), (environments, c.embed_dim)
    z, goal = (draw.standard_normal(shape, np.float32) for shape in shapes)
    past = draw.standard_normal((environments, frames - 1, c.block_dim), np.float32) if frames > 1 else None
    return z, goal, draw.standard_normal((environments, samples, horizon, c.block_dim), np.float32), past


@pytest.mark.parametrize("backend", others())
@pytest.mark.parametrize(("sizes", "history", "frames"), [(ODD, 1, 1), (ODD, 3, 2), (EVEN, 1, 1), (EVEN, 3, 2)])
def test_costs_and_guesses_are_those_of_torch(backend, sizes, history, frames):
    if backend == "cuda":
        pytest.importorskip("triton")
        if sizes is ODD:
            with pytest.raises(ValueError, match="embed_dim 37 is not a multiple of 16"):
                made(backend, sizes)
            return
    want, got = (made(name, sizes, history=history) for name in ("torch", backend))
    z, goal, candidates, past = case(want, frames=frames)
    for cost in ("distance", "latent", None):
        one, other = (m.costs(z, goal, candidates, past, cost) for m in (got, want))
        assert one.shape == (2, 19)
        np.testing.assert_allclose(one, other, rtol=1e-4)
        zs = want.rollout(z, candidates, past)
        np.testing.assert_allclose(got.cost(zs, goal, cost), other, rtol=1e-4)
    np.testing.assert_allclose(got.prior(z[:, -1], goal), want.prior(z[:, -1], goal), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", others())
@pytest.mark.parametrize("environments", [1, 3])
def test_a_plan_is_that_of_torch(backend, environments):
    """The whole search: what it starts from, what it is scored with, and what it finds."""
    planner = lewm.CEM(samples=20, iterations=2, elites=4, horizon=2)
    frames = np.random.default_rng(0).integers(0, 256, (2 * environments, 16, 16, 3), np.uint8)
    obs, goal = frames[:environments], frames[environments:]
    got, want = (
        lewm.plan(obs, goal, model=made(name, EVEN), planner=planner, seed=5, return_rollout=True)
        for name in (backend, "torch")
    )
    for name in ("actions", "cost", "mean", "trace", "imagined"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_the_head_is_exact_where_the_rollout_is_not(precision):
    if not lewm._core.Engine.instruction_sets(precision):
        pytest.skip(f"this processor has no {precision}")
    exact, fast = made("torch", EVEN), made("cpu", EVEN, precision)
    z, goal, candidates, _ = case(exact)
    want = exact.cost(fast.rollout(z, candidates), goal)
    np.testing.assert_allclose(fast.costs(z, goal, candidates), want, rtol=1e-4)


def test_the_distance_is_a_metric():
    network = made("torch", ODD).network
    a, b, c = torch.randn(3, 50, 37, generator=torch.Generator().manual_seed(0))
    assert (network.distance(a, a) == 0).all()
    assert torch.equal(network.distance(a, b), network.distance(b, a))
    assert (network.distance(a, c) <= network.distance(a, b) + network.distance(b, c) + 1e-6).all()


def test_the_planner_says_what_it_is_scored_with():
    model, without = made("cpu", EVEN), made("cpu", EVEN, distance_head=False)
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    goal = model.encode(frames[1:])
    settings = {"samples": 12, "iterations": 2, "elites": 3, "horizon": 2}
    for kind in (lewm.CEM, lewm.ICEM, lewm.MPPI):
        for cost in (None, "distance", "latent"):
            planner = kind(**settings, cost=cost)
            found = lewm.plan(frames[0], frames[1], model=model, planner=planner, return_rollout=True)
            last = found.imagined[None, None, -1:]
            np.testing.assert_allclose(found.cost, model.cost(last, goal, cost)[0, 0], rtol=1e-4)
        assert lewm.Controller(model, goal, planner=kind(**settings)).planner.cost == "distance"
        assert lewm.Controller(without, goal, planner=kind(**settings)).planner.cost == "latent"
        with pytest.raises(ValueError, match='"distance", but the model has no distance head'):
            lewm.plan(frames[0], frames[1], model=without, planner=kind(**settings, cost="distance"))
        with pytest.raises(ValueError, match="cost must be"):
            kind(cost="time")


def test_a_search_starts_from_the_guess():
    model = made("cpu", EVEN)
    z, goal, _, _ = case(model)
    low, high = model.bounds()
    for horizon in (2, 5, 7):
        planner = lewm.CEM(samples=4, iterations=1, elites=2, horizon=horizon)
        guess = np.zeros((2, horizon, model.config.block_dim))
        blocks = np.clip(model.prior(z[:, -1], goal), low, high)[:, :horizon]
        guess[:, : blocks.shape[1]] = blocks
        one, other = (lewm.planner.plan_latents(model, z, goal, planner, init=init) for init in (None, guess))
        np.testing.assert_array_equal(one.actions, other.actions)
    with pytest.raises(ValueError, match="no action prior"):
        made("cpu", EVEN, action_prior=False).prior(z[:, -1], goal)
    with pytest.raises(ValueError, match=r"want z and goal \(E, 48\)"):
        model.prior(z, goal)


def test_a_controller_guesses_for_each_plan(monkeypatch):
    model, asked = made("cpu", EVEN), []
    prior = model.prior
    monkeypatch.setattr(model, "prior", lambda z, goal: asked.append(z) or prior(z, goal))
    frames = np.random.default_rng(0).integers(0, 256, (31, 16, 16, 3), np.uint8)
    planner = lewm.CEM(samples=4, iterations=1, elites=2, horizon=2)
    for execute, guesses in ((2, 3), (1, 6)):
        asked.clear()
        controller = lewm.Controller(model, frames[-1], planner=planner, execute=execute)
        for obs in frames[:-1]:
            controller(obs)
        assert len(asked) == guesses


def test_model_files_carry_the_heads(tmp_path):
    model = made("cpu", ODD)
    model.save(tmp_path / "m.safetensors")
    for backend in ("cpu", "torch"):
        loaded = lewm.load(tmp_path / "m.safetensors", backend=backend)
        assert loaded.hash() == model.hash()
        assert loaded.config == model.config
    tensors, header = read_tensors(tmp_path / "m.safetensors", "model file")
    bad = dict(tensors)
    bad["distance_head.net.2.weight"] = bad["distance_head.net.2.weight"][:-1]
    write_tensors(tmp_path / "bad.safetensors", bad, header)
    with pytest.raises(ValueError, match=r"distance_head.net.2.weight \(44, 45\), want \(45, 45\)"):
        lewm.load(tmp_path / "bad.safetensors", backend="cpu")
    for field, value in (("distance_head", 1), ("action_prior", "yes"), ("head_hidden", 10**9), ("prior_blocks", 0)):
        changed = json.loads(json.dumps(header))
        changed["architecture"][field] = value
        write_tensors(tmp_path / "bad.safetensors", tensors, changed)
        with pytest.raises(ValueError, match=field):
            lewm.load(tmp_path / "bad.safetensors", backend="cpu")


def test_models_without_heads_are_as_before():
    plain, headed = (ModelConfig(action_dim=2, **(HEADS if on else {})) for on in (False, True))
    names = [name for name in tensor_shapes(headed) if name not in tensor_shapes(plain)]
    assert len(names) == 12
    assert all(name.startswith(heads.HEADS) for name in names)
    config, _ = configure("tiny", 2, SMALL)
    states = []
    for on in (False, True):
        torch.manual_seed(3)
        states.append(LeWM(dataclasses.replace(config, distance_head=on, action_prior=on)).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def line(count=6, length=60, seed=0):
    """Episodes that walk along a line in the first latent number, at one place a step; the way is their action."""
    draw = torch.Generator().manual_seed(seed)
    latents, actions = [], []
    for episode in range(count):
        sign = 1 - 2 * (episode % 2)
        places = sign * torch.arange(length) + (0 if sign > 0 else length)
        z = torch.zeros(length, 37)
        z[:, 0] = places / 20 - 1.5
        latents.append(z + 0.001 * torch.randn(z.shape, generator=draw))
        actions.append(torch.full((length - 1, 2), float(sign)))
    return Episodes(latents, actions, 5)


def test_heads_learn_times_and_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "STEPS", 300)
    network = made("torch", ODD).network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    metrics = train_heads(network, line(), line(2, seed=1), 0, tmp_path / "heads.csv")
    assert metrics["distance_head_correlation"] > 0.98
    assert metrics["action_prior_r2"] > 0.7
    assert metrics["distance_head_loss"] < 0.02
    rows = (tmp_path / "heads.csv").read_text().splitlines()
    assert rows[0] == "head,step,loss"
    assert len(rows) == 1 + 2 * 3
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith(heads.HEADS), name
    # Far beyond any pair's gap in order, and in units of blocks nearby.
    z = torch.zeros(3, 37)
    z[:, 0] = torch.tensor([-1.5, -1.0, 1.0])  # 10 and 50 steps from the first
    near, far = network.distance(z[0], z[1]).item(), network.distance(z[0], z[2]).item()
    assert near == pytest.approx(2, rel=0.2)
    assert far == pytest.approx(10, rel=0.2)


def test_pairs_are_of_one_episode_and_ways_end_at_the_goal():
    episodes = line()
    rng = np.random.default_rng(0)
    now, later, blocks = episodes.pairs(rng, 4000)
    steps = ((later - now)[:, 0] * 20).abs()
    assert (steps - 5 * blocks).abs().max() < 2  # the noise on the latents
    assert blocks.min() == pytest.approx(0.2)
    assert blocks.max() > 11
    now, later, done = episodes.ways(rng, 4000, 3)
    assert done.shape == (4000, 3, 10)
    assert ((done == 0) | (done.abs() == 1)).all()
    gap = (later - now)[:, 0] * 20
    np.testing.assert_array_equal(done[..., ::2].abs().sum((1, 2)), gap.abs().round().clamp(max=15))
    assert (torch.sign(done[:, 0, 0]) == torch.sign(gap)).all()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "square.lewm")


def test_training_with_heads(store, tmp_path, monkeypatch):
    """The rest of the model does not change, and a run that was cut ends the same."""
    monkeypatch.setattr(heads, "STEPS", 30)
    arguments = {"preset": "tiny", "device": "cpu", "checkpoint_every": 5, "seed": 3, "steps": 10, **TINY}
    plain = lewm.train(store, out=tmp_path / "plain", **arguments)
    whole = lewm.train(store, out=tmp_path / "whole", **arguments, **HEADS)
    weights = [model._engine.weights() for model in (plain, whole)]
    assert all(np.array_equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not (tmp_path / "plain" / "heads.csv").exists()
    metrics = whole.meta["training"]["metrics"]
    assert {"distance_head_loss", "distance_head_correlation", "action_prior_loss", "action_prior_r2"} <= set(metrics)
    assert (tmp_path / "plain" / "metrics.csv").read_text().splitlines()[0] == ",".join(trainer._COLUMNS)

    def interrupt(done, total, metrics):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lewm.train(store, out=tmp_path / "cut", progress=interrupt, **arguments, **HEADS)
    torch.manual_seed(12345)
    resumed = lewm.train(store, out=tmp_path / "cut", resume=True, **arguments, **HEADS)
    assert resumed.hash() == whole.hash()
    again = lewm.train(store, out=tmp_path / "cut", resume=True, **arguments, **HEADS)  # it had ended
    assert again.hash() == whole.hash()


def test_data_without_a_pair_is_refused(store, tmp_path):
    config, train = configure("tiny", 2, {**TINY, **HEADS, "steps": 1})
    run = trainer._Run(store, "tiny", config, train, device="cpu")
    run.train_episodes = np.empty(0, np.int64)
    run.out = tmp_path
    with pytest.raises(ValueError, match="at least 2 frames for a head"):
        run._train_heads()
