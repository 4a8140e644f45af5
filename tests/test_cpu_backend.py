"""The CPU engine: parity with the official code and float64 PyTorch, on all instruction sets of this processor."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lewm
from lewm import cpu_backend
from lewm._core import Engine
from lewm.config import ModelConfig
from lewm.cpu_backend import CpuBackend, agreement, engine_config, fastest_first, is_faster
from lewm.model_file import tensor_shapes

PARITY = Path(__file__).parent / "parity"
sys.path.insert(0, str(PARITY))
import rule

SETS = [(precision, cpu) for precision in ("float32", "bfloat16", "int8") for cpu in Engine.instruction_sets(precision)]
WANT = np.load(PARITY / "expected_seed1.npz")


def engine(config, weights, **settings):
    floats = {name: np.asarray(value, np.float32) for name, value in weights.items() if value.dtype.kind == "f"}
    return Engine(engine_config(config), floats, **settings)


def some_weights(config, seed=0):
    """Weights of any architecture, of the size that keeps activations near 1."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        values = rng.normal(size=shape)
        if name.endswith("num_batches_tracked"):
            weights[name] = np.array(1)
            continue
        if name.endswith("running_var"):
            values = np.exp(0.3 * values)
        elif len(shape) > 1:
            values *= 0.9 / np.sqrt(np.prod(shape[1:]))
        elif name.endswith("weight"):
            values = 1 + 0.2 * values
        else:
            values *= 0.2
        weights[name] = values.astype(np.float32)
    return weights


@pytest.fixture(scope="module")
def official():
    return rule.weights(1)


