"""stable-worldmodel's interfaces, and what its CEMSolver did on the problems of `golden/swm_cem.py`.

Tests marked by `needs_peer` run where stable-worldmodel is installed, which `make test` does not ask for: `make peers`
makes such an environment. They take whichever release is imported, PyPI's or the main branch.
"""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gymnasium

import lewm
import lewm.swm
from lewm.model_file import released_names
from lewm.network import LeWM
from lewm.pixels import MEAN, STD

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent / "golden")]
import swm_cem
from benches import peers
from benches.peer_cem import Elites

GOLDEN = np.load(swm_cem.FILE)
BUDGET = {"samples": swm_cem.SAMPLES, "iterations": swm_cem.ITERATIONS, "elites": swm_cem.ELITES}
NUMBERS = range(swm_cem.COUNT)
PEER = importlib.util.find_spec("stable_worldmodel") is not None
RELEASE = "main" if PEER and importlib.util.find_spec("stable_worldmodel.planning") else "0.1.1"
needs_peer = pytest.mark.skipif(not PEER, reason="needs stable-worldmodel: make peers")


def model_of(case, backend="torch", precision="float64", **options):
    overrides = {**swm_cem.ARCHITECTURE, "history": case.config.history}
    return lewm.Model.from_state_dict(
        case.weights, preset="tiny", backend=backend, precision=precision, **overrides, **options
    )


def configured(solver, environments, horizon, action_dim=2, block=2):
    space = gymnasium.spaces.Box(-1, 1, (environments, action_dim))
    solver.configure(
        action_space=space, n_envs=environments, config=SimpleNamespace(horizon=horizon, action_block=block)
    )
    return solver


def tensors(case):
    return {name: torch.from_numpy(value) for name, value in case.info.items()}


def init_of(case):
    return None if case.init is None else torch.tensor(case.init)  # CEMSolver writes into it


def recorded(model):
    """`model`, and what its objectives were asked and said: (candidates, costs) of every iteration."""
    seen = []

    def objective(z, goal, past, cost):
        def costs(candidates):
            seen.append((candidates.copy(), np.asarray(model.costs(z, goal, candidates, past, cost))))
            return seen[-1][1]

        return costs

    model.objective = objective
    return model, seen


def elites_of(seen, environments):
    """(iterations, E, K) of calls that were made for one batch of environments after the other."""
    ranked = [np.sort(np.argsort(costs, axis=1, kind="stable")[:, : swm_cem.ELITES], axis=1) for _, costs in seen]
    batches = [ranked[i : i + swm_cem.ITERATIONS] for i in range(0, len(ranked), swm_cem.ITERATIONS)]
    return np.concatenate([np.stack(batch) for batch in batches], axis=1).reshape(-1, environments, swm_cem.ELITES)


@pytest.fixture(autouse=True)
def one_thread():
    """Problems this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def case():
    return swm_cem.problem(5, "main")  # 3 environments, horizon 6, history 3


def test_importing_loads_neither_torch_nor_the_peer():
    code = "import lewm.swm, sys; print({'torch', 'stable_worldmodel', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------------------- reference mode


def test_the_problems_cover_what_they_should():
    cases = [swm_cem.problem(number, "main") for number in NUMBERS]
    assert {case.horizon for case in cases} == set(range(1, 9))
    assert {case.environments for case in cases} == {1, 2, 3, 4}
    assert {case.info["pixels"].shape[1] for case in cases} == {1, 2, 3}
    assert {case.init is None for case in cases} == {True, False}
    assert len({case.batch_size for case in cases}) > 2


@pytest.mark.parametrize("name", ["0.1.1", "main"])
@pytest.mark.parametrize("number", NUMBERS)
def test_reference_mode_does_what_cem_solver_did(number, name):
    case = swm_cem.problem(number, name)
    model, seen = recorded(model_of(case))
    solver = lewm.swm.Solver(model, **BUDGET, seed=case.seed, reference=True, batch_size=case.batch_size)
    found = configured(solver, case.environments, case.horizon).solve(tensors(case), init_of(case))
    np.testing.assert_array_equal(elites_of(seen, case.environments), GOLDEN[f"{name} {number} elites"])
    np.testing.assert_allclose(found["actions"], GOLDEN[f"{name} {number} actions"], rtol=0, atol=1e-6)


def test_what_reference_mode_returns(case):
    model, seen = recorded(model_of(case))
    solver = lewm.swm.Solver(model, **BUDGET, seed=case.seed, reference=True, batch_size=3)
    found = configured(solver, 3, case.horizon)(tensors(case), init_action=init_of(case))
    assert set(found) == {"costs", "mean", "var", "actions"}
    assert len(seen) == swm_cem.ITERATIONS
    np.testing.assert_array_equal(seen[0][0][:, 0, : case.init.shape[1]], case.init)
    for (candidates, costs), (following, _) in itertools.pairwise(seen):
        best = np.argsort(costs, axis=1, kind="stable")[:, : swm_cem.ELITES, None, None]
        picked = np.take_along_axis(candidates, best, axis=1)
        np.testing.assert_allclose(following[:, 0], picked.mean(axis=1), rtol=0, atol=1e-12)
    candidates, costs = seen[-1]
    picked = np.take_along_axis(
        candidates, np.argsort(costs, axis=1, kind="stable")[:, : swm_cem.ELITES, None, None], axis=1
    )
    np.testing.assert_allclose(found["actions"], picked.mean(axis=1), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found["mean"][0], picked.mean(axis=1), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found["var"][0], picked.std(axis=1, ddof=1), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found["costs"], np.sort(costs, axis=1)[:, : swm_cem.ELITES].mean(axis=1), rtol=1e-12)
    assert found["actions"].dtype == torch.float64
    assert found["actions"].device.type == "cpu"


def test_the_noise_goes_on_from_plan_to_plan(case):
    solver = configured(
        lewm.swm.Solver(model_of(case), **BUDGET, seed=7, reference=True), case.environments, case.horizon
    )
    first, second = (solver.solve(tensors(case))["actions"] for _ in range(2))
    again = configured(
        lewm.swm.Solver(model_of(case), **BUDGET, seed=7, reference=True), case.environments, case.horizon
    )
    assert torch.equal(again.solve(tensors(case))["actions"], first)
    assert not torch.equal(first, second)


def test_float32_follows_float64_until_candidates_are_alike(case):
    """The CPU engine's costs differ in the last digits: the first elites are the same, on the same noise."""
    exact, cpu = (recorded(model_of(case, *which)) for which in (("torch", "float32"), ("cpu", "float32")))
    for model, _ in (exact, cpu):
        solver = lewm.swm.Solver(model, **BUDGET, seed=case.seed, reference=True)
        found = configured(solver, 3, case.horizon).solve(tensors(case))
        assert found["actions"].dtype == torch.float32
    elites = [elites_of(seen, 3) for _, seen in (exact, cpu)]
    np.testing.assert_array_equal(elites[0][:3], elites[1][:3])


