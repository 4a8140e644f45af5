"""The `cuda` back end behind `lewm.Model`: on a GPU where there is one, else its kernels in Triton's interpreter."""

import json
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import lewm
from lewm import cuda_backend
from lewm import model as model_module
from test_kernels_rollout import network

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

STATS = {"mean": [0.1, -0.2], "std": [0.5, 0.4], "low": [-1.0, -1.0], "high": [1.0, 1.0]}
PLANNER = lewm.CEM(samples=20, iterations=2, elites=4, horizon=2)


def made(backend, precision="float32", history=2, **overrides):
    config, net = network(predictor_depth=1, history=history, **overrides)
    weights = {name: value.float() if value.is_floating_point() else value for name, value in net.state_dict().items()}
    device = None if backend == "cpu" else DEVICE
    return lewm.Model(config, weights, stats=STATS, backend=backend, precision=precision, device=device)


@pytest.fixture(scope="module")
def models():
    return {backend: made(backend) for backend in ("cuda", "torch")}


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("history", [1, 2])
def test_it_is_the_torch_backend(models, frames, history):
    draw = np.random.default_rng(1)
    width = models["cuda"].config.block_dim
    candidates = draw.standard_normal((2, 3, 2, width), np.float32)
    past = draw.standard_normal((2, history - 1, width), np.float32) if history > 1 else None
    got, want = [], []
    for results, model in ((got, models["cuda"]), (want, models["torch"])):
        z = model.encode(frames).reshape(2, 2, -1)[:, :history]
        goal = model.encode(frames[:2])
        results += [z, model.rollout(z, candidates, past), model.costs(z, goal, candidates, past)]
    for one, other in zip(got, want, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_more_candidates_than_go_at_once(models, monkeypatch):
    model, draw = models["cuda"], np.random.default_rng(2)
    z = draw.standard_normal((3, 1, 48), np.float32)
    goal = draw.standard_normal((3, 48), np.float32)
    candidates = draw.standard_normal((3, 5, 1, model.config.block_dim), np.float32)
    whole, found = model.costs(z, goal, candidates), lewm.plan
    for rows in (1, 2, 5, 11):
        monkeypatch.setattr(cuda_backend, "ROWS", rows)
        np.testing.assert_allclose(model.costs(z, goal, candidates), whole, rtol=1e-5)
    assert found is lewm.plan


def test_a_plan_is_that_of_the_cpu(models, frames):
    """Same noise, same costs: the Rust planner with the Rust engine, and everything on the device."""
    cpu, planner = made("cpu"), PLANNER
    for obs, goal in ((frames[0], frames[1]), (frames[:2], frames[2:])):
        got = lewm.plan(obs, goal, model=models["cuda"], planner=planner, seed=5, return_rollout=True)
        want = lewm.plan(obs, goal, model=cpu, planner=planner, seed=5, return_rollout=True)
        assert (got.backend, got.precision) == ("cuda", "float32")
        for name in ("actions", "cost", "mean", "trace", "clipped", "imagined", "kept"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-3, atol=1e-4, err_msg=name)
        assert got.iterations == want.iterations


def test_groups_of_environments_are_planned_one_after_the_other(models, frames, monkeypatch):
    whole = lewm.plan(frames[:3], frames[3], model=models["cuda"], planner=PLANNER)
    monkeypatch.setattr(cuda_backend, "ROWS", 2 * PLANNER.samples)
    parts = lewm.plan(frames[:3], frames[3], model=models["cuda"], planner=PLANNER)
    for name in ("actions", "cost", "mean", "trace", "clipped"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-5, err_msg=name)
    hurried = lewm.plan(frames[:3], frames[3], model=models["cuda"], planner=PLANNER, deadline_ms=1e-6)
    assert hurried.deadline_hit
    assert hurried.iterations == 1
    assert hurried.trace.shape == (1, 3)


def test_other_planners_take_the_loop_on_the_cpu(models, frames):
    planner = lewm.ICEM(samples=12, iterations=2, elites=3, horizon=2)
    got, want = (
        lewm.plan(frames[0], frames[1], model=model, planner=planner) for model in (models["cuda"], made("cpu"))
    )
    np.testing.assert_allclose(got.actions, want.actions, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("found", "want"), [((0.9995, 0.97), "bfloat16"), ((0.9985, 1.0), "float32")])
def test_precision_of_its_own_choice(monkeypatch, found, want):
    asked = []
    monkeypatch.setattr(cuda_backend, "agreement", lambda exact, fast, config: asked.append((exact, fast)) or found)
    assert made("cuda", "auto").precision == want
    assert [kernels.precision for kernels in asked[0]] == ["float32", "bfloat16"]


def test_controller(models, frames):
    controller = lewm.Controller(models["cuda"], frames[3], planner=PLANNER, execute=1)
    block = models["cuda"].config.action_block
    actions = [controller(frames[i // block % 3]) for i in range(block + 1)]
    assert all(action.shape == (2,) and np.isfinite(action).all() for action in actions)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"precision": "int8"}, 'precision must be auto or one of .* with backend "cuda", got .int8.'),
        ({"predictor_mlp": 100}, "predictor_mlp 100 is not a multiple of 16"),
    ],
)
def test_refusals(change, text):
    with pytest.raises(ValueError, match=text):
        made("cuda", **change)


