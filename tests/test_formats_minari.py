"""Minari data sets, written by minari, read as sources."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

h5py = pytest.importorskip("h5py")
minari = pytest.importorskip("minari")

from minari.data_collector import EpisodeBuffer

from lewm.formats import opened
from recorded import assert_holds, episodes, psnr

LENGTHS = (6, 2, 9)
BOX = spaces.Box(-1, 1, (2,), np.float32)
STATE = spaces.Box(-np.inf, np.inf, (3,), np.float64)
pytestmark = pytest.mark.filterwarnings("ignore")  # minari misses a name of the algorithm, of the author and so on


def picture(size):
    return spaces.Box(0, 255, (size, size, 3), np.uint8)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a data set; gives its folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def write(observations, observation_space, actions, action_space=BOX, name="d-v0", **settings):
        buffers = [
            EpisodeBuffer(
                observations=observation,
                actions=action,
                rewards=[0.0] * len(action),
                terminations=[False] * len(action),
                truncations=[False] * len(action),
                infos={"t": np.arange(len(action) + 1)},
            )
            for observation, action in zip(observations, actions, strict=True)
        ]
        spaces = {"observation_space": observation_space, "action_space": action_space}
        minari.create_dataset_from_buffers(name, buffers, **spaces, data_format="hdf5", **settings)
        return tmp_path / name

    return write


def test_a_picture_is_the_observation(write):
    made = episodes(LENGTHS, size=16)
    path = write([frames for frames, _, _ in made], picture(16), [actions for _, actions, _ in made])
    for folder in (path, path / "data"):
        with opened(folder) as source:
            assert_holds(source, made, columns=())
            assert (source.format, source.lossless, source.columns) == ("minari", True, {})
            assert source.metadata == {"action_low": [-1, -1], "action_high": [1, 1]}
            assert set(source.left_out) == {"rewards", "terminations", "truncations", "infos"}
            assert source.bytes > 16 * 16 * 3 * sum(LENGTHS)


def test_entries_of_a_dict(write):
    made = episodes(LENGTHS, size=32)
    space = spaces.Dict(
        {
            "camera": spaces.Dict({"front": picture(32), "side": picture(32)}),
            "state": STATE,
            "gear": spaces.Discrete(4),
            "scan": spaces.Box(0, 1, (4, 4)),
            "task": spaces.Text(8),
        }
    )
    observations = [
        {
            "camera": {"front": frames, "side": 255 - frames},
            "state": columns["state"],
            "gear": np.arange(len(frames)) % 4,
            "scan": np.zeros((len(frames), 4, 4), np.float32),
            "task": ["go"] * len(frames),
        }
        for frames, _, columns in made
    ]
    path = write(observations, space, [actions for _, actions, _ in made], jpeg_encoding=False)
    with pytest.raises(ValueError, match=r"needs camera=, .* it has camera/front, camera/side"):
        opened(path)
    with pytest.raises(ValueError, match="has no camera 'top'; .* are camera/front, camera/side"):
        opened(path, camera="top")
    with pytest.raises(ValueError, match="action must not be given for Minari"):
        opened(path, camera="camera/front", action="x")
    with opened(path, camera="camera/front") as source:
        assert_holds(source, made)
        assert source.lossless
        assert source.columns == {"state": 3, "gear": 1}
        np.testing.assert_array_equal(source.column("gear", 2)[:, 0], np.arange(9) % 4)
        left_out = {name: source.left_out[name] for name in ("camera/side", "scan", "task")}
        assert left_out == {
            "camera/side": "another camera",
            "scan": "rows of shape (4, 4) are no vector of 1 to 4096 numbers",
            "task": "Text is no number",
        }
    with opened(path, camera="camera/side") as source:
        np.testing.assert_array_equal(source.frames(1), 255 - made[1][0])


def test_jpeg_is_not_lossless_and_close(write):
    made = episodes(LENGTHS, size=32)
    path = write([frames for frames, _, _ in made], picture(32), [actions for _, actions, _ in made])
    with opened(path) as source:
        assert not source.lossless
        found = [psnr(source.frames(i), frames) for i, (frames, _, _) in enumerate(made)]
    print(f"PSNR of Minari's JPEG: {min(found):.1f} dB")
    assert min(found) > 20  # a red square on grey at quality 75, colours at half the resolution: 24 dB


def test_pictures_are_read_whatever_the_release_made_of_them(write):
    made = episodes(LENGTHS, size=32)
    path = write([frames for frames, _, _ in made], picture(32), [a for _, a, _ in made], jpeg_encoding=False)
    described(path, jpeg_encoding=None)  # as before 0.5.4: plain pictures that it takes for JPEG
    with opened(path) as source:
        assert source.lossless
        assert_holds(source, made, columns=())
    still = [np.full((3, 32, 32, 3), 90, np.uint8)]  # JPEG of one length are a table
    path = write(still, picture(32), [np.zeros((2, 2), np.float32)], name="still-v0")
    with opened(path) as source:
        assert psnr(source.frames(0), still[0] + 1) > 40


def test_damaged_jpeg_is_named(write):
    from PIL import Image

    made = episodes(LENGTHS, size=32)
    path = write([frames for frames, _, _ in made], picture(32), [a for _, a, _ in made])
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        other = io.BytesIO()
        Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(other, "PNG")
        for episode, row in enumerate((b"", b"no JPEG", other.getvalue())):
            file[f"episode_{episode}/observations"][1] = np.frombuffer(row, np.uint8)
    with opened(path) as source:
        for episode in range(3):
            with pytest.raises(ValueError, match=f"frame 1 of .*d-v0 episode {episode} must be JPEG of RGB"):
                source.frames(episode)


def test_unbounded_actions_have_no_bounds(write):
    made = episodes(LENGTHS, size=16)
    space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    path = write([frames for frames, _, _ in made], picture(16), [actions for _, actions, _ in made], space)
    with opened(path) as source:
        assert source.metadata == {}


def test_discrete_actions_are_refused(write):
    path = write([np.zeros((3, 16, 16, 3), np.uint8)], picture(16), [np.array([0, 1])], spaces.Discrete(2))
    with pytest.raises(ValueError, match=r"d-v0 must be continuous, Box of \(A,\), got Discrete\(2\)"):
        opened(path)


def test_data_without_pictures_are_refused(write):
    path = write([np.zeros((3, 3))], STATE, [np.zeros((2, 2), np.float32)])
    with pytest.raises(ValueError, match=r"needs camera=, the observation of uint8 \(H, W, 3\).* it has none"):
        opened(path)


@pytest.fixture
def path(write):
    made = episodes(LENGTHS, size=16)
    observations = [{"pixels": frames, **columns} for frames, _, columns in made]
    space = spaces.Dict({"pixels": picture(16), "state": STATE})
    return write(observations, space, [actions for _, actions, _ in made])


def described(path, **changes):
    file = path / "data/metadata.json"
    text = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in {**text, **changes}.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"action_space": None}, "lacks action_space; environments that it names are not made"),
        ({"data_format": "arrow"}, "is in Minari's storage 'arrow', want 'hdf5'"),
        ({"action_space": '{"type": "Bax"}'}, "metadata.json is damaged: KeyError|metadata.json is damaged: TypeError"),
        ({"observation_space": "{"}, "metadata.json is damaged: JSONDecodeError"),
        ({"total_episodes": 4}, "episode 3 is damaged: it has no actions"),
        ({"total_episodes": 0}, "has no episodes"),
    ],
)
def test_descriptions_that_do_not_fit(path, changes, text):
    described(path, **changes)
    with pytest.raises(ValueError, match=text):
        opened(path)


def test_an_environment_that_is_named_is_not_made(path, tmp_path, monkeypatch):
    """minari makes it where a space is missing, and what its specification names is imported and called."""
    (tmp_path / "trap.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('sprung').touch()\nEnv = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    spec = {"id": "trap-v0", "entry_point": "trap:Env", "kwargs": {}, "additional_wrappers": []}
    described(path, env_spec=json.dumps(spec))
    with opened(path) as source:
        assert len(source) == 3
    described(path, observation_space=None)
    with pytest.raises(ValueError, match="lacks observation_space"):
        opened(path)
    assert not (tmp_path / "sprung").exists()
    assert "trap" not in sys.modules


def test_damage_is_named(path):
    main = path / "data/main_data.hdf5"
    content = main.read_bytes()
    for cut in (100, len(content) // 2, len(content) - 1):
        main.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"main_data.hdf5 is no HDF5 file, or a damaged one"):
            opened(path)
    main.write_bytes(content)
    with h5py.File(main, "a") as file:
        del file["episode_1/actions"]
        file["episode_1/actions"] = np.zeros((1, 3), np.float32)
        del file["episode_2/observations/state"]
        frames = file["episode_0/observations/pixels"][:-1]
        del file["episode_0/observations/pixels"]
        file["episode_0/observations/pixels"] = frames
    with opened(path) as source:
        with pytest.raises(ValueError, match=r"actions of .* episode 1 must be of shape \(1, 2\), got \(1, 3\)"):
            source.actions(1)
        with pytest.raises(ValueError, match="episode 2 is damaged: it has no observations/state"):
            source.column("state", 2)
        with pytest.raises(ValueError, match=r"frames of .* episode 0 must be of shape \(16, 16, 3\) each, got \(5, "):
            source.frames(0)


def test_other_folders_are_none(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/metadata.json").write_text("{}")
    with pytest.raises(ValueError, match="is none of the formats that are read"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="is no Minari data set"):
        opened(Path(tmp_path), "minari")