# ------------------------------------------------------------------------------------------------- the protocol


def test_the_solver_protocol(case):
    solver = lewm.swm.Solver(model_of(case, "cpu", "float32"), **BUDGET)
    for name in ("action_dim", "n_envs", "horizon"):
        with pytest.raises(AttributeError, match="not configured"):
            getattr(solver, name)
    with pytest.raises(AttributeError, match="not configured"):
        solver.solve(tensors(case))
    configured(solver, 5, 4)
    assert (solver.action_dim, solver.n_envs, solver.horizon) == (4, 5, 4)
    found = solver(tensors(case))  # three of the five environments want a plan
    assert found["actions"].shape == found["mean"][0].shape == found["var"][0].shape == (3, 4, 4)
    assert found["actions"].dtype == torch.float32
    assert len(found["costs"]) == 3
    assert all(isinstance(cost, float) for cost in found["costs"])


def test_the_fast_mode_is_the_search_of_plan():
    case = swm_cem.problem(2, "0.1.1")  # 2 environments, one frame
    stats = {"mean": [0.1, -0.2], "std": [0.5, 0.4], "low": [-1, -1], "high": [1, 1]}
    model = model_of(case, "cpu", "float32", stats=stats)
    rng = np.random.default_rng(3)
    obs, goal = (swm_cem.pictures(rng, 2, 1) for _ in range(2))
    want = lewm.plan(obs[:, 0], goal[:, 0], model=model, planner=lewm.CEM(**BUDGET, horizon=3), seed=9)
    scaler = SimpleNamespace(transform=lambda raw: (raw - stats["mean"]) / stats["std"])
    solver = configured(lewm.swm.Solver(model, **BUDGET, seed=9, scaler=scaler), 2, 3)
    floats = {"pixels": torch.from_numpy(swm_cem.normalised(obs)), "goal": torch.from_numpy(swm_cem.normalised(goal))}
    found = solver.solve(floats)
    raw = model.denormalise(found["actions"].numpy()).reshape(2, 6, 2)
    np.testing.assert_allclose(raw, want.actions, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found["costs"], want.cost, rtol=1e-6)
    assert np.abs(raw).max() <= 1 + 1e-6
    again = configured(lewm.swm.Solver(model, **BUDGET, seed=9, scaler=scaler), 2, 3)
    bytes_ = {"pixels": torch.from_numpy(obs), "goal": goal}  # as a policy without a transform passes them
    assert torch.equal(again.solve(bytes_)["actions"], found["actions"])
    assert not torch.equal(again.solve(bytes_)["actions"], found["actions"])  # fresh noise for the next plan


