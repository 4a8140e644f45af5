"""What the tasks on MuJoCo share: drawing without a window, and one engine in a process for all tasks of a kind.

A look says how a picture is made. "official" is the picture of the benchmark, to the bit. "light" is the same scene
without shadows, reflections and sky, each pixel the average of 2 x 2; it costs a fraction of the time where there is
no graphics card, because shadow maps and multisampling cost most of an official picture there.
"""

from __future__ import annotations

import abc
import atexit
import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lewm.envs.task import Task, choice, package

LOOKS = ("light", "official")
GL_PACKAGES = {"egl": "libegl1 libopengl0 libgl1-mesa-dri", "osmesa": "libosmesa6"}  # Debian's names
_GL_FILES = {"egl": ("libEGL.so.1", "libOpenGL.so.0"), "osmesa": ("libOSMesa.so.8",)}
_INSTALL_GL = f"on Debian or Ubuntu: apt install {GL_PACKAGES['egl']} (or {GL_PACKAGES['osmesa']})"

_drew: int | None = None  # the process that made the first GL context
_live: weakref.WeakSet[Renderer] = weakref.WeakSet()
_inherited: list[Any] = []  # contexts of the process that this one was forked from: not to be touched, nor freed


# ------------------------------------------------------------------------------------------------------------ drawing


def choose_gl() -> str:
    """Sets MUJOCO_GL for this process and those it starts, unless it is set; gives it.

    EGL comes first, then OSMesa, "" stands for neither; a window system is never chosen. Elsewhere than on Linux
    MuJoCo's own choice stands. To be called before mujoco is imported, which looks for a window system otherwise.
    """
    # Mesa's rasteriser threads do not survive a fork, and workers that share the cores need none.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    chosen = os.environ.get("MUJOCO_GL", "")
    if sys.platform == "linux":
        _load_triton()
    if not chosen and sys.platform == "linux":
        chosen = next((gl for gl in _GL_FILES if installed(gl)), "")
        if chosen:
            os.environ["MUJOCO_GL"] = chosen
    return chosen.lower().strip()


def installed(gl: str) -> bool:
    """Whether the libraries of "egl" or "osmesa" can be loaded."""
    try:
        for file in _GL_FILES[gl]:
            ctypes.CDLL(file)
    except OSError:
        return False
    return True


class Renderer:
    """Draws what the data of a MuJoCo model hold.

    GL contexts are made by the first `draw` of a size, in the process that draws: a process that was forked makes its
    own. They are freed by `close`, with the object, or before the interpreter exits. One thread draws, always the same.

    Args:
        model: An MjModel. A light look changes its quality settings.
        camera: Name of a camera in it.
        look: One of LOOKS.
    """

    def __init__(self, model: Any, camera: str, look: str) -> None:
        self._model = model
        self._camera = camera
        self._light = look == "light"
        self._made: dict[int, Any] = {}
        self._pid = os.getpid()
        if self._light:
            model.vis.quality.shadowsize = model.vis.quality.offsamples = 0

    def draw(self, data: Any, size: int) -> np.ndarray:
        """The picture (size, size, 3) uint8 of data whose positions `mj_forward` has derived.

        Raises:
            OSError: GL does not work here; the message says what to install.
        """
        if self._pid != os.getpid():
            _inherited.append(self._made)
            self._made, self._pid = {}, os.getpid()
        renderer = self._made.get(size) or self._make(size)
        renderer.update_scene(data, camera=self._camera)
        return halved(renderer.render()) if self._light else renderer.render()

    def close(self) -> None:
        """Frees the GL contexts; a later `draw` makes new ones."""
        made, self._made = self._made, {}
        if self._pid != os.getpid():
            _inherited.append(made)
            return
        for renderer in made.values():
            renderer.close()

    def __del__(self) -> None:
        if _live is not None:  # None while the interpreter goes away, when atexit has closed everything
            self.close()

    def _make(self, size: int) -> Any:
        import mujoco

        side = 2 * size if self._light else size
        gl = choose_gl()
        if not gl and sys.platform == "linux":
            raise OSError(f"drawing needs a GL library, and there is none; {_INSTALL_GL}")
        _check_fork(gl)
        self._model.vis.global_.offwidth = self._model.vis.global_.offheight = side
        try:
            _use(gl)
            renderer = mujoco.Renderer(self._model, side, side)
        except Exception as error:  # each GL fails in its own way: ImportError, AttributeError, RuntimeError, GLError
            hint = "unset MUJOCO_GL, which chooses EGL or OSMesa" if gl not in _GL_FILES else _INSTALL_GL
            raise OSError(f"MuJoCo cannot draw with MUJOCO_GL={gl or 'glfw'} ({_short(error)}); {hint}") from error
        if self._light:
            for flag in ("SHADOW", "REFLECTION", "SKYBOX"):
                renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
        _remember()
        _live.add(self)
        self._made[size] = renderer
        return renderer


