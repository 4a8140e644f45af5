"""Many environments of a task at once, in this process or in worker processes that write into shared memory.

    python -m lewm.envs.vector     is a worker, started by `TaskVectorEnv`; it is no command for people

Workers are programs of their own, not forks: threads and GPU contexts of this process do not matter to them, and a
script that uses them needs no `if __name__ == "__main__"`. Orders go through their standard input, a line each;
everything with a size lies in one file without a name that both have mapped.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import mmap
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from typing import IO, Any, ClassVar, NamedTuple, cast

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from lewm.checks import integer
from lewm.envs.task import Task, begin, checked_size, choice, clipped, judged, placed, spaces_of

_LEAST = 4  # environments that are worth a worker


class TaskVectorEnv(VectorEnv):
    """N environments of a task.

    Environment i does what a `TaskEnv` reset with `seed + i` does, bit for bit, however many workers there are. Actions
    are (N, A), observations (N, size, size, 3) uint8 or (N, 2 S) float64; info holds `state` and `goal_state` (N, S)
    float64, `success` (N,) bool and `distance` (N,) float64.

    Args:
        num_envs: N.
        size: Side of the pictures in pixels.
        obs_type: "pixels" or "state".
        max_episode_steps: Truncates an episode after so many steps; None never does.
        autoreset_mode: `NEXT_STEP`: the step after an episode's last one starts the next episode and ignores the
            action. `DISABLED`: there are no resets but one's own, and a task goes on after success.
        render_mode: "rgb_array" makes `render` give a tuple of N pictures.
        workers: Processes that share the environments; 0 is this process. None: one a processor that this process may
            use, if each has at least 4 environments.
        **settings: Of the task.
    """

    metadata: ClassVar[dict[str, Any]] = {
        "render_modes": ["rgb_array"],
        "render_fps": 10,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }
    task_type: ClassVar[type[Task]]
    whole_episodes: ClassVar[bool] = True  # what is collected goes on after success: so do the tasks' policies

    def __init__(
        self,
        num_envs: int = 1,
        *,
        size: int = 64,
        obs_type: str = "pixels",
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        workers: int | None = None,
        **settings: Any,
    ) -> None:
        task = self.task_type
        self.num_envs = integer("num_envs", num_envs, 1)
        self.size = checked_size(task, size)
        self.obs_type = choice("obs_type", obs_type, ("pixels", "state"))
        self.max_episode_steps = None if max_episode_steps is None else integer("max_steps", max_episode_steps, 1)
        self.render_mode = choice("render_mode", render_mode, (None, "rgb_array"))
        mode = choice("autoreset_mode", autoreset_mode, (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED))
        self.metadata = {**self.metadata, "autoreset_mode": mode}
        self.single_observation_space, self.single_action_space = spaces_of(task, self.size, obs_type)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        job = _Job(f"{task.__module__}:{task.__qualname__}", settings, num_envs, self.size, obs_type == "pixels")
        job = job._replace(limit=self.max_episode_steps, again=mode is AutoresetMode.NEXT_STEP)
        workers = _workers(num_envs, task) if workers is None else integer("workers", workers, 0, num_envs + 1)
        self._groups: list[_Group | _Worker]
        if workers:
            with tempfile.TemporaryFile() as file:
                file.truncate(job.bytes())
                self._shared = job.arrays(memory := mmap.mmap(file.fileno(), job.bytes()))
                cuts = [num_envs * i // workers for i in range(workers + 1)]
                spans = list(itertools.pairwise(cuts))
                self._groups = [_Worker(job, file.fileno(), *span) for span in spans]
                self._memory = memory
                self._wait()  # until all have mapped the memory
        else:
            self._shared = job.arrays(bytearray(job.bytes()))
            self._groups = [_Group(task(**settings), job, self._shared, 0, num_envs)]
        self._task = task(**settings)  # to check and to draw; those of the environments stay where they are
        self._begun = False

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode in every environment.

        Args:
            seed: Environment i is seeded with `seed + i`, or with `seed[i]`; None goes on with what is there.
            options: "state" and "goal", (N, S) each; what is not given is drawn.

        Raises:
            ValueError: An unknown option, a state or goal that the simulator cannot take, or seeds of another number.
        """
        state, goal = placed(self._task, options, (self.num_envs,))
        if isinstance(seed, int | np.integer):
            seed = [int(seed) + i for i in range(self.num_envs)]
        if seed is not None and len(seed) != self.num_envs:
            raise ValueError(f"seed must have one entry for each of {self.num_envs} environments, got {len(seed)}")
        for name, given in (("state", state), ("goal", goal)):
            if given is not None:
                self._shared[name][:] = given
        seeds = None if seed is None else [int(each) for each in seed]
        self._all("reset", seeds, state is not None, goal is not None)
        self._begun = True
        return self._observation(), self._info()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Moves all on; gives observations, rewards (N,) of 0.0, terminated (N,), truncated (N,) and info.

        Raises:
            ValueError: Actions of another shape, or not finite.
            gymnasium.error.ResetNeeded: There was no `reset` yet.
        """
        self._started()
        self._shared["action"][:] = clipped(self._task, actions, self.action_space.shape)
        self._all("step")
        ended = self._shared["ended"]
        return self._observation(), np.zeros(self.num_envs), ended & 1 > 0, ended & 2 > 0, self._info()

    def render(self) -> tuple[np.ndarray, ...] | None:
        """N pictures (size, size, 3) uint8 in mode "rgb_array", else None."""
        if self.render_mode is None:
            return None
        self._started()
        if self.obs_type == "pixels":
            return tuple(self._shared["frames"].copy())
        frames = []
        for state in self._shared["state"]:
            self._task.set_state(state)
            frames.append(self._task.render(self.size))
        return tuple(frames)

    def close_extras(self, **_: Any) -> None:
        """Ends the workers and frees the simulators."""
        for group in self._groups:
            group.close()
        self._task.close()

    def _all(self, order: str, *arguments: Any) -> None:
        for group in self._groups:
            group.begin(order, *arguments)
        self._wait()

    def _wait(self) -> None:
        failed = [error for group in self._groups if (error := group.end()) is not None]
        if failed:
            raise failed[0]

    def _started(self) -> None:
        if not self._begun:
            raise gymnasium.error.ResetNeeded(f"{self._task.name} was stepped or drawn before its first reset()")

    def _observation(self) -> np.ndarray:
        shared = self._shared
        if self.obs_type == "pixels":
            return shared["frames"].copy()
        return np.concatenate([shared["state"], shared["goal"]], axis=1)

    def _info(self) -> dict[str, Any]:
        shared = self._shared
        info = {"state": shared["state"].copy(), "goal_state": shared["goal"].copy()}
        return info | {"success": shared["success"].astype(bool), "distance": shared["distance"].copy()}


class _Job(NamedTuple):
    """What a worker has to know; plain data."""

    task: str  # module:class
    settings: dict[str, Any]
    count: int
    size: int
    pixels: bool
    limit: int | None = None
    again: bool = True  # whether an episode that is over is followed by the next one

    def arrays(self, memory: Any) -> dict[str, np.ndarray]:
        """The arrays of all environments, in one piece of memory."""
        found = {}
        for name, (offset, shape, dtype) in self._places().items():
            size = math.prod(shape)
            found[name] = np.frombuffer(memory, dtype, size, offset).reshape(shape)
        return found

    def bytes(self) -> int:
        """Size of that memory."""
        offset, shape, dtype = list(self._places().values())[-1]
        return offset + max(1, math.prod(shape)) * np.dtype(dtype).itemsize

    def _places(self) -> dict[str, tuple[int, tuple[int, ...], str]]:
        task, n = self.type(), self.count
        fields: dict[str, tuple[tuple[int, ...], str]] = {
            "state": ((n, task.state_dim), "f8"),
            "goal": ((n, task.state_dim), "f8"),
            "action": ((n, len(task.action_low)), "f8"),
            "distance": ((n,), "f8"),
            "success": ((n,), "u1"),
            "ended": ((n,), "u1"),  # 1 terminated, 2 truncated, 3 both
            "frames": ((n * self.pixels, self.size, self.size, 3), "u1"),
        }
        places, offset = {}, 0
        for name, (shape, dtype) in fields.items():
            places[name] = offset, shape, dtype
            offset += -(-math.prod(shape) * np.dtype(dtype).itemsize // 64) * 64
        return places

    def type(self) -> type[Task]:
        """The class named `task`."""
        module, _, name = self.task.partition(":")
        return getattr(importlib.import_module(module), name)


class _Group:
    """Environments `first .. last` on one simulator, which is put to each one's state where it was left elsewhere."""

    def __init__(self, task: Task, job: _Job, shared: dict[str, np.ndarray], first: int, last: int) -> None:
        self.task, self._job, self._shared, self._rows = task, job, shared, range(first, last)
        # A simulator for each: to set one's state anew would forget contacts.
        self._tasks = [task, *(job.type()(**job.settings) for _ in self._rows[1:])]
        self._rngs: list[np.random.Generator] = []
        self._steps = [0] * len(self._rows)
        self._error: Exception | None = None

    def begin(self, order: str, *arguments: Any) -> None:
        """Does it: "reset" (seeds or None, states given?, goals given?) or "step"."""
        self._error = None
        try:
            getattr(self, f"_{order}")(*arguments)
        except Exception as error:
            self._error = error

    def end(self) -> Exception | None:
        """What went wrong."""
        return self._error

    def close(self) -> None:
        """Frees the simulators."""
        for task in self._tasks:
            task.close()

    def _reset(self, seeds: Sequence[int] | None, state: bool, goal: bool) -> None:
        if seeds is not None or not self._rngs:
            keys = [None] * len(self._rows) if seeds is None else [seeds[row] for row in self._rows]
            self._rngs = [seeding.np_random(key)[0] for key in keys]
        for i, row in enumerate(self._rows):
            self._start(i, self._shared["state"][row] if state else None, self._shared["goal"][row] if goal else None)
            self._report(i)

    def _start(self, i: int, state: np.ndarray | None = None, goal: np.ndarray | None = None) -> None:
        self._steps[i] = 0
        self._shared["goal"][self._rows[i]] = begin(self._tasks[i], self._rngs[i], state, goal)
        self._shared["ended"][self._rows[i]] = 0

    def _step(self) -> None:
        for i, row in enumerate(self._rows):
            if self._job.again and self._shared["ended"][row]:
                self._start(i)
                self._report(i)
            else:
                self._tasks[i].step(self._shared["action"][row])
                self._steps[i] += 1
                success = self._report(i)
                spent = self._job.limit is not None and self._steps[i] >= self._job.limit
                self._shared["ended"][row] = success + 2 * spent

    def _report(self, i: int) -> bool:
        row, shared, task = self._rows[i], self._shared, self._tasks[i]
        found = judged(task, shared["goal"][row])
        for name in ("state", "success", "distance"):
            shared[name][row] = found[name]
        if self._job.pixels:
            shared["frames"][row] = task.render(self._job.size)
        return found["success"]