def test_a_model_that_searches_by_itself_does():
    """As one on the GPU: it is asked what `lewm.plan` asks it."""
    case, asked = swm_cem.problem(2, "0.1.1"), []
    stats = {"mean": [0, 0], "std": [1, 1], "low": [-2, -2], "high": [2, 2]}
    model = model_of(case, "cpu", "float32", stats=stats)

    class Searches:
        def solve(self, settings, mean, **call):
            asked.append((settings, mean, call))
            zeros = np.zeros((2, 3, 4))
            ends = {"iterations": 10, "deadline_hit": False, "clipped": np.zeros(2), "kept": np.zeros((2, 0, 3, 4))}
            return {
                "actions": zeros,
                "mean": zeros,
                "std": zeros,
                "cost": np.zeros(2),
                "trace": np.zeros((10, 2)),
                **ends,
            }

    model.objective = lambda *arguments: Searches()
    scaler = SimpleNamespace(transform=lambda raw: 2 * raw)
    found = configured(lewm.swm.Solver(model, **BUDGET, seed=9, scaler=scaler), 2, 3).solve(tensors(case))
    assert found["actions"].shape == (2, 3, 4)
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    lewm.plan(frames, frames, model=model, planner=lewm.CEM(**BUDGET, horizon=3), seed=9)
    np.testing.assert_equal(asked[0], asked[1])


def test_without_a_scaler_nothing_bounds_the_actions(case):
    model = model_of(case, "cpu", "float32")
    found = configured(lewm.swm.Solver(model, **BUDGET, init_std=20.0), 3, 2).solve(tensors(case))
    assert found["actions"].abs().max() > 5


def test_a_warm_start_is_the_first_mean(case):
    init = torch.full((3, 2, 4), 0.25)
    model, seen = recorded(model_of(case))
    configured(lewm.swm.Solver(model, **BUDGET), 3, 6).solve(tensors(case), init_action=init)
    assert (seen[0][0][:, 0, :2] == 0.25).all()
    assert (seen[0][0][:, 0, 2:] == 0).all()
    seen.clear()
    configured(lewm.swm.Solver(model, **BUDGET), 3, 1).solve(tensors(case), init_action=init)
    assert seen[0][0].shape == (3, 64, 1, 4)
    solver = configured(lewm.swm.Solver(model, **BUDGET), 3, 6)
    for bad in (init[:2], init[:, :, :3], init[0]):
        with pytest.raises(ValueError, match=r"init_action must be of shape \(3, t, 4\), got"):
            solver.solve(tensors(case), bad)
    with pytest.raises(ValueError, match="init_action must be finite"):
        solver.solve(tensors(case), init * float("nan"))


def test_a_prior_starts_the_search_where_nothing_else_does(case):
    model = model_of(case, "cpu", "float32")
    assert not model.config.action_prior
    guess = np.full((3, 2, 4), 0.5)
    object.__setattr__(model.config, "action_prior", True)
    model.prior = lambda z, goal: guess
    model, seen = recorded(model)
    configured(lewm.swm.Solver(model, **BUDGET), 3, 4).solve(tensors(case))
    np.testing.assert_array_equal(seen[0][0][:, 0], np.pad(guess, ((0, 0), (0, 2), (0, 0))))
    seen.clear()
    configured(lewm.swm.Solver(model, **BUDGET, reference=True), 3, 4).solve(tensors(case))
    assert (seen[0][0][:, 0] == 0).all()


def test_frames_beyond_the_history_do_not_count(case):
    rng = np.random.default_rng(0)
    more = tensors(case)
    earlier = torch.from_numpy(swm_cem.normalised(swm_cem.pictures(rng, 3, 2)))
    more["pixels"] = torch.cat([earlier, more["pixels"]], 1)
    more["action_history"] = torch.cat([torch.ones(3, 2, 4), more["action_history"]], 1)
    plans = [configured(lewm.swm.Solver(model_of(case), **BUDGET), 3, 3).solve(i) for i in (tensors(case), more)]
    np.testing.assert_allclose(plans[0]["actions"], plans[1]["actions"], rtol=0, atol=1e-12)
    case.config = SimpleNamespace(history=1)
    case.weights["predictor.pos_embedding"] = case.weights["predictor.pos_embedding"][:, :1]
    one = tensors(case)
    one["pixels"] = one["pixels"][:, -1:]
    del one["action_history"]
    plans = [configured(lewm.swm.Solver(model_of(case), **BUDGET), 3, 3).solve(i) for i in (tensors(case), one)]
    np.testing.assert_allclose(plans[0]["actions"], plans[1]["actions"], rtol=0, atol=1e-12)