@pytest.mark.parametrize(("precision", "cpu"), SETS)
def test_the_official_outputs_are_reproduced(official, precision, cpu):
    x = rule.inputs(1)
    made = engine(ModelConfig(action_dim=2), official, precision=precision, cpu=cpu)
    assert (made.precision, made.cpu) == (precision, cpu)
    z = made.encode(x["pixels"].reshape(-1, 224, 224, 3))
    np.testing.assert_allclose(z, WANT["eval_emb"].reshape(-1, 192), rtol=1e-4, atol=1e-4)
    z, goal = made.encode(x["obs"][0])[None], made.encode(x["goal"][0])
    candidates = x["candidates"].astype(np.float32)
    rollout, costs = made.rollout(z, candidates), made.costs(z, goal, candidates)
    if precision == "float32":
        np.testing.assert_allclose(rollout, WANT["rollout"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(costs, WANT["costs"], rtol=1e-4)
    else:  # 8 bits: what that gives is written here rather than hidden
        assert np.abs(rollout - WANT["rollout"]).max() < 0.06
        np.testing.assert_allclose(costs, WANT["costs"], rtol=0.02)


@pytest.mark.parametrize(("precision", "cpu"), SETS)
def test_plans_do_not_depend_on_threads_or_neighbours(official, precision, cpu):
    rng = np.random.default_rng(0)
    config = ModelConfig(action_dim=2, predictor_depth=2, encoder_depth=1)
    weights = {name: official[name] for name in tensor_shapes(config)}
    z = rng.normal(size=(3, 2, 192)).astype(np.float32)
    past = rng.normal(size=(3, 1, 10)).astype(np.float32)
    goal = rng.normal(size=(3, 192)).astype(np.float32)
    candidates = rng.normal(size=(3, 37, 4, 10)).astype(np.float32)
    frames = rng.integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    results = []
    for threads in (1, 2, 4):
        made = engine(config, weights, precision=precision, cpu=cpu, threads=threads)
        assert made.threads == threads
        results.append((made.encode(frames), made.costs(z, goal, candidates, past)))
    for other in results[1:]:
        np.testing.assert_array_equal(other[0], results[0][0])
        np.testing.assert_array_equal(other[1], results[0][1])
    for e in range(3):
        one = slice(e, e + 1)
        alone = made.costs(z[one], goal[one], np.ascontiguousarray(candidates[one, 5:18]), past[one])
        np.testing.assert_array_equal(alone[0], results[0][1][e, 5:18])


sizes = st.integers(1, 40)


@st.composite
def configs(draw):
    heads = draw(st.integers(1, 3))
    patch = draw(st.sampled_from([2, 5, 8]))
    embed = draw(sizes)
    prefix = draw(st.booleans())
    return ModelConfig(
        action_dim=draw(st.integers(1, 3)),
        action_block=draw(st.integers(1, 3)),
        image_size=patch * draw(st.integers(1, 4)),
        patch_size=patch,
        encoder_dim=heads * draw(st.integers(2, 24)),
        encoder_depth=draw(st.integers(1, 2)),
        encoder_heads=heads,
        encoder_mlp=draw(sizes),
        embed_dim=embed,
        projector_hidden=draw(st.integers(1, 300)),
        predictor_dim=draw(st.sampled_from([embed, draw(st.integers(2, 40))])),
        predictor_depth=draw(st.integers(1, 3)),
        predictor_heads=draw(st.integers(1, 5)),
        predictor_head_dim=draw(sizes),
        predictor_mlp=draw(st.integers(1, 300)),
        history=1 if prefix else draw(st.integers(1, 5)),
        action_prefix=prefix,
        prefix_blocks=draw(st.integers(1, 5)),
        action_smoothed=draw(sizes),
        action_hidden=draw(sizes),
    )


@settings(max_examples=25, deadline=None)
@given(config=configs(), data=st.data())
def test_any_architecture_agrees_with_float64_torch(config, data):
    torch = pytest.importorskip("torch")
    from lewm.network import LeWM

    envs, samples, horizon = (data.draw(st.integers(1, n)) for n in (3, 30, 5))
    frames = data.draw(st.integers(1, config.history))
    weights = some_weights(config, data.draw(st.integers(0, 1000)))
    rng = np.random.default_rng(0)
    z = rng.normal(size=(envs, frames, config.embed_dim)).astype(np.float32)
    past = rng.normal(size=(envs, frames - 1, config.block_dim)).astype(np.float32)
    candidates = rng.normal(size=(envs, samples, horizon, config.block_dim)).astype(np.float32)
    pictures = rng.integers(0, 256, (2, config.image_size, config.image_size, 3), dtype=np.uint8)
    network = LeWM(config).double().eval()
    network.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in weights.items()})

    def answers(dtype):
        network.to(dtype)
        with torch.no_grad():
            latents = network.encode(torch.from_numpy(pictures))
            flat = [torch.from_numpy(np.repeat(a, samples, 0)).to(dtype) for a in (z, past)]
            rollout = network.rollout(flat[0], torch.from_numpy(candidates).to(dtype).flatten(0, 1), flat[1])
        return latents.numpy(), rollout.numpy().reshape(envs, samples, frames + horizon, -1)

    # A norm over two or three numbers can blow rounding up: PyTorch's own float32 tells by how much.
    latents, rollout = answers(torch.float64)
    slack = [10 * np.abs(a - b).max() for a, b in zip(answers(torch.float32), (latents, rollout), strict=True)]
    for cpu in Engine.instruction_sets("float32"):
        made = engine(config, weights, cpu=cpu, threads=1)
        np.testing.assert_allclose(made.encode(pictures), latents, rtol=1e-4, atol=1e-4 + slack[0])
        got = made.rollout(z, candidates, past)
        np.testing.assert_allclose(got, rollout, rtol=1e-4, atol=1e-4 + slack[1])
        goal = np.ascontiguousarray(got[:, 0, -1])
        np.testing.assert_allclose(made.costs(z, goal, candidates, past)[:, 0], 0, atol=1e-9)


def test_tensor_shapes_are_those_of_the_network_and_of_the_official_file():
    torch = pytest.importorskip("torch")
    from lewm.network import LeWM

    for config in (ModelConfig(action_dim=2), ModelConfig(action_dim=3, embed_dim=32, predictor_dim=96)):
        with torch.device("meta"):
            state = LeWM(config).state_dict()
        assert {name: tuple(value.shape) for name, value in state.items()} == tensor_shapes(config)
    keys = json.loads((PARITY / "keys.json").read_text())
    assert {row["v5"]: tuple(row["shape"]) for row in keys} == tensor_shapes(ModelConfig(action_dim=2))


