"""LeRobot's data sets, read as lerobot 0.3.3 (v2.1) and 0.4.4 (v3.0) wrote them (`fixtures/make.py`), and written."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import lewm
from lewm.formats import opened

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("av")
pytest.importorskip("PIL")

from fixtures import rule
from lewm.formats import lerobot

FIXTURES = Path(__file__).parent / "fixtures"
TOP, WRIST = "observation.images.top", "observation.images.wrist"
NAMES = ("lerobot_v21_video", "lerobot_v21_image", "lerobot_v30_video", "lerobot_v30_image")


@pytest.fixture
def copy(tmp_path):
    def copied(name):
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return copied


@pytest.fixture
def store(tmp_path):
    """What the fixtures hold, as a store."""
    return made(tmp_path / "toy.lewm", {"state": 3, "reward": 1})


def made(path, columns, metadata=None):
    metadata = {"fps": rule.FPS} if metadata is None else metadata
    size = {"height": rule.HEIGHT, "width": rule.WIDTH, "action_dim": 2}
    with lewm.StoreWriter(path, **size, columns=columns, metadata=json.dumps(metadata)) as writer:
        for episode in range(3):
            rows = {"state": rule.states(episode), "reward": rule.rewards(episode)[:, None]}
            values = {name: rows[name.split("/")[-1]].astype(np.float64) for name in columns}
            writer.append(rule.frames(episode), rule.actions(episode)[:-1], values)
    return lewm.Dataset(path)


def changed(path, **changes):
    """`meta/info.json` with changes."""
    file = path / "meta/info.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps({**info, **changes}))
    return info


def rewritten(file, change):
    """A parquet file, after a change of its table."""
    pq.write_table(change(pq.read_table(file)), file)


def read(path, **options):
    """All frames."""
    with opened(path, **options) as source:
        return [source.frames(k) for k in range(len(source))]


def without(table, name):
    return table.drop_columns([name])


def replaced(table, name, values):
    return table.set_column(table.column_names.index(name), name, values)


# Least PSNR of an episode, measured (2026-11, AV1 at crf 30 in yuv420p): 31.9 dB for v2.1, 32.5 and 31.8 for v3.0.
@pytest.mark.parametrize(
    ("name", "camera", "least"),
    [
        ("lerobot_v21_video", TOP, 31),
        ("lerobot_v21_image", TOP, math.inf),
        ("lerobot_v30_video", TOP, 31),
        ("lerobot_v30_video", WRIST, 31),
        ("lerobot_v30_image", TOP, math.inf),
    ],
)
def test_reads_what_lerobot_wrote(name, camera, least):
    with opened(FIXTURES / name, camera=camera) as source:
        assert source.format == f"lerobot {'v2.1' if 'v21' in name else 'v3.0'}"
        assert source.lengths.tolist() == list(rule.LENGTHS)
        assert source.lengths.dtype == np.int64
        assert (source.height, source.width, source.action_dim) == (rule.HEIGHT, rule.WIDTH, 2)
        assert source.columns == {"observation.state": 3, "next.reward": 1, "next.done": 1}
        assert source.left_out.pop("note") == "string is no number"
        other = {TOP, WRIST} - {camera} if name == "lerobot_v30_video" else ()
        assert source.left_out == dict.fromkeys(other, "another camera")
        assert source.metadata == {"fps": 10.0}  # least and greatest recorded actions are no bounds
        assert source.lossless == (least == math.inf)
        assert 10_000 < source.bytes < 50_000
        for episode in (2, 0, 1):
            frames, wanted = source.frames(episode), rule.frames(episode, int(camera == WRIST))
            assert rule.psnr(frames, wanted) >= least
            assert rule.nearest(frames, wanted) == list(range(len(wanted)))
            actions = source.actions(episode)
            assert actions.dtype == np.float32
            assert np.array_equal(actions, rule.actions(episode)[:-1])
            state = source.column("observation.state", episode)
            assert state.dtype == np.float64
            assert np.array_equal(state, rule.states(episode))
            assert np.array_equal(source.column("next.reward", episode), rule.rewards(episode)[:, None])
            assert np.array_equal(source.column("next.done", episode)[:, 0], np.arange(len(state)) == len(state) - 1)


def test_one_of_several_cameras_must_be_chosen():
    with pytest.raises(ValueError, match=f"camera must be given; it has {TOP}, {WRIST}"):
        opened(FIXTURES / "lerobot_v30_video")
    with pytest.raises(ValueError, match=f"no camera 'front'; it has {TOP}"):
        opened(FIXTURES / "lerobot_v30_image", camera="front")


def test_other_actions():
    with opened(FIXTURES / "lerobot_v30_image", action="observation.state") as source:
        assert source.action_dim == 3
        assert source.columns == {"action": 2, "next.reward": 1, "next.done": 1}
        assert np.array_equal(source.actions(1), rule.states(1)[:-1])
    with pytest.raises(ValueError, match="no feature of actions 'torque'; it has observation.state, action"):
        opened(FIXTURES / "lerobot_v30_image", action="torque")
    with pytest.raises(ValueError, match="'note' that can be read: string is no number"):
        opened(FIXTURES / "lerobot_v30_image", action="note")


def test_files_may_be_links_to_elsewhere(copy, tmp_path):
    path = copy("lerobot_v21_video")  # so does the cache of huggingface_hub
    (tmp_path / "blobs").mkdir()
    for k, file in enumerate(sorted(file for file in path.rglob("*") if file.is_file())):
        file.rename(tmp_path / f"blobs/{k}")
        file.symlink_to(tmp_path / f"blobs/{k}")
    with opened(path) as source:
        assert rule.nearest(source.frames(2), rule.frames(2)) == list(range(7))


def test_depth_is_no_camera(copy):
    path = copy("lerobot_v30_video")
    features = changed(path)["features"]
    features[WRIST]["info"]["video.is_depth_map"] = True
    changed(path, features=features)
    with opened(path) as source:
        assert source.left_out[WRIST] == "depth"
        assert np.array_equal(source.frames(0).shape, (5, 48, 64, 3))


def test_one_row_group_of_all_episodes(copy):
    path = copy("lerobot_v30_image")  # as lerobot's own tools leave it, when they merge data sets
    rewritten(path / "data/chunk-000/file-000.parquet", lambda table: table.combine_chunks())
    with opened(path) as source:
        for episode in (1, 0, 2, 1):
            assert np.array_equal(source.frames(episode), rule.frames(episode))
            assert np.array_equal(source.actions(episode), rule.actions(episode)[:-1])


def test_episodes_of_one_frame_are_left_out(copy):
    path = copy("lerobot_v21_image")
    lines = (path / "meta/episodes.jsonl").read_text().splitlines()
    lines[1] = lines[1].replace('"length": 9', '"length": 1')
    (path / "meta/episodes.jsonl").write_text("\n".join(lines))
    rewritten(path / "data/chunk-000/episode_000001.parquet", lambda table: table.slice(0, 1))
    with opened(path) as source:
        assert source.lengths.tolist() == [5, 7]
        assert source.left_out["episodes"] == "1 of 3 have fewer than 2 frames"
        assert np.array_equal(source.frames(1), rule.frames(2))
        (path / "data/chunk-000/episode_000002.parquet").unlink()
        source.close()
        with pytest.raises(ValueError, match="episode_000002.parquet is missing"):
            source.actions(1)


def test_versions(copy, tmp_path):
    path = copy("lerobot_v21_image")
    changed(path, codebase_version="v2.0")  # differs in statistics only
    with opened(path) as source:
        assert source.format == "lerobot v2.0"
    changed(path, codebase_version="v1.6")
    with pytest.raises(ValueError, match=r"info.json: codebase_version must be one of v2.0, v2.1, v3.0, got 'v1.6'"):
        opened(path)
    old = tmp_path / "old"
    (old / "meta_data").mkdir(parents=True)
    (old / "meta_data/info.json").write_text('{"codebase_version": "v1.6", "fps": 10}')
    with pytest.raises(ValueError, match="old is of a version before v2.0"):
        opened(old)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fps": 0}, "fps must be a number above 0, got 0"),
        ({"fps": 10**400}, "fps must be a number above 0, got 1000"),
        ({"fps": "10"}, "fps must be a number above 0, got '10'"),
        ({"fps": math.nan}, "fps must be"),
        ({"features": []}, "features must give each feature a dtype and a shape"),
        ({"features": {"action": {"dtype": "float32", "shape": "2"}}}, "features must give"),
        ({"features": {"action": {"dtype": "float32", "shape": [2]}}}, "no camera None; it has none"),
        ({"data_path": None}, "info.json has no data_path"),
        ({"data_path": 3}, "data_path must be text"),
        ({"data_path": "../{chunk_index}.parquet"}, "data_path must stay in the folder, got '../0.parquet'"),
        ({"data_path": "data\\..\\..\\x"}, "must stay in the folder"),
        ({"data_path": "/etc/passwd"}, "must stay in the folder"),
        ({"data_path": "C:/x"}, "must stay in the folder"),
        ({"data_path": "data/\0"}, "must stay in the folder"),
        ({"data_path": "data/{file_index.__class__}"}, "may name chunk_index, file_index in braces"),
        ({"data_path": "data/{file_index!r}"}, "may name chunk_index, file_index in braces"),
        ({"data_path": "data/{episode_index:06d}"}, "may name chunk_index, file_index, got"),
        ({"data_path": "d" * 300}, "must stay in the folder"),
        ({"data_path": "data/none.parquet"}, "none.parquet is missing"),
        ({"video_path": "../../{video_key}.mp4"}, "video_path must stay in the folder"),
        ({"total_episodes": 4}, "says 4 episodes, the list of episodes has 3"),
    ],
)
def test_info_is_not_trusted(copy, changes, text):
    path = copy("lerobot_v30_video")
    changed(path, **changes)
    with pytest.raises(ValueError, match=text.replace("\\", "\\\\").replace(".", r"\.")) as error:
        opened(path, camera=TOP if "features" not in changes else None)
    assert str(path) in str(error.value)


def test_names_of_features_are_not_trusted(copy):
    path = copy("lerobot_v21_video")
    features = changed(path)["features"]
    features["../../../secret"] = features.pop(TOP)
    changed(path, features=features)
    with pytest.raises(ValueError, match="video_path must stay in the folder, got 'videos/chunk-000/../../../secret"):
        opened(path)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": ' + "[" * 100_000])
def test_info_that_is_no_json(copy, text):
    path = copy("lerobot_v30_image")
    (path / "meta/info.json").write_text(text)
    with pytest.raises(ValueError, match=r"info.json (is no JSON|must be a JSON object)"):
        opened(path)


def test_lists_of_episodes(copy):
    path = copy("lerobot_v21_image")
    listed = path / "meta/episodes.jsonl"
    for line, text in (
        ("{", "episodes.jsonl line 4 is no JSON"),
        ('{"episode_index": -1, "length": 3}', "episodes.jsonl line 4: episode_index and length must be integers"),
        ('{"episode_index": 2, "length": 7}', "must list each episode once"),
    ):
        kept = listed.read_text()
        changed(path, total_episodes=4)
        listed.write_text(kept + line)
        with pytest.raises(ValueError, match=text):
            opened(path)
        listed.write_text(kept)
    listed.unlink()
    with pytest.raises(ValueError, match="episodes.jsonl is missing"):
        opened(path)

    path = copy("lerobot_v30_video")
    listed = path / "meta/episodes/chunk-000/file-000.parquet"
    kept, start = listed.read_bytes(), f"videos/{TOP}/from_timestamp"
    for change, text in (
        (lambda t: replaced(t, "length", pa.array([5, None, 7])), "episode 1: episode_index and length must be"),
        (lambda t: replaced(t, start, pa.array([0.0, math.nan, 1.4])), "episode 1: from_timestamp must be seconds"),
        (lambda t: without(t, start), f"no column '{start}'"),
    ):
        rewritten(listed, change)
        with pytest.raises(ValueError, match=f"file-000.parquet.*{text}"):
            opened(path, camera=TOP)
        listed.write_bytes(kept)
    listed.unlink()
    with pytest.raises(ValueError, match="meta/episodes is missing, or empty"):
        opened(path, camera=TOP)


@pytest.mark.parametrize("name", ["lerobot_v21_video", "lerobot_v30_video"])
def test_missing_videos(copy, name):
    path = copy(name)
    file = sorted(path.rglob("*.mp4"))[-1]
    episode = 2 if "v21" in name else 0
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(ValueError, match=f"{name} episode {episode} has no video: .*{file.name} is missing"):
        opened(path, camera=TOP if "v21" in name else WRIST)
    file.write_bytes(content[: len(content) // 2])  # moov comes first, the frames are cut off
    with pytest.raises(ValueError, match=f"{file.name}.*(damaged|cut short|no frame)"):
        read(path, camera=TOP if "v21" in name else WRIST)
    file.write_bytes(b"no video")
    with pytest.raises(ValueError, match=f"{file.name} is no video"):
        opened(path, camera=TOP if "v21" in name else WRIST)


def test_a_video_with_fewer_frames_than_rows(copy):
    path = copy("lerobot_v21_video")
    videos = path / "videos/chunk-000" / TOP
    shutil.copy(videos / "episode_000000.mp4", videos / "episode_000001.mp4")
    with pytest.raises(
        ValueError, match=r"episode_000001.mp4 ends after 5 frames.* episode 1 wants a frame at 0.800 s"
    ):
        opened(path)
    path = copy("lerobot_v30_video")
    start = f"videos/{TOP}/from_timestamp"
    late = pa.array([0.0, 0.5, 1.9])
    rewritten(path / "meta/episodes/chunk-000/file-000.parquet", lambda table: replaced(table, start, late))
    with pytest.raises(ValueError, match=r"file-000.mp4 ends after 21 frames.* episode 2 wants a frame at 2.500 s"):
        opened(path, camera=TOP)


def test_damaged_and_missing_numbers(copy):
    path = copy("lerobot_v21_image")
    file = path / "data/chunk-000/episode_000001.parquet"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="episode_000001.parquet is no parquet file, or a damaged one"):
        opened(path)
    file.unlink()
    with pytest.raises(ValueError, match="episode_000001.parquet is missing"):
        opened(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: without(t, "action"), "file-000.parquet has no column 'action'; it has"),
        (lambda t: without(t, "observation.state"), "file-000.parquet has no column 'observation.state'"),
        (lambda t: without(t, TOP), "file-000.parquet has no column"),
        (lambda t: t.slice(0, 20), "file-000.parquet has 6 rows of episode 2, the list of episodes says 7"),
        (lambda t: t.take(np.r_[0:4, 5, 4, 6:21]), "must have the rows of an episode together"),
        (
            lambda t: replaced(t, "episode_index", pa.array([0.0] * 21)),
            "episode_index of .* must be integers, got float64",
        ),
        (lambda t: t.take(np.r_[1, 0, 2:21]), "must have the frames of episode 0 in order"),
        (
            lambda t: replaced(t, "action", pa.array(["a"] * 21)),
            "action of .*v30_image episode 0 must be numbers, got string",
        ),
        (lambda t: replaced(t, "action", pa.array([[0.0] * 3] * 21)), "must be 2 wide, as info.json says, got 3"),
        (lambda t: replaced(t, "action", pa.array([[0.0]] * 3 + [[0.0, 1.0]] * 18)), "equally many numbers"),
        (lambda t: replaced(t, "action", pa.array([None, *[[0.0, 1.0]] * 20])), "a value in each row, 1 are missing"),
        (lambda t: replaced(t, "action", pa.array([[0.0, math.inf]] * 21)), "episode 0 must be finite, row 0 of 5"),
    ],
)
def test_numbers_that_cannot_be(copy, change, text):
    path = copy("lerobot_v30_image")
    rewritten(path / "data/chunk-000/file-000.parquet", change)
    with pytest.raises(ValueError, match=text), opened(path) as source:
        source.actions(0)


def test_irregular_times_do_not_fit_a_video(copy):
    path = copy("lerobot_v30_video")
    times = pa.array(np.r_[[0.0, 0.1, 0.3, 0.4, 0.5], np.zeros(16)].astype(np.float32))
    rewritten(path / "data/chunk-000/file-000.parquet", lambda table: replaced(table, "timestamp", times))
    with pytest.raises(ValueError, match="timestamps of episode 0 are not those of 10 frames a second"):
        opened(path, camera=TOP)


def test_damaged_pictures(copy):
    path = copy("lerobot_v30_image")
    file, kept = path / "data/chunk-000/file-000.parquet", pq.read_table(FIXTURES / "lerobot_v30_image/data/chunk-000")
    blobs = [row["bytes"] for row in kept.column(TOP).to_pylist()]
    small = lerobot.png(np.zeros((8, 8, 3), np.uint8))
    for blob, text in (
        (None, "frame 1 of .* episode 1 is missing"),
        (b"GIF89a", "frame 1 of .* episode 1 is no picture in PNG or JPEG"),
        (blobs[6][:-100], "frame 1 of .* episode 1 is damaged"),
        (small, "frame 1 of .* episode 1 must be 48x64 in RGB or grey, got 8x8"),
    ):
        rows = [{"bytes": b, "path": None} for b in (*blobs[:6], blob, *blobs[7:])]
        pq.write_table(replaced(kept, TOP, pa.array(rows)), file)
        with opened(path) as source:
            assert np.array_equal(source.frames(0), rule.frames(0))
            with pytest.raises(ValueError, match=text):
                source.frames(1)


@pytest.mark.parametrize("video", [True, False])
def test_what_is_written_is_laid_out_as_lerobot_does(store, tmp_path, video):
    path, real = tmp_path / "made", FIXTURES / f"lerobot_v30_{'video' if video else 'image'}"
    lerobot.write(store, path, camera=TOP, task="move", video=video)
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    wanted = {file.relative_to(real).as_posix() for file in real.rglob("*") if file.is_file()}
    if video:  # each episode has its own
        wanted = {name for name in wanted if WRIST not in name} | {
            f"videos/{TOP}/chunk-000/file-00{k}.mp4" for k in (1, 2)
        }
    assert files == wanted

    info, of_real = (json.loads((folder / "meta/info.json").read_text()) for folder in (path, real))
    features, real_features = info.pop("features"), of_real.pop("features")
    assert info == {**of_real, "robot_type": None}
    assert features.keys() - {"reward"} == real_features.keys() - {WRIST, "note", "next.reward", "next.done"}
    encoding = {"video.codec": "h264"} if video else {}
    for name in features.keys() - {"reward", TOP}:
        assert features[name] == {**real_features[name], "names": None}
    if video:
        real_features[TOP]["info"] |= encoding
    assert features[TOP] == real_features[TOP]

    dropped = {"note", "next.done", "next.reward"}
    schema, real_schema = (pq.read_schema(folder / "data/chunk-000/file-000.parquet") for folder in (path, real))
    assert {(field.name, field.type) for field in real_schema if field.name not in dropped} == {
        (field.name, field.type) for field in schema if field.name != "reward"
    }
    described, real_described = (
        json.loads(each.metadata[b"huggingface"])["info"]["features"] for each in (schema, real_schema)
    )
    described["next.reward"] = described.pop("reward")
    assert described == {name: real_described[name] for name in described}

    file = "meta/episodes/chunk-000/file-000.parquet"
    schema, real_schema = (pq.read_schema(folder / file) for folder in (path, real))
    ours = {field.name.replace("/reward/", "/next.reward/"): field.type for field in schema}
    theirs = {field.name: field.type for field in real_schema if WRIST not in field.name and "done" not in field.name}
    assert ours == theirs
    made, real_made = (pq.read_table(folder / file).to_pydict() for folder in (path, real))
    for name in ("episode_index", "length", "tasks", "dataset_from_index", "dataset_to_index", "data/file_index"):
        assert made[name] == real_made[name]
    tasks, real_tasks = (pq.read_table(folder / "meta/tasks.parquet") for folder in (path, real))
    assert tasks == real_tasks
    index = [json.loads(each.schema.metadata[b"pandas"])["index_columns"] for each in (tasks, real_tasks)]
    assert index[0] == index[1]


@pytest.mark.parametrize("video", [True, False])
def test_statistics_are_those_of_lerobot(store, tmp_path, video):
    path, real = tmp_path / "made", FIXTURES / f"lerobot_v30_{'video' if video else 'image'}"
    lerobot.write(store, path, camera=TOP, task="move", video=video)
    ours, theirs = (json.loads((folder / "meta/stats.json").read_text()) for folder in (path, real))
    for name in ours.keys() - {"reward", "action"}:  # actions differ in the last row
        assert ours[name].keys() == theirs[name].keys()
        for key in ("min", "max", "mean", "std", "count"):
            if name == TOP and key == "std":  # lerobot 0.4.4 squares pictures in uint8, which is wrong
                continue
            # lerobot adds up in float32
            np.testing.assert_allclose(
                ours[name][key], theirs[name][key], rtol=1e-5, atol=1e-6, err_msg=f"{name} {key}"
            )
            assert np.shape(ours[name][key]) == np.shape(theirs[name][key])
    rows = np.concatenate([np.r_[store.actions(k), store.actions(k)[-1:]] for k in range(3)])
    np.testing.assert_allclose(ours["action"]["mean"], rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(ours["action"]["std"], rows.std(axis=0), rtol=1e-6)
    pixels = np.concatenate([store.frames(k) for k in range(3)]) / 255
    np.testing.assert_allclose(np.ravel(ours[TOP]["std"]), pixels.std(axis=(0, 1, 2)), rtol=1e-6)


# Least PSNR of an episode, measured (2026-11, x264 at crf 18): 31.9 dB in yuv420p, 43.7 in yuv444p. The square is of
# bright colours, of which yuv420p has a quarter of the pixels.
@pytest.mark.parametrize(("video", "least"), [(True, 31), (False, math.inf)])
def test_round_trip(store, tmp_path, video, least):
    calls = []
    lerobot.write(store, tmp_path / "made", video=video, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(5, 21), (14, 21), (21, 21)]
    with opened(tmp_path / "made") as source:
        assert source.metadata == {"fps": 10.0}
        assert source.lossless == (not video)
        assert source.columns == {"observation.state": 3, "reward": 1}
        for k in range(3):
            assert rule.psnr(source.frames(k), store.frames(k)) >= least
            assert rule.nearest(source.frames(k), store.frames(k)) == list(range(len(store.frames(k))))
            assert np.array_equal(source.actions(k), store.actions(k))
            assert np.array_equal(source.column("observation.state", k), store.column("state", k))
            assert np.array_equal(source.column("reward", k), store.column("reward", k))
    rows = pq.read_table(tmp_path / "made/data").to_pydict()
    assert np.array_equal(rows["action"][3:5], [rule.actions(0)[3]] * 2)  # LeRobot has an action in the last row too
    assert np.array_equal(rows["index"], np.arange(21))
    assert rows["frame_index"][5:14] == list(range(9))


def test_odd_sides_and_odd_rates(tmp_path):
    frames = rule.frames(1)[:, :47, :63]
    size = {"height": 47, "width": 63, "action_dim": 1}
    with lewm.StoreWriter(tmp_path / "odd.lewm", **size, columns={}, metadata='{"fps": 5}') as writer:
        writer.append(frames, np.zeros((8, 1), np.float32), {})
    lerobot.write(lewm.Dataset(tmp_path / "odd.lewm"), tmp_path / "made", fps=29.97)
    with opened(tmp_path / "made") as source:
        assert source.metadata == {"fps": 29.97}
        assert rule.psnr(source.frames(0), frames) > 40


def test_files_are_divided(store, tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot, "_DATA_MB", 0.001)
    monkeypatch.setattr(lerobot, "_FILES_PER_CHUNK", 2)
    lerobot.write(store, tmp_path / "made")
    files = sorted(file.relative_to(tmp_path / "made").as_posix() for file in (tmp_path / "made").rglob("file-*"))
    assert [name for name in files if name.startswith("data")] == [
        "data/chunk-000/file-000.parquet", "data/chunk-000/file-001.parquet", "data/chunk-001/file-000.parquet"
    ]  # fmt: skip
    assert [name[-26:] for name in files if name.startswith("videos")][-1] == ".camera/chunk-001/file-000.mp4"[-26:]
    with opened(tmp_path / "made") as source:
        assert np.array_equal(source.actions(2), store.actions(2))
        assert rule.nearest(source.frames(2), store.frames(2)) == list(range(len(store.frames(2))))


def test_names_of_columns(tmp_path):
    data = made(tmp_path / "a.lewm", {"state": 3, "own/reward": 1})
    lerobot.write(data, tmp_path / "a", columns=["own/reward"])
    with opened(tmp_path / "a") as source:
        assert source.columns == {"own.reward": 1}
    with pytest.raises(ValueError, match="columns must be of .*state, got 'speed'"):
        lerobot.write(data, tmp_path / "b", columns=["speed"])
    with pytest.raises(ValueError, match="clash with each other or with LeRobot's own: action"):
        lerobot.write(data, tmp_path / "b", camera="action")
    with pytest.raises(ValueError, match="camera must be of letters"):
        lerobot.write(data, tmp_path / "b", camera="../x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.lewm"]


def test_nothing_is_half_written(store, tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    with pytest.raises(FileExistsError, match="there exists"):
        lerobot.write(store, there)
    unknown = made(tmp_path / "unknown.lewm", {}, {})
    with pytest.raises(ValueError, match="unknown.lewm does not say it; got None"):
        lerobot.write(unknown, tmp_path / "made")
    with pytest.raises(ValueError, match="fps must be a number above 0"):
        lerobot.write(store, tmp_path / "made", fps=-1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lerobot, "_merged", full)
    with pytest.raises(OSError, match="No space left"):
        lerobot.write(store, tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "toy.lewm", "unknown.lewm"]
