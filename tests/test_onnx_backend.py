"""ONNX: the exported graphs give the model's numbers in onnxruntime alone, and behind `lewm.plan` its plans."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import lewm
from lewm import doctor, onnx_graphs
from lewm.config import configure
from lewm.onnx_backend import OnnxBackend
from test_cpu_backend import TINY, WANT, configs, rule, some_weights

STATS = {"mean": [0.1, -0.2], "std": [0.5, 0.7], "low": [-1.0, -0.5], "high": [1.0, 2.0]}
HEADS = {"distance_head": True, "action_prior": True, "prior_blocks": 3}
PREFIX = {"action_prefix": True, "history": 1, "prefix_blocks": 3}


def model_of(preset="tiny", backend="cpu", **overrides):
    config, _ = configure(preset, 2, overrides)
    meta = {"preset": preset, "planner": {"samples": 64, "iterations": 5, "elites": 8, "horizon": 4}}
    return lewm.Model(config, some_weights(config), stats=STATS, meta=meta, backend=backend, precision="float32")


def pictures(config, *lead, seed=0):
    shape = (*lead, config.image_size, config.image_size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """A small model of history 2 in ONNX."""
    model = lewm.Model(TINY, some_weights(TINY), stats=STATS, meta={"preset": "tiny"}, backend="cpu")
    model.export("onnx", tmp_path / "m")
    return tmp_path / "m"


# -------------------------------------------------------------------------------------------- the graphs by themselves


@pytest.mark.parametrize("preset", ["tiny", "small", "paper"])
def test_the_graphs_give_the_networks_numbers_in_onnxruntime(preset, tmp_path):
    torch = pytest.importorskip("torch")
    model = model_of(preset, backend="torch")
    model.export("onnx", tmp_path / "m")
    for name in ("encoder", "predictor"):
        path = tmp_path / "m" / f"{name}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        (opset,) = onnx.load(path).opset_import
        assert (opset.domain, opset.version) == ("", 17)
    encoder, predictor = (onnxruntime.InferenceSession(tmp_path / "m" / f"{n}.onnx") for n in ("encoder", "predictor"))
    c, network = model.config, model.network
    seen = pictures(c, 7)
    encoded = model.encode(seen)
    for batch in (1, 3, 7):
        (latents,) = encoder.run(["latents"], {"frames": seen[:batch]})
        np.testing.assert_allclose(latents, encoded[:batch], rtol=0, atol=1e-4)
        for frames in range(1, c.history + 1):
            z, blocks = normal(batch, frames, c.embed_dim), normal(batch, frames, c.block_dim, seed=1)
            (following,) = predictor.run(["next"], {"latents": z, "blocks": blocks})
            with torch.no_grad():
                actions = network.action_encoder(torch.from_numpy(blocks))
                want = network.predict(torch.from_numpy(z), actions)[:, -1].numpy()
            assert following.shape == (batch, c.embed_dim)
            np.testing.assert_allclose(following, want, rtol=0, atol=1e-4)


def test_the_official_outputs_are_reproduced():
    x = rule.inputs(1)
    model = OnnxBackend(lewm.ModelConfig(action_dim=2), rule.weights(1), "float32", None)
    z = model.encode(x["pixels"])
    np.testing.assert_allclose(z.reshape(-1, 192), WANT["eval_emb"].reshape(-1, 192), rtol=1e-4, atol=1e-4)
    z, goal, candidates = model.encode(x["obs"][0])[None], model.encode(x["goal"][0]), x["candidates"]
    np.testing.assert_allclose(model.rollout(z, candidates, None), WANT["rollout"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.costs(z, goal, candidates, None), WANT["costs"], rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(config=configs(), data=st.data())
def test_any_architecture_agrees_with_the_rust_engine(config, data):
    weights = some_weights(config, data.draw(st.integers(0, 1000)))
    made = [lewm.Model(config, weights, backend=backend, precision="float32") for backend in ("cpu", "onnx")]
    environments, samples, horizon = (data.draw(st.integers(1, n)) for n in (3, 8, 7))
    observed = data.draw(st.integers(1, config.history))
    z, past = normal(environments, observed, config.embed_dim), normal(environments, observed - 1, config.block_dim)
    candidates, frames = normal(environments, samples, horizon, config.block_dim, seed=1), pictures(config, 2)
    # A norm over two or three numbers can blow rounding up: widths of 2 and 3 are tested for what is not rounding.
    narrow = min(config.encoder_dim, config.predictor_dim, config.embed_dim) < 8
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if narrow else {"rtol": 1e-4, "atol": 1e-4}
    want, got = ((m.encode(frames), m.rollout(z, candidates, past)) for m in made)
    for a, b in zip(want, got, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, **tolerance)


@pytest.mark.parametrize("overrides", [HEADS, PREFIX, {**HEADS, **PREFIX}, {"embed_dim": 96, "history": 3, **HEADS}])
def test_heads_and_action_prefixes_are_exported_too(overrides, tmp_path):
    model = model_of(**overrides)
    model.export("onnx", tmp_path / "m")
    for path in (tmp_path / "m").glob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)
    loaded = lewm.load(tmp_path / "m", backend="onnx")
    assert loaded.config == model.config
    c = model.config
    z, goal = normal(3, 1, c.embed_dim), normal(3, c.embed_dim, seed=1)
    candidates = normal(3, 7, 5, c.block_dim, seed=2)
    zs = model.rollout(z, candidates)
    np.testing.assert_allclose(loaded.rollout(z, candidates), zs, rtol=0, atol=1e-4)
    for cost in ("latent", "distance") if c.distance_head else ("latent",):
        want = model.costs(z, goal, candidates, cost=cost)
        np.testing.assert_allclose(loaded.costs(z, goal, candidates, cost=cost), want, rtol=1e-4)
        np.testing.assert_allclose(loaded.cost(zs, goal, cost), want, rtol=1e-4)
    if c.action_prior:
        np.testing.assert_allclose(loaded.prior(z[:, 0], goal), model.prior(z[:, 0], goal), rtol=0, atol=1e-4)
    frame = pictures(c)
    plans = [lewm.plan(frame, pictures(c, seed=1), model=m) for m in (model, loaded)]
    np.testing.assert_allclose(plans[1].cost, plans[0].cost, rtol=1e-3)


# --------------------------------------------------------------------------------------------------------- the back end


@pytest.mark.parametrize("history", [1, 2, 3])
def test_it_plans_as_the_cpu_back_end_does(history, tmp_path):
    model = model_of(history=history)
    model.export("onnx", tmp_path / "m")
    loaded = lewm.load(tmp_path / "m", backend="onnx")
    assert (loaded.backend, loaded.precision, loaded.meta["preset"]) == ("onnx", "float32", "tiny")
    c = model.config
    frames, goal = pictures(c, 2, history), pictures(c, 2, seed=1)
    past = np.random.default_rng(2).uniform(-1, 1, (2, history - 1, c.block_dim))
    found = [lewm.plan(frames, goal, model=m, past_actions=past, seed=3, return_rollout=True) for m in (model, loaded)]
    assert found[1].backend == "onnx"
    # On random weights nearly every candidate costs the same: elites may flip, what they cost does not.
    np.testing.assert_allclose(found[1].trace, found[0].trace, rtol=1e-3)
    np.testing.assert_allclose(found[1].cost, found[0].cost, rtol=1e-3)
    np.testing.assert_allclose(found[1].actions, found[0].actions, atol=0.02)
    z = model.encode(frames)
    blocks = model.normalise(past) if history > 1 else None
    for iteration in range(4):  # narrowing around the plan, as a search does
        candidates = found[0].mean[:, None] + 0.5**iteration * normal(2, 50, 4, c.block_dim, seed=iteration)
        want, got = (m.costs(z, model.encode(goal), candidates, blocks) for m in (model, loaded))
        np.testing.assert_allclose(got, want, rtol=1e-4)
        elites = [np.argsort(costs, axis=1)[:, :10] for costs in (want, got)]
        cut = np.take_along_axis(want, elites[0][:, -1:], axis=1)
        for e in range(2):
            for s in set(elites[0][e]) ^ set(elites[1][e]):
                assert abs(want[e, s] - cut[e]) < 1e-4 * cut[e]  # only ties flip


def test_a_controller_runs_on_it():
    model = model_of(backend="onnx", history=2)
    controller = lewm.Controller(model, pictures(model.config, seed=1), planner=lewm.CEM(8, 2, 2, 2), execute=1)
    for step in range(11):
        action = controller(pictures(model.config, seed=step))
        assert (action >= STATS["low"]).all()
        assert (action <= STATS["high"]).all()
    assert controller.plan.backend == "onnx"


def test_neither_loading_nor_planning_imports_torch(folder):
    code = """
