"""`lewm.loader`: order, resuming, memory, threads, processes, and what goes wrong."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import lewm
from lewm._core import StoreError, StoreWriter, WindowOrder, copy_windows, philox, read_windows
from lewm.loader import Batch, Loader

METHODS = [method for method in ("fork", "spawn") if method in multiprocessing.get_all_start_methods()]
LENGTHS = [12, 30, 2, 21, 16, 40, 25]
ARGUMENTS = {"frames": 3, "stride": 2}  # spans 5 frames


def write(path, lengths=LENGTHS, size=8):
    metadata = json.dumps({"action_low": [-1, -1], "action_high": [1, 1]})
    with StoreWriter(path, height=size, width=size, action_dim=2, columns={}, metadata=metadata) as writer:
        for episode, length in enumerate(lengths):
            rng = np.random.default_rng(episode)
            frames = rng.integers(0, 256, (length, size, size, 3), dtype=np.uint8)
            frames[:, 0, 0, 0], frames[:, 0, 0, 1] = episode, np.arange(length)  # which frame it is
            writer.append(frames, rng.normal(size=(length - 1, 2)), {})
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("loader") / "d.lewm")


@pytest.fixture
def data(path):
    return lewm.Dataset(path)


def arrays(data, batch_size=8, **arguments):
    return data.loader(batch_size, **{**ARGUMENTS, "tensors": False, **arguments})


def ids(batches):
    """(episode, start) of every window of the batches, in order."""
    return [tuple(int(x) for x in window[0, 0, 0, :2]) for batch in batches for window in np.asarray(batch[0])]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("lewm-loader")]


# -------------------------------------------------------------------------------------------------------------- order


def feistel(seed, epoch, n, x):
    """The permutation as `rust/core/src/loader.rs` documents it."""
    side = max(8, int(np.ceil(np.sqrt(n))))
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32)
    while True:
        left, right = divmod(x, side)
        for step in range(8):
            counter = np.array([[right, step, epoch, int.from_bytes(b"perm", "big")]], np.uint32)
            word = int(philox(counter, key)[0, 0])
            left, right = right, (left + (word * side >> 32)) % side
        x = left * side + right
        if x < n:
            return x


def test_the_order_is_the_documented_one(data):
    seed = 2**40 + 3
    windows = data.windows(range(7), **ARGUMENTS)
    order = WindowOrder(np.arange(7), np.maximum(np.array(LENGTHS) - 4, 0), seed=seed, shuffle=True)
    assert len(order) == len(windows) == 120
    want = windows[[feistel(seed, 5, 120, place) for place in range(120)]]
    np.testing.assert_array_equal(order.windows(5, 0, 120), want)
    np.testing.assert_array_equal(order.windows(5, 30, 7), want[30:37])
    assert order.windows(5, 120, 0).shape == (0, 2)
    with pytest.raises(IndexError, match="an epoch has 120 places, not 2 from 119 on"):
        order.windows(5, 119, 2)
    with pytest.raises(ValueError, match="epoch must be an integer"):
        order.windows(2**32, 0, 1)


def test_every_window_is_there_once_in_every_epoch(data):
    loader = arrays(data, 7, drop_last=False, seed=3)
    assert len(loader) == 18
    epochs = [list(loader) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [18] * 3
    assert len(epochs[0][-1].frames) == 1
    want = sorted(map(tuple, data.windows(range(7), **ARGUMENTS).tolist()))
    assert all(sorted(ids(epoch)) == want for epoch in epochs)
    assert len({tuple(ids(epoch)) for epoch in epochs}) == 3
    loader.set_epoch(1)
    assert ids(loader) == ids(epochs[1])
    assert ids(arrays(data, 7, drop_last=False, seed=4)) != ids(epochs[0])
    dropping = arrays(data, 7, seed=3)
    assert len(dropping) == 17
    assert ids(dropping) == ids(epochs[0][:-1])
    plain = arrays(data, 7, shuffle=False, drop_last=False, episodes=[5, 2, 0])
    assert ids(plain) == [tuple(w) for w in data.windows([5, 2, 0], **ARGUMENTS).tolist()] == ids(plain)


def test_batches_are_those_of_batch(data):
    loader = arrays(data, 16, seed=1)
    for batch in loader:
        assert isinstance(batch, Batch)
        want = data.batch(ids([batch]), **ARGUMENTS)
        for got, wanted, shape, kind in zip(
            batch, want, [(16, 3, 8, 8, 3), (16, 2, 4)], [np.uint8, np.float32], strict=True
        ):
            assert got.shape == shape
            assert got.dtype == kind
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_same_bytes_for_any_number_of_threads(tmp_path, in_memory):
    data = lewm.Dataset(write(tmp_path / "d.lewm", [40, 30, 50], size=96), in_memory=in_memory)  # large enough to share
    want = [(a.copy(), b.copy()) for a, b in arrays(data, 64, threads=1, seed=5)]
    assert want[0][0].nbytes > 4 * 2**20
    for number in (2, 4, None):
        for prefetch in (0, 1, 5):
            loader = arrays(data, 64, threads=number, prefetch=prefetch, seed=5)
            for got, wanted in zip(loader, want, strict=True):
                np.testing.assert_array_equal(got[0], wanted[0])
                np.testing.assert_array_equal(got[1], wanted[1])


def test_weights(data):
    """Draws with replacement: 40 epochs of 120 windows, each share within five of its standard deviations."""
    windows = [tuple(w) for w in data.windows([1, 2, 3], **ARGUMENTS).tolist()]
    by_window = np.zeros(len(windows))
    by_window[[0, 7, 30]] = 1, 2, 5
    for weights in ([2.0, 9.0, 0.5], by_window):
        loader = arrays(data, 4, episodes=[1, 2, 3], weights=weights, seed=2, drop_last=False)
        assert len(loader) == 11
        drawn = [window for _ in range(40) for window in ids(loader)]
        assert len(drawn) == 40 * len(windows) == 1720
        each = by_window if weights is by_window else np.array([{1: 2.0, 3: 0.5}[e] for e, _ in windows])
        share = each / each.sum()
        counts = np.array([drawn.count(window) for window in windows])
        assert (np.abs(counts - share * 1720) <= 5 * np.sqrt(1720 * share * (1 - share))).all()
    with pytest.raises(ValueError, match="weights has 2 entries; wants one for each of 7 episodes or of 120 windows"):
        arrays(data, weights=[1, 2])
    with pytest.raises(ValueError, match="weights has -1"):
        arrays(data, weights=[-1, 2, 0, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="weights must be of one dimension"):
        arrays(data, weights=[[1]])


# ----------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("weights", [None, np.arange(7.0)])
def test_it_resumes_with_the_exact_next_batch(data, weights):
    loader = arrays(data, seed=9, weights=weights)
    whole = [ids([batch]) for _ in range(3) for batch in loader]
    per_epoch = len(loader)
    assert per_epoch == 15
    for done in (0, 1, 20, 2 * per_epoch - 1, 2 * per_epoch):
        loader.set_epoch(0)
        seen = []
        while len(seen) < done:
            for batch in loader:
                seen.append(ids([batch]))
                if len(seen) == done:
                    break
        state = json.loads(json.dumps(loader.state_dict()))
        assert (state["epoch"], state["batch"]) == divmod(done, per_epoch)
        fresh = arrays(data, seed=9, weights=weights, threads=1, prefetch=7)
        fresh.load_state_dict(state)
        assert fresh.state_dict() == state
        while len(seen) < len(whole):
            seen += [ids([batch]) for batch in fresh]
        assert seen == whole


def test_an_iteration_that_is_broken_off_is_followed_by_the_next_epoch(data):
    loader = arrays(data, seed=9)
    epochs = [ids(loader) for _ in range(2)]
    loader.set_epoch(0)
    assert ids([next(iter(loader))]) == epochs[0][:8]
    assert ids(loader) == epochs[1]
    loader.set_epoch(1, 3)
    assert ids(loader) == epochs[1][24:]


def test_a_state_of_another_loader_is_refused(data):
    state = arrays(data).state_dict()
    for name, value in (
        ("seed", 1),
        ("batch_size", 4),
        ("shuffle", False),
        ("episodes", [1]),
        ("weights", np.ones(7)),
        ("stride", 1),
    ):
        other = arrays(data, **{name: value})
        with pytest.raises(ValueError, match=f"loader with {'windows' if name in ('episodes', 'weights') else name} "):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="batch must be an integer of at least 0 and below 16, got 16"):
        arrays(data).set_epoch(0, 16)
    with pytest.raises(ValueError, match="epoch must be an integer"):
        arrays(data).set_epoch(-1)


# ------------------------------------------------------------------------------------------------------------- memory


def test_a_batch_stays_as_it_is_while_it_is_held(data):
    loader = arrays(data, 8, seed=1)
    kept = [(batch, batch.frames.copy(), batch.actions.copy()) for batch in loader]
    views = [batch.frames[3, 1] for batch in loader]  # a view keeps all of it
    copies = [view.copy() for view in views]
    for _ in range(2):
        for batch in loader:
            batch.frames[:] = 0  # a batch is its holder's
    for batch, frames, actions in kept:
        np.testing.assert_array_equal(batch.frames, frames)
        np.testing.assert_array_equal(batch.actions, actions)
    np.testing.assert_array_equal(views, copies)


def test_memory_that_is_not_held_is_used_again(data):
    seen, loader = set(), arrays(data, 1, prefetch=2)
    for batch in loader:
        seen.add(batch.frames.ctypes.data)
    assert len(loader) == 120
    assert len(seen) <= 5  # one with the caller, up to three made or in work, one free


@pytest.mark.parametrize("kind", ["tensors", "arrays"])
def test_transform_runs_in_the_background(data, kind):
    if kind == "tensors":
        pytest.importorskip("torch")
    names = set()

    def transform(batch):
        names.add(threading.current_thread().name)
        return {"pixels": batch.frames[:, 0] * 1, "action": batch.actions}

    loader = arrays(data, tensors=kind == "tensors", transform=transform, seed=4)
    for got, want in zip(loader, arrays(data, seed=4), strict=True):
        np.testing.assert_array_equal(got["pixels"], want.frames[:, 0])
    assert names
    assert all(name.startswith("lewm-loader") for name in names)


# ----------------------------------------------------------------------------------------------------- how it can end


def test_no_thread_outlives_its_iteration(data):
    def stop(batch):
        raise ZeroDivisionError

    def fail(batches):
        for _ in batches:
            raise KeyError

    loader = arrays(data, 2)
    for _ in loader:
        assert len(threads()) == 1
        break
    gc.collect()
    assert not threads()
    with pytest.raises(KeyError):
        fail(loader)
    assert not threads()
    iterator = iter(loader)
    next(iterator)
    del iterator
    assert not threads()
    assert sum(1 for _ in loader) == 60
    assert not threads()
    with pytest.raises(ZeroDivisionError):
        next(iter(arrays(data, 2, transform=stop)))
    assert not threads()
    assert iter(loader) is not None  # never advanced: never begun
    assert not threads()


SCRIPT = """
import sys, time
import lewm
loader = lewm.Dataset(sys.argv[1]).loader(2, 3, 2, tensors=False, prefetch=50,
                                          transform=lambda batch: (time.sleep(0.02), batch)[1])