class _Worker:
    """A process with a `_Group`."""

    def __init__(self, job: _Job, memory: int, first: int, last: int) -> None:
        # What can be imported here can be imported there; one thread each, for there are as many as processors.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "LP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lewm.envs.vector", json.dumps([*job]), str(memory), str(first), str(last)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(memory,),
            env=environment,
        )
        self._orders, self._answers = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        self._end = weakref.finalize(self, _end, self._process, self._orders, self._answers)

    def begin(self, order: str, *arguments: Any) -> None:
        """Orders it."""
        with contextlib.suppress(BrokenPipeError):  # `end` says so
            print(json.dumps([order, *arguments]), file=self._orders, flush=True)

    def end(self) -> Exception | None:
        """Waits until it has done it; what went wrong."""
        answer = self._answers.readline()
        if not answer:
            return RuntimeError(f"a worker of the vector environment has ended with code {self._process.wait()}")
        kind, text = json.loads(answer)
        known = {"ValueError": ValueError, "ModuleNotFoundError": ModuleNotFoundError, "OSError": OSError}
        return None if kind is None else known.get(kind, RuntimeError)(text)

    def close(self) -> None:
        """Ends it."""
        self._end()


def _end(process: subprocess.Popen, orders: IO[str], answers: IO[str]) -> None:
    with contextlib.suppress(OSError):
        orders.close()
    process.wait()
    answers.close()


def _workers(count: int, task: type[Task]) -> int:
    """As many as there are processors, if there is work for more than one."""
    if os.name != "posix" or task.__module__ == "__main__":
        return 0  # no memory to inherit, or nothing that another process could import
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(processors, count // _LEAST)
    return workers if workers > 1 else 0


def _serve(job: _Job, memory: int, first: int, last: int) -> None:
    """A worker's life: orders until its standard input ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what a simulator prints is no answer

    def answer(error: Exception | None) -> None:
        print(json.dumps([None, ""] if error is None else [type(error).__name__, str(error)]), file=answers, flush=True)

    try:
        group = _Group(job.type()(**job.settings), job, job.arrays(mmap.mmap(memory, job.bytes())), first, last)
    except Exception as error:
        answer(error)
        return
    answer(None)
    for line in sys.stdin:
        group.begin(*json.loads(line))
        answer(group.end())
    group.close()


if __name__ == "__main__":
    # A worker has the module under its own name too, as the tasks' modules import it.
    from lewm.envs import vector

    _, _text, *_numbers = sys.argv
    with contextlib.suppress(KeyboardInterrupt):
        vector._serve(vector._Job(*json.loads(_text)), *map(int, _numbers))