def test_of_several_goals_the_last_counts(case):
    several = tensors(case)
    other = torch.from_numpy(swm_cem.normalised(swm_cem.pictures(np.random.default_rng(0), 3, 2)))
    several["goal"] = torch.cat([other, several["goal"]], 1)
    plans = [configured(lewm.swm.Solver(model_of(case), **BUDGET), 3, 3).solve(i) for i in (tensors(case), several)]
    np.testing.assert_allclose(plans[0]["actions"], plans[1]["actions"], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": None}, "info_dict must have pixels, it has goal, action"),
        ({"goal": None}, "info_dict must have goal"),
        ({"action_history": None}, r"3 frames in pixels and no action_history \(3, 2, 4\)"),
        ({"action_history": torch.zeros(3, 1, 4)}, r"action_history must be of shape \(3, 2, 4\), got \(3, 1, 4\)"),
        ({"pixels": torch.zeros(3, 3, 3, 8, 8)}, r"pixels must be of shape \(E, T, 3, 16, 16\).*got \(3, 3, 3, 8, 8\)"),
        ({"goal": torch.zeros(3, 3, 16, 16)}, r"goal must be of shape \(E, T, 3, 16, 16\)"),
        ({"goal": torch.zeros(3, 16, 16, 3, dtype=torch.uint8)}, r"goal must be of shape \(E, T, H, W, 3\), got uint8"),
        ({"goal": torch.full((3, 1, 3, 16, 16), 9.0)}, "goal must be normalised with ImageNet's mean.*not within"),
        ({"goal": torch.full((3, 1, 3, 16, 16), torch.nan)}, "goal must be normalised with ImageNet's mean"),
        ({"goal": torch.zeros(2, 1, 3, 16, 16)}, "3 environments in pixels and 2 in goal"),
    ],
)
def test_bad_dicts_are_named(case, change, message):
    info = {name: value for name, value in (tensors(case) | change).items() if value is not None}
    solver = configured(lewm.swm.Solver(model_of(case), **BUDGET), 3, 3)
    with pytest.raises(ValueError, match=message):
        solver.solve(info)


def test_bad_arguments_are_named(case, tmp_path):
    model = model_of(case)
    with pytest.raises(ValueError, match="give one of model and cost"):
        lewm.swm.Solver()
    with pytest.raises(ValueError, match="give one of model and cost"):
        lewm.swm.Solver(model, cost=model)
    with pytest.raises(TypeError, match="model must be a lewm.Model, the path of one, or a LeWM of.* got int"):
        lewm.swm.Solver(3)
    with pytest.raises(TypeError, match="got a Odd with other parts"):
        lewm.swm.Solver(type("Odd", (torch.nn.Module,), {"encoder": 0, "predictor": 0, "action_encoder": 0})())
    with pytest.raises(FileNotFoundError):
        lewm.swm.Solver(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="scaler must be None with reference=True"):
        lewm.swm.Solver(model, scaler=1, reference=True)
    with pytest.raises(ValueError, match="for a model that is not loaded yet"):
        lewm.swm.Solver(model, backend="cpu")
    with pytest.raises(ValueError, match="elites must be at most samples"):
        lewm.swm.Solver(model, samples=8, elites=9)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
        lewm.swm.Solver(model, batch_size=0)
    with pytest.raises(ValueError, match="action blocks are 4 wide.*3 wide and config has action_block=2.* 6"):
        configured(lewm.swm.Solver(model), 1, 5, action_dim=3)
    flat = SimpleNamespace(transform=np.zeros_like)
    with pytest.raises(ValueError, match="scaler must make bounds"):
        configured(lewm.swm.Solver(model, scaler=flat), 1, 5)


def test_reference_mode_refuses_to_round_pictures(case):
    info = tensors(case)
    info["goal"] = info["goal"] * 0.987
    solver = configured(lewm.swm.Solver(model_of(case, "cpu", "float32"), **BUDGET, reference=True), 3, 2)
    with pytest.raises(ValueError, match='goal must be whole levels with reference=True and backend "cpu"'):
        solver.solve(info)
    rounded = configured(lewm.swm.Solver(model_of(case, "cpu", "float32"), **BUDGET), 3, 2).solve(info)
    assert rounded["actions"].isfinite().all()
    exact = configured(lewm.swm.Solver(model_of(case), **BUDGET, reference=True), 3, 2).solve(info)
    assert exact["actions"].isfinite().all()


# ------------------------------------------------------------------------------------------------- their models


class Theirs(LeWM):
    """Has the parts of their LeWM that are looked at; `layout` is the release of transformers."""

    def __init__(self, case, layout=5):
        super().__init__(case.config)
        self.load_state_dict({name: torch.from_numpy(value) for name, value in case.weights.items()})
        self.encoder.config = SimpleNamespace(num_attention_heads=2, hidden_act="gelu", layer_norm_eps=1e-12)
        self.layout = layout

    def state_dict(self, *arguments, **options):
        state = super().state_dict(*arguments, **options)
        return state if self.layout == 5 else released_names(state)


