"""Action-prefix models: what they predict and learn, and that all back ends and planners take them."""

import dataclasses
import json
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import lewm
from lewm import trainer
from lewm.config import ModelConfig, configure
from lewm.model_file import read_tensors, tensor_shapes, write_tensors
from lewm.network import LeWM
from test_heads import EVEN, HEADS, ODD, case, made, others
from test_trainer import TINY, run_of, write_store

PREFIX = {"history": 1, "action_prefix": True, "prefix_blocks": 3}


def network(**overrides):
    return made("torch", ODD, **PREFIX, **overrides).network


def test_a_prefix_says_where_it_leads():
    """Prediction k is of the current latent and the first k blocks alone; passes go on from their last prediction."""
    net = network().double()
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(4, 2, 37, generator=draw, dtype=torch.float64)
    past, blocks = (torch.randn(4, n, 10, generator=draw, dtype=torch.float64) for n in (1, 7))
    with torch.no_grad():
        found = net.rollout(z, blocks, past)
        assert found.shape == (4, 9, 37)
        assert torch.equal(found[:, :2], z)
        for count in (1, 2, 3, 4, 7):
            torch.testing.assert_close(net.rollout(z[:, 1:], blocks[:, :count]), found[:, 1 : 2 + count])
        torch.testing.assert_close(net.rollout(found[:, 4:5], blocks[:, 3:]), found[:, 4:])
        assert not torch.allclose(net.rollout(found[:, 3:4], blocks[:, 2:]), found[:, 3:], rtol=1e-2)
        changed = blocks.clone()
        changed[:, 1] += 1
        other = net.rollout(z, changed)
        assert torch.equal(other[:, 2], found[:, 2])
        assert not torch.isclose(other[:, 3:], found[:, 3:]).all(-1).any()


@pytest.mark.parametrize(("frames", "pairs"), [(4, 6), (6, 12)])
def test_the_loss_is_of_every_frame_and_prefix(frames, pairs):
    net = network().double()
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(2, frames, 37, generator=draw, dtype=torch.float64, requires_grad=True)
    actions = torch.randn(2, frames - 1, 10, generator=draw, dtype=torch.float64)
    errors = []
    for t in range(frames - 1):
        ahead = net.rollout(z[:, t : t + 1], actions[:, t : t + 3])[:, 1:]
        errors += [(ahead[:, k] - z[:, t + 1 + k]).square().mean() for k in range(ahead.shape[1])]
    assert len(errors) == pairs
    want, got = torch.stack(errors).mean(), trainer._predict(net, z, actions, z)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", others())
@pytest.mark.parametrize("sizes", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("horizon", [1, 2, 3, 5])
def test_costs_and_rollouts_are_those_of_torch(backend, sizes, horizon):
    if backend == "cuda":
        pytest.importorskip("triton")
        if sizes is ODD:
            pytest.skip("the kernels take no such widths")
    want, got = (made(name, sizes, **PREFIX) for name in ("torch", backend))
    for environments, frames in ((3, 1), (1, 2)):
        z, goal, candidates, past = case(want, environments, 7, horizon, frames)
        for cost in ("distance", "latent"):
            one, other = (m.costs(z, goal, candidates, past, cost) for m in (got, want))
            np.testing.assert_allclose(one, other, rtol=1e-4)
        one, other = (m.rollout(z, candidates, past) for m in (got, want))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_rounded_factors(precision):
    if not lewm._core.Engine.instruction_sets(precision):
        pytest.skip(f"this processor has no {precision}")
    exact, fast = made("torch", ODD, **PREFIX), made("cpu", ODD, precision, **PREFIX)
    z, goal, candidates, _ = case(exact, 2, 40, 5)
    want, got = (m.rollout(z, candidates) for m in (exact, fast))
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)
    costs = fast.costs(z, goal, candidates, cost="latent")
    np.testing.assert_allclose(costs, fast.cost(got, goal, "latent"), rtol=1e-4)


@pytest.mark.parametrize("backend", others())
@pytest.mark.parametrize("planner", [lewm.CEM, lewm.ICEM, lewm.MPPI])
def test_a_plan_is_that_of_torch(backend, planner):
    """With the distance head's cost, from the action prior's guess, and beyond a pass."""
    # MPPI weighs its elites by cost gaps, here a thousandth of a cost: that much more does the rounding of costs weigh.
    atol = 2e-3 if planner is lewm.MPPI else 1e-4
    planner = planner(samples=16, iterations=2, elites=4, horizon=4)
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    models = (made(name, EVEN, **PREFIX) for name in (backend, "torch"))
    got, want = (
        lewm.plan(frames[:2], frames[2:], model=model, planner=planner, seed=5, return_rollout=True) for model in models
    )
    for name in ("actions", "cost", "mean", "trace", "imagined"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-3, atol=atol, err_msg=name)


