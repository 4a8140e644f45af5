"""Random training windows out of the trajectory store, against the two layouts that stable-worldmodel reads.

HDF5: one chunk a frame, uncompressed, a chunk cache of 256 MiB, the whole span of 20 frames read and one in five kept.
Lance: JPEG of quality 95 in a binary column, the rows of a batch in one take. Kinder than its reader: only the frames
that are kept are read, and they are decoded by OpenCV's libjpeg-turbo on as many threads as ours.
"""

from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from common import THREADS, compare

import lewm
from lewm._core import StoreWriter

BATCH, FRAMES, STRIDE = 128, 4, 5
SPAN = FRAMES * STRIDE


def push_t(rng, count, size=224):
    """Frames like PushT's: a grey T that turns and slides, a blue disc, a green goal T; smooth edges on white."""
    y, x = np.mgrid[:size, :size].astype(np.float32) + 0.5
    unit = size / 512

    def box(x, y, half_width, half_height):  # distance to a box around the origin, negative inside
        return np.maximum(abs(x) - half_width, abs(y) - half_height)

    def tee(place, angle, scale=30 * unit):
        dx, dy = (x - place[0]) / scale, (y - place[1]) / scale
        u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
        return scale * np.minimum(box(u, v, 2, 0.5), box(u, v - 2, 0.5, 1.5))

    def paint(picture, distance, colour):
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        return picture + cover * (np.array(colour, np.float32) - picture)

    frame = abs(box(x - size / 2, y - size / 2, 250 * unit, 250 * unit)) - unit
    ground = paint(np.full((size, size, 3), 255, np.float32), frame, (211, 211, 211))
    ground = paint(ground, tee((size / 2, size / 2), np.pi / 4), (144, 238, 144))
    block, agent, angle = rng.uniform(150, 360, 2), rng.uniform(50, 460, 2), rng.uniform(0, 6.3)
    frames = np.empty((count, size, size, 3), np.uint8)
    for at in range(count):
        if at % 12 == 0:
            target = block + 40 * rng.normal(size=2) if rng.random() < 0.7 else rng.uniform(50, 460, 2)
        agent += np.clip((target - agent) / 4, -14, 14)
        between = block - agent
        distance = np.hypot(*between)
        if distance < 75:  # the disc pushes
            block = np.clip(block + (75 - distance) * between / (distance + 1e-9), 90, 420)
            angle += 0.04 * rng.normal()
        picture = paint(ground, tee(block * unit, angle), (119, 136, 153))
        disc = np.hypot(x - agent[0] * unit, y - agent[1] * unit) - 15 * unit
        frames[at] = np.rint(paint(picture, disc, (65, 105, 225)))
    return frames


def camera(rng, count, size=224):
    """The same scene under uneven light through a sensor with noise: what no lossless code makes small."""
    frames = push_t(rng, count, size)
    light = np.linspace(0.6, 0.9, size, dtype=np.float32)[:, None]
    for frame in frames:
        frame[:] = np.clip(np.rint(frame * light + rng.normal(scale=3, size=frame.shape)), 0, 255)
    return frames


def write(path, episodes):
    size = episodes[0].shape[1]
    with StoreWriter(path, height=size, width=size, action_dim=2, columns={}, metadata="{}") as writer:
        for frames in episodes:
            writer.append(frames, np.zeros((len(frames) - 1, 2)), {})
    return lewm.Dataset(path)


def make(scene, size, path):
    rng = np.random.default_rng(0)
    if scene == "two-room":
        return lewm.collect("lewm/TwoRoom-v0", path, episodes=20, size=size, seed=0)
    return write(path, [{"push-t": push_t, "camera": camera}[scene](rng, 100, size) for _ in range(16)])


def drawer(store):
    """Gives another batch of random windows each time."""
    index = store.windows(range(len(store)), FRAMES, STRIDE)
    index = index[index[:, 1] + SPAN <= store.lengths[index[:, 0]]]  # the reference needs the whole span
    rng = np.random.default_rng(0)
    return lambda: index[rng.integers(0, len(index), BATCH)]


def reader(store, draw):
    """Reads a batch, into the same memory each time, as a loader does."""
    out = memory(store)

    def read(windows=None):
        episodes, starts = (draw() if windows is None else windows).T.copy()
        return store._store.windows(episodes, starts, FRAMES, STRIDE, out)

    return read


