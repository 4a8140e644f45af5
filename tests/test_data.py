"""`lewm.data.Dataset`: episodes, splits, statistics and windows."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest

from lewm import memory
from lewm._core import StoreError, StoreWriter
from lewm.data import Dataset

LENGTHS = [12, 30, 2, 21, 16]
METADATA = {"env_id": "test", "action_low": [-1, -2], "action_high": [1, 3], "pixels": {"size": 8}}


def make_episode(seed, length):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (length, 8, 8, 3), dtype=np.uint8)
    return frames, rng.normal(size=(length - 1, 2)).astype(np.float32), {"state": rng.normal(size=(length, 3))}


EPISODES = [make_episode(seed, length) for seed, length in enumerate(LENGTHS)]


def write(path, episodes, metadata=METADATA):
    text = json.dumps(metadata)
    with StoreWriter(path, height=8, width=8, action_dim=2, columns={"state": 3}, metadata=text) as writer:
        for episode in episodes:
            writer.append(*episode)
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "d.lewm", EPISODES)


@pytest.fixture
def data(path):
    return Dataset(path)


def test_episodes(data):
    assert len(data) == 5
    assert data.lengths.tolist() == LENGTHS
    assert data.frame_count == sum(LENGTHS)
    assert data.metadata == METADATA
    assert (data.height, data.width, data.action_dim, data.columns) == (8, 8, 2, {"state": 3})
    assert "5 episodes, 81 frames of 8x8" in repr(data)
    for index, (episode, (frames, actions, columns)) in enumerate(zip(data, EPISODES, strict=True)):
        assert episode.index == index
        assert len(episode) == len(frames)
        np.testing.assert_array_equal(episode.frames, frames)
        np.testing.assert_array_equal(episode.actions, actions)
        np.testing.assert_array_equal(episode.columns["state"], columns["state"])
    np.testing.assert_array_equal(data[-1].actions, EPISODES[-1][1])
    np.testing.assert_array_equal(data.frames(np.int64(1), [3, 3, 0]), EPISODES[1][0][[3, 3, 0]])
    np.testing.assert_array_equal(data.column("state", -2), EPISODES[3][2]["state"])


def test_bad_episode_numbers(data):
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"episode {index} is not in .* has 5"):
            data[index]
    with pytest.raises(TypeError, match="integer"):
        data["0"]
    with pytest.raises(ValueError, match="indices must be a 1-d array of integers, got float64"):
        data.frames(0, [0.5])


def test_split_is_a_partition_by_seed(data):
    train, validation = data.split(0.4, seed=3)
    assert (len(train), len(validation)) == (3, 2)
    assert sorted([*train, *validation]) == list(range(5))
    assert train.dtype == validation.dtype == np.int64
    assert np.all(np.diff(train) > 0)
    for first, second in zip(data.split(0.4, seed=3), (train, validation), strict=True):
        np.testing.assert_array_equal(first, second)
    assert len({tuple(data.split(0.4, seed=seed)[1]) for seed in range(20)}) > 3
    assert [len(part) for part in data.split(0.001)] == [4, 1]
    assert [len(part) for part in data.split(0.999)] == [1, 4]
    for share in (0, 1, -0.1):
        with pytest.raises(ValueError, match="validation must be above 0 and below 1"):
            data.split(share)


def test_split_of_one_episode(tmp_path):
    with pytest.raises(ValueError, match="at least 2 episodes"):
        Dataset(write(tmp_path / "d.lewm", EPISODES[:1])).split()


def test_action_statistics(data):
    for episodes in (None, [3, 0]):
        rows = np.concatenate([EPISODES[i][1] for i in (range(5) if episodes is None else episodes)]).astype(np.float64)
        statistics = data.action_statistics(episodes)
        np.testing.assert_allclose(statistics["mean"], rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics["std"], rows.std(0), rtol=1e-12)
        np.testing.assert_array_equal(statistics["low"], [-1, -2])
        np.testing.assert_array_equal(statistics["high"], [1, 3])
        assert all(values.dtype == np.float64 for values in statistics.values())
    with pytest.raises(ValueError, match="at least 1 episode"):
        data.action_statistics([])
    with pytest.raises(IndexError, match="episodes must be from 0 to 4, got 1 to 5"):
        data.action_statistics([1, 5])


def test_a_constant_action_column(tmp_path):
    frames, actions, columns = make_episode(0, 9)
    actions[:, 1] = 0.3
    with pytest.raises(ValueError, match=r"action column 1 .* is constant at 0.3"):
        Dataset(write(tmp_path / "d.lewm", [(frames, actions, columns)])).action_statistics()


def test_actions_that_are_not_finite(data):
    """The writer refuses them; another program's may not."""
    actions, offsets = data._actions
    actions[offsets[3] + 1, 0] = np.nan
    with pytest.raises(ValueError, match=r"actions of episode 3 .* not all finite"):
        data.action_statistics()
    assert np.isfinite(data.action_statistics([0, 1])["mean"]).all()


