"""Model files from elsewhere: what is damaged is refused with one error that names the file, whatever the damage."""

import copy
import importlib.util
import json
import os
import struct
import sys
import time

import numpy as np
import pytest

import lewm
from lewm.config import configure
from lewm.model_file import read_tensors, tensor_shapes, write_model

STATS = {"mean": [0.1, -0.2], "std": [0.5, 0.7], "low": [-1.0, -0.5], "high": [1.0, 2.0]}
META = {
    "preset": "tiny",
    "planner": {"samples": 20, "iterations": 3, "elites": 5, "horizon": 2},
    "data": {"fingerprint": "ab" * 16, "episodes": 3, "env_id": "square"},
    "training": {"steps": 2, "validation_episodes": [1, 2], "metrics": {"loss": 0.5}},
}
# The smallest network that has every part.
SMALL = {"image_size": 4, "patch_size": 2, "encoder_dim": 2, "encoder_depth": 1, "encoder_heads": 1, "encoder_mlp": 3,
         "embed_dim": 4, "projector_hidden": 3, "predictor_dim": 3, "predictor_depth": 1, "predictor_heads": 1,
         "predictor_head_dim": 2, "predictor_mlp": 3, "history": 2, "action_hidden": 2}  # fmt: skip
BACKENDS = ("cpu", "torch") if importlib.util.find_spec("torch") else ("cpu",)


@pytest.fixture
def content(tmp_path):
    """A sound model file: its bytes."""
    config, _ = configure("tiny", 2, SMALL)
    rng = np.random.default_rng(0)
    counts = {name: np.array(7) for name in tensor_shapes(config) if name.endswith(".num_batches_tracked")}
    weights = {k: rng.uniform(0.1, 0.5, shape).astype(np.float32) for k, shape in tensor_shapes(config).items()}
    write_model(tmp_path / "sound.safetensors", {**weights, **counts}, config, STATS, META)
    return (tmp_path / "sound.safetensors").read_bytes()


