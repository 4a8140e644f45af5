import queue
import threading
import time

import numpy as np
import pytest

import lewm
from lewm import camera
from lewm.camera import Camera, Frame, StaleFrame

PICTURE = np.zeros((4, 6, 3), np.uint8)


class Driver:
    """A fake camera: gives what it is handed, waits while there is nothing, and dies on an exception."""

    def __init__(self):
        self.items = queue.Queue()

    def give(self, value):
        self.items.put(np.full((4, 6, 3), value, np.uint8))

    def die(self, error=None):
        self.items.put(error)

    def __call__(self):
        item = self.items.get()
        if isinstance(item, np.ndarray | list | str):
            return item
        raise item or OSError("the fake driver is let go")


@pytest.fixture
def driver():
    driver = Driver()
    yield driver
    driver.die()


@pytest.fixture
def grabbed(driver):
    with Camera(driver, name="wrist") as grabbed:
        yield grabbed
        driver.die()


def eventually(condition):
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_public_names():
    assert lewm.Camera is Camera
    assert lewm.StaleFrame is StaleFrame
    assert issubclass(StaleFrame, TimeoutError)


def test_it_waits_for_the_first_picture(driver, grabbed):
    threading.Timer(0.05, driver.give, [7]).start()
    before = time.monotonic()
    frame = grabbed.latest(1e4, timeout_ms=5000)
    assert frame.number == 1
    assert before < frame.time <= time.monotonic()
    assert 0 <= frame.age_ms < 1e4
    np.testing.assert_array_equal(frame.picture, np.full((4, 6, 3), 7))


def test_the_newest_picture_alone_is_kept_and_numbers_tell_what_was_missed(driver, grabbed):
    for value in (1, 2, 3):
        driver.give(value)
    frame = grabbed.latest(1e4, timeout_ms=5000, after=2)
    assert (frame.number, frame.picture[0, 0, 0]) == (3, 3)
    again = grabbed.latest(1e4)
    assert again is frame  # asked twice between two pictures: the same number


def test_after_waits_for_a_newer_picture(driver, grabbed):
    driver.give(1)
    known = grabbed.latest(1e4, timeout_ms=5000)
    with pytest.raises(StaleFrame, match=r"number 1, is \d+ ms old, want at most 10000 ms and a number above 1"):
        grabbed.latest(1e4, after=known.number)
    threading.Timer(0.02, driver.give, [2]).start()
    assert grabbed.latest(1e4, timeout_ms=5000, after=known.number).number == 2


def test_a_camera_that_has_given_nothing_is_stale_without_an_age(grabbed):
    with pytest.raises(StaleFrame, match=r"^wrist has given no picture yet$") as caught:
        grabbed.latest(50)
    assert (caught.value.age_ms, caught.value.max_age_ms) == (None, 50)
    started = time.monotonic()
    with pytest.raises(StaleFrame, match=r"no picture yet after waiting for 30 ms"):
        grabbed.latest(50, timeout_ms=30)
    assert 0.03 <= time.monotonic() - started < 5


def test_a_camera_that_stalls_goes_stale_and_comes_back(driver, grabbed):
    driver.give(1)
    assert grabbed.latest(1e4, timeout_ms=5000).number == 1
    time.sleep(0.06)
    with pytest.raises(TimeoutError, match=r"number 1, is \d+ ms old, want at most 50 ms$") as caught:
        grabbed.latest(50)
    assert 60 <= caught.value.age_ms < 5000
    assert grabbed.latest(1e4).number == 1  # old, but as young as asked for
    driver.give(2)
    assert grabbed.latest(1e4, timeout_ms=5000, after=1).number == 2


def test_a_slow_camera_holds_up_nobody(driver, grabbed):
    driver.give(1)
    grabbed.latest(1e4, timeout_ms=5000)
    # Until it is given something, read() hangs, and nobody waits for it.
    assert {grabbed.latest(1e4).number for _ in range(1000)} == {1}


def test_a_fast_camera_is_never_queued():
    count = 0

    def read():
        nonlocal count
        count += 1
        time.sleep(0.001)
        return PICTURE

    with Camera(read) as fast:
        eventually(lambda: count > 20)
        known = count
        assert fast.latest(1e4).number >= known - 1  # all but the one in the making


