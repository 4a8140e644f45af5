"""The newest picture of a camera, and how old it is.

A camera that is read inside the control loop makes the loop wait for it, and what its driver has queued is old. Here a
thread reads it all the time and keeps the newest picture alone; the loop takes that one, or is told that it is stale.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from types import TracebackType
from typing import Any

import numpy as np

from lewm import pixels
from lewm.checks import integer

__all__ = ["Camera", "Frame", "StaleFrame"]

_CLOSE_SECONDS = 2.0


class StaleFrame(TimeoutError):
    """The newest picture of a camera is too old, or there is none yet.

    Attributes:
        age_ms: Its age in milliseconds; None if there is none.
        max_age_ms: The age in milliseconds that was asked for.
    """

    def __init__(self, text: str, age_ms: float | None, max_age_ms: float) -> None:
        super().__init__(text)
        self.age_ms = age_ms
        self.max_age_ms = max_age_ms


@dataclass(frozen=True)
class Frame:
    """A picture of a `Camera`.

    Attributes:
        picture: (H, W, 3) uint8 RGB.
        number: Pictures read up to this one, 1 for the first: an equal number is the same picture, a gap is what was
            missed.
        time: `time.monotonic()` in seconds when `read()` had returned it. Exposure and transfer came before that.
    """

    picture: np.ndarray
    number: int
    time: float

    @property
    def age_ms(self) -> float:
        """Milliseconds since `time`."""
        return (time.monotonic() - self.time) * 1e3


class Camera:
    """Reads a camera in a thread and keeps the newest picture.

    Use it as a context manager, or call `close`. Any number of threads may ask for pictures.

    Args:
        read: Called again and again in a thread of its own; it waits for the next picture and returns it, (H, W, 3)
            uint8 RGB. The picture is copied, so it may be the same memory each time. What `read` raises, `latest`
            raises.
        name: What error messages call it.

    Raises:
        TypeError: `read` cannot be called.
    """

    def __init__(self, read: Callable[[], Any], *, name: str = "camera") -> None:
        if not callable(read):
            raise TypeError(f"read must be a function that returns the next picture, got {type(read).__name__}")
        self.name = name
        self._read = read
        self._changed = threading.Condition()
        self._frame: Frame | None = None
        self._error: BaseException | None = None
        self._origin: TracebackType | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._grab, name=f"lewm {name}", daemon=True)
        self._thread.start()

    def latest(self, max_age_ms: float, *, timeout_ms: float = 0.0, after: int = 0) -> Frame:
        """The newest picture.

        Args:
            max_age_ms: The age in milliseconds that it may have.
            timeout_ms: How many milliseconds to wait for one if there is none, as before the first.
            after: Number of a picture that is known already: only a newer one will do.

        Returns:
            The picture, its number and its time.

        Raises:
            StaleFrame: There is none after `timeout_ms`; a `TimeoutError` that says how old the newest is.
            RuntimeError: The camera is closed.
            TypeError, ValueError: An argument is not as described, or what `read` returned is no picture.
            Exception: What `read` raised. It is raised from then on, however new the last picture is.
        """
        if not (isinstance(max_age_ms, Real) and 0 < max_age_ms < math.inf):
            raise ValueError(f"max_age_ms must be a positive number of milliseconds, got {max_age_ms!r}")
        if not (isinstance(timeout_ms, Real) and 0 <= timeout_ms < math.inf):
            raise ValueError(f"timeout_ms must be zero or a positive number of milliseconds, got {timeout_ms!r}")
        integer("after", after, 0)
        until = time.monotonic() + timeout_ms / 1e3
        with self._changed:
            while True:
                if self._closed:
                    raise RuntimeError(f"{self.name} is closed")
                if self._error is not None:
                    raise self._error.with_traceback(self._origin)  # else each raise would add to it
                frame = self._frame
                if frame is not None and frame.number > after and frame.age_ms <= max_age_ms:
                    return frame
                left = until - time.monotonic()
                if left <= 0:
                    raise self._stale(frame, max_age_ms, timeout_ms, after)
                self._changed.wait(min(left, threading.TIMEOUT_MAX))

    def close(self) -> None:
        """Stops reading and waits for the thread; a picture in the making is dropped. Closing twice does no harm.

        Warns:
            RuntimeWarning: `read` has not returned within 2 s. Its thread, a daemon, then ends with `read` or with the
                process.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            text = f"{self.name} is closed, but read() has not returned for {_CLOSE_SECONDS:g} s"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def __enter__(self) -> Camera:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        frame = self._frame
        seen = "no picture yet" if frame is None else f"picture {frame.number}, {frame.age_ms:.0f} ms old"
        return f"<lewm.Camera {self.name}, {'closed' if self._closed else seen}>"

    def _grab(self) -> None:
        number = 0
        while not self._closed:
            try:
                picture, now = self._read(), time.monotonic()
                picture = np.array(pixels.checked(np.asarray(picture), f"the picture of {self.name}", (0,)))
            except BaseException as error:  # whatever it is, the consumer has to know
                with self._changed:
                    self._error, self._origin = error, error.__traceback__
                    self._changed.notify_all()
                return
            number += 1
            with self._changed:
                self._frame = Frame(picture, number, now)
                self._changed.notify_all()

    def _stale(self, frame: Frame | None, max_age_ms: float, timeout_ms: float, after: int) -> StaleFrame:
        waited = f" after waiting for {timeout_ms:g} ms" if timeout_ms else ""
        if frame is None:
            return StaleFrame(f"{self.name} has given no picture yet{waited}", None, max_age_ms)
        age = frame.age_ms
        wanted = f"at most {max_age_ms:g} ms" + (f" and a number above {after}" if frame.number <= after else "")
        text = f"the newest picture of {self.name}, number {frame.number}, is {age:.0f} ms old{waited}, want {wanted}"
        return StaleFrame(text, age, max_age_ms)