class Compiled(torch.nn.Module):
    """What torch.compile makes of a module, but for compiling, which takes seconds to import."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def __getattr__(self, name):
        return getattr(super().__getattr__("_orig_mod"), name) if name != "_orig_mod" else super().__getattr__(name)


@pytest.mark.parametrize("layout", [4, 5])
def test_their_model_is_copied(case, layout):
    theirs = Theirs(case, layout)
    solver = lewm.swm.Solver(theirs, **BUDGET, backend="cpu", precision="float32")
    assert solver.model.hash() == model_of(case, "cpu", "float32").hash()
    assert solver.model.config.encoder_heads == solver.model.config.predictor_heads == 2
    assert (solver.model.backend, solver.model.precision) == ("cpu", "float32")
    with torch.no_grad():
        theirs.pred_proj.net[0].weight.zero_()
    assert solver.model.hash() == model_of(case, "cpu", "float32").hash()


def test_a_compiled_model_is_copied(case):
    theirs = Theirs(case)
    theirs.predictor = Compiled(theirs.predictor)
    assert any("_orig_mod." in name for name in theirs.state_dict())
    assert lewm.swm.Solver(theirs, backend="cpu").model.hash() == model_of(case, "cpu", "float32").hash()


def test_reference_mode_computes_in_their_precision(case):
    single = lewm.swm.Solver(Theirs(case), reference=True, backend="cpu")
    assert single.model.precision == "float32"
    double = lewm.swm.Solver(Theirs(case).double(), reference=True)
    assert (double.model.backend, double.model.precision) == ("torch", "float64")
    assert lewm.swm.Solver(Theirs(case).double(), precision="float32", backend="cpu").model.precision == "float32"


def test_another_encoder_is_refused(case):
    theirs = Theirs(case)
    theirs.encoder.config.layer_norm_eps = 1e-6
    with pytest.raises(ValueError, match="encoder with layer_norm_eps=1e-12, got 1e-06"):
        lewm.swm.Solver(theirs)


def test_paths_are_loaded(case, tmp_path):
    model = model_of(case)
    model.save(tmp_path / "model.safetensors")
    for path in (tmp_path / "model.safetensors", str(tmp_path)):
        assert lewm.swm.Solver(path, backend="cpu").model.hash() == model.hash()
    assert lewm.swm.Solver(tmp_path, reference=True, backend="cpu").model.precision == "float32"
    assert lewm.swm.as_cost_model(tmp_path, backend="cpu").model.hash() == model.hash()


def default_goal_encode():
    """Has the name of theirs."""


def test_an_evaluator_is_unpacked_or_refused(case):
    goal = {"pred_key": "predicted_emb", "goal_key": "goal_emb", "reduction": "sum"}
    evaluator = SimpleNamespace(
        model=Theirs(case), objective=SimpleNamespace(**goal), constraints=None, encode_goal=default_goal_encode
    )
    assert lewm.swm.Solver(cost=evaluator, backend="cpu").model.config.history == 3
    for name, value in (
        ("objective", SimpleNamespace(**(goal | {"reduction": "mean"}))),
        ("objective", SimpleNamespace(weights=[1.0])),
        ("constraints", [1]),
        ("encode_goal", None),
    ):
        other = SimpleNamespace(**(vars(evaluator) | {name: value}))
        with pytest.raises(ValueError, match="cost must be ShootingCostEvaluator.*as_cost_model"):
            lewm.swm.Solver(cost=other)


# ------------------------------------------------------------------------------------------------- our models


def expanded(case, samples):
    return {
        name: value[:, None].expand(value.shape[0], samples, *value.shape[1:]) for name, value in tensors(case).items()
    }


def candidates_of(case, samples=5, horizon=2, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(1).normal(size=(case.environments, samples, horizon, 4))).to(dtype)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_costs_are_those_of_the_model(case, backend):
    model = model_of(case, backend, "float32")
    ours, info = lewm.swm.as_cost_model(model), expanded(case, 5)
    candidates = candidates_of(case, dtype=torch.float32)
    got = ours.get_cost(info, candidates)
    pixels, goal = (np.moveaxis(case.info[name], 2, -1) * STD + MEAN for name in ("pixels", "goal"))
    z, target = (model.encode(np.rint(255 * x).astype(np.uint8)) for x in (pixels, goal))
    want = model.costs(z, target[:, 0], candidates.numpy(), case.info["action_history"].astype(np.float32))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got.dtype == torch.float32
    assert got.shape == (3, 5)
    model.encode = None  # what the dict has is encoded once
    assert torch.equal(ours.get_cost(info, candidates), got)
    assert len(list(ours.parameters())) == (0 if backend == "cpu" else len(list(model.network.parameters())))


@pytest.mark.parametrize("frames", [3, 5])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_encode_rollout_and_criterion_make_the_cost(case, backend, frames):
    """As an evaluator of the main branch calls them."""
    if frames > 3:
        first, blocks = case.info["pixels"][:, :1], np.ones((3, 1, 4))
        case.info["pixels"] = np.concatenate([first, first, case.info["pixels"]], 1)
        case.info["action_history"] = np.concatenate([blocks, blocks, case.info["action_history"]], 1)
    ours, info = lewm.swm.as_cost_model(model_of(case, backend, "float32")), expanded(case, 5)
    candidates = candidates_of(case, dtype=torch.float32)
    goal = {"pixels": info["goal"][:, 0]}
    info["goal_emb"] = ours.encode(goal)["emb"]
    assert goal["emb"].shape == (3, 1, 8)
    found = ours.rollout(info, candidates)
    assert found["predicted_emb"].shape == (3, 5, frames + 2, 8)
    z = ours.encode({"pixels": info["pixels"][:, 0]})["emb"]
    np.testing.assert_allclose(found["predicted_emb"][:, 3, :frames], z, rtol=0, atol=1e-6)
    costs = ours.criterion(info, candidates)
    np.testing.assert_allclose(costs, ours.get_cost(expanded(case, 5), candidates), rtol=1e-4)


def test_gradients_reach_the_candidates(case):
    ours = lewm.swm.as_cost_model(model_of(case))
    candidates = candidates_of(case).requires_grad_()
    info = expanded(case, 5)
    costs = ours.get_cost(info, candidates)
    np.testing.assert_allclose(costs.detach(), ours.get_cost(info, candidates.detach()), rtol=1e-12)
    costs.sum().backward()
    step = 1e-6
    for place in ((0, 0, 0, 0), (2, 4, 1, 3)):
        moved = [candidates.detach().clone() for _ in range(2)]
        moved[0][place] += step
        moved[1][place] -= step
        above, below = (ours.get_cost(info, values)[place[:2]] for values in moved)
        assert candidates.grad[place] == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-5, abs=1e-8)
    by_rollout = candidates.detach().clone().requires_grad_()
    rolled = ours.rollout(expanded(case, 5), by_rollout)
    rolled["goal_emb"] = ours.encode({"pixels": info["goal"][:, 0]})["emb"]
    ours.criterion(rolled).sum().backward()
    np.testing.assert_allclose(by_rollout.grad, candidates.grad, rtol=1e-9, atol=1e-12)


def test_gradients_without_torch_are_refused(case):
    ours = lewm.swm.as_cost_model(model_of(case, "cpu", "float32"))
    candidates = candidates_of(case).requires_grad_()
    with pytest.raises(ValueError, match='gradients need a model on backend "torch", this one is on "cpu"'):
        ours.get_cost(expanded(case, 5), candidates)
    with torch.no_grad():
        assert ours.get_cost(expanded(case, 5), candidates).shape == (3, 5)


def test_a_cost_that_the_model_has_not_is_refused(case):
    with pytest.raises(ValueError, match="no distance head"):
        lewm.swm.as_cost_model(model_of(case), cost="distance")


# ------------------------------------------------------------------------------------------------- the real library


@needs_peer
@pytest.mark.parametrize("number", NUMBERS)
def test_reference_mode_does_what_cem_solver_does(number):
    case, callback = swm_cem.problem(number, RELEASE), Elites()
    theirs, peer, info = swm_cem.theirs(case, callbacks=[callback])
    want = peer.solve(info, init_of(case))
    given = {"model": theirs} if RELEASE == "0.1.1" else {"cost": peer.cost}
    ours = lewm.swm.Solver(**given, **BUDGET, seed=case.seed, reference=True, batch_size=case.batch_size)
    assert (ours.model.backend, ours.model.precision) == ("torch", "float64")
    _, seen = recorded(ours.model)
    found = configured(ours, case.environments, case.horizon).solve(tensors(case), init_of(case))
    np.testing.assert_array_equal(elites_of(seen, case.environments), callback.found)
    np.testing.assert_array_equal(callback.found, GOLDEN[f"{RELEASE} {number} elites"])
    np.testing.assert_allclose(found["actions"], want["actions"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found["costs"], want["costs"], rtol=1e-9)
    np.testing.assert_allclose(found["var"][0], want["var"][0], rtol=1e-9)


@needs_peer
@pytest.mark.parametrize("history", [1, 3])
def test_the_policy_acts_alike_with_either_solver(history):
    """Through their own policy: its transforms, its scaler, its buffers of actions and, in the main branch, frames."""
    from stable_worldmodel import PlanConfig
    from stable_worldmodel.policy import WorldModelPolicy
    from torchvision.transforms import v2

    if history > 1 and RELEASE != "main":
        pytest.skip("release 0.1.1 gives a model no context")
    number = 4 if history == 1 else 5  # history of the model 2, 3; 3 environments
    case = swm_cem.problem(number, RELEASE)
    theirs, peer, _ = swm_cem.theirs(case)
    ours = lewm.swm.Solver(theirs, **BUDGET, seed=case.seed, reference=True, batch_size=case.batch_size)
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    scaler = SimpleNamespace(transform=lambda raw: (raw - 0.1) / 0.5, inverse_transform=lambda z: z * 0.5 + 0.1)
    spaces = [gymnasium.spaces.Box(-1, 1, shape) for shape in ((3, 2), (2,))]
    env = SimpleNamespace(num_envs=3, action_space=spaces[0], single_action_space=spaces[1])
    acted = []
    for solver in (peer, ours):
        rng, last = np.random.default_rng(0), np.full((3, 1, 2), np.nan)
        policy = WorldModelPolicy(
            solver=solver,
            config=PlanConfig(horizon=4, receding_horizon=1, action_block=2, history_len=history),
            process={"action": scaler},
            transform={"pixels": transform, "goal": transform},
        )
        policy.set_env(env)
        taken = []
        for step in range(7):  # four plans; the third environment starts anew in between and plans at other times
            info = {"pixels": swm_cem.pictures(rng, 3, 1), "goal": swm_cem.pictures(rng, 3, 1), "action": last}
            info["_needs_flush"] = np.array([False, False, step == 3])
            taken.append(policy.get_action(info))
            last = taken[-1][:, None].astype(np.float64)
        acted.append(np.stack(taken))
    assert acted[0].shape == (7, 3, 2)
    np.testing.assert_allclose(acted[1], acted[0], rtol=0, atol=1e-5)


@needs_peer
def test_a_peer_compiled_or_in_float32_is_planned_for(case):
    case = swm_cem.problem(5, RELEASE)
    theirs, peer, info = swm_cem.theirs(case)
    theirs.float()
    del theirs.action_encoder.forward
    theirs.predictor = torch.compile(theirs.predictor)
    solver = lewm.swm.Solver(cost=getattr(peer, "cost", theirs), **BUDGET, backend="cpu", precision="float32")
    assert solver.model.hash() == model_of(case, "cpu", "float32").hash()
    found = configured(solver, case.environments, 2).solve(info)
    single = {name: value.float() for name, value in info.items()}
    flat = {name: value[:, None] for name, value in single.items()}
    theirs.predictor = theirs.predictor._orig_mod
    scored = getattr(peer, "cost", theirs)
    costs = [
        scored.get_cost({name: value[i : i + 1] for name, value in flat.items()}, found["actions"][i : i + 1, None])
        for i in range(case.environments)
    ]
    np.testing.assert_allclose(torch.cat(costs)[:, 0], found["costs"], rtol=1e-4)


def peer_solvers():
    if not PEER:
        return None
    if RELEASE == "main":
        from stable_worldmodel.planning import solver
    else:
        from stable_worldmodel import solver
    return solver


@needs_peer
@pytest.mark.parametrize("name", ["CEMSolver", "ICEMSolver", "MPPISolver", "PredictiveSamplingSolver"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_their_sampling_solvers_plan_with_our_models(name, backend):
    case = swm_cem.problem(11, RELEASE)
    ours = lewm.swm.as_cost_model(model_of(case, backend, "float32"))
    solver = getattr(peer_solvers(), name)(ours, num_samples=64, device="cpu")
    found = configured(solver, case.environments, 3).solve(tensors(case))
    assert found["actions"].shape == (case.environments, 3, 4)
    assert costs_of(ours, case, found["actions"]) < 0.95 * costs_of(ours, case, torch.zeros(case.environments, 3, 4))


@needs_peer
@pytest.mark.parametrize("name", ["GradientSolver", "LagrangianSolver"])
def test_their_gradient_solvers_plan_with_our_models(name):
    case = swm_cem.problem(11, RELEASE)
    ours = lewm.swm.as_cost_model(model_of(case, "torch", "float32"))
    solver = getattr(peer_solvers(), name)(ours, n_steps=20, num_samples=4, device="cpu")
    found = configured(solver, case.environments, 3).solve(tensors(case))
    assert costs_of(ours, case, found["actions"]) < costs_of(ours, case, torch.zeros(case.environments, 3, 4))


def costs_of(ours, case, actions):
    """Mean cost of a plan for each environment."""
    return ours.get_cost(expanded(case, 1), actions[:, None].float()).mean().item()


@needs_peer
@pytest.mark.parametrize("evaluated", [False, True])
def test_their_cem_gives_the_same_on_our_model_as_on_theirs(evaluated):
    case = swm_cem.problem(7, RELEASE)
    _, peer, info = swm_cem.theirs(case)
    ours = lewm.swm.as_cost_model(model_of(case))
    if evaluated:
        if RELEASE != "main":
            pytest.skip("release 0.1.1 has no evaluators")
        from stable_worldmodel.planning import GoalMSE, ShootingCostEvaluator

        ours = ShootingCostEvaluator(ours, GoalMSE())
        ours.parameters = ours.model.parameters  # of float64, in which it draws then
    options = {"num_samples": swm_cem.SAMPLES, "n_steps": swm_cem.ITERATIONS, "topk": swm_cem.ELITES}
    other = peer_solvers().CEMSolver(ours, seed=case.seed, batch_size=case.batch_size, **options)
    configured(other, case.environments, case.horizon)
    found, want = (solver.solve(info, init_of(case)) for solver in (other, peer))
    np.testing.assert_allclose(found["actions"], want["actions"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found["costs"], want["costs"], rtol=1e-9)


@needs_peer
def test_what_we_export_is_what_they_load(tmp_path):
    """Their `load_pretrained` builds it with stable-pretraining's ViT; both compute the same."""
    pytest.importorskip("stable_pretraining")
    from stable_worldmodel.wm.utils import load_pretrained

    case = swm_cem.problem(6, "0.1.1")
    model = model_of(case, "cpu", "float32")
    model.export("official", tmp_path / "ours")
    theirs = load_pretrained(str(tmp_path / "ours")).eval().requires_grad_(False)
    assert lewm.swm.Solver(theirs, backend="cpu").model.hash() == model.hash()
    z = theirs.encode({"pixels": torch.from_numpy(case.info["pixels"])})["emb"]
    again = lewm.swm.as_cost_model(model).encode({"pixels": torch.from_numpy(case.info["pixels"])})["emb"]
    np.testing.assert_allclose(z, again, rtol=0, atol=1e-5)