import sys
sys.modules["torch"] = None
import lewm, numpy as np
model = lewm.load(sys.argv[1], backend="onnx")
frame = np.zeros((16, 16, 3), np.uint8)
print(lewm.plan(frame, frame, model=model, planner=lewm.CEM(8, 2, 2, 2)).backend)
model.export("onnx", sys.argv[1] + "-again")
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "onnx\n"), done.stderr
    assert done.stderr == ""  # onnxruntime has nothing to warn of
    again = Path(f"{folder}-again")
    assert {f.name: f.read_bytes() for f in again.iterdir()} == {f.name: f.read_bytes() for f in folder.iterdir()}


def test_a_folder_is_a_model_like_any_other(folder):
    models = [lewm.load(folder, backend=backend, precision="float32") for backend in ("cpu", "onnx")]
    want = some_weights(TINY)
    for model in models:
        assert model.config == TINY
        assert model.meta["preset"] == "tiny"
        np.testing.assert_array_equal(model.stats["high"], STATS["high"])
        for name, value in model._engine.weights().items():
            np.testing.assert_array_equal(value, want[name])
    models[1].save(folder.parent / "m.safetensors")
    assert lewm.load(folder.parent / "m.safetensors").hash() == models[0].hash()
    assert "runs on onnx in float32" in models[1].describe()
    given = lewm.load(folder, stats={**STATS, "high": [5.0, 5.0]}, backend="onnx")
    assert given.bounds()[1][0] == pytest.approx((5 - 0.1) / 0.5)