def test_no_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config, _ = network()
    assert cuda_backend.unusable(config, "cpu") == "device cpu is no CUDA device"


# ------------------------------------------------------------------------------------------------ the check of a GPU


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = {"history": 2}, {"samples": 8, "iterations": 2, "elites": 3, "horizon": 2}
    if DEVICE == "cpu":
        monkeypatch.setattr(cuda_backend, "_CHECKS", (small,))  # the interpreter takes minutes for more
    cuda_backend._self_check.cache_clear()
    yield tmp_path / "lewm-fast" / "gpu.json"
    cuda_backend._self_check.cache_clear()


def test_the_check_passes_here_and_is_remembered(cache, monkeypatch):
    assert cuda_backend.self_check(DEVICE)
    assert list(json.loads(cache.read_text()).values()) == [True]
    cuda_backend._self_check.cache_clear()
    monkeypatch.setattr(cuda_backend, "_problem", lambda device: pytest.fail("it was remembered"))
    assert cuda_backend.self_check(DEVICE)


@pytest.mark.parametrize("damage", ["costs", "crash", "noise"])
def test_a_gpu_that_fails_gets_the_torch_backend(cache, monkeypatch, damage):
    kernels = cuda_backend.Kernels.costs
    if damage == "costs":
        monkeypatch.setattr(cuda_backend.Kernels, "costs", lambda *a: kernels(*a) * 1.01)
        reason = "costs in float32 differ"
    elif damage == "crash":
        monkeypatch.setattr(cuda_backend, "pack", lambda *a: 1 / 0)
        reason = "ZeroDivisionError"
    else:
        solve = cuda_backend.Objective.solve
        monkeypatch.setattr(
            cuda_backend.Objective, "solve", lambda self, s, m, **call: solve(self, s, m, **call | {"seed": 4})
        )
        reason = "plans in float32 differ"
    monkeypatch.setattr(model_module, "_gpu", lambda: True)
    config, _ = network()
    with pytest.warns(RuntimeWarning, match=f"failed their check on .*{reason}"):
        assert model_module._best(config, "auto", None) == "torch"
    assert not cache.exists()


def test_what_auto_takes(monkeypatch):
    config, _ = network()
    monkeypatch.setattr(cuda_backend, "self_check", lambda device: True)
    monkeypatch.setattr(cuda_backend, "unusable", lambda config, device: None)
    for gpu, precision, device, want in (
        (False, "auto", None, "cpu"),
        (True, "auto", None, "cuda"),
        (True, "int8", None, "cpu"),
        (True, "float64", None, "torch"),
        (True, "auto", "cpu", "torch"),
        (False, "auto", "cuda:0", "cuda"),
    ):
        monkeypatch.setattr(model_module, "_gpu", lambda gpu=gpu: gpu)
        assert model_module._best(config, precision, device) == want
    monkeypatch.setattr(cuda_backend, "unusable", lambda config, device: "it is too old")
    assert model_module._best(config, "auto", "cuda:0") == "torch"