@needs_peer
def test_the_page_for_their_users(tmp_path, monkeypatch):
    """Its blocks in their order, those marked `peers` too, which `make test` leaves out."""
    pytest.importorskip("stable_pretraining")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "stable-worldmodel.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python( peers)?\n(.*?)^```$", page, re.M | re.S)
    assert {kind for kind, _ in blocks} == {"", " peers"}
    scope = {}
    for _, code in blocks:
        exec(compile(code, "stable-worldmodel.md", "exec"), scope)
    assert scope["solver"].n_envs == 2


# ------------------------------------------------------------------------------------------------- what is measured

RESULTS = {
    "date": "2026-11-23",
    "device": "a processor",
    "threads": 2,
    "versions": {"lewm": "0.1.0", "torch": "2.15.0"},
    "plans": [
        {"preset": "tiny", "budget": "100x10", "solver": solver, "precision": precision, "seconds": seconds}
        for solver, precision, seconds in (
            ("ours", "float32", 0.01),
            ("ours", "bfloat16", 0.005),
            ("ours, reference", "float32", 0.0125),
            ("theirs", "float32", 1.5),
            ("theirs", "autocast bfloat16", 0.06),
        )
    ],
    "agreement": [
        {
            "preset": "tiny",
            "budget": "100x10",
            "relative_error_of_costs": 2e-6,
            "float32": {
                "iterations_with_the_same_elites": 8,
                "least_share_of_elites": 0.9,
                "actions_differ_by": 0.002,
            },
        }
    ],
    "loading": [
        {
            "size": 64,
            "window": "4 frames, stride 5",
            "theirs": "HDF5",
            "ours_samples_per_s": 7000.0,
            "theirs_samples_per_s": 1400.0,
            "ratio": 5.0,
        }
    ],
    "collection": [
        {"task": "PushT", "size": 64, "ours_frames_per_s": 4000.0, "theirs_frames_per_s": 500.0, "ratio": 8.0}
    ],
}