def test_arguments_that_do_not_fit(monkeypatch):
    weights = some_weights(TINY)
    with pytest.raises(ValueError, match="precision must be auto or float32 with backend \"onnx\", got 'int8'"):
        lewm.Model(TINY, weights, backend="onnx", precision="int8")
    with pytest.raises(ValueError, match=r"device must be an execution provider .*CPUExecutionProvider; got 'cuda'"):
        lewm.Model(TINY, weights, backend="onnx", device="cuda")
    with pytest.raises(ValueError, match=r"1 missing \(encoder.layernorm.bias\)"):
        lewm.Model(TINY, {k: v for k, v in weights.items() if k != "encoder.layernorm.bias"}, backend="onnx")
    bad = {**weights, "encoder.layernorm.bias": np.full(32, np.nan, np.float32)}
    with pytest.raises(ValueError, match="encoder.layernorm.bias holds values that are not finite"):
        lewm.Model(TINY, bad, backend="onnx")
    assert lewm.Model(TINY, weights, backend="onnx", device="CPUExecutionProvider").backend == "onnx"
    for threads in ("0", "many", "", "2000"):
        monkeypatch.setenv("LEWM_NUM_THREADS", threads)
        with pytest.raises(ValueError, match="LEWM_NUM_THREADS must be a number from 1 to 1024"):
            lewm.Model(TINY, weights, backend="onnx")
    monkeypatch.setattr(onnx_graphs, "_LARGEST", 10_000)
    with pytest.raises(ValueError, match="an ONNX file holds less than 2 GiB, the encoder of this model has"):
        onnx_graphs.graphs(TINY, weights)


@pytest.mark.parametrize("module", ["onnx", "onnxruntime"])
def test_what_is_missing_is_said(module, folder, monkeypatch):
    model = lewm.load(folder)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf'{module}: pip install "lewm-fast\[onnx\]"'):
        lewm.Model(TINY, some_weights(TINY), backend="onnx")
    if module == "onnx":
        with pytest.raises(ModuleNotFoundError, match=r'ONNX needs onnx: pip install "lewm-fast\[onnx\]"'):
            model.export("onnx", folder.parent / "other")
        assert not (folder.parent / "other").exists()
        with pytest.raises(ModuleNotFoundError, match=r"ONNX needs onnx"):
            lewm.load(folder)
    line = doctor.diagnose()["Back ends"]["onnx"]
    assert line == f'{module} is not installed: pip install "lewm-fast[onnx]"'


