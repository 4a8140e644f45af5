"""The trajectory store as Python meets it. Every truncation and flipped byte is tested beside the Rust code."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lewm._core import Store, StoreError, StoreWriter, repair_store, verify_store

H, W, A = 12, 10, 2
COLUMNS = {"state": 2, "goal": 3}


def open_writer(path, **changes):
    wanted = {"height": H, "width": W, "action_dim": A, "columns": COLUMNS, "metadata": '{"env_id": "test"}'}
    return StoreWriter(path, **{**wanted, **changes})


def make_episode(seed, length=None):
    """Frames, actions and columns that follow from the seed; odd seeds are noise, even ones a moving dot."""
    rng = np.random.default_rng(seed)
    length = length or int(rng.integers(2, 40))
    frames = rng.integers(0, 256, (length, H, W, 3), dtype=np.uint8)
    if seed % 2 == 0:
        frames[:] = 200
        frames[np.arange(length), np.arange(length) % H, rng.integers(0, W, length)] = (255, 0, seed % 256)
    actions = rng.normal(size=(length - 1, A)).astype(np.float32)
    return frames, actions, {name: rng.normal(size=(length, width)) for name, width in COLUMNS.items()}


def assert_episode(store, index, seed, length=None):
    frames, actions, columns = make_episode(seed, length)
    np.testing.assert_array_equal(store.frames(index, np.arange(len(frames))), frames)
    np.testing.assert_array_equal(store.actions(index), actions)
    for name, values in columns.items():
        np.testing.assert_array_equal(store.column(name, index), values)


@pytest.fixture
def path(tmp_path):
    """A store of the episodes 0 to 4."""
    with open_writer(tmp_path / "s.lewm") as writer:
        assert [writer.append(*make_episode(seed)) for seed in range(5)] == list(range(5))
    return tmp_path / "s.lewm"


def test_what_is_written_is_read(path):
    store = Store(path)
    assert len(store) == 5
    assert (store.height, store.width, store.action_dim, store.columns) == (H, W, A, COLUMNS)
    assert json.loads(store.metadata) == {"env_id": "test"}
    assert store.lengths.dtype == np.int64
    assert store.lengths.tolist() == [len(make_episode(seed)[0]) for seed in range(5)]
    assert store.skipped == []
    assert store.actions(0).dtype == np.float32
    assert store.column("state", 0).dtype == np.float64
    for seed in range(5):
        assert_episode(store, seed, seed)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(2, 70),
    windows=st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), max_size=8),
    frames=st.integers(1, 6),
    stride=st.integers(1, 9),
)
def test_windows_equal_naive_slices(tmp_path_factory, seed, length, windows, frames, stride):
    path = tmp_path_factory.mktemp("store")
    episodes = [make_episode(seed, length), make_episode(seed + 1, length)]
    with open_writer(path) as writer:
        for episode in episodes:
            writer.append(*episode)
    store = Store(path)
    last = length - 1 - (frames - 1) * stride
    if last < 0:
        with pytest.raises(IndexError, match="no window of"):
            store.windows(np.array([0]), np.array([0]), frames, stride)
        return
    ids = np.array([episode for episode, _ in windows], dtype=np.int64)
    starts = np.array([round(place * last) for _, place in windows], dtype=np.int64)
    got = store.windows(ids, starts, frames, stride)
    assert got.shape == (len(ids), frames, H, W, 3)
    for window, episode, start in zip(got, ids, starts, strict=True):
        np.testing.assert_array_equal(window, episodes[episode][0][start::stride][:frames])


def test_arrays_of_other_dtypes_and_layouts(tmp_path):
    frames, actions, columns = make_episode(1)
    columns = {"state": columns["state"].astype(np.float32), "goal": columns["goal"].astype(np.int16)}
    with open_writer(tmp_path / "s.lewm") as writer:
        writer.append(
            np.asfortranarray(frames), actions.astype(np.float64)[::-1], {k: v.tolist() for k, v in columns.items()}
        )
        writer.append(frames[::-1], actions, columns)
    store = Store(str(tmp_path / "s.lewm"))
    np.testing.assert_array_equal(store.frames(0, np.arange(len(frames))), frames)
    np.testing.assert_array_equal(store.frames(1, np.arange(len(frames))), frames[::-1])
    np.testing.assert_array_equal(store.actions(0), actions[::-1])
    for index, name in itertools.product(range(2), COLUMNS):
        np.testing.assert_array_equal(store.column(name, index), columns[name])


def test_a_second_session_appends(path):
    with open_writer(path, metadata='{"ignored": 1}') as writer:
        assert writer.append(*make_episode(5)) == 5
    store = Store(path)
    assert json.loads(store.metadata) == {"env_id": "test"}
    for seed in range(6):
        assert_episode(store, seed, seed)


def test_refresh_sees_new_episodes(path):
    store = Store(path)
    with open_writer(path) as writer:
        writer.append(*make_episode(5))
        assert len(store) == 5
        assert store.refresh() == 1
        assert store.refresh() == 0
        assert_episode(store, 5, 5)
    assert store.fingerprint() == Store(path).fingerprint()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc, which this system lacks")
def test_refresh_opens_no_file_twice(path):
    store = Store(path)
    with open_writer(path) as writer:
        for seed in range(5, 25):
            writer.append(*make_episode(seed))
            store.refresh()
            assert_episode(store, seed, seed)
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        files = [os.readlink(link) for link in links if os.path.islink(link)]
        data = [file for file in files if file.startswith(str(path)) and file.endswith("1.data")]
        assert len(data) == 2, "one of the writer, one of the reader"


def test_a_path_means_what_it_meant_when_it_was_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = open_writer("s.lewm")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    writer.append(*make_episode(0))
    monkeypatch.chdir(tmp_path)
    store = Store("s.lewm")
    monkeypatch.chdir("elsewhere")
    assert_episode(store, 0, 0)


def test_more_frames_than_memory_holds(tmp_path):
    with open_writer(tmp_path / "s.lewm", height=4096, width=4096, action_dim=1, columns={}) as writer:
        writer.append(np.zeros((2, 4096, 4096, 3), np.uint8), np.zeros((1, 1)), {})
    with pytest.raises(MemoryError, match=r"\(1000000, 4096, 4096, 3\)"):
        Store(tmp_path / "s.lewm").frames(0, np.zeros(10**6, np.int64))


def test_fingerprint_changes_with_the_data(path, tmp_path):
    before = Store(path).fingerprint()
    with open_writer(tmp_path / "same.lewm", metadata="{}") as writer:
        for seed in range(5):
            writer.append(*make_episode(seed))
    assert Store(tmp_path / "same.lewm").fingerprint() == before
    with open_writer(tmp_path / "other.lewm") as writer:
        for seed in range(5):
            frames, actions, columns = make_episode(seed)
            columns["goal"][-1, -1] += seed == 4
            writer.append(frames, actions, columns)
    assert Store(tmp_path / "other.lewm").fingerprint() != before
    with open_writer(path) as writer:
        writer.append(*make_episode(5))
    assert Store(path).fingerprint() != before


def _write_many(path, first):
    with open_writer(path) as writer:
        for seed in range(first, first + 20):
            writer.append(*make_episode(seed))


def test_two_processes_write_at_once(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_write_many, args=(tmp_path / "s.lewm", first)) for first in (100, 200)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    store = Store(tmp_path / "s.lewm")
    starts = [
        int(store.column("state", index)[0, 0] == make_episode(200 + index % 20)[2]["state"][0, 0]) for index in (0, 20)
    ]
    assert sorted(starts) == [0, 1]
    for index in range(40):
        first = (100, 200)[starts[index // 20]]
        assert_episode(store, index, first + index % 20)


def test_threads_share_a_writer(tmp_path):
    writer = open_writer(tmp_path / "s.lewm")
    seeds = {}

    def work(first):
        for seed in range(first, first + 10):
            seeds[writer.append(*make_episode(seed))] = seed

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = Store(tmp_path / "s.lewm")
    assert sorted(seeds) == list(range(20)) == list(range(len(store)))
    for index, seed in seeds.items():
        assert_episode(store, index, seed)


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_core_store import make_episode, open_writer
seed = int(sys.argv[3])
with open_writer(sys.argv[1]) as writer:
    while True:
        writer.append(*make_episode(seed))
        print(seed, flush=True)
        seed += 1
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_every_acknowledged_episode_survives_a_kill(tmp_path):
    path, rng, acknowledged = tmp_path / "s.lewm", np.random.default_rng(0), []
    for attempt in range(6):
        command = [sys.executable, "-c", WRITER, path, os.path.dirname(__file__), str(1000 * attempt)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        acknowledged.append(int(writer.stdout.readline()))
        time.sleep(rng.uniform(0, 0.1))
        writer.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout.read().splitlines()]
        assert writer.wait(10) == -signal.SIGKILL
        store = Store(path)
        # What was committed and not yet acknowledged may be there too: at most one episode for each kill.
        assert len(acknowledged) <= len(store) <= len(acknowledged) + attempt + 1
        firsts = {make_episode(seed)[2]["state"].tobytes(): seed for seed in acknowledged}
        found = {firsts.get(store.column("state", index).tobytes()): index for index in range(len(store))}
        for seed in acknowledged:
            assert_episode(store, found[seed], seed)


def _read_all(path):
    store = Store(path)
    for seed in range(5):
        assert_episode(store, seed, seed)


@pytest.mark.parametrize("method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
def test_another_process_reads(path, method):
    child = multiprocessing.get_context(method).Process(target=_read_all, args=(path,))
    child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_an_open_store_is_read_after_a_fork(tmp_path):
    """The parent reads with several threads all the while."""
    length = 300
    with open_writer(tmp_path / "s.lewm") as writer:
        writer.append(*make_episode(1, length))
        writer.append(*make_episode(2, length))
    store = Store(tmp_path / "s.lewm")
    stop = threading.Event()

    def read():
        while not stop.is_set():
            store.windows(np.zeros(20, np.int64), np.arange(20), 50, 5)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                try:
                    assert_episode(store, 0, 1, length)
                    assert_episode(store, 1, 2, length)
                finally:
                    os._exit(int(sys.exc_info()[0] is not None))
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        reader.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_writer_is_not_used_after_a_fork(path):
    with open_writer(path) as writer:
        writer.append(*make_episode(5))
        child = os.fork()
        if child == 0:
            try:
                writer.append(*make_episode(6))
            except ValueError as error:
                os._exit(0 if "another process" in str(error) else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        writer.append(*make_episode(6))
    assert len(Store(path)) == 7


def test_a_file_cut_short(path):
    data = path / "shard-000000.data"
    whole = data.stat().st_size
    os.truncate(data, whole - 1)
    with pytest.raises(
        StoreError, match=rf"shard-000000.data has {whole - 1} bytes and needs {whole}.*skip_damaged=True"
    ):
        Store(path)
    store = Store(path, skip_damaged=True)
    assert len(store) == 4
    assert len(store.skipped) == 1
    for seed in range(4):
        assert_episode(store, seed, seed)


def test_a_flipped_byte(path):
    data = path / "shard-000000.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    store = Store(path)
    lengths = enumerate(store.lengths)
    with pytest.raises(StoreError, match=r"shard-000000.data: episode \d is damaged"):
        [store.frames(episode, np.arange(length)) for episode, length in lengths]
    intact = Store(path, skip_damaged=True)
    assert len(intact) == 4
    assert "is damaged" in intact.skipped[0]


def test_what_is_not_a_store(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.lewm"):
        Store(tmp_path / "none.lewm")
    with pytest.raises(StoreError, match=r"not a .lewm store"):
        Store(tmp_path)
    (tmp_path / "file").write_bytes(b"no folder")
    with pytest.raises(StoreError, match=r"not a .lewm store"):
        Store(tmp_path / "file")
    with pytest.raises(ValueError, match=r"not a .lewm store and not empty: it has file"):
        open_writer(tmp_path)


def test_an_empty_store(tmp_path):
    open_writer(tmp_path / "s.lewm").close()
    store = Store(tmp_path / "s.lewm")
    assert len(store) == 0
    assert store.lengths.shape == (0,)
    assert store.windows(np.empty(0, np.int64), np.empty(0, np.int64), 4, 5).shape == (0, 4, H, W, 3)


@pytest.mark.parametrize("skip_damaged", [False, True])
def test_a_cut_catalogue(path, skip_damaged):
    os.truncate(path / "catalogue.json", 50)
    with pytest.raises(StoreError, match=r"catalogue.json: damaged"):
        Store(path, skip_damaged=skip_damaged)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 13}, "height is 13, but .* has 12"),
        ({"width": 1}, "width is 1, but .* has 10"),
        ({"action_dim": 1}, "action_dim is 1, but .* has 2"),
        ({"columns": {"state": 2}}, "columns is .*, but .* has"),
        ({"height": 0}, "height is 0; wants 1 to 4096"),
        ({"width": -1}, r"width must be an integer in 0..2\^64, got -1"),
        ({"columns": {"state": -1}}, r'columns\["state"\] must be an integer in 0..2\^64, got -1'),
        ({"metadata": "[]"}, "metadata wants a JSON object"),
        ({"metadata": '{"low": NaN}'}, "metadata is not JSON"),
    ],
)
def test_a_store_of_another_schema(path, changes, message):
    with pytest.raises(ValueError, match=message):
        open_writer(path, **changes)


FRAMES, ACTIONS, STATES = make_episode(3, 5)


@pytest.mark.parametrize(
    ("frames", "actions", "columns", "message"),
    [
        (
            FRAMES.astype(np.float32),
            ACTIONS,
            STATES,
            r"frames is float32 of shape \(5, 12, 10, 3\); wants a uint8 array",
        ),
        (
            FRAMES.transpose(0, 3, 1, 2),
            ACTIONS,
            STATES,
            r"frames is uint8 of shape \(5, 3, 12, 10\); wants .*\(N, 12, 10, 3\)",
        ),
        (FRAMES[0], ACTIONS, STATES, r"frames is uint8 of shape \(12, 10, 3\)"),
        ("pixels", ACTIONS, STATES, "frames is <class 'str'>"),
        (FRAMES[:1], ACTIONS[:0], {k: v[:1] for k, v in STATES.items()}, "an episode needs at least 2 frames, got 1"),
        (FRAMES[:0], ACTIONS[:0], {k: v[:0] for k, v in STATES.items()}, "an episode needs at least 2 frames, got 0"),
        (FRAMES, np.zeros((5, A)), STATES, r"actions is float64 of shape \(5, 2\); wants .* shape \(4, 2\)"),
        (FRAMES, ACTIONS * np.nan, STATES, r"actions\[0, 0\] is NaN"),
        (FRAMES, ACTIONS * 1j, STATES, "actions is complex64"),
        (FRAMES, [[1, 2], [3]], STATES, "actions is <class 'list'>"),
        (FRAMES, ACTIONS, {"state": STATES["state"]}, 'columns lacks "goal"'),
        (FRAMES, ACTIONS, {**STATES, "extra": STATES["goal"]}, 'columns has "extra"'),
        (FRAMES, ACTIONS, {**STATES, "goal": STATES["goal"][:-1]}, r'columns\["goal"\] is float64 of shape \(4, 3\)'),
        (FRAMES, ACTIONS, {**STATES, "goal": STATES["goal"] * np.inf}, r'columns\["goal"\]\[0, 0\] is'),
    ],
)
def test_bad_episodes_leave_nothing(tmp_path, frames, actions, columns, message):
    with open_writer(tmp_path / "s.lewm") as writer:
        with pytest.raises(ValueError, match=message):
            writer.append(frames, actions, columns)
        assert {file.name for file in (tmp_path / "s.lewm").iterdir()} == {"catalogue.json", "lock"}
        assert writer.append(FRAMES, ACTIONS, STATES) == 0
    with pytest.raises(ValueError, match="this StoreWriter is closed"):
        writer.append(FRAMES, ACTIONS, STATES)


def test_bad_reads(path):
    store = Store(path)
    one = np.array([0])
    with pytest.raises(IndexError, match="episode 5 is not in a store of 5 episodes"):
        store.actions(5)
    with pytest.raises(IndexError, match="episode -1"):
        store.windows(-one - 1, one, 1, 1)
    with pytest.raises(IndexError, match="starts at 1000"):
        store.frames(0, one + 1000)
    with pytest.raises(ValueError, match='name is "pose"'):
        store.column("pose", 0)
    with pytest.raises(ValueError, match="length is 0"):
        store.windows(one, one, 0, 1)


def test_windows_into_memory_that_is_used_again(path):
    store = Store(path)
    ids, starts = np.array([1, 3]), np.array([0, 0])
    out = np.full((2, 2, H, W, 3), 7, np.uint8)
    assert store.windows(ids, starts, 2, 1, out) is out
    np.testing.assert_array_equal(out, store.windows(ids, starts, 2, 1))
    frozen = out.copy()
    frozen.flags.writeable = False
    for bad in (frozen, out[:1], out[..., ::-1], out.astype(np.int8), out.tobytes()):
        with pytest.raises(ValueError, match=r"wants a writable C-contiguous uint8 array of shape \(2, 2, 12, 10, 3\)"):
            store.windows(ids, starts, 2, 1, bad)


def test_thread_count_from_the_environment(path, monkeypatch):
    monkeypatch.setenv("LEWM_NUM_THREADS", "1")
    assert_episode(Store(path), 0, 0)
    monkeypatch.setenv("LEWM_NUM_THREADS", "many")
    with pytest.raises(ValueError, match='LEWM_NUM_THREADS is "many"'):
        Store(path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot limit open files by setrlimit")
def test_a_full_disk_commits_nothing_and_the_next_append_does(path):
    import resource

    with open_writer(path) as writer:
        writer.append(*make_episode(5))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Some of the next episode still fits.
        resource.setrlimit(resource.RLIMIT_FSIZE, ((path / "shard-000001.data").stat().st_size + 100, limits[1]))
        try:
            with pytest.raises(OSError, match=r"File too large.*shard-000001.data"):
                writer.append(*make_episode(7))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(Store(path)) == 6
        writer.append(*make_episode(6))
    store = Store(path)
    assert len(store) == 7
    for seed in range(7):
        assert_episode(store, seed, seed)


def test_verify_and_repair(path):
    assert verify_store(path) == (5, sum(len(make_episode(seed)[0]) for seed in range(5)), [], [])
    steps = []
    assert repair_store(path, progress=lambda *step: steps.append(step))[2] == []
    assert len(steps) == 5
    assert {total for _, total in steps} == {(path / "shard-000000.data").stat().st_size}
    os.truncate(path / "shard-000000.index", 3 * 64)
    assert len(Store(path)) == 3
    assert [text.partition(": ")[2].split(" at byte")[0] for text in verify_store(path)[2]] == ["a whole episode"] * 2
    with open_writer(path), pytest.raises(ValueError, match="has a writer at work"):
        repair_store(path)
    assert repair_store(path, dry_run=True)[0] == 5
    assert len(Store(path)) == 3
    assert repair_store(path)[0] == 5
    for seed in range(5):
        assert_episode(Store(path), seed, seed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_neither_drops_nor_keeps_the_lock_of_a_writer(path):
    ready, go = os.pipe(), os.pipe()
    writer = open_writer(path)
    child = os.fork()
    if child == 0:
        del writer
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        with pytest.raises(ValueError, match="has a writer at work"):
            repair_store(path)
        writer.close()
        assert repair_store(path)[2] == []
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)


@pytest.mark.parametrize("work", [verify_store, repair_store])
def test_what_progress_raises_ends_the_work(path, work):
    def stop(done, total):
        raise KeyboardInterrupt

    os.truncate(path / "shard-000000.index", 64)
    with pytest.raises(KeyboardInterrupt):
        work(path, progress=stop)
    assert len(Store(path)) == 1