def halved(picture: np.ndarray) -> np.ndarray:
    """A picture (2 N, 2 M, 3) uint8 as (N, M, 3), each pixel the rounded mean of four."""
    rows = np.add(picture[::2], picture[1::2], dtype=np.uint16)
    found = np.empty((rows.shape[0], rows.shape[1] // 2, 3), dtype=np.uint8)
    for channel in range(3):  # 8 times as fast as all three at once, whose inner loops have a length of 3
        found[..., channel] = (rows[:, ::2, channel] + rows[:, 1::2, channel] + 2) >> 2
    return found


def _use(gl: str) -> None:
    """Has mujoco.Renderer take the chosen GL, also where mujoco was imported before the choice."""
    if gl in _GL_FILES:
        from mujoco.rendering.classic import gl_context

        gl_context.GLContext = importlib.import_module(f"mujoco.{gl}").GLContext


@functools.cache
def _load_triton() -> None:
    """Loads Triton's library, where there is one, ahead of Mesa's.

    Both bring an LLVM. Mesa offers the names in its own to every library that comes later, and Triton, imported after
    the first picture, would take them and crash. In this order both keep to their own.
    """
    triton = importlib.util.find_spec("triton") if sys.modules.get("triton", ...) is ... else None
    if triton is None or "libLLVM" in Path("/proc/self/maps").read_text():  # not there, or too late
        return
    for folder in triton.submodule_search_locations or ():
        for file in Path(folder, "_C").glob("libtriton*.so"):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(file))


def _check_fork(gl: str) -> None:
    if _drew not in (None, os.getpid()) and os.environ.get("LP_NUM_THREADS") != "0" and gl in _GL_FILES:
        raise OSError(
            "this process was forked from one that had drawn, whose GL threads it lacks: leave LP_NUM_THREADS unset or"
            ' at 0, or start worker processes by "spawn" or "forkserver"'
        )


def _remember() -> None:
    # Registered after the first context: MuJoCo's EGL shuts down in an exit handler too, and the last one comes first.
    global _drew
    if _drew is None:
        atexit.register(_close_all)
        _drew = os.getpid()


def _close_all() -> None:
    for renderer in list(_live):
        renderer.close()


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() if not type(error).__module__.startswith("OpenGL") else []
    return lines[0] if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------------- engines


class Engine(abc.ABC):
    """A MuJoCo model with its data and renderer, which holds nothing between two calls.

    All tasks of a kind and look in a process share one: a state is all that a task has, and `place` makes everything
    else from it, so what one task does cannot reach another. Not for use from two threads at once.

    Args:
        model: An MjModel, `data` is made for it where it is not given.
        camera: Name of the camera that draws.
        look: One of LOOKS.
    """

    def __init__(self, model: Any, camera: str, look: str, data: Any = None) -> None:
        import mujoco

        self.model = model
        self.data = mujoco.MjData(model) if data is None else data
        self.renderer = Renderer(model, camera, look)

    @classmethod
    @abc.abstractmethod
    def make(cls, look: str) -> Engine:
        """A new one."""

    @classmethod
    def shared(cls, look: str) -> Engine:
        """The one of this process, made if it is not there; it goes with the last task that has it."""
        key = (cls, look)
        engine = _engines.get(key)
        if engine is None:
            engine = _engines[key] = cls.make(look)
        return engine

    def place(self, state: np.ndarray) -> None:
        """Puts the data at a state (nq + nv + nu,) of positions, velocities and controls, and derives the rest."""
        import mujoco

        model, data = self.model, self.data
        mujoco.mj_resetData(model, data)
        data.qpos[:], data.qvel[:], data.ctrl[:] = np.split(state, [model.nq, model.nq + model.nv])
        mujoco.mj_forward(model, data)

    @contextlib.contextmanager
    def painted(self, geom: str, rgba: tuple[float, ...]) -> Iterator[None]:
        """Within it a geom has another colour, which also comes before that of its material."""
        colour = self.model.geom(geom).rgba
        before = colour.copy()
        colour[:] = rgba
        try:
            yield
        finally:
            colour[:] = before

    def state(self) -> np.ndarray:
        """(nq + nv + nu,) float64, what `place` takes."""
        return np.concatenate([self.data.qpos, self.data.qvel, self.data.ctrl])


_engines: weakref.WeakValueDictionary[tuple[type[Engine], str], Engine] = weakref.WeakValueDictionary()


class EngineTask(Task):
    """A task whose state is held here and whose engine is shared.

    Args:
        look: "light" or "official": how pictures are made.

    Attributes:
        repaint: The geom that pictures show in another colour where the task is `recoloured`, and that colour, RGBA.
    """

    engine_type: ClassVar[type[Engine]]
    repaint: ClassVar[tuple[str, tuple[float, ...]]]

    def __init__(self, look: str = "light") -> None:
        self.look = choice("look", look, LOOKS)
        choose_gl()
        package("mujoco", self.name)
        self._engine: Any = self.engine_type.shared(look)
        self._state = np.zeros(self.state_dim)

    @abc.abstractmethod
    def _place(self) -> None:
        """Puts the engine at the state."""

    def set_state(self, state: np.ndarray) -> None:
        """Puts the simulator there, as if it had never been elsewhere."""
        self._state = np.array(state, dtype=np.float64)

    def get_state(self) -> np.ndarray:
        """(S,) float64 where the simulator is; what `set_state` took, if there was no step since."""
        return self._state.copy()

    def render(self, size: int) -> np.ndarray:
        """The picture (size, size, 3) uint8 of where the simulator is. It does not show the goal.

        Raises:
            OSError: GL does not work here; the message says what to install.
        """
        self._place()
        with self._engine.painted(*self.repaint) if self.recoloured else contextlib.nullcontext():
            return self._engine.renderer.draw(self._engine.data, size)

    def close(self) -> None:
        """Lets go of the engine; with the last task its memory and GL contexts are freed."""
        self._engine = None