iterator = iter(loader)
next(iterator)
print("ready", flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1), ("for _ in iter(int, 1): next(iterator)", None)],
)
def test_the_interpreter_ends_in_the_middle_of_an_epoch(path, end, code):
    """At its end, with an error, by Ctrl-C: at once, and silently but for what was raised."""
    command = [sys.executable, "-c", SCRIPT.format(end=end), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        if code is None:
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
        assert time.monotonic() - start < 10
        assert process.returncode == (code if code is not None else -signal.SIGINT)
        assert "Fatal" not in error
        last = error.strip().splitlines()[-1:] or [""]
        assert last[0].split(":")[0] == {0: "", 3: "", 1: "ZeroDivisionError", None: "KeyboardInterrupt"}[code]


def test_damage_is_an_error_where_the_batch_is_taken(tmp_path):
    path = write(tmp_path / "d.lewm", size=32)  # nearly all of it is frames
    data = lewm.Dataset(path)
    file = path / "shard-000000.data"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(b"\xff" * 64)
    loader = arrays(data, 4, shuffle=False)
    with pytest.raises(StoreError, match=r"shard-000000.data: episode \d is damaged"):
        list(loader)
    assert not threads()
    assert 0 < loader.state_dict()["batch"] < len(loader), "the batches before it were given"


# ---------------------------------------------------------------------------------------------------------- processes


def read(loader):
    return ids(loader)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_other_processes_read_the_same(path, method, in_memory):
    loader = arrays(lewm.Dataset(path, in_memory=in_memory), seed=6)
    want = read(loader)
    loader.set_epoch(0)
    clone = pickle.loads(pickle.dumps(loader))
    assert read(clone) == want
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read, [loader, loader], chunksize=1) == [want, want]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_in_the_middle_of_an_iteration(data):
    """The child goes on where the parent was, with a thread of its own."""
    loader = arrays(data, seed=6)
    want = read(loader)
    loader.set_epoch(0)
    iterator = iter(loader)
    first = ids([next(iterator)])
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: sender.send(ids(iterator)))
    process.start()
    assert receiver.poll(30), "the child hangs"
    assert first + receiver.recv() == want
    process.join(30)
    assert process.exitcode == 0
    assert first + ids(iterator) == want


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_torch_dataloader_takes_it(data, workers):
    torch = pytest.importorskip("torch")
    loader = data.loader(8, **ARGUMENTS, seed=6)
    assert isinstance(loader, torch.utils.data.IterableDataset)
    want = [(a.clone(), b.clone()) for a, b in loader]
    assert all(torch.is_tensor(part) for batch in want for part in batch)
    assert ids(want) == ids(arrays(data, seed=6))
    loader.set_epoch(0, 1)
    torch_loader = torch.utils.data.DataLoader(loader, batch_size=None, num_workers=workers)
    assert len(torch_loader) == 15
    got = list(torch_loader)
    assert len(got) == 14
    for (frames, actions), wanted in zip(got, want[1:], strict=True):
        assert torch.equal(frames, wanted[0])
        assert torch.equal(actions, wanted[1])