@pytest.mark.parametrize("bad", [None, [-1], [[-1, -2]], "low", [None, 0]])
def test_actions_without_bounds(tmp_path, bad):
    data = Dataset(write(tmp_path / "d.lewm", EPISODES, {**METADATA, "action_low": bad}))
    with pytest.raises(ValueError, match=r"metadata 'action_low' of .* must be 2 numbers"):
        data.action_statistics()


@pytest.mark.parametrize(("frames", "stride"), [(1, 1), (2, 1), (4, 5), (3, 10), (2, 29)])
def test_windows_and_batches_equal_naive_slices(data, frames, stride):
    span = (frames - 1) * stride
    naive = [(e, s) for e in (4, 1, 0, 2, 3) for s in range(LENGTHS[e] - span)]
    windows = data.windows([4, 1, 0, 2, 3], frames, stride)
    assert windows.dtype == np.int64
    assert [tuple(window) for window in windows] == naive
    pixels, blocks = data.batch(windows, frames, stride)
    assert pixels.dtype == np.uint8
    assert blocks.dtype == np.float32
    assert pixels.shape == (len(naive), frames, 8, 8, 3)
    assert blocks.shape == (len(naive), frames - 1, stride * 2)
    for (episode, start), window, block in zip(naive, pixels, blocks, strict=True):
        np.testing.assert_array_equal(window, EPISODES[episode][0][start : start + span + 1 : stride])
        for k in range(frames - 1):
            first = start + k * stride
            np.testing.assert_array_equal(block[k], EPISODES[episode][1][first : first + stride].ravel())


def test_no_episode_is_long_enough(data):
    with pytest.raises(ValueError, match="it needs 31 frames, the longest of 5 has 30"):
        data.windows(range(5), 4, 10)
    with pytest.raises(ValueError, match="there are no episodes"):
        data.windows([], 4, 10)
    assert (data.windows(range(5), 30)[:, 0] == 1).all()


def test_bad_windows(data):
    with pytest.raises(ValueError, match="frames must be an integer of at least 1, got 0"):
        data.windows([0], 0)
    with pytest.raises(ValueError, match="stride must be an integer of at least 1, got -1"):
        data.batch([[0, 0]], 2, -1)
    with pytest.raises(ValueError, match=r"index must be of shape \(B, 2\), got \(1, 3\)"):
        data.batch([[0, 0, 0]], 2)
    with pytest.raises(ValueError, match="index must be a 2-d array of integers"):
        data.batch([0, 0], 2)
    with pytest.raises(IndexError, match="episode 2 has 2 frames: no window of 3 at stride 1 starts at 0"):
        data.batch([[2, 0]], 3)
    with pytest.raises(IndexError, match="starts at -1"):
        data.batch([[0, -1]], 2)
    pixels, blocks = data.batch(np.empty((0, 2), np.int64), 4, 5)
    assert (pixels.shape, blocks.shape) == ((0, 4, 8, 8, 3), (0, 3, 10))


def test_refresh(path, data):
    before = data.fingerprint()
    data.batch([[0, 0]], 2)
    write(path, [make_episode(9, 7)])
    assert data.refresh() == 1
    assert data.lengths.tolist() == [*LENGTHS, 7]
    np.testing.assert_array_equal(data.batch([[5, 2]], 3, 2)[1].ravel(), make_episode(9, 7)[1][2:6].ravel())
    assert data.fingerprint() == Dataset(path).fingerprint() != before


def test_damage(path):
    file = path / "shard-000000.data"
    os.truncate(file, file.stat().st_size - 5)
    with pytest.raises(StoreError, match="skip_damaged=True"):
        Dataset(path)
    with pytest.warns(RuntimeWarning, match=r"damaged episodes are left out: .*1 of the 5 episodes"):
        data = Dataset(path, skip_damaged=True)
    assert data.lengths.tolist() == LENGTHS[:4]
    with pytest.raises(StoreError, match=r"not a .lewm store"):
        Dataset(path.parent)


def test_an_empty_store(tmp_path):
    data = Dataset(write(tmp_path / "d.lewm", []))
    assert list(data) == []
    assert data.frame_count == 0
    with pytest.raises(ValueError, match="there are no episodes"):
        data.windows([], 1)
    with pytest.raises(IndexError, match="has 0"):
        data[0]


def _sum(data):
    pixels, blocks = data.batch(data.windows(range(len(data)), 3, 2), 3, 2)
    return int(pixels.sum()), float(blocks.sum())


