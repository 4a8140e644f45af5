"""Episodes, and files of other formats that hold them, written by the libraries whose formats they are."""

import h5py
import numpy as np

LENGTHS = (7, 2, 12, 5)


def episodes(lengths=LENGTHS, size=16, seed=0):
    """[(frames, actions, columns)]: pictures in which a square moves, actions in [-1, 1], a state of three numbers."""
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        frames = np.empty((length, size, size, 3), np.uint8)
        frames[...] = np.linspace(40, 200, size, dtype=np.uint8)[:, None, None]
        frames[..., 2] = rng.integers(50, 200)
        for t in range(length):
            frames[t, 2 : size // 2, t % (size // 2) : t % (size // 2) + size // 4] = (250, 30, 90)
        actions = rng.uniform(-1, 1, (length - 1, 2)).astype(np.float32)
        made.append((frames, actions, {"state": rng.normal(size=(length, 3))}))
    return made


def columns_of(made):
    """Rows of all episodes, one after the other, the action of an episode's last row NaN: dict of arrays."""
    last = np.full((1, 2), np.nan, np.float32)
    return {
        "pixels": np.concatenate([frames for frames, _, _ in made]),
        "action": np.concatenate([rows for _, actions, _ in made for rows in (actions, last)]),
        "state": np.concatenate([columns["state"] for _, _, columns in made]),
        "ep_len": np.array([len(frames) for frames, _, _ in made], np.int32),
        "ep_offset": np.cumsum([0, *(len(frames) for frames, _, _ in made)])[:-1].astype(np.int64),
    }


def write_hdf5(path, data):
    """The layout of stable-worldmodel's writer: a growing data set a column, a chunk a row."""
    with h5py.File(path, "w", libver="latest") as file:
        for name, rows in data.items():
            if name in ("ep_len", "ep_offset"):
                file.create_dataset(name, data=rows, maxshape=(None,))
                continue
            rows = np.asarray(rows)
            kind = h5py.string_dtype() if rows.dtype.kind == "U" else rows.dtype
            rows = rows.astype(object) if rows.dtype.kind == "U" else rows
            shape = rows.shape[1:]
            file.create_dataset(name, data=rows, dtype=kind, maxshape=(None, *shape), chunks=(1, *shape))
    return path


def assert_holds(data, made, columns=("state",)):
    """`data`, a `Source` or a `lewm.Dataset`, has these episodes, bit for bit."""
    assert data.lengths.tolist() == [len(frames) for frames, _, _ in made]
    for episode, (frames, actions, rows) in enumerate(made):
        np.testing.assert_array_equal(data.frames(episode), frames)
        np.testing.assert_array_equal(data.actions(episode), actions)
        assert data.actions(episode).dtype == np.float32
        for name in columns:
            np.testing.assert_array_equal(data.column(name, episode), rows[name])


def psnr(a, b):
    """Of one array of pictures against another, in dB."""
    return 10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2))