TINY = ModelConfig(action_dim=2, image_size=16, patch_size=8, encoder_dim=32, encoder_depth=1, embed_dim=32,
                   encoder_heads=2, encoder_mlp=64, projector_hidden=64, predictor_dim=48, predictor_depth=2,
                   predictor_heads=2, predictor_head_dim=32, predictor_mlp=96, history=2, action_hidden=32)  # fmt: skip


def test_weights_that_do_not_fit_are_listed():
    weights = some_weights(TINY)
    with pytest.raises(ValueError, match=r"1 missing \(encoder.layernorm.bias\); 1 unexpected \(more\)"):
        CpuBackend(
            TINY, {**{k: v for k, v in weights.items() if k != "encoder.layernorm.bias"}, "more": np.ones(1)}, "float32"
        )
    weights["encoder.layernorm.bias"][3] = np.nan
    with pytest.raises(ValueError, match=r"encoder.layernorm.bias of the weights must be finite, got NaN"):
        CpuBackend(TINY, weights, "float32")
    with pytest.raises(ValueError, match=r"pred_proj.net.1.running_var of the weights must not be negative, got -1"):
        CpuBackend(TINY, {**some_weights(TINY), "pred_proj.net.1.running_var": np.full(64, -1, np.float32)}, "float32")


def test_bad_arguments_are_named():
    weights, config = some_weights(TINY), engine_config(TINY)
    floats = {name: value for name, value in weights.items() if value.dtype == np.float32}
    with pytest.raises(ValueError, match='precision must be "float32", "bfloat16" or "int8", got "int4"'):
        Engine(config, floats, precision="int4")
    with pytest.raises(ValueError, match=r"cpu must be one of \[.*\"portable\"\] for float32 .*got \"z80\""):
        Engine(config, floats, cpu="z80")
    with pytest.raises(KeyError, match="config lacks history"):
        Engine({k: v for k, v in config.items() if k != "history"}, floats)
    with pytest.raises(ValueError, match="weights lack encoder.layernorm.bias"):
        Engine(config, {k: v for k, v in floats.items() if k != "encoder.layernorm.bias"})
    with pytest.raises(TypeError, match=r'weights\["encoder.layernorm.bias"\] must be a float32 array'):
        Engine(config, {**floats, "encoder.layernorm.bias": np.zeros(32)})
    made = Engine(config, floats)
    with pytest.raises(ValueError, match=r"frames must have shape \(N, 16, 16, 3\), got \(1, 16, 15, 3\)"):
        made.encode(np.zeros((1, 16, 15, 3), np.uint8))
    z, goal, candidates = (np.zeros(shape, np.float32) for shape in ((1, 2, 32), (1, 32), (1, 4, 3, 10)))
    with pytest.raises(ValueError, match="past must have 10 numbers, got 0"):
        made.costs(z, goal, candidates)
    with pytest.raises(ValueError, match="z must be C-contiguous"):
        made.costs(np.zeros((1, 1, 64), np.float32)[..., ::2], goal, candidates)
    with pytest.raises(ValueError, match="candidates must be C-contiguous"):
        made.costs(z[:, :1], goal, np.asfortranarray(candidates))