@pytest.mark.parametrize("seen", [0, 1])
def test_what_kills_the_thread_is_raised_where_pictures_are_asked_for(driver, grabbed, seen):
    for value in range(seen):
        driver.give(value)
    eventually(lambda: grabbed._frame is not None or not seen)
    driver.die(OSError("USB cable pulled"))
    grabbed._thread.join(5)
    depths = []
    for _ in range(3):  # also while the last picture is young enough
        with pytest.raises(OSError, match="USB cable pulled") as caught:
            grabbed.latest(1e4, timeout_ms=5000)
        depths.append(len(caught.traceback))
    assert len(set(depths)) == 1
    assert caught.traceback[-1].name == "__call__"  # it shows where the driver failed


def test_the_death_of_the_thread_wakes_who_waits(driver, grabbed):
    threading.Timer(0.02, driver.die, [ConnectionError("gone")]).start()
    started = time.monotonic()
    with pytest.raises(ConnectionError, match="gone"):
        grabbed.latest(50, timeout_ms=60_000)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        (np.zeros((4, 6, 3)), r"the picture of wrist must be uint8 in \[0, 255\], got float64"),
        (np.zeros((3, 4, 6), np.uint8), r"must be of shape \(H, W, 3\), got \(3, 4, 6\), which looks like channels"),
        (np.zeros((2, 4, 6, 3), np.uint8), r"must be of shape \(H, W, 3\), got \(2, 4, 6, 3\)"),
        ("no picture", "must be uint8"),
    ],
)
def test_what_is_no_picture_is_refused(driver, grabbed, picture, text):
    driver.items.put(picture)
    with pytest.raises(ValueError, match=text):
        grabbed.latest(50, timeout_ms=5000)


def test_a_driver_may_use_its_memory_again():
    memory, first, go = np.ones((4, 6, 3), np.uint8), threading.Event(), threading.Event()

    def read():
        if first.is_set():
            memory[:] = 9
            go.wait(5)
        first.set()
        return memory

    with Camera(read) as camera:
        frame = camera.latest(1e4, timeout_ms=5000)
        eventually(lambda: memory[0, 0, 0] == 9)
        assert frame.picture.max() == 1
        go.set()


def test_close_joins_and_what_comes_later_says_so(driver):
    closed = Camera(driver)
    driver.give(1)
    closed.latest(1e4, timeout_ms=5000)
    driver.give(2)
    driver.die()
    closed.close()
    closed.close()
    assert not closed._thread.is_alive()
    with pytest.raises(RuntimeError, match="camera is closed"):
        closed.latest(50)


def test_close_wakes_who_waits(driver):
    closed, raised = Camera(driver), []

    def wait():
        try:
            closed.latest(50, timeout_ms=60_000)
        except RuntimeError as error:
            raised.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    driver.die()
    closed.close()
    waiting.join(5)
    assert not waiting.is_alive()
    assert len(raised) == 1


def test_close_does_not_wait_for_ever(driver, monkeypatch):
    monkeypatch.setattr(camera, "_CLOSE_SECONDS", 0.05)
    stuck = Camera(driver, name="wrist")
    with pytest.warns(RuntimeWarning, match=r"wrist is closed, but read\(\) has not returned for 0.05 s"):
        stuck.close()
    driver.give(1)  # the driver wakes: the thread ends, and its picture is dropped
    stuck._thread.join(5)
    assert not stuck._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        stuck.latest(50)


@pytest.mark.parametrize("name", ["max_age_ms", "timeout_ms"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "100", None])
def test_milliseconds_are_checked(grabbed, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*milliseconds, got"):
        grabbed.latest(**{"max_age_ms": 50, name: value})


def test_arguments_are_checked(grabbed):
    with pytest.raises(ValueError, match="max_age_ms must be a positive"):
        grabbed.latest(0)
    with pytest.raises(TypeError, match="after must be an integer of at least 0, got 1.5"):
        grabbed.latest(50, after=1.5)
    with pytest.raises(TypeError, match="read must be a function that returns the next picture, got ndarray"):
        Camera(PICTURE)


def test_it_says_what_it_is(driver, grabbed):
    assert repr(grabbed) == "<lewm.Camera wrist, no picture yet>"
    driver.give(1)
    grabbed.latest(1e4, timeout_ms=5000)
    assert repr(grabbed).startswith("<lewm.Camera wrist, picture 1, ")
    assert Frame(PICTURE, 1, time.monotonic() - 1).age_ms >= 1000
