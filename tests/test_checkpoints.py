"""Official checkpoints and the Hugging Face Hub: they load as they are, run nothing, and what is damaged is refused."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import lewm
from lewm.config import configure
from lewm.model_file import current_names, released_names, tensor_shapes
from local_hub import LocalHub

PARITY = Path(__file__).parent / "parity"
sys.path.insert(0, str(PARITY))
import rule

STATS = {"mean": [0.1, -0.2], "std": [0.5, 0.7], "low": [-1.0, -0.5], "high": [1.0, 2.0]}
SMALL = {"image_size": 16, "encoder_heads": 1, "predictor_heads": 2, "predictor_head_dim": 64, "action_hidden": 64}


def small(**overrides):
    """A small network of the official kind, with random weights: the configuration and its state dict."""
    config, _ = configure("tiny", 2, {**SMALL, **overrides})
    rng = np.random.default_rng(0)
    counts = {name: np.array(7) for name in tensor_shapes(config) if name.endswith(".num_batches_tracked")}
    weights = {k: rng.uniform(-0.3, 0.3, shape).astype(np.float32) for k, shape in tensor_shapes(config).items()}
    weights |= {name: np.abs(value) + 0.1 for name, value in weights.items() if name.endswith("running_var")}
    return config, {**weights, **counts}


def tensors(weights):
    return {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}


@pytest.fixture
def official(tmp_path):
    """A folder as the released checkpoints are: names of transformers 4, no heads that are not 64 wide."""
    _, weights = small()
    folder = tmp_path / "official"
    folder.mkdir()
    torch.save(tensors(released_names(weights)), folder / "weights.pt")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch, official):
    constants = pytest.importorskip("huggingface_hub.constants")
    files = {"weights.pt": (official / "weights.pt").read_bytes()}
    hub = LocalHub({"someone/lewm-pusht": {"main": files, "v2": files}, "someone/empty": {"main": {}}})
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield hub
    hub.close()


def test_released_names_undo_current_names():
    keys = json.loads((PARITY / "keys.json").read_text())
    assert list(released_names({key["v5"]: 0 for key in keys})) == [key["v4"] for key in keys]
    assert list(current_names({key["v4"]: 0 for key in keys})) == [key["v5"] for key in keys]


def test_an_official_checkpoint_gives_the_official_numbers(tmp_path):
    """In the layout of the released ones; tests/test_model.py has the other."""
    x, want = rule.inputs(1), np.load(PARITY / "expected_seed1.npz")
    torch.save(tensors(rule.weights(1, "v4")), tmp_path / "lewm_weight.ckpt")
    model = lewm.load(tmp_path / "lewm_weight.ckpt", stats=STATS, backend="cpu", precision="float32")
    assert model.config == configure("paper", 2, {})[0]
    z, goal = model.encode(x["obs"]), model.encode(x["goal"])[:, 0]
    zs = model.rollout(z, x["candidates"])
    assert np.linalg.norm(zs - want["rollout"]) / np.linalg.norm(want["rollout"]) < 1e-4
    np.testing.assert_allclose(model.cost(zs, goal), want["costs"], rtol=1e-4)
    model.save(tmp_path / "own.safetensors")
    own = lewm.load(tmp_path / "own.safetensors", backend="cpu", precision="float32")
    assert own.hash() == model.hash()


def test_a_folder_a_file_and_the_forms_that_frameworks_save_are_the_same_model(official, tmp_path):
    from safetensors.torch import save_file

    model = lewm.load(official, stats=STATS)
    state = torch.load(official / "weights.pt", weights_only=True)
    save_file(state, tmp_path / "weights.safetensors")
    lightning = {"state_dict": {f"model.{k}": v for k, v in state.items()} | {"sigreg.t": torch.zeros(3)}, "epoch": 4}
    torch.save(lightning, tmp_path / "epoch.ckpt")
    torch.save({k: v.double() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "double.pth")
    kept = {k: torch.nn.Parameter(v.T.contiguous().T) if v.ndim == 2 else v for k, v in state.items()}
    torch.save(kept, tmp_path / "kept.pt")  # as state_dict(keep_vars=True) has them, in another order of memory
    others = [official / "weights.pt", tmp_path, *(tmp_path / name for name in ("epoch.ckpt", "double.pth", "kept.pt"))]
    assert {lewm.load(path, stats=STATS).hash() for path in others} == {model.hash()}
    assert model.config == small(dropout=0.1, init="official", head_hidden=256)[0]
    assert "preset" not in model.meta
    assert model.meta["planner"]["samples"] == 300


def test_statistics_are_asked_for_and_say_how_wide_an_action_is(official, tmp_path):
    model = lewm.load(official)
    frame = np.zeros((16, 16, 3), np.uint8)
    assert model.encode(frame).shape == (32,)
    with pytest.raises(ValueError, match=r"official checkpoints carry none\): give stats=dict.* or the data"):
        lewm.plan(frame, frame, model=model)
    bounds = json.dumps({"action_low": [-1.0] * 5, "action_high": [1.0] * 5})
    schema = {"height": 16, "width": 16, "action_dim": 5, "columns": {}}
    with lewm.StoreWriter(tmp_path / "own.lewm", **schema, metadata=bounds) as store:
        actions = np.random.default_rng(0).uniform(-1, 1, (9, 5)).astype(np.float32)
        store.append(np.zeros((10, 16, 16, 3), np.uint8), actions, {})
    for stats in (tmp_path / "own.lewm", str(tmp_path / "own.lewm"), lewm.Dataset(tmp_path / "own.lewm")):
        model = lewm.load(official, stats=stats)
        assert (model.config.action_dim, model.config.action_block) == (5, 2)
        np.testing.assert_allclose(model.stats["mean"], actions.mean(axis=0), rtol=1e-5)
    assert lewm.plan(frame, frame, model=model, planner=lewm.CEM(samples=8, iterations=1, elites=2)).action.shape == (
        5,
    )
    three = {name: [*values, values[0]] for name, values in STATS.items()}
    with pytest.raises(ValueError, match="10 wide, which is no whole number of actions of the width 3"):
        lewm.load(official, stats=three)
    for wrong in (3, [1, 2]):
        with pytest.raises(ValueError, match="stats must be a dict of mean, std, low, high, a lewm.Dataset or"):
            lewm.load(official, stats=wrong)
    with pytest.raises(ValueError, match="stats must hold"):
        lewm.load(official, stats={})


@pytest.mark.parametrize("transformers", [4, 5])
def test_what_is_exported_comes_back(transformers, tmp_path):
    config, weights = small(encoder_heads=2, predictor_heads=8, predictor_head_dim=16)
    model = lewm.Model(config, weights, stats=STATS)
    model.export("official", tmp_path / "out", transformers=transformers)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "weights.pt"]
    state = torch.load(tmp_path / "out" / "weights.pt", weights_only=True)
    assert ("encoder.layers.0.attention.q_proj.weight" in state) == (transformers == 5)
    again = lewm.load(tmp_path / "out", stats=STATS)
    assert again.hash() == model.hash()
    assert (again.config.encoder_heads, again.config.predictor_heads, again.config.predictor_head_dim) == (2, 8, 16)
    with pytest.raises(ValueError, match='form must be "official"'):
        model.export("onnx2", tmp_path / "x")
    with pytest.raises(ValueError, match="transformers must be 4 or 5"):
        model.export("official", tmp_path / "x", transformers=3)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"distance_head": True}, "the official code has no distance_head"),
        ({"action_prefix": True, "history": 1}, "has no action_prefix"),
        ({"action_hidden": 33}, "action_hidden that is a multiple of embed_dim 32, this model has 33"),
        ({"predictor_heads": 1, "predictor_head_dim": 96}, "no output projection for a single head"),
    ],
)
def test_what_the_official_code_cannot_hold_is_not_exported(overrides, text, tmp_path):
    config, weights = small(**overrides)
    with pytest.raises(ValueError, match=text):
        lewm.Model(config, weights).export("official", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ what is refused


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_runs_nothing(official, tmp_path):
    for name, content, what in (
        ("lewm_object.ckpt", torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ("trap.pt", {"a": Trap(tmp_path / "ran")}, "getattr"),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=rf"holds more than tensors.*not \*_object.ckpt \(it names {what}"):
            lewm.load(tmp_path / name)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(ValueError, match="holds more than tensors, or is damaged"):
        lewm.load(tmp_path / "bare.pt")
    assert not (tmp_path / "ran").exists()
    for content in ([torch.zeros(2)], {"a": 1}, torch.zeros(3)):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="want a dict of tensors"):
            lewm.load(tmp_path / "other.pt")


def test_a_checkpoint_that_is_cut_or_changed_is_refused(official):
    path = official / "weights.pt"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for end in (0, 1, 100, *rng.integers(100, len(whole) - 1, 20)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="model file: .*weights.pt"):
            lewm.load(official)


def test_keys_and_shapes_that_do_not_fit_are_listed(official):
    path = official / "weights.pt"
    state = torch.load(path, weights_only=True)
    last = "predictor.pos_embedding"
    for change, text in (
        ({"encoder.pooler.dense.weight": torch.zeros(2)}, r"1 unexpected \(encoder.pooler.dense.weight\)"),
        ({"encoder.layernorm.bias": None}, r"1 missing \(encoder.layernorm.bias\)"),
        ({"projector.net.3.bias": torch.zeros(5)}, r"1 of another shape \(projector.net.3.bias \(5,\), want \(32,\)\)"),
        ({last: None}, "lacks predictor.pos_embedding with 3 axes: want the state dict of a LeWorldModel"),
        ({last: torch.zeros(2)}, "lacks predictor.pos_embedding with 3 axes"),
        ({"encoder.layernorm.bias": torch.full((64,), torch.nan)}, "encoder.layernorm.bias holds values that are not"),
        ({"encoder.layernorm.bias": torch.zeros(64).to_sparse()}, "encoder.layernorm.bias in .* is no plain tensor"),
        ({"encoder.layernorm.bias": torch.zeros(64, device="meta")}, "encoder.layernorm.bias in .* is no plain tensor"),
        ({"encoder.layernorm.bias": torch.zeros(1).expand(10**9)}, "encoder.layernorm.bias in .* is no plain tensor"),
        ({"action_encoder.patch_embed.weight": torch.zeros(10, 0, 1)}, "action_block must be an integer"),
    ):
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        torch.save(changed, path)
        with pytest.raises(ValueError, match=text):
            lewm.load(official)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"encoder": {}, "predictor": {"heads": "x"}}', "[" * 10**5])
def test_a_description_that_describes_nothing_is_refused(text, official):
    (official / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json does not describe it"):
        lewm.load(official)


def test_of_a_description_nothing_is_imported(official):
    """The peers make what `_target_` names; here only numbers are taken."""
    trap = {
        "_target_": "os.mkdir",
        "path": str(official / "ran"),
        "encoder": {"_target_": "os.getcwd"},
        "predictor": {},
    }
    (official / "config.json").write_text(json.dumps(trap))
    assert lewm.load(official).config.predictor_heads == 2
    for heads, text in (({"heads": 10**9}, "predictor_heads must be an integer from 1"), ({"dim_head": 0}, "head_dim")):
        (official / "config.json").write_text(json.dumps({**trap, "predictor": heads}))
        with pytest.raises(ValueError, match=text):
            lewm.load(official)
    assert not (official / "ran").exists()


def test_folders_that_hold_no_model_or_several(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder with none of model.safetensors, weights.safetensors"):
        lewm.load(tmp_path)
    for name in ("a.pt", "b.ckpt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="folder with several, name the one: a.pt, b.ckpt"):
        lewm.load(tmp_path)
    with pytest.raises(ValueError, match="revision is for repositories"):
        lewm.load(tmp_path, revision="main")
    with pytest.raises(FileNotFoundError, match="no such file"):
        lewm.load(tmp_path / "x" / "y" / "z")


def test_without_torch_and_huggingface_hub_it_is_said_what_to_install(official, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for module in ("torch", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r'weights.pt is a file of torch.s: pip install "lewm-fast\[train\]"'):
        lewm.load(official)
    with pytest.raises(FileNotFoundError, match=r'no such file: someone/lewm; .*Hub: pip install "lewm-fast\[data\]"'):
        lewm.load("someone/lewm")


# ------------------------------------------------------------------------------------------------------- from the Hub


def test_a_repository_is_downloaded_once_and_then_there_without_the_hub(hub, official, monkeypatch):
    import huggingface_hub.constants

    model = lewm.load("someone/lewm-pusht", stats=STATS)
    assert model.hash() == lewm.load(official).hash()
    lewm.load("someone/lewm-pusht")
    downloads = [request for request in hub.requests if request.startswith("GET /someone")]
    assert downloads == ["GET /someone/lewm-pusht/resolve/main/weights.pt"]
    asked = len(hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert lewm.load("someone/lewm-pusht").hash() == model.hash()
    with pytest.raises(ConnectionError, match="Hub cannot be reached, and someone/other is not in its local cache"):
        lewm.load("someone/other")
    assert len(hub.requests) == asked


def test_the_file_that_lewm_wrote_comes_before_the_official_one(hub, official, tmp_path):
    model = lewm.load(official, stats=STATS)
    model.save(tmp_path / "m.safetensors")
    hub.repositories["someone/lewm-pusht"]["main"]["model.safetensors"] = (tmp_path / "m.safetensors").read_bytes()
    again = lewm.load("someone/lewm-pusht")
    np.testing.assert_array_equal(again.stats["low"], STATS["low"])
    assert not any("weights.pt" in request for request in hub.requests)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_the_description_beside_the_weights_comes_with_them(name, hub, tmp_path):
    """Heads that are not 64 wide are in no shape."""
    from safetensors.torch import save_file

    config, weights = small(encoder_heads=2, predictor_heads=8, predictor_head_dim=16)
    lewm.Model(config, weights).export("official", tmp_path / "out")
    save_file(torch.load(tmp_path / "out" / "weights.pt", weights_only=True), tmp_path / "out" / "weights.safetensors")
    files = {part: (tmp_path / "out" / part).read_bytes() for part in (name, "config.json")}
    hub.repositories["someone/narrow"] = {"main": files}
    assert lewm.load("someone/narrow").config.predictor_heads == 8


def test_a_revision_is_asked_for_by_name(hub):
    lewm.load("someone/lewm-pusht", revision="v2")
    assert "GET /someone/lewm-pusht/resolve/v2/weights.pt" in hub.requests
    with pytest.raises(FileNotFoundError, match="the Hugging Face Hub has no revision v3 of someone/lewm-pusht"):
        lewm.load("someone/lewm-pusht", revision="v3")


def test_what_the_hub_lacks(hub):
    with pytest.raises(FileNotFoundError, match="no such file: someone/typo, and the Hugging Face Hub has no some"):
        lewm.load("someone/typo")
    with pytest.raises(FileNotFoundError, match="someone/empty on the Hugging Face Hub holds none of model"):
        lewm.load("someone/empty")


def test_a_download_that_breaks_off_leaves_nothing_that_loads(hub, tmp_path, official):
    hub.cut = 10_000
    with pytest.raises(ConnectionError, match="weights.pt of someone/lewm-pusht cannot be downloaded"):
        lewm.load("someone/lewm-pusht")
    assert not list((tmp_path / "cache").rglob("snapshots/*/weights.pt"))
    hub.cut = None
    assert lewm.load("someone/lewm-pusht").hash() == lewm.load(official).hash()


def test_a_download_that_is_killed_is_done_again(hub, tmp_path, official):
    hub.stall = 10_000
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    code = "import lewm; lewm.load('someone/lewm-pusht')"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)
    assert hub.stalled.wait(60)
    process.kill()
    process.wait()
    assert not list((tmp_path / "cache").rglob("snapshots/*/weights.pt"))
    hub.stall = None
    assert lewm.load("someone/lewm-pusht").hash() == lewm.load(official).hash()


def test_what_was_changed_in_the_cache_is_found(hub, tmp_path):
    lewm.load("someone/lewm-pusht")
    (path,) = (tmp_path / "cache").rglob("snapshots/*/weights.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.resolve().write_bytes(content)
    with pytest.raises(ValueError, match="weights.pt is damaged, its SHA-256 is .* delete .* and load it again"):
        lewm.load("someone/lewm-pusht")
    path.resolve().unlink()
    lewm.load("someone/lewm-pusht")