@pytest.mark.parametrize("method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
def test_workers_read_the_same(data, method, tmp_path, monkeypatch):
    wanted = _sum(data)
    assert _sum(pickle.loads(pickle.dumps(data))) == wanted
    monkeypatch.chdir(tmp_path)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_sum, [Dataset("d.lewm"), data], chunksize=1) == [wanted] * 2


def test_in_memory_is_equal(path, data):
    kept = Dataset(path, in_memory=True)
    assert repr(kept) == repr(data)
    assert kept.fingerprint() == data.fingerprint()
    windows = np.random.default_rng(0).permutation(data.windows(range(5), 3, 2))
    for which in (kept, pickle.loads(pickle.dumps(kept))):
        for got, want in zip(which.batch(windows, 3, 2), data.batch(windows, 3, 2), strict=True):
            np.testing.assert_array_equal(got, want)
    for episode, want in zip(kept, data, strict=True):
        np.testing.assert_array_equal(episode.frames, want.frames)
        episode.frames[:] = 0  # a copy
    np.testing.assert_array_equal(kept.frames(1, [3, 3, 0]), EPISODES[1][0][[3, 3, 0]])
    assert kept.frames(1, []).shape == (0, 8, 8, 3)
    for which in (kept, data):
        for bad in ([30], [0, -1]):
            with pytest.raises(IndexError, match="episode 1 has 30 frames"):
                which.frames(1, bad)
    write(path, [make_episode(9, 7)])
    assert kept.refresh() == 1
    np.testing.assert_array_equal(kept.batch([[5, 2]], 3, 2).frames[0], make_episode(9, 7)[0][2:7:2])


def test_in_memory_reads_no_file_any_more(path):
    data = Dataset(path, in_memory=True)
    data.batch([[0, 0]], 2)  # the actions are read with the first batch
    for file in path.glob("shard-*"):
        os.truncate(file, 0)
    np.testing.assert_array_equal(data.batch([[3, 4]], 2, 3).frames[0], EPISODES[3][0][4:8:3])


def test_what_does_not_fit_into_memory_is_refused(path, monkeypatch):
    need = sum(LENGTHS) * 8 * 8 * 3
    monkeypatch.setattr(memory, "available", lambda: need)
    assert Dataset(path, in_memory=True).frame_count == sum(LENGTHS)
    monkeypatch.setattr(memory, "available", lambda: need - 1)
    with pytest.raises(MemoryError, match=r"in_memory=True for .*d.lewm needs 0.00 GiB of memory, and 0.00 are free; "):
        Dataset(path, in_memory=True)
    assert len(Dataset(path)) == 5
    monkeypatch.setattr(memory, "available", lambda: None)  # a system that does not say
    assert len(Dataset(path, in_memory=True)) == 5


def test_damage_found_while_loading_into_memory(path):
    file = path / "shard-000000.data"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 4)
        stream.write(b"\xff" * (file.stat().st_size // 4))
    with pytest.raises(StoreError, match=r"episode \d is damaged"):
        Dataset(path, in_memory=True)


def _system(root, groups, limits, available=8 << 20):
    """A `/proc` and a `/sys` with these control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {available >> 10} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for folder, (limit, used, cached) in limits.items():
        folder = root / "sys/fs/cgroup" / folder
        folder.mkdir(parents=True, exist_ok=True)
        first = "memory" in folder.parts
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
        for name, value in zip(names, (limit, used), strict=True):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{'total_' * first}inactive_file {cached}\n")
    return root


@pytest.mark.parametrize(
    ("groups", "limits", "want"),
    [
        ("", {}, 8 << 20),
        ("0::/\n", {}, 8 << 20),
        ("0::/a/b\n", {"a/b": ("max", 5, 0), "a": (5000, 3000, 1000)}, 3000),  # a group above, and its file cache
        ("0::/a/b\n", {"a/b": (4000, 3000, 0), "a": (5000, 3000, 1000)}, 1000),
        ("0::/a\n", {"a": (1000, 3000, 0)}, 0),
        ("0::/elsewhere\n", {"": (700, 100, 0)}, 600),  # within a container
        ("4:memory:/a\n1:cpu:/\n", {"memory/a": (900, 100, 50)}, 850),
        ("4:cpu,memory:/a\n0::/\n", {"memory/a": (2**63 - 4096, 100, 0), "memory": (800, 100, 0)}, 700),
    ],
)
def test_memory_that_is_free(tmp_path, groups, limits, want):
    assert memory.available(_system(tmp_path, groups, limits)) == want


def test_memory_of_this_machine():
    free = memory.available()
    assert free is None or 2**20 < free < 2**50
