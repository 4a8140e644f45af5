"""Philox and the noise layout against a second implementation in NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lewm import _core

WORD = st.integers(0, 2**32 - 1)


def philox(counter, key):
    """Philox4x32-10, Salmon et al. 2011, figure 4. (N, 4), (2,) uint32 -> (N, 4) uint32."""
    low = np.uint64(0xFFFFFFFF)
    c = [column.astype(np.uint64) for column in np.asarray(counter, np.uint32).T]
    k = [np.uint64(k) for k in key]
    for r in range(10):
        k0 = (k[0] + np.uint64(r * 0x9E3779B9)) & low
        k1 = (k[1] + np.uint64(r * 0xBB67AE85)) & low
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k0, p1 & low, (p0 >> np.uint64(32)) ^ c[3] ^ k1, p0 & low]
    return np.stack(c, axis=1).astype(np.uint32)


def noise(seed, env_ids, plan, iteration, samples, width):
    """The layout at the head of rust/core/src/rng/mod.rs. -> (E, S, width) float64."""
    blocks = -(-width // 4)
    env, sample, block = np.meshgrid(env_ids, np.arange(samples), np.arange(blocks), indexing="ij")
    counter = np.stack([iteration << 16 | block, sample, np.full_like(block, plan), env], axis=-1).reshape(-1, 4)
    w = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1, 2, 2)
    u = ((w[..., 0] >> np.uint32(8)) + 1) * 2.0**-24
    v = (w[..., 1] >> np.uint32(8)) * 2.0**-24
    radius = np.sqrt(-2 * np.log(u))
    normal = np.stack([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)], axis=-1)
    return normal.reshape(len(env_ids), samples, 4 * blocks)[..., :width]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter, key, words):
    """Random123's kat_vectors, through the binding and through the test's own implementation."""
    counter, key, words = (np.array([int(w, 16) for w in text.split()], np.uint32) for text in (counter, key, words))
    np.testing.assert_array_equal(_core.philox(counter[None], key), words[None])
    np.testing.assert_array_equal(philox(counter[None], key), words[None])


@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), max_size=5), WORD, WORD)
def test_words(counters, k0, k1):
    counters = np.array(counters, np.uint32).reshape(-1, 4)
    got = _core.philox(counters, np.array([k0, k1], np.uint32))
    assert got.dtype == np.uint32
    np.testing.assert_array_equal(got, philox(counters, (k0, k1)))


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    env_ids=st.lists(WORD, min_size=1, max_size=3),
    plan=WORD,
    iteration=st.integers(0, 65535),
    samples=st.integers(1, 5),
    width=st.integers(1, 19),
)
def test_noise(seed, env_ids, plan, iteration, samples, width):
    got = _core.noise(seed, env_ids, plan, iteration, samples, width)
    assert got.dtype == np.float32
    assert got.shape == (len(env_ids), samples, width)
    np.testing.assert_allclose(got, noise(seed, env_ids, plan, iteration, samples, width), rtol=0, atol=1e-6)


def test_noise_in_the_last_block():
    got = _core.noise(5, [3], 1, 65535, 1, 4 * 65536)
    np.testing.assert_allclose(got, noise(5, [3], 1, 65535, 1, 4 * 65536), rtol=0, atol=1e-6)
    assert abs(got.mean()) < 0.01
    assert abs(got.std() - 1) < 0.01


def test_one_environment_alone_or_in_a_batch():
    ids = np.array([7, 0, 4294967295, 12, 5, 6, 1, 2], np.uint32)
    batch = _core.noise(3, ids, 4, 5, 16, 10)
    for row, env_id in enumerate(ids):
        np.testing.assert_array_equal(batch[row], _core.noise(3, [env_id], 4, 5, 16, 10)[0])
    assert len(np.unique(batch)) == batch.size


GOOD = {"seed": 0, "env_ids": [0], "plan": 0, "iteration": 0, "samples": 2, "width": 4}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"iteration": 65536}, ValueError, "iteration must be below 65536, got 65536"),
        ({"iteration": -1}, ValueError, r"iteration must be an integer in 0\.\.2\^64, got -1"),
        ({"width": 4 * 65536 + 1}, ValueError, "width .* got 262145"),
        ({"width": 0}, ValueError, "width .* got 0"),
        ({"samples": 0}, ValueError, "samples .* got 0"),
        ({"samples": 10**15}, ValueError, "samples .* got 1000000000000000"),
        ({"samples": 2**32, "width": 2**18, "env_ids": range(4096)}, ValueError, "samples: no memory"),
        ({"samples": 2.0}, TypeError, "samples must be an integer, got <class 'float'>"),
        ({"seed": 2**64}, ValueError, r"seed must be an integer in 0\.\.2\^64, got 18446744073709551616"),
        ({"seed": -1}, ValueError, "seed"),
        ({"plan": 2**32}, ValueError, r"plan must be an integer in 0\.\.2\^32, got 4294967296"),
        ({"env_ids": [-1]}, ValueError, r"env_ids must hold numbers in 0\.\.2\^32, got -1"),
        ({"env_ids": [2**32]}, ValueError, "env_ids .* got 4294967296"),
        ({"env_ids": [0.5]}, TypeError, "env_ids must be an array of .* integers, got dtype float64"),
        ({"env_ids": np.zeros((1, 1), int)}, ValueError, r"env_ids must have shape \(E,\)"),
        ({"env_ids": np.zeros(0, int)}, ValueError, r"env_ids must have shape \(E,\)"),
    ],
)
def test_bad_noise_arguments(change, error, match):
    assert _core.noise(**GOOD).shape == (1, 2, 4)
    with pytest.raises(error, match=match):
        _core.noise(**GOOD | change)


@pytest.mark.parametrize(
    ("counter", "key", "error", "match"),
    [
        (np.zeros((1, 3), np.uint32), [0, 0], ValueError, r"counter must have shape \(N, 4\), got \(1, 3\)"),
        (np.zeros(4, np.uint32), [0, 0], ValueError, "counter must have shape"),
        (np.zeros((1, 4), np.uint32), [0, 0, 0], ValueError, r"key must have shape \(2,\), got \(3,\)"),
        (np.zeros((1, 4)), [0, 0], TypeError, "counter must be an array of .* integers, got dtype float64"),
        (np.zeros((1, 4), np.uint32), np.array([0, 2**63], np.uint64), ValueError, "key must hold numbers"),
    ],
)
def test_bad_philox_arguments(counter, key, error, match):
    with pytest.raises(error, match=match):
        _core.philox(counter, key)