def test_a_controller_needs_no_history():
    model = made("cpu", EVEN, **PREFIX)
    frames = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    planner = lewm.CEM(samples=8, iterations=1, elites=2, horizon=4)
    controller = lewm.Controller(model, frames[-1], planner=planner, execute=1)
    assert all(np.isfinite(controller(obs)).all() for obs in frames[:-1])
    with pytest.raises(ValueError, match="this model's history is 1"):
        lewm.plan(frames[:2], frames[2], model=model, planner=planner, past_actions=np.zeros((1, 10)))


def test_model_files_say_so(tmp_path):
    path, model = tmp_path / "m.safetensors", made("cpu", ODD, **PREFIX)
    model.save(path)
    for backend in ("cpu", "torch"):
        assert lewm.load(path, backend=backend).config == model.config
    assert "prefixes of up to 3 blocks" in model.describe()
    tensors, header = read_tensors(path, "model file")
    assert tensors["predictor.pos_embedding"].shape == (1, 3, 37)
    for changes, text in (
        ({"action_prefix": 1}, "action_prefix must be True or False"),
        ({"prefix_blocks": 0}, "prefix_blocks must be an integer from 1 to 1024"),
        ({"prefix_blocks": 10**9}, "prefix_blocks must be an integer from 1 to 1024"),
        ({"prefix_blocks": 4}, r"predictor.pos_embedding \(1, 3, 37\), want \(1, 4, 37\)"),
        ({"history": 2}, "history must be 1 with action_prefix, got 2"),
    ):
        changed = json.loads(json.dumps(header))
        changed["architecture"].update(changes)
        write_tensors(tmp_path / "bad.safetensors", tensors, changed)
        with pytest.raises(ValueError, match=text):
            lewm.load(tmp_path / "bad.safetensors", backend="cpu")


def test_models_without_are_as_before(tmp_path):
    """Files of before say nothing of prefixes; the number of blocks alone changes nothing."""
    plain, path = made("cpu", ODD, history=3), tmp_path / "m.safetensors"
    plain.save(path)
    tensors, header = read_tensors(path, "model file")
    for name in ("action_prefix", "prefix_blocks"):
        del header["architecture"][name]
    write_tensors(path, tensors, header)
    assert lewm.load(path, backend="cpu").config == plain.config
    config = ModelConfig(action_dim=2)
    assert tensor_shapes(dataclasses.replace(config, prefix_blocks=9)) == tensor_shapes(config)
    with pytest.raises(ValueError, match="history must be 1 with action_prefix, got 3"):
        dataclasses.replace(config, action_prefix=True)
    config, _ = configure("tiny", 2, {**ODD, **PREFIX, **HEADS})
    with torch.device("meta"):
        state = LeWM(config).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == tensor_shapes(config)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "square.lewm")


def test_training(store, tmp_path):
    arguments = {"preset": "tiny", "device": "cpu", "seed": 3, "steps": 60, **TINY, **PREFIX, "frames": 5}
    with pytest.raises(ValueError, match="frames must exceed prefix_blocks 3, got 3"):
        lewm.train(store, out=tmp_path / "run", **{**arguments, "frames": 3})
    model = lewm.train(store, out=tmp_path / "run", **arguments)
    rows = np.genfromtxt(tmp_path / "run" / "metrics.csv", delimiter=",", names=True)
    assert rows["prediction"][-1] < 0.5 * rows["prediction"][0]
    assert lewm.load(tmp_path / "run", backend="torch").hash() == model.hash()
    positions = model._engine.weights()["predictor.pos_embedding"]
    new = run_of(store, **PREFIX, frames=5, seed=3).network.predictor.pos_embedding.detach().numpy()
    assert (np.abs(positions - new).max(-1) > 0).all()  # every position was trained


def test_a_compiled_step_is_the_same(store):
    eager, compiled = (run_of(store, compile, **PREFIX, frames=5, steps=4) for compile in (False, True))
    if not compiled.compiled:
        pytest.skip("there is no compiler here")
    batches = [batch for batch, _ in zip(eager._batches(0), range(2), strict=False)]
    for frames, actions in batches:
        losses = [run._step(frames, actions)["prediction"].item() for run in (eager, compiled)]
        assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_kernels_for_a_gpu_are_refused_beyond_eight_blocks():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1")
    with pytest.raises(ValueError, match="prefix_blocks 9 is above 8"):
        made("cuda", EVEN, **{**PREFIX, "prefix_blocks": 9})