def test_the_table_says_what_was_measured():
    text = peers.table(RESULTS)
    for row in (
        "| a plan, `tiny`, 100x10, float32 | 10 ms | 1.50 s (float32) | 150.0x |",
        "| a plan, `tiny`, 100x10, bfloat16 | 5 ms | 60 ms (autocast) | 12.0x |",
        "| a plan in reference mode, `tiny`, 100x10, float32 | 12.5 ms | 1.50 s (float32) | 120.0x |",
        "| training windows of 4 frames, stride 5, 64 px, from HDF5 | 7,000 a second | 1,400 a second | 5.0x |",
        "| collecting PushT, 64 px | 4,000 frames a second | 500 frames a second | 8.0x |",
    ):
        assert row in text.splitlines()
    assert "differ by 2e-06, relatively; on the same noise in float32 8 of 10 iterations have the same elites" in text
    assert "a processor, 2 threads, 2026-11-23; lewm 0.1.0, torch 2.15.0" in text
    page = "before\n<!-- peers: how -->\nold\n<!-- /peers -->\nafter\n"
    once = peers.with_table(page, text)
    assert once == f"before\n<!-- peers: how -->\n{text}<!-- /peers -->\nafter\n"
    assert peers.with_table(once, text) == once
    assert peers.with_table("none here", text) == "none here"


def test_the_pages_have_the_table_of_the_committed_results():
    newest = peers.newest()
    text = "" if newest is None else peers.table(json.loads(newest.read_text()))
    pages = [page.read_text(encoding="utf-8") for page in peers.PAGES]
    assert any(peers.PLACE.search(page) for page in pages)
    for page in pages:
        assert peers.with_table(page, text) == page
    if newest is not None:
        assert not json.loads(newest.read_text())["quick"]


@needs_peer
@pytest.mark.skipif(RELEASE == "main", reason="the comparison is with the release")
def test_the_comparison_runs(tmp_path):
    """The parts that take seconds; `python -m benches.peers --quick` runs all."""
    peers.main(["--quick", "--only", "agreement", "--out", str(tmp_path / "peers.json")])
    found = json.loads((tmp_path / "peers.json").read_text())
    assert [row["preset"] for row in found["agreement"]] == ["tiny", "paper"]
    for row in found["agreement"]:
        assert row["relative_error_of_costs"] < 1e-5
        assert row["float32"]["iterations_before_the_first_other"] == 3
    assert found["agreement"][0]["float64"]["actions_differ_by"] < 1e-6
