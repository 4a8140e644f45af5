"""`lewm.Model`: the array interface, units, and the model file."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import lewm
from lewm import model as model_module
from lewm._core import Planner
from lewm.config import configure
from lewm.network import LeWM
from lewm.pixels import resize_area
from lewm.torch_backend import TorchBackend

PARITY = Path(__file__).parent / "parity"
sys.path.insert(0, str(PARITY))
import rule

STATS = {"mean": [0.1, -0.2], "std": [0.5, 0.7], "low": [-1.0, -0.5], "high": [1.0, 2.0]}


def make(precision="float32", stats=STATS, backend="torch", **overrides):
    config, _ = configure("tiny", 2, {"image_size": 16, **overrides})
    torch.manual_seed(0)
    network = LeWM(config)
    with torch.no_grad():
        for parameter in network.predictor.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    meta = {"preset": "tiny", "planner": {"samples": 20, "iterations": 3, "elites": 5, "horizon": 2}}
    return lewm.Model(config, network.state_dict(), stats=stats, meta=meta, backend=backend, precision=precision)


@pytest.fixture(params=["torch", "cpu"])
def model(request):
    return make(backend=request.param)


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


def test_encode_keeps_leading_axes_and_kinds(model, frames):
    z = model.encode(frames)
    assert z.shape == (5, 32)
    assert z.dtype == np.float32
    assert model.encode(frames[0]).shape == (32,)
    np.testing.assert_allclose(
        model.encode(frames[:4].reshape(2, 2, 16, 16, 3)), z[:4].reshape(2, 2, 32), rtol=1e-5, atol=1e-6
    )
    tensor = model.encode(torch.from_numpy(frames))
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), z)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (
            np.zeros((3, 16, 16), np.uint8),
            r"must be of shape \(\.\.\., H, W, 3\), got \(3, 16, 16\), which looks like channels first",
        ),
        (np.zeros((16, 16, 3), np.float32), "must be uint8 .*got float32"),
        (np.zeros((16, 16), np.uint8), r"got \(16, 16\)"),
        (np.zeros((16, 24, 3), np.uint8), r"must be square .*\(16x16\), got 16x24"),
        (np.zeros((0, 16, 16, 3), np.uint8), r"got \(0, 16, 16, 3\)"),
    ],
)
def test_frames_of_another_kind_are_refused_by_name(model, bad, text):
    with pytest.raises(ValueError, match=text):
        model.encode(bad, name="obs")
    with pytest.raises(ValueError, match="^obs "):
        model.encode(bad, name="obs")


def test_another_size_is_area_resized(model, frames):
    large = frames.repeat(3, axis=1).repeat(3, axis=2)
    np.testing.assert_array_equal(resize_area(large, 16), frames)
    np.testing.assert_array_equal(model.encode(large), model.encode(frames))
    odd = np.random.default_rng(1).integers(0, 256, (2, 23, 23, 3), dtype=np.uint8)
    # Every source pixel split into 16 x 16, every target pixel the plain mean of 23 x 23 of them.
    fine = odd.repeat(16, 1).repeat(16, 2).astype(np.float64).reshape(2, 16, 23, 16, 23, 3).mean((2, 4))
    assert np.abs(resize_area(odd, 16) - fine).max() <= 0.5 + 1e-4


@pytest.mark.filterwarnings("error")
def test_flipped_and_read_only_frames_are_taken(model, frames):
    """What BGR to RGB and a memory map give; torch itself refuses the one and warns of the other."""
    fixed = frames.copy()
    fixed.flags.writeable = False
    np.testing.assert_array_equal(model.encode(frames[..., ::-1]), model.encode(frames[..., ::-1].copy()))
    np.testing.assert_array_equal(model.encode(fixed), model.encode(frames))


def test_what_becomes_of_a_picture_does_not_depend_on_its_batch(frames):
    large = np.random.default_rng(2).integers(0, 256, (9, 100, 100, 3), dtype=np.uint8)
    batch = resize_area(large, 64)
    np.testing.assert_array_equal(np.stack([resize_area(one, 64) for one in large]), batch)


def test_a_device_that_is_not_there_is_named():
    for device in ("cudaa", None if torch.cuda.is_available() else "cuda"):
        if device:
            with pytest.raises(ValueError, match=f"device must be one that torch has here, got '{device}'"):
                TorchBackend(configure("tiny", 2, {})[0], {}, "auto", device)


def test_costs_are_the_cost_of_the_rollout():
    model = make("float64", history=3)
    rng = np.random.default_rng(0)
    z, goal = rng.normal(size=(3, 2, 32)), rng.normal(size=(3, 32))
    candidates, past = rng.normal(size=(3, 7, 4, 10)), rng.normal(size=(3, 1, 10))
    zs = model.rollout(z, candidates, past)
    assert zs.shape == (3, 7, 6, 32)
    np.testing.assert_array_equal(zs[:, :, :2], np.broadcast_to(z[:, None], (3, 7, 2, 32)))
    want = ((zs[:, :, -1] - goal[:, None]) ** 2).sum(-1)
    np.testing.assert_allclose(model.cost(zs, goal), want, rtol=1e-12)
    np.testing.assert_allclose(model.costs(z, goal, candidates, past), want, rtol=1e-12)
    # Environment by environment it is the same: a goal is never handed to another environment (B == S included).
    square = model.costs(z, goal, candidates[:, :3], past)
    for e in range(3):
        one = slice(e, e + 1)
        np.testing.assert_allclose(
            model.costs(z[one], goal[one], candidates[one, :3], past[one])[0], square[e], rtol=1e-12
        )


@pytest.mark.parametrize(
    ("z", "candidates", "past", "text"),
    [
        ((1, 32), (1, 4, 2, 10), None, "z must be"),
        ((1, 1, 31), (1, 4, 2, 10), None, "z must be"),
        ((2, 1, 32), (1, 4, 2, 10), None, "candidates must be"),
        ((1, 1, 32), (1, 4, 0, 10), None, "candidates must be"),
        ((1, 1, 32), (1, 4, 2, 9), None, "candidates must be"),
        ((1, 2, 32), (1, 4, 2, 10), None, "past_actions must be"),
        ((1, 2, 32), (1, 4, 2, 10), (1, 2, 10), "past_actions must be"),
    ],
)
def test_rollout_names_the_wrong_shape(model, z, candidates, past, text):
    with pytest.raises(ValueError, match=text):
        model.rollout(np.zeros(z), np.zeros(candidates), None if past is None else np.zeros(past))


def test_units_and_bounds(model):
    raw = np.random.default_rng(0).normal(size=(3, 10))
    blocks = model.normalise(raw)
    np.testing.assert_allclose(blocks[:, 2], (raw[:, 2] - 0.1) / 0.5)
    np.testing.assert_allclose(blocks[:, 3], (raw[:, 3] + 0.2) / 0.7)
    np.testing.assert_allclose(model.denormalise(blocks), raw, rtol=1e-14)
    low, high = model.bounds()
    assert low.shape == high.shape == (10,)
    np.testing.assert_allclose(low[::2], (-1 - 0.1) / 0.5)
    np.testing.assert_allclose(high[1::2], (2 + 0.2) / 0.7)
    with pytest.raises(ValueError, match="whole actions of width 2"):
        model.normalise(np.zeros(3))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"std": [0.5, 0.0]}, "a constant action"),
        ({"mean": [np.nan, 0.0]}, "must be finite"),
        ({"low": [2.0, 0.0]}, "must be below"),
        ({"high": [1.0]}, r"must have shape \(2,\)"),
        ({"low": [-np.inf, 0.0]}, r"stats\['low'\] must be finite: unbounded actions cannot be planned"),
    ],
)
def test_bad_statistics_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        make(stats={**STATS, **change})


def test_a_model_without_statistics_says_how_to_give_them():
    model = make(stats=None)
    assert model.encode(np.zeros((16, 16, 3), np.uint8)).shape == (32,)
    with pytest.raises(ValueError, match="no action statistics.*stats=dict"):
        model.bounds()


def test_saved_and_loaded_it_is_the_same(model, frames, tmp_path):
    path = tmp_path / "m.safetensors"
    model.save(path)
    again = lewm.load(path, backend=model.backend, precision="float32")
    np.testing.assert_array_equal(again.encode(frames), model.encode(frames))
    assert again.config == model.config
    assert again.hash() == model.hash()
    assert again.meta["preset"] == "tiny"
    assert again.meta["planner"] == model.meta["planner"]
    for name, values in STATS.items():
        np.testing.assert_array_equal(again.stats[name], values)
    assert lewm.load(tmp_path / "m.safetensors", stats={**STATS, "mean": [0, 0]}).stats["mean"][0] == 0
    (tmp_path / "model.safetensors").write_bytes(path.read_bytes())
    assert lewm.load(tmp_path).hash() == model.hash()
    assert "action 1: raw bounds [-0.5, 2]" in again.describe()


def test_saving_fails_whole(model, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    model.save(path)
    before = path.read_bytes()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        model.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    with pytest.raises(ValueError, match="must end in .safetensors"):
        model.save(tmp_path / "m.pt")


def test_what_is_no_model_file_is_refused(model, tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        lewm.load(path)
    for content in (b"", b"hello", b"\x00" * 100, b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a safetensors file"):
            lewm.load(path)

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="is a pickle"):
        lewm.load(path)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is a pickle"):
        lewm.load(path)
    assert not (tmp_path / "ran").exists()
    save_file({"a": np.zeros(2, np.float32)}, path)
    with pytest.raises(ValueError, match="is no checkpoint of a LeWorldModel"):
        lewm.load(path)
    for header in (
        {},
        {"format_version": 2, "architecture": {}},
        {"format_version": 1, "architecture": {"action_dim": 0}},
    ):
        save_file({"a": np.zeros(2, np.float32)}, path, metadata={"lewm": json.dumps(header)})
        with pytest.raises(ValueError, match="model file"):
            lewm.load(path)


def test_a_model_file_cut_at_any_byte_is_refused(model, tmp_path):
    whole, cut = tmp_path / "m.safetensors", tmp_path / "cut.safetensors"
    model.save(whole)
    content = whole.read_bytes()
    for end in [*range(0, 64), *np.random.default_rng(0).integers(64, len(content), 60), len(content) - 1]:
        cut.write_bytes(content[:end])
        with pytest.raises(ValueError, match="model file"):
            lewm.load(cut)


def test_weights_that_do_not_fit_are_listed_by_group(model):
    weights = model._engine.weights()
    weights["extra"] = weights.pop("predictor.pos_embedding")
    with pytest.raises(ValueError, match=r"1 missing \(predictor.pos_embedding\); 1 unexpected \(extra\)"):
        lewm.Model(model.config, weights)
    with pytest.raises(ValueError, match="state dict of a LeWorldModel"):
        lewm.Model.from_state_dict({"a": np.zeros(1)})


def test_both_transformers_layouts_load_and_agree():
    x = rule.inputs(1)
    one, other = (lewm.Model.from_state_dict(rule.weights(1, layout), stats=STATS) for layout in ("v5", "v4"))
    assert one.config.block_dim == 10
    np.testing.assert_array_equal(one.encode(x["obs"]), other.encode(x["obs"]))
    assert one.hash() == other.hash()


def test_an_engine_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match='backend must be "auto", "cpu", "cuda", "torch" or "onnx", got \'gpu\''):
        make(backend="gpu")
    for backend in ("torch", "cpu"):
        with pytest.raises(ValueError, match="precision must be auto or one of .*got 'int4'"):
            make("int4", backend=backend)
    with pytest.raises(ValueError, match='device is for the backends "cuda", "torch" and "onnx"'):
        lewm.Model.from_state_dict(rule.weights(1), backend="cpu", device="cpu")


def test_bfloat16_is_close_to_float32(frames):
    """On torch, where frames are encoded in it too; tests/test_cpu_backend.py has the rollout on the CPU."""
    exact, rough = make("float32"), make("bfloat16")
    z = exact.encode(frames)
    error = np.linalg.norm(rough.encode(frames) - z) / np.linalg.norm(z)
    assert 0 < error < 0.02
    assert rough.encode(frames).dtype == np.float32


def test_use_and_the_environment_variable(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "_current", None)
    monkeypatch.delenv("LEWM_MODEL", raising=False)
    with pytest.raises(RuntimeError, match=r"no model is set: pass model=, call lewm.use\(model\), or set LEWM_MODEL"):
        model_module.current()
    path = tmp_path / "m.safetensors"
    model.save(path)
    monkeypatch.setenv("LEWM_MODEL", str(path))
    assert model_module.current().hash() == model.hash()
    other = make(stats=None)
    other.save(tmp_path / "other.safetensors")
    monkeypatch.setenv("LEWM_MODEL", str(tmp_path / "other.safetensors"))
    assert model_module.current().stats is None
    assert model_module.current() is model_module.current()
    lewm.use(model)
    assert model_module.current() is model
    lewm.use(None)
    monkeypatch.delenv("LEWM_MODEL")
    with pytest.raises(RuntimeError):
        model_module.current()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_reference_planner_makes_the_official_update(backend):
    """4 iterations, 32 samples, 8 elites, the official code's noise: its mean, std and elite cost."""
    x, want = rule.inputs(1), np.load(PARITY / "expected_seed1.npz")
    model = lewm.Model.from_state_dict(rule.weights(1), stats=STATS, backend=backend, precision="float32")
    z, goal = model.encode(x["obs"]), model.encode(x["goal"])[:, 0]
    elite_costs = []

    def cost(candidates):
        costs = model.costs(z, goal, candidates)
        elite_costs.append(np.sort(costs, axis=1)[:, :8].mean())
        return costs

    planner = Planner("cem", samples=32, iterations=4, elites=8, reference=True)
    found = planner.solve(cost, np.zeros((1, 5, 10)), noise=x["cem_noise"][:, None])
    for name, value in (("mean", found["mean"]), ("std", found["std"]), ("actions", found["actions"])):
        expected = want["cem_std" if name == "std" else "cem_mean"]
        assert np.linalg.norm(value - expected) / np.linalg.norm(expected) < 1e-4, name
    np.testing.assert_allclose(elite_costs, want["cem_elite_cost"], rtol=1e-5)
    np.testing.assert_allclose(found["trace"][:, 0], want["cem_elite_cost"], rtol=1e-5)
