"""`lewm.ReplayBuffer`: capacity, episodes in progress, stores, and a writer beside a reader."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest

import lewm
from lewm import memory


def make_episode(seed, length, size=8):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (length, size, size, 3), dtype=np.uint8)
    frames[:, 0, 0, 0], frames[:, 0, 0, 1] = seed, np.arange(length)
    actions = rng.normal(size=(length - 1, 2)).astype(np.float32)
    return frames, actions, {"state": rng.normal(size=(length, 3))}


@pytest.fixture(params=["memory", "store"])
def make(request, tmp_path):
    def buffer(capacity, **arguments):
        path = tmp_path / "r.lewm" if request.param == "store" else None
        return lewm.ReplayBuffer(
            capacity, height=8, width=8, action_dim=2, columns={"state": 3}, path=path, **arguments
        )

    return buffer


def record(buffer, frames, actions, columns):
    buffer.start(frames[0], {"state": columns["state"][0]})
    for action, frame, state in zip(actions, frames[1:], columns["state"][1:], strict=True):
        buffer.add(action, frame, {"state": state})


def check(buffer, episodes, first=0):
    """The buffer holds these, and gives the windows of a plain slice."""
    snapshot = buffer.snapshot()
    for number, (frames, actions, columns) in enumerate(episodes, first):
        np.testing.assert_array_equal(snapshot.frames(number), frames)
        np.testing.assert_array_equal(snapshot.actions(number), actions)
        if columns is not None:
            np.testing.assert_array_equal(snapshot.column("state", number), columns["state"])
    assert buffer.first == first
    assert buffer.lengths.tolist() == [len(frames) for frames, *_ in episodes]
    assert len(buffer) == len(episodes)
    assert buffer.frame_count == sum(len(frames) for frames, *_ in episodes) <= buffer.capacity
    windows = buffer.windows(range(first, first + len(episodes)), 3, 2)
    windows = windows[np.random.default_rng(0).permutation(len(windows))]
    pixels, blocks = buffer.batch(windows, 3, 2)
    for (episode, start), window, block in zip(windows, pixels, blocks, strict=True):
        frames, actions, _ = episodes[episode - first]
        np.testing.assert_array_equal(window, frames[start : start + 5 : 2])
        np.testing.assert_array_equal(block, actions[start : start + 4].reshape(2, 4))


def test_the_oldest_episodes_are_dropped_whole(make):
    episodes = [make_episode(seed, length) for seed, length in enumerate([10, 20, 5, 30, 8, 60])]
    with make(60) as buffer:
        for count, first in ((1, 0), (2, 0), (3, 0), (4, 1), (5, 2), (6, 5)):
            buffer.append(*episodes[count - 1])
            check(buffer, episodes[first:count], first)
        for dropped in (lambda: buffer.batch([[4, 0]], 3, 2), lambda: buffer.snapshot().column("state", 4)):
            with pytest.raises(IndexError, match="episodes must be from 5 to 5, got 4 to 4"):
                dropped()
        with pytest.raises(ValueError, match=r"name must be one of \['state'\], got 'pose'"):
            buffer.snapshot().column("pose", 5)
        assert repr(buffer) == "ReplayBuffer(1 episodes, 60 of 60 frames of 8x8)"
    check(buffer, episodes[5:], 5)


def test_an_episode_in_progress_is_read_as_far_as_it_goes(make):
    whole, growing = make_episode(0, 30), make_episode(1, 25)
    buffer = make(50)
    buffer.append(*whole)
    frames, actions, columns = growing
    buffer.start(frames[0], {"state": columns["state"][0]})
    for count in range(2, 26):
        buffer.add(actions[count - 2], frames[count - 1], {"state": columns["state"][count - 1]})
        partial = (frames[:count], actions[: count - 1], None)
        if count <= 20:
            check(buffer, [whole, partial])
        elif count >= 5:  # there is no room for both
            check(buffer, [partial], 1)
    buffer.finish()
    check(buffer, [growing], 1)
    buffer.finish()  # nothing is in progress
    check(buffer, [growing], 1)
    last = make_episode(2, 12)
    record(buffer, *last)
    buffer.start(frames[0], {"state": columns["state"][0]})  # finishes the one before, and has one frame
    check(buffer, [growing, last, (frames[:1], actions[:0], None)], 1)
    buffer.finish()
    check(buffer, [growing, last], 1)


def test_an_episode_longer_than_the_capacity_is_refused(make):
    frames, actions, columns = make_episode(0, 12)
    buffer = make(10)
    with pytest.raises(ValueError, match="frames must be 2 to 10, the capacity, got 12"):
        buffer.append(frames, actions, columns)
    with pytest.raises(ValueError, match="the episode in progress has 10 frames, which is all of the capacity"):
        record(buffer, frames, actions, columns)
    buffer.finish()
    check(buffer, [(frames[:10], actions[:9], None)])


def test_what_is_given_may_change_later(make):
    frames, actions, columns = (make_episode(0, 12)[i] for i in range(3))
    buffer, want = make(100), make_episode(0, 12)
    buffer.append(frames, actions, columns)
    record(buffer, frames, actions, columns)
    frames[:], actions[:] = 0, 0
    check(buffer, [want, want])


def test_a_snapshot_stays_as_it_is(make):
    episodes = [make_episode(seed, 20) for seed in range(4)]
    buffer = make(40)
    buffer.append(*episodes[0])
    record(buffer, *(part[:10] if isinstance(part, np.ndarray) else {"state": part["state"][:10]}
                     for part in (episodes[1][0], episodes[1][1][:9], episodes[1][2])))  # fmt: skip
    snapshot = buffer.snapshot()
    for episode in episodes[2:]:
        buffer.append(*episode)
    check(buffer, episodes[2:], 2)
    assert (snapshot.first, snapshot.lengths.tolist(), snapshot.growing) == (0, [20, 10], False)
    index = snapshot.windows([0, 1], 3, 2)
    pixels, _ = snapshot.batch(index, 3, 2)
    wanted = [episodes[e][0][s : s + 5 : 2] for e, s in index]
    np.testing.assert_array_equal(pixels, wanted)
    loader = snapshot.loader(4, 3, 2, tensors=False, drop_last=False)
    seen = [tuple(window[0, 0, 0, :2].tolist()) for batch in loader for window in batch.frames]
    assert sorted(seen) == [tuple(row) for row in index.tolist()]


def test_a_loader_draws_what_is_there(make):
    buffer = make(60)
    loader = buffer.loader(64, 3, 2, seed=4, tensors=False)
    with pytest.raises(ValueError, match="no window of 3 frames at stride 2: it needs 5 frames, there are no episodes"):
        next(iter(loader))
    with pytest.raises(TypeError, match="never end"):
        len(loader)
    episodes = [make_episode(seed, length) for seed, length in enumerate([5, 25, 6, 30, 20])]
    for episode in episodes[:3]:
        buffer.append(*episode)
    state = loader.state_dict()
    batches = iter(loader)
    first = [next(batches) for _ in range(30)]
    windows = [tuple(w) for w in buffer.windows(range(3), 3, 2).tolist()]
    drawn = [tuple(window[0, 0, 0, :2].tolist()) for batch in first for window in batch.frames]
    counts = np.array([drawn.count(window) for window in windows])
    assert counts.sum() == 30 * 64
    share = 1 / len(windows)
    assert (np.abs(counts - 1920 * share) < 5 * np.sqrt(1920 * share * (1 - share))).all()
    again = buffer.loader(64, 3, 2, seed=4, tensors=False, threads=1)
    again.load_state_dict(state)
    for batch, wanted in zip(again, first, strict=False):
        np.testing.assert_array_equal(batch.frames, wanted.frames)
        np.testing.assert_array_equal(batch.actions, wanted.actions)
    again.load_state_dict({**state, "batch": 7})
    np.testing.assert_array_equal(next(iter(again)).frames, first[7].frames)
    for episode in episodes[3:]:
        buffer.append(*episode)
    assert buffer.first == 2
    for _ in range(3):
        next(batches)  # was made before
    assert {int(x) for _ in range(5) for x in next(batches).frames[:, 0, 0, 0, 0]} == {2, 3, 4}
    for name, value in (("episodes", [0]), ("weights", [1]), ("shuffle", False), ("drop_last", False)):
        with pytest.raises(ValueError, match=f"{name} must be .* for what grows"):
            buffer.loader(4, 3, 2, **{name: value})


def test_one_writes_while_others_read(make):
    """Every window read is whole: the frames and actions of one episode, in order."""
    buffer = make(200)
    episodes = {seed: make_episode(seed, 7 + seed % 40) for seed in range(120)}
    buffer.append(*episodes[0])
    done, failures = threading.Event(), []

    def reads(seed):
        try:
            for batch in buffer.loader(16, 3, 2, seed=seed, tensors=False):
                for window, block in zip(batch.frames, batch.actions, strict=True):
                    episode, start = (int(x) for x in window[0, 0, 0, :2])
                    frames, actions, _ = episodes[episode]
                    np.testing.assert_array_equal(window, frames[start : start + 5 : 2])
                    np.testing.assert_array_equal(block, actions[start : start + 4].reshape(2, 4))
                if done.is_set():
                    return
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=reads, args=(seed,)) for seed in range(2)]
    for reader in readers:
        reader.start()
    for seed in range(1, 120):
        (record if seed % 3 else type(buffer).append)(buffer, *episodes[seed])
        assert buffer.frame_count <= 200
    done.set()
    for reader in readers:
        reader.join(30)
        assert not reader.is_alive()
    assert not failures


def test_a_store_keeps_what_is_dropped_and_fills_the_next_buffer(tmp_path):
    path, sizes = tmp_path / "r.lewm", {"height": 8, "width": 8, "action_dim": 2, "columns": {"state": 3}}
    episodes = [make_episode(seed, 20) for seed in range(5)]
    with lewm.ReplayBuffer(45, **sizes, path=path, metadata={"env_id": "test"}) as buffer:
        for episode in episodes[:4]:
            record(buffer, *episode)
        check(buffer, episodes[2:4], 2)
    data = lewm.Dataset(path)
    assert data.metadata == {"env_id": "test"}
    assert len(data) == 4
    for got, (frames, actions, columns) in zip(data, episodes, strict=False):
        np.testing.assert_array_equal(got.frames, frames)
        np.testing.assert_array_equal(got.actions, actions)
        np.testing.assert_array_equal(got.columns["state"], columns["state"])
    with lewm.ReplayBuffer(65, **sizes, path=path) as buffer:
        check(buffer, episodes[1:4], 1)
        buffer.append(*episodes[4])
        check(buffer, episodes[2:], 2)
    with pytest.raises(ValueError, match="height is 16, but .* has 8"):
        lewm.ReplayBuffer(65, **{**sizes, "height": 16}, path=path)


def test_what_other_writers_commit_is_found(tmp_path):
    path, sizes = tmp_path / "r.lewm", {"height": 8, "width": 8, "action_dim": 2, "columns": {"state": 3}}
    episodes = [make_episode(seed, 20) for seed in range(3)]
    buffer = lewm.ReplayBuffer(100, **sizes, path=path)
    with lewm.ReplayBuffer(100, **sizes, path=path) as other:
        other.append(*episodes[0])
    assert len(buffer) == 0
    buffer.append(*episodes[1])
    assert {int(buffer.batch([[i, 0]], 3, 2).frames[0, 0, 0, 0, 0]) for i in range(2)} == {0, 1}


def test_bad_input(make):
    frames, actions, columns = make_episode(0, 6)
    state = {"state": columns["state"][0]}
    buffer = make(20)
    with pytest.raises(ValueError, match="there is no episode to add to"):
        buffer.add(actions[0], frames[0], state)
    for frame, text in (
        (frames[0] / 255, "frame must be uint8"),
        (frames[0, :4], r"a frame must be of shape \(8, 8, 3\), got \(4, 8, 3\)"),
        (frames, "a frame must be of shape"),
        (np.moveaxis(frames[0], -1, 0), "channels first"),
    ):
        with pytest.raises(ValueError, match=text):
            buffer.start(frame, state)
    buffer.start(frames[0], state)
    for action in ([1, 2, 3], [np.nan, 0], 1.0, ["a", "b"]):
        with pytest.raises(ValueError, match=r"action must be finite numbers of shape \(2,\)"):
            buffer.add(action, frames[1], state)
    for bad in ({}, {"other": [1, 2, 3]}, {**state, "other": [0]}):
        with pytest.raises(ValueError, match=r"columns must be \['state'\], got"):
            buffer.add(actions[0], frames[1], bad)
    with pytest.raises(ValueError, match=r"columns\['state'\] must be finite numbers of shape \(3,\)"):
        buffer.add(actions[0], frames[1], {"state": [1, 2]})
    with pytest.raises(ValueError, match=r"actions must be finite numbers of shape \(5, 2\)"):
        buffer.append(frames, actions[1:], columns)
    with pytest.raises(ValueError, match=r"columns\['state'\] must be finite numbers of shape \(6, 3\)"):
        buffer.append(frames, actions, {"state": columns["state"][1:]})
    with pytest.raises(ValueError, match="frames must be 2 to 20, the capacity, got 1"):
        buffer.append(frames[:1], actions[:0], {"state": columns["state"][:1]})
    buffer.add(actions[0], frames[1], state)  # none of that has harmed the episode in progress
    assert buffer.lengths.tolist() == [2]
    with pytest.raises(TypeError, match="belongs to its process"):
        pickle.dumps(buffer)
    with pytest.raises(ValueError, match="capacity must be an integer of at least 2, got 1"):
        make(1)


def test_a_buffer_that_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 2**20)
    sizes = {"height": 64, "width": 64, "action_dim": 2}
    assert lewm.ReplayBuffer(2**20 // (64 * 64 * 3), **sizes).frame_count == 0
    with pytest.raises(MemoryError, match=r"a ReplayBuffer of 1000 frames needs 0.01 GiB of memory, and 0.00 are free"):
        lewm.ReplayBuffer(1000, **sizes)