def test_doctor_names_the_providers():
    assert "CPUExecutionProvider" in doctor._onnx()


# -------------------------------------------------------------------------------------------------- writing and reading


def test_a_folder_is_written_whole_or_not_at_all(folder, monkeypatch, tmp_path):
    model, before = lewm.load(folder), sorted(tmp_path.iterdir())
    for taken in (folder, folder / "model.json"):
        with pytest.raises(FileExistsError, match="exists already: an ONNX model is written as a new folder"):
            model.export("onnx", taken)
    synced = []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        model.export("onnx", tmp_path / "other")
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    model.export("onnx", tmp_path / "empty")
    assert lewm.load(tmp_path / "empty").hash() == model.hash()
    with pytest.raises(ValueError, match='form must be "official" or "onnx", got \'tflite\''):
        model.export("tflite", tmp_path / "x")


def test_the_same_weights_give_the_same_bytes():
    first, second = (
        {name: graph.SerializeToString(deterministic=True) for name, graph in onnx_graphs.graphs(TINY, weights).items()}
        for weights in (some_weights(TINY), dict(reversed(some_weights(TINY).items())))
    )
    assert first == second


def test_a_damaged_file_is_refused(folder):
    rng = np.random.default_rng(0)
    for name in ("encoder.onnx", "predictor.onnx"):
        whole = (folder / name).read_bytes()
        for end in (0, 1, len(whole) - 1, *rng.integers(1, len(whole), 5)):
            (folder / name).write_bytes(whole[:end])
            with pytest.raises(ValueError, match=f"model file: .*{name} is damaged, or another program changed it"):
                lewm.load(folder)
        content = bytearray(whole)
        content[rng.integers(len(whole))] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            lewm.load(folder)
        (folder / name).write_bytes(whole)
    (folder / "predictor.onnx").unlink()
    with pytest.raises(ValueError, match=r"lists predictor.onnx, and there is no such file"):
        lewm.load(folder)
    with pytest.raises(ValueError, match=r"one graph of an ONNX model: name the folder"):
        lewm.load(folder / "encoder.onnx")


def forged(folder, name, content):
    """Puts `content` in place of a graph, with the checksum that goes with it."""
    (folder / f"{name}.onnx").write_bytes(content)
    description = json.loads((folder / "model.json").read_text())
    description["onnx"]["graphs"][name] = hashlib.sha256(content).hexdigest()
    (folder / "model.json").write_text(json.dumps(description))


def test_forged_files_are_refused_or_are_a_model(folder):
    rng = np.random.default_rng(0)
    for name in ("encoder", "predictor"):
        whole = (folder / f"{name}.onnx").read_bytes()
        for end in (0, 1, len(whole) - 1, *rng.integers(1, len(whole), 5)):
            forged(folder, name, whole[:end])
            with pytest.raises(ValueError, match="model file: .*(no ONNX file|other graphs|describes no model)"):
                lewm.load(folder)
        refused = 0
        for place in (*rng.integers(5000, size=25), *rng.integers(len(whole), size=10)):  # operators come first
            content = bytearray(whole)
            content[place] ^= 1 << rng.integers(8)
            forged(folder, name, bytes(content))
            try:
                lewm.load(folder, precision="float32")
            except ValueError as error:
                refused += str(error).startswith("model file: ") or pytest.fail(str(error))
        assert refused > 10
        forged(folder, name, whole)


def test_tensors_in_other_files_are_not_read(folder):
    (folder.parent / "secret").write_bytes(bytes(10**6))
    whole = (folder / "encoder.onnx").read_bytes()
    for names, text in (
        (("encoder.layernorm.bias",), "encoder.layernorm.bias is no float32 tensor that is in the file itself"),
        (("constant_0", "constant_1"), r"holds other graphs than lewm writes for these weights \(encoder\)"),
    ):
        graph = onnx.ModelProto.FromString(whole)
        for tensor in graph.graph.initializer:
            if tensor.name in names:
                onnx.external_data_helper.set_external_data(tensor, "../secret")
                tensor.ClearField("raw_data")
        assert graph.SerializeToString() != whole
        forged(folder, "encoder", graph.SerializeToString())
        with pytest.raises(ValueError, match=text):
            lewm.load(folder)


