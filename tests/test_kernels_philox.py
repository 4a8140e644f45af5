"""The planners' noise in Triton against the Rust module: on a GPU where there is one, else in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import triton.language as tl

from lewm import _core
from lewm.kernels.philox import box_muller, normals, philox

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A mark and no skip: the compile test imports this file without the interpreter.
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a CUDA device or TRITON_INTERPRET=1"
)


@triton.jit
def _words_kernel(counter_ptr, key_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """out[n] = philox(counter[n], key), (N, 4) uint32."""
    n = tl.arange(0, BLOCK)
    live = n < N
    c0 = tl.load(counter_ptr + 4 * n, mask=live, other=0)
    c1 = tl.load(counter_ptr + 4 * n + 1, mask=live, other=0)
    c2 = tl.load(counter_ptr + 4 * n + 2, mask=live, other=0)
    c3 = tl.load(counter_ptr + 4 * n + 3, mask=live, other=0)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, tl.load(key_ptr), tl.load(key_ptr + 1))
    tl.store(out_ptr + 4 * n, w0, mask=live)
    tl.store(out_ptr + 4 * n + 1, w1, mask=live)
    tl.store(out_ptr + 4 * n + 2, w2, mask=live)
    tl.store(out_ptr + 4 * n + 3, w3, mask=live)


@triton.jit
def _pairs_kernel(word_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """out[n] = box_muller(words[n]), (N, 2)."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    n0, n1 = box_muller(
        tl.load(word_ptr + 2 * n, mask=live, other=0), tl.load(word_ptr + 2 * n + 1, mask=live, other=0)
    )
    tl.store(out_ptr + 2 * n, n0, mask=live)
    tl.store(out_ptr + 2 * n + 1, n1, mask=live)