def taken_apart(content):
    """The header's entries, what `lewm` holds, and the data of a model file."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8:end])
    return entries, json.loads(entries.pop("__metadata__")["lewm"]), content[end:]


def together(entries, description, data):
    text = description if isinstance(description, str) else json.dumps(description)
    header = json.dumps({"__metadata__": {"lewm": text}, **entries}).encode()
    return struct.pack("<Q", len(header)) + header + data


def refused(path, content, text):
    path.write_bytes(content)
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=text) as caught:
            lewm.load(path, backend=backend)
        assert str(caught.value).startswith(f"model file: {path} ")
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("where", "value", "text"),
    [
        (("format_version",), 2, "of format version 2, want 1"),
        (("architecture",), [], "architecture must be a dict"),
        (("architecture", "embed_dim"), 10**18, "embed_dim must be an integer from 1 to 65536"),
        (("architecture", "encoder_depth"), 10**12, "encoder_depth must be an integer from 1 to 256"),
        (("architecture", "encoder_depth"), 2, "16 missing"),
        (("architecture", "dropout"), float("nan"), "dropout must be in"),
        (("architecture", "widths"), 1, "unexpected keyword argument 'widths'"),
        (("architecture", "init"), "x" * 10**6, "init must be .*xx[.][.][.][)]$"),
        (("stats",), [], "stats must hold mean, std, low, high"),
        (("stats", "std"), [0.5, 0], "must be positive"),
        (("stats", "low"), [2, 0], "must be below"),
        (("stats", "high"), [float("inf"), 1], "must be finite"),
        (("stats", "mean"), [None, 0], "must be numbers"),
        (("stats", "mean"), ["1", "2"], "must be numbers"),
        (("stats", "mean"), [10**400, 0], "must be numbers"),
        (("stats", "mean"), [[1], [2, 3]], "must be numbers"),
        (("stats", "mean"), [0.0], r"must have shape \(2,\)"),
        (("planner",), [1], "planner must be a dict"),
        (("data",), "x", "data must be a dict"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(content, tmp_path, where, value, text):
    entries, description, data = taken_apart(content)
    *parents, last = where
    node = description
    for name in parents:
        node = node[name]
    node[last] = value
    refused(tmp_path / "m.safetensors", together(entries, description, data), text)


def test_deep_and_long_descriptions_are_refused(content, tmp_path):
    entries, description, data = taken_apart(content)
    path = tmp_path / "m.safetensors"
    for depth in (200, 900, 10**6):
        refused(path, together(entries, "[" * depth + "]" * depth, data), "model file")
        refused(path, together({**entries, "deep": json.loads("[" * 150 + "]" * 150)}, description, data), "its header")
    refused(path, together(entries, "1" * 5000, data), "model file")
    refused(path, together(entries, "x" * (16 << 20), data), "header has .* bytes: want at most 16777216")


def test_a_header_that_lies_about_the_file_is_refused(content, tmp_path):
    """Nothing is allocated for what a header merely declares."""
    entries, description, data = taken_apart(content)
    path = tmp_path / "m.safetensors"
    name, other = "encoder.layernorm.weight", "encoder.layernorm.bias"
    at = entries[name]["data_offsets"]
    huge = {"dtype": "F32", "shape": [2**60 // 4], "data_offsets": [len(data), len(data) + 2**60]}
    for change, text in (
        ({"huge": huge}, "declares .* bytes of tensors and .* follow"),
        ({"empty": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}, "safetensors file"),
        ({"empty": {"dtype": "F32", "shape": [0] * 100, "data_offsets": [0, 0]}}, "safetensors file"),
        ({"over": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 0]}}, "its header"),
        ({other: entries[name]}, "its header"),
        ({name: {**entries[name], "data_offsets": at[::-1]}}, "its header"),
        ({name: {**entries[name], "shape": [-1]}}, "its header"),
        ({name: {**entries[name], "dtype": "F31"}}, "its header"),
        ({name: {**entries[name], "dtype": "I32"}}, f"{name} is of type I32, want one of F16"),
        ({name: {**entries[name], "dtype": "BF16", "shape": [2, 2]}}, f"{name} is of type BF16"),
        ({name: {**entries[name], "dtype": "I64", "shape": [1]}}, "1 of another shape"),
        ({name: {**entries[name], "shape": [2, 1]}}, "1 of another shape"),
        ({name: {**entries[name], "dtype": "F16", "shape": [2, 2]}}, "1 of another shape"),
    ):
        refused(path, together({**entries, **change}, description, data), text)
    refused(path, content + b"\0", "declares")
    refused(path, struct.pack("<Q", 2**64 - 1) + content[8:], "header has 18446744073709551615 bytes")


def test_weights_that_no_model_has_are_refused(content, tmp_path):
    entries, description, data = taken_apart(content)
    path = tmp_path / "m.safetensors"
    at = entries["encoder.layernorm.weight"]["data_offsets"][0]
    for value in (np.nan, np.inf):
        damaged = data[:at] + struct.pack("<f", value) + data[at + 4 :]
        refused(
            path, together(entries, description, damaged), "encoder.layernorm.weight holds values that are not finite"
        )
    last = max(entries, key=lambda name: entries[name]["data_offsets"])
    end = entries[last]["data_offsets"][0]
    wide = {**entries, last: {**entries[last], "dtype": "F64"}}
    size = int(np.prod(entries[last]["shape"]))
    wide[last]["data_offsets"] = [end, end + 8 * size]
    refused(path, together(wide, description, data[:end] + struct.pack("<d", 1e300) * size), "not finite in float32")
    wide[last]["dtype"] = "I64"
    refused(path, together(wide, description, data[:end] + struct.pack("<q", 1) * size), f"{last} is of type int64")
    wide[last]["dtype"] = "F64"
    path.write_bytes(together(wide, description, data[:end] + struct.pack("<d", 0.5) * size))
    for backend in BACKENDS:
        np.testing.assert_array_equal(np.unique(lewm.load(path, backend=backend)._engine.weights()[last]), [0.5])


def test_what_is_read_is_what_safetensors_reads(content, tmp_path):
    """Another header than ours: unordered, unpadded; another type, an empty tensor and a scalar."""
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = {
        "b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a": np.array(3),
        "none": np.zeros((0, 4), np.float64),
        "c": np.arange(5.0, dtype=np.float32),
    }
    (tmp_path / "x").write_bytes(numpy.save(tensors, metadata={"lewm": "{}"}))
    found, header = read_tensors(tmp_path / "x", "a file")
    assert header == {}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
        assert found[name].flags.writeable


VALUES = [0, 1, -1, 2, 3, 65536, 2**31, 2**63, 10**18, 10**30, 0.5, 1e308, float("nan"), float("-inf"), True, None, "",
          "x", "F16", "I64", "BF16", "\ud800", "y" * 5000, [], {}, [1, 2], [0.5, 0.5], {"a": 1}]  # fmt: skip


def change(node, rng):
    """Changes one value at any depth of a JSON value: another in its place, or none, or it under another name."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[rng.integers(len(keys))]
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.2:
            break
        node = node[key]
    value = copy.deepcopy(VALUES[rng.integers(len(VALUES))])  # or a change to it would last
    match rng.integers(8):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[str(value)] = node[key]
        case 2 if isinstance(node, list):
            node.insert(key, value)
        case 3:
            node[key] = node[keys[rng.integers(len(keys))]]
        case 4 if isinstance(node[key], int):
            node[key] += int(rng.integers(-8, 9))
        case _:
            node[key] = value