@pytest.mark.parametrize("count", ["9" * 30, "9" * 5000, "", "1.5", "-"])
def test_counts_that_are_none(count, folder):
    graph = onnx.ModelProto.FromString((folder / "encoder.onnx").read_bytes())
    assert [entry.key for entry in graph.metadata_props] == ["projector.net.1.num_batches_tracked"]
    graph.metadata_props[0].value = count
    forged(folder, "encoder", graph.SerializeToString())
    with pytest.raises(ValueError, match="model file: .*encoder.onnx is not one of lewm's"):
        lewm.load(folder)


def test_graphs_that_lewm_does_not_write_are_not_run(folder):
    """Weights and description are right, an operator is not: one of another domain, another attribute, one more."""
    whole = (folder / "predictor.onnx").read_bytes()

    def foreign(graph):
        graph.graph.node[0].domain = "com.example"

    def attribute(graph):
        next(n for n in graph.graph.node if n.op_type == "LayerNormalization").attribute[0].i = 0

    def more(graph):
        graph.graph.node.append(onnx.helper.make_node("Identity", ["next"], ["copied"]))

    for change in (foreign, attribute, more):
        graph = onnx.ModelProto.FromString(whole)
        change(graph)
        forged(folder, "predictor", graph.SerializeToString())
        with pytest.raises(ValueError, match=r"holds other graphs than lewm writes for these weights \(predictor\)"):
            lewm.load(folder, backend="onnx")
    forged(folder, "predictor", (folder / "encoder.onnx").read_bytes())
    with pytest.raises(ValueError, match="describes no model that this release reads .* missing"):
        lewm.load(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format_version": 2}, "format version 2, want 1"),
        ({"architecture": {"action_dim": 0}}, "action_dim must be an integer"),
        ({"architecture": {"action_dim": 2, "image_size": 10**9}}, "image_size must be an integer from 1 to"),
        ({"architecture": None}, "its architecture must be a dict"),
        ({"stats": {"mean": [0.0, 0.0]}}, "stats must hold mean, std, low, high"),
        ({"stats": {**STATS, "std": [0.0, 1.0]}}, "std'] must be positive"),
        ({"stats": {**STATS, "low": [float("nan"), 1.0]}}, "low'] must be finite"),
        ({"planner": []}, "its planner must be a dict"),
        ({"onnx": None}, "lists no graphs of a LeWorldModel"),
        ({"onnx": {"graphs": {"../../etc/passwd": ""}}}, "lists no graphs of a LeWorldModel"),
        ({"onnx": {"graphs": ["encoder"]}}, "lists no graphs of a LeWorldModel"),
        ({"onnx": {"graphs": {"encoder": None}}}, "encoder.onnx is damaged"),
        ({"onnx": {"graphs": {}}}, "missing"),
    ],
)
def test_descriptions_that_do_not_fit(change, text, folder):
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"model file: .*{text}"):
        lewm.load(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 10**6, b" " * (16 * 2**20) + b"{}"])
def test_descriptions_that_are_none(content, folder):
    (folder / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match="model file: .*model.json (is not JSON|lists no graphs)"):
        lewm.load(folder)


def test_the_command_line_exports(tmp_path):
    from typer.testing import CliRunner

    from lewm.cli import app

    model_of("tiny", encoder_heads=1, predictor_heads=2, predictor_head_dim=64).save(tmp_path / "m.safetensors")
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(tmp_path / "m.safetensors"), str(out)])
    assert done.exit_code == 0, done.output
    assert [Path(line).name for line in done.output.split()] == ["encoder.onnx", "model.json", "predictor.onnx"]
    assert lewm.load(out).hash() == lewm.load(tmp_path / "m.safetensors").hash()
    pytest.importorskip("torch")
    arguments = ["export", str(tmp_path / "m.safetensors"), str(tmp_path / "official"), "--format", "official"]
    done = CliRunner().invoke(app, [*arguments, "--transformers", "4"])
    assert done.exit_code == 0, done.output
    assert [Path(line).name for line in done.output.split()] == ["config.json", "weights.pt"]