@triton.jit
def _noise_kernel(env_ptr, out_ptr, seed, plan, iteration, S, width, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[e] = noise(seed, env_ids[e], plan, iteration), (E, S, width)."""
    e = tl.program_id(0).to(tl.int64)
    env = tl.load(env_ptr + e)
    sample = tl.arange(0, BLOCK_S)[:, None]
    block = tl.arange(0, BLOCK_N)[None, :]
    n0, n1, n2, n3 = normals(seed, plan, iteration, env, sample, block)
    at = 4 * block
    out = out_ptr + (e * S + sample) * width + at
    tl.store(out, n0, mask=(sample < S) & (at < width))
    tl.store(out + 1, n1, mask=(sample < S) & (at + 1 < width))
    tl.store(out + 2, n2, mask=(sample < S) & (at + 2 < width))
    tl.store(out + 3, n3, mask=(sample < S) & (at + 3 < width))


def on_device(x):
    return torch.from_numpy(np.ascontiguousarray(x)).to(DEVICE)


def words(counter, key):
    out = torch.zeros(len(counter), 4, dtype=torch.uint32, device=DEVICE)
    block = triton.next_power_of_2(len(counter))
    _words_kernel[(1,)](on_device(counter), on_device(key), out, len(counter), BLOCK=block)
    return out.cpu().numpy()


def pairs(words):
    out = torch.full(words.shape, float("nan"), device=DEVICE)
    block = min(1 << 16, triton.next_power_of_2(len(words))) if DEVICE == "cpu" else 1024
    _pairs_kernel[(triton.cdiv(len(words), block),)](on_device(words), out, len(words), BLOCK=block)
    return out.cpu().numpy()


def noise(seed, env_ids, plan, iteration, samples, width):
    out = torch.full((len(env_ids), samples, width), float("nan"), device=DEVICE)
    seed -= (seed >> 63) << 64  # the same 64 bits, signed
    _noise_kernel[(len(env_ids),)](
        on_device(np.array(env_ids, np.uint32)), out, seed, plan, iteration, samples, width,
        BLOCK_S=triton.next_power_of_2(samples), BLOCK_N=triton.next_power_of_2(-(-width // 4)),
    )  # fmt: skip
    return out.cpu().numpy()


def exact(words):
    """Box-Muller of the layout in float64, (N, 2)."""
    u = ((words[:, 0] >> 8).astype(np.float64) + 1) * 2.0**-24
    turn = 2 * np.pi * ((words[:, 1] >> 8) * 2.0**-24)
    return np.sqrt(-2 * np.log(u))[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)


def test_known_answers():
    """Random123's kat_vectors; the third is made of digits of pi."""
    for counter, key, answer in [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]:
        counter, key, answer = (np.array([int(w, 16) for w in t.split()], np.uint32) for t in (counter, key, answer))
        np.testing.assert_array_equal(words(counter[None], key), answer[None])


def test_words_are_those_of_rust():
    random = np.random.default_rng(0)
    for n in (1, 5, 64, 97):
        counter, key = (random.integers(0, 2**32, size, dtype=np.uint32) for size in ((n, 4), 2))
        np.testing.assert_array_equal(words(counter, key), _core.philox(counter, key))


@pytest.mark.parametrize(
    ("seed", "env_ids", "plan", "iteration", "samples", "width"),
    [
        (0, [0], 0, 0, 1, 1),
        (1, [1], 1, 1, 1, 1),  # Triton makes constants of arguments that are 1
        (2**64 - 1, [2**32 - 1], 2**32 - 1, 65535, 3, 7),
        (2**63, [7, 0, 2**31], 2**31, 3, 5, 50),
        (0x0123456789ABCDEF, [5, 9], 7, 2, 33, 10),
        (42, [3], 17, 29, 300, 13),
    ],
)
def test_noise_is_that_of_rust(seed, env_ids, plan, iteration, samples, width):
    got = noise(seed, env_ids, plan, iteration, samples, width)
    want = _core.noise(seed, env_ids, plan, iteration, samples, width)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    blocks = np.arange(-(-width // 4), dtype=np.uint32)
    counters = [(iteration << 16 | b, s, plan, e) for e in env_ids for s in range(samples) for b in blocks]
    formula = exact(_core.philox(np.array(counters, np.uint32), [seed & 0xFFFFFFFF, seed >> 32]).reshape(-1, 2))
    formula = formula.reshape(len(env_ids), samples, -1)[..., :width]
    np.testing.assert_allclose(got, formula, rtol=0, atol=1e-6)


def test_the_last_block():
    got = noise(5, [3], 1, 65535, 1, 4 * 65536)
    np.testing.assert_allclose(got, _core.noise(5, [3], 1, 65535, 1, 4 * 65536), rtol=0, atol=1e-6)


def test_normals_are_within_1e_6_of_float64():
    # Radii where cosine is 1 (every 16th, and all near both ends), angles at the largest radius, both at once.
    ends = np.concatenate([np.arange(1 << 12), np.arange(8, 1 << 24, 16), np.arange((1 << 24) - (1 << 12), 1 << 24)])
    some = np.arange(1 << 18, dtype=np.uint32)
    scattered = some * np.uint32(0x9E3779B9)
    largest = 0.0
    for w0, w1 in [
        (ends << 8, np.zeros_like(ends)),
        (np.zeros_like(ends), ends << 8),
        ((some % 64) << 8, scattered),
        (some * np.uint32(0x85EBCA6B) ^ np.uint32(0x5BD1E995), scattered),
    ]:
        both = np.stack([w0, w1], axis=1).astype(np.uint32)
        largest = max(largest, np.abs(pairs(both) - exact(both)).max())
    assert largest < 1e-6


def test_extreme_words():
    top = 2**32 - 1
    got = pairs(np.array([[top, 0], [top, top], [0, 0], [0, 1 << 31], [0, 1 << 30], [255, 255]], np.uint32))
    assert np.all(got[:2] == 0)  # u = 1
    radius = np.sqrt(48 * np.log(2))
    np.testing.assert_allclose(got[2:], [[radius, 0], [-radius, 0], [0, radius], [radius, 0]], rtol=0, atol=1e-6)


# Runs in a process of its own, where the kernels are not in the interpreter. Argument: compute capability. Prints how
# often an instruction stands in the machine code of the noise.
COMPILE = r"""
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from test_kernels_philox import _noise_kernel as kernel

types = {"env_ptr": "*u32", "out_ptr": "*fp32", "seed": "i64"}
constants = {"BLOCK_S": 64, "BLOCK_N": 16}
names = [p.name for p in kernel.params]
signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()})
cubin = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm["cubin"]
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(cubin)
    file.flush()
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    text = subprocess.run([tool, file.name], capture_output=True, text=True, check=True).stdout
print(json.dumps({op: len(re.findall(rf"\b{op}\b", text)) for op in ("FFMA", "LDL", "STL", "DFMA", "DMUL", "CALL")}))
"""


@pytest.mark.parametrize("capability", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 100, 120))])
def test_machine_code_keeps_everything_in_registers(capability):
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm").exists():
        pytest.skip("this Triton does not ship nvdisasm")
    path = [str(Path(__file__).parent), *filter(None, sys.path)]
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, "-c", COMPILE, str(capability)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert counts.pop("FFMA") > 0
    assert not any(counts.values()), counts
