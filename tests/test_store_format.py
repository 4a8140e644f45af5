"""The store's format: what docs/store-format.md says is what is written, and version 1 stays what it is."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from lewm._core import Store, StoreWriter, repair_store, verify_store
from store_reader import read_store

GOLDEN = Path(__file__).parent / "golden" / "store-v1"
COLUMNS = {"goal": 1, "état": 2}


def episodes():
    """Coded frames in two chunks, noise that no code makes smaller, the shortest episode; all made of integers."""
    moving = np.full((40, 6, 7, 3), 230, np.uint8)
    moving[:, 1:4, 5] = (10, 20, 30)
    for step in range(40):
        moving[step, step % 6, step % 5] = (step, 2 * step, 255 - step)
    words = (np.arange(3 * 6 * 7 * 3, dtype=np.uint64) * 2654435761) % 2**32
    noise = (words >> 13).astype(np.uint8).reshape(3, 6, 7, 3)
    shortest = np.stack([np.zeros((6, 7, 3), np.uint8), np.full((6, 7, 3), 255, np.uint8)])
    for frames in (moving, noise, shortest):
        count = len(frames)
        actions = (np.arange((count - 1) * 2, dtype=np.float32) / 8 - 1).reshape(-1, 2)
        columns = {name: np.arange(count * w, dtype=np.float64).reshape(-1, w) / 3 for name, w in COLUMNS.items()}
        yield frames, actions, columns


def write(path):
    for session in (slice(0, 2), slice(2, 3)):
        with StoreWriter(
            path, height=6, width=7, action_dim=2, columns=COLUMNS, metadata='{"env_id": "golden", "n": [1, 2.5]}'
        ) as writer:
            for episode in list(episodes())[session]:
                writer.append(*episode)


@pytest.fixture
def written(tmp_path):
    write(tmp_path / "s.lewm")
    return tmp_path / "s.lewm"


def assert_content(found):
    for (frames, actions, columns), wanted in zip(found, episodes(), strict=True):
        np.testing.assert_array_equal(frames, wanted[0])
        np.testing.assert_array_equal(actions, wanted[1])
        assert columns.keys() == COLUMNS.keys()
        for name, values in wanted[2].items():
            np.testing.assert_array_equal(columns[name], values)


def test_a_reader_written_from_the_document_reads_what_is_written(written):
    catalogue, found, fingerprint = read_store(written)
    assert catalogue["metadata"] == {"env_id": "golden", "n": [1, 2.5]}
    assert_content(found)
    assert fingerprint == Store(written).fingerprint()


def test_that_reader_reads_a_larger_store(tmp_path):
    rng = np.random.default_rng(0)
    frames = np.full((70, 33, 20, 3), 255, np.uint8)
    for frame, place in zip(frames, np.cumsum(rng.integers(-1, 2, (70, 2)), axis=0) % 20, strict=True):
        frame[place[0] : place[0] + 6, place[1] : place[1] + 4] = rng.integers(0, 256, 3)
    with StoreWriter(tmp_path / "s", height=33, width=20, action_dim=1, columns={}, metadata="{}") as writer:
        writer.append(frames, np.zeros((69, 1)), {})
    (found,) = read_store(tmp_path / "s")[1]
    np.testing.assert_array_equal(found[0], frames)


def test_version_1_is_read_for_ever(tmp_path):
    """The files were written when the format was frozen. Never write them anew: old stores have to be read."""
    store = Store(GOLDEN)
    assert store.fingerprint() == "c0325402643d4bc6"
    assert_content(
        [
            (store.frames(i, np.arange(n)), store.actions(i), {name: store.column(name, i) for name in COLUMNS})
            for i, n in enumerate(store.lengths)
        ]
    )
    assert_content(read_store(GOLDEN)[1])
    assert verify_store(GOLDEN) == (3, 45, [], [])
    shutil.copytree(GOLDEN, tmp_path / "s")
    (tmp_path / "s" / "catalogue.json").unlink()
    (tmp_path / "s" / "shard-000000.index").write_bytes(b"")
    assert repair_store(tmp_path / "s")[:2] == (3, 45)
    for name in ("catalogue.json", "shard-000000.index"):
        assert (tmp_path / "s" / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_what_is_written_today_is_version_1(written):
    for name in ("catalogue.json", "shard-000000.index", "shard-000000.data", "shard-000001.data"):
        assert (written / name).read_bytes() == (GOLDEN / name).read_bytes(), f"{name} is written otherwise"
