"""Official HDF5 files: what is read of them, what is refused, and what is written."""

import os
import sys

import numpy as np
import pytest

h5py = pytest.importorskip("h5py")

from lewm import Dataset
from lewm._core import StoreWriter
from lewm.formats import hdf5, opened
from recorded import LENGTHS, assert_holds, columns_of, episodes, write_hdf5

ROWS = sum(LENGTHS)


@pytest.fixture
def made():
    return episodes()


@pytest.fixture
def columns(made):
    return columns_of(made)


def test_episodes_are_read_bit_for_bit(tmp_path, made, columns):
    path = write_hdf5(tmp_path / "d.h5", columns)
    with opened(path) as source:
        assert_holds(source, made)
        assert (source.format, source.lossless, source.height, source.width, source.action_dim) == (
            "hdf5", True, 16, 16, 2,
        )  # fmt: skip
        assert source.columns == {"state": 3}
        assert (source.left_out, source.metadata) == ({}, {})
        assert source.bytes == path.stat().st_size
        assert source.lengths.dtype == np.int64


def test_a_file_is_known_by_its_content_or_its_name(tmp_path, made, columns):
    path = write_hdf5(tmp_path / "no-suffix", columns)
    with opened(path) as source:
        assert_holds(source, made)
    (tmp_path / "empty.h5").touch()
    with pytest.raises(ValueError, match="empty.h5 is no HDF5 file, or a damaged one"):
        opened(tmp_path / "empty.h5")


def test_what_becomes_a_column_and_what_is_left_out(tmp_path, made, columns):
    more = {
        "obs/state": columns["state"].astype(np.float32),
        "obs/deep/done": np.arange(ROWS) % 2 == 0,
        "step_idx": np.arange(ROWS),
        "text": np.array(["a"] * ROWS),
        "wrist": columns["pixels"],
        "depth": np.zeros((ROWS, 4, 4), np.float32),
        "short": np.zeros(3),
    }
    with opened(write_hdf5(tmp_path / "d.h5", {**columns, **more})) as source:
        assert source.columns == {"state": 3, "obs/state": 3, "obs/deep/done": 1, "step_idx": 1}
        assert source.left_out == {
            "text": "object is no number",
            "wrist": "another camera",
            "depth": "rows of shape (4, 4) are no vector of 1 to 4096 numbers",
            "short": f"it has 3 rows, pixels {ROWS}",
        }
        np.testing.assert_array_equal(source.column("step_idx", 2)[:, 0], np.arange(9, 21))
        np.testing.assert_array_equal(source.column("obs/deep/done", 1), [[0], [1]])
        assert source.column("obs/state", 0).dtype == np.float64


def test_episodes_of_one_frame_are_left_out(tmp_path, made, columns):
    columns["ep_len"] = np.array([7, 1, 13, 5], np.int32)
    columns["ep_offset"] = np.array([0, 7, 8, 21])
    columns["action"] = np.where(np.isnan(columns["action"]), 0.5, columns["action"])
    with opened(write_hdf5(tmp_path / "d.h5", columns)) as source:
        assert source.lengths.tolist() == [7, 13, 5]
        assert source.left_out == {"episodes": "1 of 4 have fewer than 2 frames"}
        np.testing.assert_array_equal(source.frames(1), columns["pixels"][8:21])


def test_cameras_and_actions_are_named(tmp_path, made, columns):
    columns = {**columns, "wrist/rgb": 255 - columns["pixels"], "action_abs": 2 * columns["action"].astype(np.float64)}
    path = write_hdf5(tmp_path / "d.h5", columns)
    with opened(path, camera="wrist/rgb", action="action_abs") as source:
        np.testing.assert_array_equal(source.frames(0), 255 - made[0][0])
        np.testing.assert_array_equal(source.actions(0), 2 * made[0][1])
        assert source.left_out == {"pixels": "another camera"}
        assert source.columns == {"action": 2, "state": 3}
    with pytest.raises(ValueError, match=r"has no camera 'front'; it has pixels, wrist/rgb"):
        opened(path, camera="front")
    with pytest.raises(ValueError, match=r"has no column of actions 'joints'; it has action, action_abs, state"):
        opened(path, action="joints")