def damaged(data, rng):
    """Some bytes of it changed, removed or repeated."""
    data = bytearray(data)
    at, length = (int(rng.integers(n)) for n in (len(data), 40))
    match rng.integers(6):
        case 0:
            return bytes(data[:at])
        case 1:
            del data[at : at + length]
        case 2:
            data[at:at] = data[at : at + length]
        case 3:
            data[at - at % 4 : at - at % 4 + 4] = struct.pack("<f", (np.nan, np.inf, 3e38, -1, 0)[rng.integers(5)])
        case _:
            data[at] ^= 1 << rng.integers(8)
    return bytes(data)


def mutated(content, rng):
    """A file that is nearly this one."""
    entries, description, data = taken_apart(content)
    for _ in range(rng.integers(3)):
        part = (description, description, entries)[rng.integers(3)]
        if part:
            change(part, rng)
    kind = rng.integers(6)
    text = damaged(json.dumps(description).encode(), rng).decode("latin-1") if kind == 0 else description
    whole = together(entries, text, damaged(data, rng) if kind == 1 else data)
    if kind == 2:  # the header's text, under its right length
        header = damaged(whole[8 : len(whole) - len(data)], rng)
        return struct.pack("<Q", len(header)) + header + data
    return damaged(whole, rng) if kind == 3 else whole


def most_memory():
    """The most bytes that this process has held at once; 0 on Windows, which has no such count."""
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # bytes there, kB elsewhere


@pytest.mark.filterwarnings("error")
def test_mutated_files_are_read_or_refused(content, tmp_path):
    """`LEWM_FUZZ_RUNS=1000000 python -m pytest tests/test_model_file.py -s -k mutated` runs longer."""
    runs, seed = (int(os.environ.get(f"LEWM_FUZZ_{name}", default)) for name, default in (("RUNS", 2000), ("SEED", 0)))
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    for backend in BACKENDS:  # what importing it takes is not the file's
        lewm.load(path, backend=backend).encode(np.zeros((4, 4, 3), np.uint8))
    before = most_memory()
    read, slowest = 0, 0.0
    for run in range(runs):
        path.write_bytes(mutated(content, np.random.default_rng([seed, run])))
        start, refusal = time.perf_counter(), ""
        try:
            model = lewm.load(path, backend=BACKENDS[run % len(BACKENDS)])
            latents = model.describe() and model.encode(np.zeros((4, 4, 3), np.uint8))
        except ValueError as error:
            refusal = str(error)
        except BaseException as error:
            raise AssertionError(f"run {run} of seed {seed}") from error
        slowest = max(slowest, time.perf_counter() - start)
        read += not refusal
        assert latents.shape == (4,) if not refusal else refusal.startswith(f"model file: {path} "), (seed, run)
        assert len(refusal) < 1000, (seed, run)
    grown = most_memory() - before
    print(f"{runs} runs, {read} read; the slowest took {slowest:.3f} s, memory grew by {grown / 2**20:.1f} MiB")
    assert runs / 20 < read < runs / 2
    assert grown < 256 << 20
