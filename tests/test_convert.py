"""`lewm.convert`, `Dataset.open`, `Dataset.from_arrays`: whole or not at all, and the same after an interruption."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

h5py = pytest.importorskip("h5py")

import lewm
from lewm import Dataset, StoreError, cli, conversion
from lewm._core import StoreWriter
from lewm.conversion import Conversion, convert
from lewm.formats import hdf5
from lewm.pixels import resize_area
from recorded import assert_holds, columns_of, episodes, psnr, write_hdf5

BOUNDS = {"low": -1, "high": [1, 2]}
LENGTHS = (7, 2, 12, 5, 9, 3)


@pytest.fixture
def made():
    return episodes(LENGTHS)


@pytest.fixture
def src(tmp_path, made):
    return write_hdf5(tmp_path / "d.h5", columns_of(made))


@pytest.fixture
def fingerprint(tmp_path_factory, made):
    """Of a store that holds the episodes."""
    path = tmp_path_factory.mktemp("wanted") / "d.lewm"
    with StoreWriter(path, height=16, width=16, action_dim=2, columns={"state": 3}, metadata="{}") as writer:
        for episode in made:
            writer.append(*episode)
    return Dataset(path).fingerprint()


def names(folder):
    return sorted(os.listdir(folder))


# ---------------------------------------------------------------------------------------------------------- round trips


def test_hdf5_becomes_a_store_and_hdf5_again(tmp_path, made, src, fingerprint):
    seen = []
    report = convert(src, tmp_path / "d.lewm", **BOUNDS, progress=lambda *step: seen.append(step))
    data = Dataset(tmp_path / "d.lewm")
    assert_holds(data, made)
    assert data.fingerprint() == fingerprint
    assert (data.metadata["action_low"], data.metadata["action_high"]) == ([-1, -1], [1, 2])
    assert seen[:6] == [(k, 6, "episodes checked") for k in range(1, 7)]
    assert [step for step in seen if step[2] == "frames converted"][-1] == (38, 38, "frames converted")
    assert seen[-1][2] == "bytes verified"
    assert (report.path, report.kind, report.episodes, report.frames) == (tmp_path / "d.lewm", "store", 6, 38)
    assert report.lossless
    assert report.psnr is None
    assert report.written == sum(file.stat().st_size for file in (tmp_path / "d.lewm").iterdir())
    assert report.ratio == pytest.approx(38 * 16 * 16 * 3 / report.written)
    assert "6 episodes, 38 frames" in str(report)
    assert "lossless; every byte verified" in str(report)

    report = convert(tmp_path / "d.lewm", tmp_path / "again.h5")
    assert report.lossless
    with h5py.File(tmp_path / "again.h5") as file:
        for name, rows in columns_of(made).items():
            np.testing.assert_array_equal(file[name][:], rows)
    convert(tmp_path / "again.h5", tmp_path / "again.lewm")  # the bounds have come along
    again = Dataset(tmp_path / "again.lewm")
    assert again.fingerprint() == fingerprint
    assert again.metadata["action_high"] == [1, 2]
    assert names(tmp_path) == ["again.h5", "again.lewm", "d.h5", "d.lewm"]


def test_hdf5_becomes_hdf5_of_some_episodes(tmp_path, made, src):
    convert(src, tmp_path / "some.h5", episodes=[4, 1])
    with h5py.File(tmp_path / "some.h5") as file:
        np.testing.assert_array_equal(file["pixels"][:], np.concatenate([made[4][0], made[1][0]]))
        assert file["ep_len"][:].tolist() == [9, 2]
    assert names(tmp_path) == ["d.h5", "some.h5"]


def test_a_store_becomes_a_lerobot_folder_and_a_store_again(tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    made = episodes((7, 12), size=64)
    src = write_hdf5(tmp_path / "d.h5", columns_of(made))
    with pytest.raises(
        ValueError, match="d.h5 does not say how many frames a second it has, which LeRobot needs: fps="
    ):
        convert(src, tmp_path / "folder")
    report = convert(src, tmp_path / "folder", fps=10)
    assert (report.kind, report.lossless) == ("lerobot", False)
    least, mean = report.psnr
    print(report)
    assert 30 <= least <= mean  # a saturated square, whose colour is kept at half the resolution
    convert(tmp_path / "folder", tmp_path / "d.lewm", low=-1, high=1)
    data = Dataset(tmp_path / "d.lewm")
    assert not data.metadata["source"]["lossless"]
    assert data.metadata["fps"] == 10
    for episode, (frames, actions, columns) in enumerate(made):
        np.testing.assert_array_equal(data.actions(episode), actions)
        np.testing.assert_array_equal(data.column("observation.state", episode), columns["state"].astype(np.float32))
        assert psnr(data.frames(episode), frames) >= least - 0.01
    assert names(tmp_path) == ["d.h5", "d.lewm", "folder"]


@pytest.mark.filterwarnings("ignore")  # minari misses a name of the algorithm, of the author and so on
def test_minari_and_videos_become_stores(tmp_path, monkeypatch):
    minari, video = pytest.importorskip("minari"), pytest.importorskip("lewm.formats.video")
    pytest.importorskip("av")
    from gymnasium import spaces

    made = episodes((7, 12), size=64)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    buffers = [
        minari.data_collector.EpisodeBuffer(
            observations={"pixels": frames, **columns}, actions=actions, rewards=[0.0] * len(actions),
            terminations=[False] * len(actions), truncations=[False] * len(actions),
        )
        for frames, actions, columns in made
    ]  # fmt: skip
    observation = {"pixels": spaces.Box(0, 255, (64, 64, 3), np.uint8), "state": spaces.Box(-9, 9, (3,), np.float64)}
    described = {"observation_space": spaces.Dict(observation), "action_space": spaces.Box(-1, 1, (2,), np.float32)}
    minari.create_dataset_from_buffers("d-v0", buffers, **described, jpeg_encoding=False, data_format="hdf5")
    report = convert(tmp_path / "d-v0", tmp_path / "minari.lewm")
    assert report.lossless
    assert_holds(Dataset(tmp_path / "minari.lewm"), made)
    assert Dataset(tmp_path / "minari.lewm").metadata["action_low"] == [-1, -1]

    (tmp_path / "takes").mkdir()
    for name, (frames, actions, _) in zip("ab", made, strict=True):
        video.write(tmp_path / f"takes/{name}.mp4", frames, 10)
        np.save(tmp_path / f"takes/{name}.npy", actions)
    report = convert(tmp_path / "takes", tmp_path / "takes.lewm", low=-1, high=1)
    assert not report.lossless
    data = Dataset(tmp_path / "takes.lewm")
    for episode, (_, actions, _) in enumerate(made):
        np.testing.assert_array_equal(data.frames(episode), video.frames(tmp_path / f"takes/{'ab'[episode]}.mp4"))
        np.testing.assert_array_equal(data.actions(episode), actions)


def test_provenance_is_in_the_metadata(tmp_path, src):
    convert(src, tmp_path / "d.lewm", **BOUNDS, fps=5)
    metadata = Dataset(tmp_path / "d.lewm").metadata
    source = metadata.pop("source")
    assert metadata == {
        "action_low": [-1, -1],
        "action_high": [1, 2],
        "fps": 5,
        "pixels": {"size": 16},
        "created_by": f"lewm-fast {lewm.__version__}",
    }
    digest = source.pop("digest")
    assert len(digest) == 64
    assert source == {
        "name": "d.h5",
        "files": 1,
        "bytes": src.stat().st_size,
        "format": "hdf5",
        "options": {"low": -1, "high": [1, 2], "fps": 5},
        "lossless": True,
        "left_out": {},
        "versions": {"lewm-fast": lewm.__version__, "h5py": h5py.__version__},
    }
    # What a store is made from stays with what is made from the store.
    convert(tmp_path / "d.lewm", tmp_path / "small.lewm", size=8)
    small = Dataset(tmp_path / "small.lewm").metadata
    assert small["source"]["source"] == {**source, "digest": digest}
    assert small["source"]["resized_from"] == [16, 16]
    assert not small["source"]["lossless"]
    assert (small["action_high"], small["fps"], small["pixels"]) == ([1, 2], 5, {"size": 8})


# -------------------------------------------------------------------------------------------------------------- options


def test_frames_are_averaged_by_area(tmp_path, made, src):
    report = convert(src, tmp_path / "d.lewm", **BOUNDS, size=6)
    assert not report.lossless
    data = Dataset(tmp_path / "d.lewm")
    for episode, (frames, actions, _) in enumerate(made):
        np.testing.assert_array_equal(data.frames(episode), resize_area(frames, 6))
        np.testing.assert_array_equal(data.actions(episode), actions)
    wide = columns_of(made)
    wide["pixels"] = np.concatenate([wide["pixels"]] * 2, axis=2)
    with pytest.raises(ValueError, match=r"frames of .*wide.h5 must be square .* got 16x32"):
        convert(write_hdf5(tmp_path / "wide.h5", wide), tmp_path / "wide.lewm", **BOUNDS, size=8)
    convert(tmp_path / "wide.h5", tmp_path / "wide.lewm", **BOUNDS)
    assert (Dataset(tmp_path / "wide.lewm").height, Dataset(tmp_path / "wide.lewm").width) == (16, 32)


def test_bounds_are_never_guessed(tmp_path, made, src):
    dst = tmp_path / "d.lewm"
    text = (
        r"d.h5 does not tell the bounds of its 2 actions, .*: give low= and high= \(--low and --high\) in raw units, "
        r"or bounds='data' \(--bounds data\)"
    )
    with pytest.raises(ValueError, match=text):
        convert(src, dst)
    for options, text in (
        ({"low": -1}, "low and high must be given both"),
        ({"low": -1, "high": 1, "bounds": "data"}, "low and high must be given both, and without bounds"),
        ({"low": [-1, -1, -1], "high": 1}, r"low must be a number or 2 of them, got \[-1, -1, -1\]"),
        ({"low": -1, "high": "x"}, "high must be a number or 2 of them, got 'x'"),
        ({"low": -1, "high": np.inf}, "low must be below high in each action"),
        ({"low": [-1, 1], "high": 1}, "low must be below high in each action"),
        ({"bounds": "guess"}, "bounds must be 'data' or not given, got 'guess'"),
    ):
        with pytest.raises(ValueError, match=text):
            convert(src, dst, **options)
    assert names(tmp_path) == ["d.h5"]
    convert(src, dst, bounds="data")
    actions = np.concatenate([actions for _, actions, _ in made])
    np.testing.assert_array_equal(Dataset(dst).metadata["action_low"], actions.min(axis=0))
    np.testing.assert_array_equal(Dataset(dst).metadata["action_high"], actions.max(axis=0))


def test_actions_outside_the_bounds_are_noted(tmp_path, made, src):
    most = np.abs(made[2][1]).max()
    report = convert(src, tmp_path / "d.lewm", low=-most, high=most)
    outside = sum(np.abs(actions).max() > most for _, actions, _ in made)
    assert outside
    assert report.notes == (f"{outside} of 6 episodes have actions outside the bounds",)
    assert f"note: {outside} of 6 episodes" in str(report)


def test_columns_that_are_not_finite_are_left_out_and_named(tmp_path, made):
    columns = columns_of(made)
    columns["reward"] = np.zeros(38)
    columns["reward"][[12, 30]] = np.nan
    report = convert(write_hdf5(tmp_path / "d.h5", columns), tmp_path / "d.lewm", **BOUNDS)
    assert report.left_out == {"reward": "not finite, in episode 2 at row 3"}
    assert "left out: reward: not finite, in episode 2 at row 3" in str(report)
    data = Dataset(tmp_path / "d.lewm")
    assert data.columns == {"state": 3}
    assert data.metadata["source"]["left_out"] == report.left_out


@pytest.mark.parametrize(
    ("dst", "options", "error", "text"),
    [
        ("x.zip", {}, ValueError, r"dst must end in .lewm .* got 'x.zip'"),
        ("none/x.lewm", {}, FileNotFoundError, "no such folder: .*none"),
        ("d.h5", {}, FileExistsError, "d.h5 is there already; it is not replaced"),
        ("folder/x.lewm", {"src": "folder"}, ValueError, "dst must not be within the source: .*folder/x.lewm"),
        ("x.lewm", {"size": 0}, ValueError, "size must be an integer of at least 1"),
        ("x.lewm", {"size": 8.5}, TypeError, "size must be an integer"),
        ("x.lewm", {"episodes": 7}, ValueError, "episodes must be an integer of at least 1 and below 7, got 7"),
        ("x.lewm", {"episodes": [0, 6]}, ValueError, "episodes must be an integer of at least 0 and below 6, got 6"),
        ("x.lewm", {"episodes": []}, ValueError, "episodes must be at least 1, got none"),
        ("x.lewm", {"fps": 0}, ValueError, "fps must be above 0 and finite, got 0"),
        ("x.lewm", {"format": "zip"}, ValueError, "format must be one of hdf5, lance"),
        ("x.lewm", {"camera": "front"}, ValueError, "has no camera 'front'"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, src, dst, options, error, text):
    (tmp_path / "folder").mkdir()
    given = {**BOUNDS, **options}
    with pytest.raises(error, match=text):
        convert(tmp_path / given.pop("src", src), tmp_path / dst, **given)
    assert names(tmp_path) == ["d.h5", "folder"]
    assert not names(tmp_path / "folder")


def test_sources_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nothing.h5"):
        convert(tmp_path / "nothing.h5", tmp_path / "x.lewm")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="text is none of the formats that are read: hdf5, "):
        convert(tmp_path / "text", tmp_path / "x.lewm")
    assert names(tmp_path) == ["text"]


def test_a_destination_that_is_there_is_not_touched(tmp_path, src):
    (tmp_path / "file.lewm").write_text("mine")
    (tmp_path / "folder.lewm").mkdir()
    (tmp_path / "link.lewm").symlink_to(tmp_path / "nowhere")
    for name in ("file.lewm", "folder.lewm", "link.lewm"):
        with pytest.raises(FileExistsError, match=f"{name} is there already"):
            convert(src, tmp_path / name, **BOUNDS)
    assert (tmp_path / "file.lewm").read_text() == "mine"
    assert names(tmp_path) == ["d.h5", "file.lewm", "folder.lewm", "link.lewm"]


def test_a_destination_that_comes_meanwhile_is_not_touched(tmp_path, src, fingerprint):
    def come(done, total, what):
        (tmp_path / "d.lewm").write_text("mine") if what == "bytes verified" else None

    with pytest.raises(FileExistsError, match="d.lewm is there already"):
        convert(src, tmp_path / "d.lewm", **BOUNDS, progress=come)
    assert (tmp_path / "d.lewm").read_text() == "mine"
    (tmp_path / "d.lewm").unlink()
    convert(src, tmp_path / "d.lewm", **BOUNDS)
    assert Dataset(tmp_path / "d.lewm").fingerprint() == fingerprint


# ------------------------------------------------------------------------------------------------------------- estimate


def test_the_estimate_is_measured_and_leaves_nothing(tmp_path, src):
    with Conversion(src, tmp_path / "d.lewm", **BOUNDS) as conversion:
        estimate = conversion.estimate()
    assert names(tmp_path) == ["d.h5"]
    assert (estimate.episodes, estimate.frames, estimate.done) == (6, 38, 0)
    assert estimate.read == src.stat().st_size
    assert 0 < estimate.seconds < 60
    report = convert(src, tmp_path / "d.lewm", **BOUNDS)
    assert 0.5 < estimate.written / report.written < 2
    text = str(estimate)
    assert "(hdf5): 6 episodes, 38 frames" in text
    assert "free are needed" in text
    with Conversion(tmp_path / "d.lewm", tmp_path / "out.h5") as conversion:
        estimate = conversion.estimate()
    assert estimate.needed == estimate.written  # a store is exported as it is
    assert estimate.written >= 38 * 16 * 16 * 3
    with Conversion(src, tmp_path / "out.h5") as conversion:
        estimate = conversion.estimate()
    assert estimate.needed > estimate.written  # a store is made on the way


def test_what_does_not_fit_is_refused_before_it_is_begun(tmp_path, src, monkeypatch):
    real = conversion.shutil.disk_usage
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    with pytest.raises(OSError, match=r"needs about .* MB, and 0.001 MB are free on the disk of") as error:
        convert(src, tmp_path / "d.lewm", **BOUNDS)
    assert error.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["d.h5"]


def test_an_episode_that_does_not_fit_into_memory_is_refused(tmp_path, src, monkeypatch):
    monkeypatch.setattr("lewm.memory.available", lambda: 12 * 16 * 16 * 3)
    with pytest.raises(MemoryError, match=r"an episode of 12 frames of .*d.h5 needs .* leave it out: episodes="):
        convert(src, tmp_path / "d.lewm", **BOUNDS)
    assert names(tmp_path) == ["d.h5"]


# ------------------------------------------------------------------------------------------------- damage, interruption


def damaged_chunk(path, made, row):
    """A file whose frame `row` cannot be unpacked; all else can."""
    columns = columns_of(made)
    write_hdf5(path, columns)
    with h5py.File(path, "a") as file:
        del file["pixels"]
        data = file.create_dataset("pixels", data=columns["pixels"], chunks=(1, 16, 16, 3), compression="gzip")
        place = data.id.get_chunk_info(row).byte_offset
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"no gzip")
    return path


def test_damage_halfway_leaves_nothing(tmp_path, made, monkeypatch):
    path = damaged_chunk(tmp_path / "d.h5", made, 22)  # of episode 3: not of the sample
    monkeypatch.setattr(conversion, "_SAMPLE", (2, 4))
    seen = []
    with pytest.raises(ValueError, match="frames of episode 3 of .*d.h5 cannot be read, the file is damaged"):
        convert(path, tmp_path / "d.lewm", **BOUNDS, progress=lambda *step: seen.append(step))
    assert (21, 38, "frames converted") in seen
    assert names(tmp_path) == ["d.h5"]
    convert(path, tmp_path / "d.lewm", **BOUNDS, episodes=[0, 1, 2, 4, 5])
    assert_holds(Dataset(tmp_path / "d.lewm"), made[:3] + made[4:])


def interrupt_after(frames, with_what=KeyboardInterrupt):
    def progress(done, total, what):
        if what == "frames converted" and done >= frames:
            raise with_what

    return progress


def test_an_interrupted_conversion_goes_on(tmp_path, src, fingerprint):
    with pytest.raises(KeyboardInterrupt):
        convert(src, tmp_path / "d.lewm", **BOUNDS, progress=interrupt_after(20))
    assert names(tmp_path) == [".d.lewm.converting", "d.h5"]
    with Conversion(src, tmp_path / "d.lewm", **BOUNDS) as again:
        estimate = again.estimate()
        assert estimate.done == 3
        assert "3 of them written already" in str(estimate)
    seen = []
    convert(src, tmp_path / "d.lewm", **BOUNDS, progress=lambda *step: seen.append(step))
    assert [done for done, _, what in seen if what == "frames converted"] == [26, 35, 38]
    assert Dataset(tmp_path / "d.lewm").fingerprint() == fingerprint
    assert names(tmp_path) == ["d.h5", "d.lewm"]


def test_an_episode_that_was_written_and_not_committed_is_kept_or_made_again(tmp_path, made, src, fingerprint):
    """Between its bytes and its record in the index, or within either, is where a kill finds an append."""
    for cut in ({"index": 64}, {"index": 10}, {"index": 64, "data": 50}):
        with pytest.raises(KeyboardInterrupt):
            convert(src, tmp_path / "d.lewm", **BOUNDS, progress=interrupt_after(20))
        store = tmp_path / ".d.lewm.converting/store.lewm"
        for suffix, count in cut.items():
            (shard,) = store.glob(f"*.{suffix}")
            os.truncate(shard, shard.stat().st_size - count)
        convert(src, tmp_path / "d.lewm", **BOUNDS)
        data = Dataset(tmp_path / "d.lewm")
        assert_holds(data, made)
        assert data.fingerprint() == fingerprint
        assert "damaged" not in names(data.path)
        conversion.shutil.rmtree(data.path)


def test_a_full_disk_loses_nothing(tmp_path, src, fingerprint):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        convert(src, tmp_path / "d.lewm", **BOUNDS, progress=interrupt_after(20, full))
    assert not (tmp_path / "d.lewm").exists()
    convert(src, tmp_path / "d.lewm", **BOUNDS)
    assert Dataset(tmp_path / "d.lewm").fingerprint() == fingerprint


@pytest.mark.skipif(os.name == "nt", reason="has no SIGKILL")
@pytest.mark.parametrize("dst", ["d.lewm", "out.h5"])
def test_killed_and_called_again_it_makes_the_same(tmp_path, src, fingerprint, dst):
    code = f"""
        import os, signal, sys
        import lewm

        def progress(done, total, what):
            if sys.argv[1] in what and done >= int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)

        lewm.convert({str(src)!r}, {str(tmp_path / dst)!r}, low=-1, high=[1, 2], progress=progress)
    """
    for step in (("converted", "9"), ("converted", "30"), ("exported" if dst == "out.h5" else "verified", "20")):
        killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *step], capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert names(tmp_path) == [f".{dst}.converting", "d.h5"]
    seen = []
    convert(src, tmp_path / dst, **BOUNDS, progress=lambda *step: seen.append(step))
    assert not [done for done, _, what in seen if what == "frames converted"]  # all of it was done by then
    if dst == "out.h5":
        convert(tmp_path / dst, tmp_path / "d.lewm")
        (tmp_path / dst).unlink()
    assert Dataset(tmp_path / "d.lewm").fingerprint() == fingerprint
    assert names(tmp_path) == ["d.h5", "d.lewm"]


def test_a_source_that_has_changed_is_not_mixed_with_what_it_was(tmp_path, made, src):
    with pytest.raises(KeyboardInterrupt):
        convert(src, tmp_path / "d.lewm", **BOUNDS, progress=interrupt_after(20))
    other = episodes(LENGTHS, seed=1)
    write_hdf5(src, columns_of(other))
    with pytest.raises(ValueError, match=r"converting holds part of another .* the source has changed; restart=True"):
        convert(src, tmp_path / "d.lewm", **BOUNDS)
    with pytest.raises(ValueError, match="the source has changed and the options differ"):
        convert(src, tmp_path / "d.lewm", low=-2, high=2)
    assert names(tmp_path) == [".d.lewm.converting", "d.h5"]
    convert(src, tmp_path / "d.lewm", **BOUNDS, restart=True)
    assert_holds(Dataset(tmp_path / "d.lewm"), other)
    assert names(tmp_path) == ["d.h5", "d.lewm"]


def test_a_source_that_changes_meanwhile_is_refused(tmp_path, src):
    def touch(done, total, what):
        os.utime(src, ns=(1, done))

    with pytest.raises(ValueError, match="d.h5 has changed while it was converted"):
        convert(src, tmp_path / "d.lewm", **BOUNDS, progress=touch)
    assert names(tmp_path) == ["d.h5"]


def test_what_an_earlier_moment_left_is_used_or_thrown_away(tmp_path, src, fingerprint):
    work = tmp_path / ".d.lewm.converting"
    for leave in (
        lambda: (work / "record.json").write_text("{"),
        lambda: (work / "record.json").write_text("null"),
        lambda: (work / "store.lewm").mkdir(),
        lambda: (work / "export").write_text("half"),
    ):
        work.mkdir()
        leave()
        convert(src, tmp_path / "d.lewm", **BOUNDS)
        assert Dataset(tmp_path / "d.lewm").fingerprint() == fingerprint
        assert names(tmp_path) == ["d.h5", "d.lewm"]
        conversion.shutil.rmtree(tmp_path / "d.lewm")


def test_two_at_once_are_not_mixed(tmp_path, src, fingerprint):
    errors = []

    def another(done, total, what):
        if what == "frames converted" and not errors:
            with pytest.raises(OSError, match=r"another process is converting in .*\.d\.lewm\.converting") as error:
                convert(src, tmp_path / "d.lewm", **BOUNDS)
            errors.append(error)

    convert(src, tmp_path / "d.lewm", **BOUNDS, progress=another)
    assert errors
    assert Dataset(tmp_path / "d.lewm").fingerprint() == fingerprint


def test_what_the_disk_gives_back_is_compared(tmp_path, src, monkeypatch):
    def spoil(done, total, what):
        if (done, what) == (38, "frames converted"):
            (shard,) = (tmp_path / ".d.lewm.converting/store.lewm").glob("*.data")
            content = bytearray(shard.read_bytes())
            content[-200] ^= 1
            shard.write_bytes(content)

    with pytest.raises(StoreError, match="does not hold what was written: .*episode 5 is damaged"):
        convert(src, tmp_path / "d.lewm", **BOUNDS, progress=spoil)
    assert names(tmp_path) == ["d.h5"]

    real = hdf5.write

    def spoilt(data, path, progress=None):
        real(data, path, progress)
        if path.name == "export":
            with h5py.File(path, "a") as file:
                file["pixels"][30, 0, 0, 0] ^= 1

    monkeypatch.setattr(hdf5, "write", spoilt)
    with pytest.raises(StoreError, match="episode 4 of .*export does not hold what was written"):
        convert(src, tmp_path / "out.h5")
    assert names(tmp_path) == ["d.h5"]


# ----------------------------------------------------------------------------------------------------- Dataset.open


def test_open_converts_once(tmp_path, made, src, monkeypatch):
    data = Dataset.open(src, **BOUNDS)
    assert data.path == tmp_path / "d.lewm"
    assert_holds(data, made)
    monkeypatch.setattr(conversion, "convert", None)
    assert Dataset.open(src, **BOUNDS).fingerprint() == data.fingerprint()
    assert Dataset.open(src, low=-1.0, high=np.array([1, 2])).fingerprint() == data.fingerprint()
    assert Dataset.open(data.path).fingerprint() == data.fingerprint()
    with pytest.raises(ValueError, match=r"d.lewm was made with other options: 'd.h5', options \{'low': -1, 'high'"):
        Dataset.open(src, **BOUNDS, size=8)
    with pytest.raises(ValueError, match="is a store, which is opened as it is; got size"):
        Dataset.open(data.path, size=8)
    os.utime(src, ns=(1, 1))
    with pytest.raises(ValueError, match="d.lewm was made from another source, or that has changed since"):
        Dataset.open(src, **BOUNDS)
    src.unlink()
    with pytest.raises(FileNotFoundError, match=r"d.h5; .*d.lewm is there, lewm.Dataset opens it alone"):
        Dataset.open(src, **BOUNDS)


def test_open_converts_to_where_it_is_told(tmp_path, made, src):
    data = Dataset.open(src, tmp_path / "other.lewm", bounds="data", episodes=2)
    assert_holds(data, made[:2])
    assert names(tmp_path) == ["d.h5", "other.lewm"]
    with pytest.raises(ValueError, match="does not tell the bounds"):
        Dataset.open(src)


# --------------------------------------------------------------------------------------------------------------- arrays


@pytest.fixture
def arrays(made):
    columns = columns_of(made)
    return columns["pixels"], columns["action"], np.cumsum(LENGTHS), columns["state"]


def test_arrays_become_a_store(tmp_path, made, arrays, fingerprint):
    frames, actions, ends, state = arrays
    data = Dataset.from_arrays(
        frames, actions, ends, tmp_path / "d.lewm", **BOUNDS, columns={"state": state, "t": np.arange(38)}, fps=20
    )
    assert_holds(data, made)
    np.testing.assert_array_equal(data.column("t", 1)[:, 0], [7, 8])
    assert (data.metadata["action_low"], data.metadata["fps"]) == ([-1, -1], 20)
    assert data.metadata["source"]["format"] == "arrays"
    np.save(tmp_path / "frames.npy", frames)
    mapped = np.load(tmp_path / "frames.npy", mmap_mode="r")
    data = Dataset.from_arrays(
        mapped, actions.tolist(), ends.tolist(), tmp_path / "m.lewm", **BOUNDS, columns={"state": state}
    )
    assert data.fingerprint() == fingerprint
    assert names(tmp_path) == ["d.lewm", "frames.npy", "m.lewm"]
    with pytest.raises(FileExistsError, match="d.lewm is there already"):
        Dataset.from_arrays(frames, actions, ends, tmp_path / "d.lewm", **BOUNDS)


def nan_at(rows, place):
    rows = rows.copy()
    rows[place] = np.nan
    return rows


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f, a, e: (f / 255, a, e), "frames must be uint8 .* float pixels"),
        (lambda f, a, e: (np.moveaxis(f, -1, 1), a, e), "channels first"),
        (lambda f, a, e: (f[0], a, e), r"frames must be of shape \(N, H, W, 3\)"),
        (lambda f, a, e: (f, a[1:], e), r"actions must be numbers of shape \(N, A\), a row for each of the 38 frames"),
        (lambda f, a, e: (f, a.astype(str), e), "actions must be numbers"),
        (lambda f, a, e: (f, nan_at(a, 8), e), None),  # the last row of episode 1
        (lambda f, a, e: (f, nan_at(a, 10), e), "actions of episode 2 must be finite, row 1 of 12"),
        (lambda f, a, e: (f, a, e[:-1]), r"episode_ends must be integers \(E,\), the last of them 38"),
        (lambda f, a, e: (f, a, e / 1), "episode_ends must be integers"),
        (lambda f, a, e: (f, a, e[::-1]), "episode_ends must be integers"),
        (lambda f, a, e: (f, a, [7, 7, 38]), "episodes must have at least 2 frames, episode 1 has 0"),
        (lambda f, a, e: (f, a, [7, 3, 38]), "episodes must have at least 2 frames, episode 1 has -4"),
        (lambda f, a, e: (f, a, []), "episode_ends must be integers"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, arrays, change, text):
    frames, actions, ends, _ = arrays
    given = change(frames, actions, ends)
    if text is None:
        Dataset.from_arrays(*given, tmp_path / "d.lewm", **BOUNDS)
        return
    with pytest.raises(ValueError, match=text):
        Dataset.from_arrays(*given, tmp_path / "d.lewm", **BOUNDS)
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (np.zeros(37), r"columns\['x'\] must be numbers of shape \(38,\) or \(38, C\): it has 37 rows"),
        (np.array(["a"] * 38), "columns.* <U1 is no number"),
        (np.zeros((38, 2, 2)), r"rows of shape \(2, 2\) are no vector"),
        (nan_at(np.zeros(38), 20), r"columns\['x'\] must be finite, that of episode 2 is not"),
    ],
)
def test_columns_that_do_not_fit(tmp_path, arrays, column, text):
    with pytest.raises(ValueError, match=text):
        Dataset.from_arrays(*arrays[:3], tmp_path / "d.lewm", **BOUNDS, columns={"x": column})
    assert not names(tmp_path)


def test_arrays_are_written_in_one_go(tmp_path, arrays):
    for stop in (KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises((KeyboardInterrupt, OSError)):
            Dataset.from_arrays(*arrays[:3], tmp_path / "d.lewm", **BOUNDS, progress=interrupt_after(20, stop))
        assert not names(tmp_path)
    # What another process has there is not touched.
    (tmp_path / ".d.lewm.converting").mkdir()
    (tmp_path / "d.lewm").touch()
    with pytest.raises(FileExistsError):
        Dataset.from_arrays(*arrays[:3], tmp_path / "d.lewm", **BOUNDS)
    assert names(tmp_path) == [".d.lewm.converting", "d.lewm"]
    with pytest.raises(ValueError, match="path must end in .lewm, got"):
        Dataset.from_arrays(*arrays[:3], tmp_path / "d.h5", **BOUNDS)


# ----------------------------------------------------------------------------------------------------- the command line


def run(*arguments):
    code = "from lewm.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_the_command_prints_what_it_will_do_and_what_it_did(tmp_path, src):
    def invoke(*arguments):
        result = CliRunner().invoke(cli.app, ["convert", str(src), str(tmp_path / "d.lewm"), *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    text = invoke("--low", "-1,-1", "--high", "1", "--dry-run")
    assert f"{src} (hdf5): 6 episodes, 38 frames" in text
    assert names(tmp_path) == ["d.h5"]
    text = invoke("--low", "-1,-1", "--high", "1", "--size", "8", "--episodes", "4")
    assert text.index("free are needed") < text.index("every byte verified")
    data = Dataset(tmp_path / "d.lewm")
    assert (len(data), data.height, data.metadata["action_low"]) == (4, 8, [-1, -1])


def test_mistakes_are_one_line(tmp_path, src):
    for arguments, text in (
        ((), f"error: {src} does not tell the bounds of its 2 actions"),
        (("--low", "a,b", "--high", "1"), "error: low must be numbers with commas between them, as -1,-1, got 'a,b'"),
    ):
        done = run("convert", src, tmp_path / "x.lewm", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert text in done.stderr
    assert names(tmp_path) == ["d.h5"]


def test_ctrl_c_says_how_to_go_on(tmp_path, src, monkeypatch, capsys):
    monkeypatch.setattr("lewm.conversion.Conversion.run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(typer.Exit) as stop:
        cli.convert(src, tmp_path / "d.lewm", bounds="data")
    assert stop.value.exit_code == 130
    assert "the same command goes on after the last episode" in capsys.readouterr().err


def test_statistics_of_a_store_or_of_json(tmp_path, src):
    torch = pytest.importorskip("torch")
    from lewm.config import configure
    from lewm.model_file import tensor_shapes

    data = Dataset.open(src, **BOUNDS)
    config, _ = configure("tiny", 2, {"encoder_heads": 1, "predictor_heads": 2, "predictor_head_dim": 64})
    rng = np.random.default_rng(0)
    weights = {name: rng.uniform(0.1, 0.3, shape) for name, shape in tensor_shapes(config).items()}
    state = {name: torch.from_numpy(np.asarray(value, "f4")) for name, value in weights.items()}
    torch.save({**state, **{name: torch.tensor(1) for name in state if "num_batches" in name}}, tmp_path / "weights.pt")
    stats = {name: value.tolist() for name, value in data.action_statistics().items()}
    (tmp_path / "stats.json").write_text(json.dumps(stats))
    for given in (data.path, tmp_path / "stats.json"):
        found = cli._loaded(tmp_path / "weights.pt", given).stats
        for name, value in stats.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6)  # float32 or float64
    done = run("describe", tmp_path / "weights.pt", "--stats", tmp_path / "stats.json")
    assert done.returncode == 0, done.stderr
    assert "raw bounds" in done.stdout
    for text in ("{", "[1]"):
        (tmp_path / "stats.json").write_text(text)
        with pytest.raises(ValueError, match="stats must be .*stats.json"):
            cli._loaded(tmp_path / "weights.pt", tmp_path / "stats.json")