def test_every_thread_may_plan_at_the_same_time():
    made = engine(TINY, some_weights(TINY), threads=2)
    rng = np.random.default_rng(0)
    inputs = [[rng.normal(size=s).astype(np.float32) for s in ((1, 1, 32), (1, 32), (1, 50, 3, 10))] for _ in range(4)]
    want, got = [made.costs(*i) for i in inputs], [None] * 4

    def work(i):
        got[i] = [made.costs(*inputs[i]) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for i in range(4):
        for costs in got[i]:
            np.testing.assert_array_equal(costs, want[i])


FORK = """
import os, sys
import numpy as np
sys.path.insert(0, {tests!r})
from test_cpu_backend import TINY, engine, some_weights
made = engine(TINY, some_weights(TINY))
z, goal, candidates = (np.ones(s, np.float32) for s in ((1, 1, 32), (1, 32), (1, 50, 3, 10)))
want = made.costs(z, goal, candidates)
if os.fork() == 0:
    again = engine(TINY, some_weights(TINY))
    same = (made.costs(z, goal, candidates) == want).all() and (again.costs(z, goal, candidates) == want).all()
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_plans_too():
    code = FORK.format(tests=str(Path(__file__).parent))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "LEWM_NUM_THREADS": "3"})


@pytest.mark.parametrize(("text", "threads"), [("3", 3), ("1", 1)])
def test_the_number_of_threads_comes_from_the_environment(text, threads):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_cpu_backend import TINY, engine, some_weights; print(engine(TINY, some_weights(TINY)).threads)"
    )
    env = {**os.environ, "LEWM_NUM_THREADS": text}
    out = subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True)
    assert int(out.stdout) == threads


def test_the_environment_variable_is_checked():
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_cpu_backend import TINY, engine, some_weights; engine(TINY, some_weights(TINY))"
    )
    env = {**os.environ, "LEWM_NUM_THREADS": "many"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert 'LEWM_NUM_THREADS must be a number from 1 to 1024, got "many"' in out.stderr


FASTER = [precision for precision in ("bfloat16", "int8") if Engine.instruction_sets(precision)]
needs_int8 = pytest.mark.skipif("int8" not in FASTER, reason="no int8 instructions here")


@pytest.mark.parametrize("precision", FASTER)
def test_a_precision_passes_its_gate_where_actions_matter(official, precision):
    config = ModelConfig(action_dim=2)
    spearman, overlap = agreement(engine(config, official), engine(config, official, precision=precision), config)
    assert spearman >= cpu_backend.SPEARMAN
    assert overlap >= cpu_backend.OVERLAP


@needs_int8
def test_auto_takes_the_fastest_that_passes(monkeypatch):
    wide = dataclasses.replace(TINY, predictor_dim=cpu_backend.INT8_WIDTH)

    def taken(fast, passes, config=wide):
        monkeypatch.setattr(cpu_backend, "is_faster", lambda precision, than, made: (precision, than) in fast)
        monkeypatch.setattr(cpu_backend, "agreement", lambda exact, fast, config: passes.get(fast.precision))
        return CpuBackend(config, some_weights(config), "auto").precision

    good, near, far = (1.0, 1.0), (0.99, 1.0), (1.0, 0.9)
    all_good = {"int8": good, "bfloat16": good}
    both = {("bfloat16", "float32"), ("int8", "bfloat16")}
    assert taken(both, all_good) == "int8"
    assert taken(both, all_good, TINY) == "bfloat16"
    assert taken(both, {"int8": near, "bfloat16": good}) == "bfloat16"
    assert taken(both, {"int8": far, "bfloat16": near}) == "float32"
    assert taken({("bfloat16", "float32")}, all_good) == "bfloat16"
    assert taken({("int8", "float32")}, all_good) == "int8"
    assert taken(set(), all_good) == "float32"


@needs_int8
def test_a_speed_is_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    class Peak:
        def __init__(self, precision):
            self.peak = lambda: {"float32": 10.0, "bfloat16": 9.0, "int8": 20.0}[precision]

    def never(precision):
        pytest.fail("measured again")

    assert not is_faster("bfloat16", "float32", Peak)
    assert is_faster("int8", "float32", Peak)
    assert not is_faster("bfloat16", "float32", never)
    assert is_faster("int8", "float32", never)
    assert fastest_first(never) == ["int8"]
    file = next(tmp_path.rglob("*.json"))
    file.write_text(json.dumps({"another processor": True}))
    assert not is_faster("bfloat16", "float32", Peak)
    assert sorted(json.loads(file.read_text()).values()) == [False, True]
    file.write_text("no json")
    assert is_faster("int8", "float32", Peak)
    file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), False)))
    assert not is_faster("int8", "float32", never)


def test_a_model_says_what_runs_it(official):
    model = lewm.Model.from_state_dict(official, backend="cpu", precision="float32")
    assert (model.backend, model.precision) == ("cpu", "float32")
    with pytest.raises(AttributeError, match="a model on backend \"?'?cpu.* has no torch module"):
        model.network  # noqa: B018