def test_the_only_camera_needs_no_name(tmp_path, made, columns):
    columns["top"] = columns.pop("pixels")
    path = write_hdf5(tmp_path / "d.h5", columns)
    with opened(path) as source:
        assert_holds(source, made)
    columns["side"] = columns["top"]
    path = write_hdf5(tmp_path / "two.h5", columns)
    with pytest.raises(ValueError, match=r"two.h5 has no camera 'pixels'; it has side, top"):
        opened(path)


def with_nan(columns):
    columns["action"][3] = np.nan


MISTAKES = {
    "pixels as float": (lambda c: c.update(pixels=c["pixels"] / 255), "pixels of .* must be uint8 of shape"),
    "pixels with channels first": (
        lambda c: c.update(pixels=np.moveaxis(c["pixels"], -1, 1)), r"pixels of .* must be uint8 .* got uint8 of \(26,"
    ),
    "no pixels": (lambda c: c.pop("pixels"), "has no camera 'pixels'; it has none"),
    "no action": (lambda c: c.pop("action"), "has no column of actions 'action'; it has state"),
    "no ep_len": (lambda c: c.pop("ep_len"), "has no ep_len, which says where episodes begin"),
    "no ep_offset": (lambda c: c.pop("ep_offset"), "has no ep_offset"),
    "actions as text": (lambda c: c.update(action=np.array(["x"] * ROWS)), "action of .* must be numbers of shape"),
    "fewer actions": (lambda c: c.update(action=c["action"][:-1]), r"must be numbers of shape \(26, A\), .* \(25, 2\)"),
    "lengths as float": (lambda c: c.update(ep_len=c["ep_len"] / 1), "ep_len of .* must be integers"),
    "too long": (lambda c: c.update(ep_len=c["ep_len"] + 1), "which of the 26 rows are whose, without overlap"),
    "overlap": (lambda c: c.update(ep_offset=c["ep_offset"] // 2), "which of the 26 rows are whose, without overlap"),
    "below zero": (lambda c: c.update(ep_len=-c["ep_len"]), "which of the 26 rows are whose, without overlap"),
    "one length more": (lambda c: c.update(ep_len=np.append(c["ep_len"], 2)), "ep_len has 5 episodes, ep_offset 4"),
    "no episodes": (lambda c: c.update(ep_len=c["ep_len"][:0], ep_offset=c["ep_offset"][:0]), "got 0 episodes"),
    "frames alone": (lambda c: c.update(ep_len=c["ep_len"] * 0 + 1), "no episode of at least 2 frames"),
    "NaN within an episode": (with_nan, r"actions of .* episode 0 must be finite, row 3 of 7 is \[nan, nan\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_used_is_said_when_it_is_opened(tmp_path, columns, name):
    change, text = MISTAKES[name]
    change(columns)
    path = write_hdf5(tmp_path / "d.h5", columns)
    with pytest.raises(ValueError, match=text) as error:
        opened(path)
    assert "d.h5" in str(error.value)


def test_a_file_cut_short_anywhere_is_refused(tmp_path, columns):
    content = write_hdf5(tmp_path / "d.h5", columns).read_bytes()
    cuts = [0, 1, 8, 47, 100, 500, *(len(content) * k // 12 for k in range(1, 12)), len(content) - 1]
    for cut in cuts:
        path = tmp_path / f"{cut}.h5"
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=f"{cut}.h5"):
            opened(path)


def test_other_files_are_not_read_through_links(tmp_path, columns):
    other = write_hdf5(tmp_path / "other.h5", columns)
    for name, link in {
        "external": h5py.ExternalLink(str(other), "pixels"),
        "soft": h5py.SoftLink("/pixels"),
    }.items():
        path = write_hdf5(tmp_path / f"{name}.h5", columns)
        with h5py.File(path, "a") as file:
            file["more"] = link
        with pytest.raises(ValueError, match=f"{name}.h5: /more is a link, want data in the file itself"):
            opened(path)
    (tmp_path / "raw").write_bytes(bytes(100))
    with h5py.File(other, "a") as file:
        file.create_dataset("raw", (100,), "u1", external=[(str(tmp_path / "raw"), 0, 100)])
    with pytest.raises(ValueError, match="other.h5: /raw is in another file"):
        opened(other)


def test_groups_without_end_are_refused(tmp_path, columns):
    path = write_hdf5(tmp_path / "d.h5", columns)
    with h5py.File(path, "a") as file:
        file.create_group("round")
        file["round/self"] = file["round"]
    with pytest.raises(ValueError, match="groups within groups"):
        opened(path)


def test_a_header_that_claims_too_much_is_refused(tmp_path, columns):
    columns["action"] = columns["action"][:0]
    path = write_hdf5(tmp_path / "d.h5", columns)
    with h5py.File(path, "a") as file:  # rows that nobody wrote take no space in the file
        file["action"].resize(2**44, axis=0)
        file["pixels"].resize(2**44, axis=0)
    with pytest.raises(MemoryError, match=r"reading actions of .*d.h5 needs .* GiB of memory"):
        opened(path)


def test_a_filter_that_is_not_here_is_named(tmp_path, columns):
    path = write_hdf5(tmp_path / "d.h5", columns)
    with h5py.File(path, "a") as file:
        del file["pixels"]
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((1, 16, 16, 3))
        properties.set_filter(32024, h5py.h5z.FLAG_OPTIONAL, (1,))
        space = h5py.h5s.create_simple((ROWS, 16, 16, 3))
        h5py.h5d.create(file.id, b"pixels", h5py.h5t.STD_U8LE, space, properties)
    with pytest.raises(
        ModuleNotFoundError, match=r"/pixels of .*d.h5 is compressed by filter 32024 .*install hdf5plugin"
    ):
        opened(path)


def test_gzip_and_lzf_are_read(tmp_path, made, columns):
    path = write_hdf5(tmp_path / "d.h5", columns)
    with h5py.File(path, "a") as file:
        for name, compression in (("pixels", "gzip"), ("action", "lzf")):
            rows = file[name][:]
            del file[name]
            file.create_dataset(name, data=rows, chunks=(1, *rows.shape[1:]), compression=compression)
    with opened(path) as source:
        assert_holds(source, made)


def test_without_h5py_the_error_says_what_to_install(tmp_path, columns, monkeypatch):
    path = write_hdf5(tmp_path / "d.h5", columns)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match=r'reading HDF5 needs h5py: pip install "lewm-fast\[data\]"'):
        opened(path)


@pytest.fixture
def data(tmp_path, made):
    metadata = '{"action_low": [-1, -2], "action_high": [1, 2], "fps": 10}'
    with StoreWriter(
        tmp_path / "d.lewm", height=16, width=16, action_dim=2, columns={"state": 3}, metadata=metadata
    ) as writer:
        for episode in made:
            writer.append(*episode)
    return Dataset(tmp_path / "d.lewm")


def test_what_is_written_has_the_official_layout(tmp_path, made, columns, data):
    path, seen = tmp_path / "out.h5", []
    hdf5.write(data, path, lambda done, total: seen.append((done, total)))
    assert seen == [(7, 26), (9, 26), (21, 26), (26, 26)]
    with h5py.File(path, "r", swmr=True) as file:  # as HDF5Dataset opens it
        assert set(file) == {"pixels", "action", "state", "ep_len", "ep_offset"}
        for name, rows in columns.items():
            np.testing.assert_array_equal(file[name][:], rows)
            assert file[name].dtype == rows.dtype
            assert file[name].maxshape[0] is None
            if not name.startswith("ep_"):
                assert file[name].chunks == (1, *rows.shape[1:])
    with opened(path) as source:
        assert_holds(source, made)
        assert source.metadata == {"action_low": [-1, -2], "action_high": [1, 2], "fps": 10}
    assert sorted(os.listdir(tmp_path)) == ["d.lewm", "out.h5"]


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path, data):
    def stop(done, total):
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hdf5.write(data, tmp_path / "out.h5", stop)
    assert os.listdir(tmp_path) == ["d.lewm"]


def test_a_column_with_a_name_of_the_layout_is_refused(tmp_path):
    with StoreWriter(
        tmp_path / "d.lewm", height=8, width=8, action_dim=1, columns={"ep_len": 1}, metadata="{}"
    ) as writer:
        writer.append(np.zeros((2, 8, 8, 3), np.uint8), np.zeros((1, 1)), {"ep_len": np.zeros((2, 1))})
    with pytest.raises(ValueError, match="must not be called ep_len"):
        hdf5.write(Dataset(tmp_path / "d.lewm"), tmp_path / "out.h5")