def test_tensors_keep_their_memory(data):
    torch = pytest.importorskip("torch")
    kept = [batch.frames[2:4] for batch in data.loader(8, **ARGUMENTS, seed=6)]
    copies = [frames.clone() for frames in kept]
    for _ in data.loader(8, **ARGUMENTS, seed=7):
        pass
    assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))
    assert kept[0].is_pinned() == torch.cuda.is_available()


def test_pinned_memory_without_cuda(data):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        loader = data.loader(8, **ARGUMENTS, pin_memory=False)
        assert not next(iter(loader)).frames.is_pinned()
        return
    with pytest.raises(ValueError, match="pin_memory is True, but torch has no CUDA here"):
        next(iter(data.loader(8, **ARGUMENTS, pin_memory=True)))


def test_without_torch(path):
    """NumPy arrays come out, and nothing asks for torch."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import lewm\n"
        "batch = next(iter(lewm.Dataset(sys.argv[1]).loader(4, 3, 2)))\n"
        "print(type(batch.frames).__module__, batch.frames.shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "numpy (4, 3, 8, 8, 3)\n", done.stderr


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 121}, ValueError, "batch_size is 121, but there are only 120 windows"),
        ({"frames": 0}, ValueError, "frames must be an integer of at least 1"),
        ({"frames": 50}, ValueError, "it needs 99 frames, the longest of 7 has 40"),
        ({"frames": 2**40, "stride": 2**40}, ValueError, "no window of"),
        ({"stride": 1.5}, TypeError, "stride must be an integer"),
        ({"threads": 0}, ValueError, "threads must be an integer of at least 1"),
        ({"prefetch": -1}, ValueError, "prefetch must be an integer of at least 0"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0"),
        ({"episodes": [7]}, IndexError, "episodes must be from 0 to 6, got 7 to 7"),
        ({"episodes": []}, ValueError, "there are no episodes"),
        ({"tensors": False, "pin_memory": True}, ValueError, "pin_memory is True, which wants torch tensors"),
    ],
)
def test_bad_arguments(data, arguments, error, text):
    with pytest.raises(error, match=text):
        arrays(data, **arguments)


def test_windows_read_into_memory_of_the_caller(data):
    """What only `_core` can be asked."""
    index, out = np.array([[1, 2], [5, 30]]), np.zeros((2, 3, 8, 8, 3), np.uint8)
    store, want = data._store, data.batch([[1, 2], [5, 30]], **ARGUMENTS).frames
    read_windows(store, index, 3, 2, out, threads=2)
    np.testing.assert_array_equal(out, want)
    parts = [data[1].frames, data[5].frames]
    out[:] = 0
    copy_windows(parts, np.array([[0, 2], [1, 30]]), 3, 2, out)
    np.testing.assert_array_equal(out, want)
    for bad in ([[2, 0]], [[0, 26]], [[0, -1]], [[-1, 0]]):
        with pytest.raises(IndexError, match="row .* is not in part"):
            copy_windows(parts, np.array(bad), 3, 2, out[:1])
    with pytest.raises(IndexError, match="no window of 3 at stride 2 starts at 26"):
        read_windows(store, np.array([[1, 26]]), 3, 2, out[:1])
    frozen = out.copy()
    frozen.flags.writeable = False
    for call in (
        lambda out: read_windows(store, index, 3, 2, out),
        lambda out: copy_windows(parts, index % 2, 3, 2, out),
    ):
        with pytest.raises(ValueError, match="out has"):
            call(out[:1])
        with pytest.raises(ValueError, match="out cannot be written to"):
            call(frozen)
    with pytest.raises(ValueError, match=r"index must be of shape \(B, 2\)"):
        read_windows(store, index[:, :1], 3, 2, out)
    with pytest.raises(ValueError, match="threads must be an integer"):
        read_windows(store, index, 3, 2, out, threads=-1)


def test_it_is_made_by_its_source(data):
    assert isinstance(arrays(data), Loader)