def memory(store):
    """A batch's, for whoever reads: how fast the system hands out new memory is not what is measured."""
    return np.zeros((BATCH, FRAMES, store.height, store.width, 3), np.uint8)


def ratio_on_disk(store):
    stored = sum(file.stat().st_size for file in store.path.iterdir())
    return round(store.frame_count * store.height * store.width * 3 / stored, 1)


def shape(scene, size):
    return f"{scene}: {BATCH} windows of {FRAMES} frames, stride {STRIDE}, {size}x{size}"


@pytest.mark.parametrize(("scene", "size"), [("two-room", 64), ("two-room", 224), ("push-t", 224), ("camera", 224)])
def test_against_hdf5(benchmark, tmp_path, scene, size):
    store = make(scene, size, tmp_path / "s.lewm")
    offsets = np.concatenate([[0], np.cumsum(store.lengths)[:-1]])
    with h5py.File(tmp_path / "s.h5", "w") as file:
        pixels = file.create_dataset("pixels", (store.frame_count, size, size, 3), np.uint8, chunks=(1, size, size, 3))
        for episode, offset in zip(store, offsets, strict=True):
            pixels[offset : offset + len(episode)] = episode.frames
    draw, out = drawer(store), memory(store)

    with h5py.File(tmp_path / "s.h5", "r", rdcc_nbytes=256 * 2**20) as file:
        pixels = file["pixels"]

        def reference(windows=None):
            rows = [offsets[e] + s for e, s in (draw() if windows is None else windows)]
            return np.stack([pixels[r : r + SPAN][::STRIDE] for r in rows], out=out)

        ours = reader(store, draw)
        windows = draw()
        np.testing.assert_array_equal(ours(windows), reference(windows))
        compare(
            benchmark,
            ours,
            reference,
            shape=shape(scene, size),
            h5py=h5py.__version__,
            raw_over_stored=ratio_on_disk(store),
        )


@pytest.mark.peer
@pytest.mark.parametrize("scene", ["two-room", "push-t"])
def test_against_lance(benchmark, tmp_path, scene):
    cv2, lance, pa = (pytest.importorskip(name) for name in ("cv2", "lance", "pyarrow"))
    cv2.setNumThreads(1)
    size = 224
    store = make(scene, size, tmp_path / "s.lewm")
    offsets = np.concatenate([[0], np.cumsum(store.lengths)[:-1]])

    def rows():
        quality = [cv2.IMWRITE_JPEG_QUALITY, 95]
        for episode in store:
            blobs = [cv2.imencode(".jpg", frame[..., ::-1], quality)[1].tobytes() for frame in episode.frames]
            yield pa.record_batch([pa.array(blobs, pa.binary())], names=["pixels"])

    lance.write_dataset(rows(), tmp_path / "s.lance", schema=pa.schema([("pixels", pa.binary())]))
    table = lance.dataset(tmp_path / "s.lance")
    on_disk = sum(file.stat().st_size for file in (tmp_path / "s.lance").rglob("*") if file.is_file())
    draw = drawer(store)
    pool = ThreadPoolExecutor(THREADS)

    def decode(blob):
        return cv2.imdecode(np.frombuffer(blob, np.uint8), cv2.IMREAD_COLOR_RGB)

    def reference(windows=None):
        windows = draw() if windows is None else windows
        wanted = (offsets[windows[:, 0]] + windows[:, 1])[:, None] + STRIDE * np.arange(FRAMES)
        blobs = table.take(wanted.ravel().tolist(), columns=["pixels"])["pixels"].to_pylist()
        return np.stack(list(pool.map(decode, blobs))).reshape(BATCH, FRAMES, size, size, 3)

    ours = reader(store, draw)
    windows = draw()
    difference = np.abs(ours(windows).astype(int) - reference(windows))
    assert difference.mean() < 3, "JPEG is not what it was"
    with pool:
        compare(
            benchmark,
            ours,
            reference,
            shape=shape(scene, size),
            lance=lance.__version__,
            raw_over_stored=ratio_on_disk(store),
            raw_over_jpeg=round(store.frame_count * size * size * 3 / on_disk, 1),
        )
