"""Cube: a robot arm that has to bring a cube to a place.

OGBench's `cube-single` (a UR5e arm with a Robotiq gripper on MuJoCo), through the package ogbench: its model, its
controller, its success test and, with `look="official"`, its picture (camera `front_pixels`, opaque arm, no target).
A goal is a state too, of which only the cube's place counts.

A state is MuJoCo's: positions (21: six joints of the arm, eight of the gripper, the cube's place and quaternion),
velocities (20) and controls (7). Unlike ogbench itself, which keeps the solver's last forces and plans from where the
arm was one substep ago, nothing else is carried from one step to the next, so a state that is set goes on exactly as
it did when it was reached. A single step from a state is ogbench's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from lewm.envs.rendering import Engine, EngineTask
from lewm.envs.task import TaskEnv, package
from lewm.envs.vector import TaskVectorEnv

SUCCESS_DISTANCE = 0.04
POSITIONS, VELOCITIES, CONTROLS = 21, 20, 7  # widths of the three parts of a state
CUBE = slice(14, 17)  # where in a state the cube's place is
CUBE_QUATERNION = slice(17, 21)
_CUBE_VELOCITY = slice(POSITIONS + 14, POSITIONS + 20)
_ARM = slice(0, 6)
_GRIPPER = 6  # the joint that ogbench takes the opening from
_CELL = 0.004  # m: detail of the arm's meshes that a light look keeps, about a pixel at 224
_REACH = np.array([[-0.2, -1.0, -0.1], [1.2, 1.0, 1.0]])  # where a cube may be put; the workspace has walls inside it
_SPEED_LIMIT = 100.0


class _CubeEngine(Engine):
    """Holds ogbench's environment, of which reset, step and render are not used: they carry things along or draw."""

    env: Any

    @classmethod
    def make(cls, look: str) -> Engine:
        package("ogbench", Cube.name)
        from ogbench.manipspace.envs.cube_env import CubeEnv

        # "pixels" gives the gripper its colour; "data_collection" has a target, which an expert asks for.
        env = CubeEnv(
            "single", ob_type="pixels", pixel_transparent_arm=False, visualize_info=False, mode="data_collection"
        )
        env._mjcf_model = env.build_mjcf_model()
        env.compile_model_and_data()
        env.np_random = np.random.default_rng(0)
        env.initialize_episode()  # sets the cube's colour and hides the target
        if look == "light":
            coarsen(env.model, _CELL)
        engine = cls(env.model, "front_pixels", look, env.data)
        engine.env = env
        return engine


class Cube(EngineTask):
    """The cube. Action: how the gripper shall move in 0.05 s: x, y, z in multiples of 0.05 m, yaw of 0.3 rad, opening.

    Recoloured and teleported is the cube.

    Args:
        look: "official" draws ogbench's picture, at 5 frames/s on a core without a graphics card. "light" draws it
            without shadows, reflections and sky, and the arm's meshes with details of 4 mm, 30 times as fast.
    """

    name = "lewm/Cube-v0"
    unit = "m"
    state_dim = POSITIONS + VELOCITIES + CONTROLS
    action_low = np.full(5, -1, dtype=np.float32)
    action_high = np.full(5, 1, dtype=np.float32)
    seconds = 0.05
    engine_type: ClassVar[type[Engine]] = _CubeEngine
    repaint = ("object_0", (0.2, 0.4, 0.95, 1.0))

    def __init__(self, look: str = "light") -> None:
        super().__init__(look)
        self._state = self.draw_state(np.random.default_rng(0))

    def draw_state(self, rng: np.random.Generator) -> np.ndarray:
        """As ogbench starts an episode of its data: gripper, open, and cube anywhere in their bounds, at rest."""
        import mujoco

        env = self._engine.env
        mujoco.mj_resetData(env.model, env.data)
        env.np_random = rng
        env.initialize_episode()
        return self._engine.state()

    def draw_goal(self, rng: np.random.Generator, state: np.ndarray) -> np.ndarray:
        """A state like those an episode starts from; the cube is anywhere, gripper away from it."""
        return self.draw_state(rng)

    def check_state(self, state: np.ndarray) -> str | None:
        """What is wrong with a finite state (48,), None if the simulator can take it."""
        model = self._engine.model
        joints, limits = state[:14], model.jnt_range[:14]
        if (joints < limits[:, 0] - 0.2).any() or (joints > limits[:, 1] + 0.2).any():
            return "a joint is more than 0.2 rad beyond its limits"
        if (state[CUBE] < _REACH[0]).any() or (state[CUBE] > _REACH[1]).any():
            return f"the cube must be between {_REACH[0].tolist()} and {_REACH[1].tolist()}"
        if abs(np.linalg.norm(state[CUBE_QUATERNION]) - 1) > 1e-3:
            return "the cube's quaternion must have norm 1"
        if abs(state[POSITIONS : POSITIONS + VELOCITIES]).max() > _SPEED_LIMIT:
            return f"velocities must be within {_SPEED_LIMIT:g}"
        return None

    def step(self, action: np.ndarray) -> None:
        """Moves on by 25 substeps of 0.002 s towards the pose that an action (5,) asks for."""
        import mujoco

        self._place()
        env = self._engine.env
        env.set_control(action)
        mujoco.mj_step(env.model, env.data, nstep=env._n_steps)
        self._state = self._engine.state()

    def distance(self, state: np.ndarray, goal: np.ndarray) -> float:
        """Between the cube's centre and the goal's."""
        return float(np.linalg.norm(state[CUBE] - goal[CUBE]))

    def success(self, state: np.ndarray, goal: np.ndarray) -> bool:
        """Whether the cube's centre is within 0.04 m of the goal's; how it is turned does not count."""
        return self.distance(state, goal) <= SUCCESS_DISTANCE

    @classmethod
    def factors(cls, states: np.ndarray) -> dict[str, np.ndarray]:
        """The cube's place, the arm's joints as sine and cosine, the gripper's joint."""
        arm = states[:, _ARM]
        return {
            "cube": states[:, CUBE],
            "arm": np.concatenate([np.sin(arm), np.cos(arm)], axis=1),
            "gripper": states[:, _GRIPPER : _GRIPPER + 1],
        }

    def teleported(self, state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`state` with the cube at rest on the floor, where an episode's start may have it and the arm is not."""
        model, data = self._engine.model, self._engine.data
        cube, after = model.geom("object_0").id, state.copy()
        while True:
            yaw = rng.uniform(0, 2 * np.pi)
            after[CUBE] = *rng.uniform(*self._engine.env._object_sampling_bounds), 0.02
            after[CUBE_QUATERNION] = np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)
            after[_CUBE_VELOCITY] = 0
            self._engine.place(after)
            touching = data.contact.geom[(data.contact.geom == cube).any(axis=1)]
            if np.isin(touching, (cube, model.geom("floor").id)).all():
                return after

    def expert_info(self, state: np.ndarray, place: np.ndarray, yaw: float) -> dict[str, Any]:
        """What ogbench's oracles want to know of a state when the cube shall go to `place` (3,) at `yaw`."""
        import mujoco

        engine = self._engine
        engine.place(state)
        engine.data.mocap_pos[0] = place
        engine.data.mocap_quat[0] = [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        mujoco.mj_rnePostConstraint(engine.model, engine.data)  # the gripper feels the cube
        return engine.env.compute_ob_info()

    def _place(self) -> None:
        self._engine.place(self._state)


def coarsen(model: Any, cell: float) -> None:
    """Merges the vertices of a model's meshes that lie in one cube of side `cell`, and drops faces that vanish.

    Only what is drawn changes: contacts come from the convex hulls.
    """
    for i in range(model.nmesh):
        first, count = model.mesh_vertadr[i], model.mesh_vertnum[i]
        start, faces = model.mesh_faceadr[i], model.mesh_facenum[i]
        x, y, z = np.floor(model.mesh_vert[first : first + count].T / cell).astype(np.int64)
        _, kept, of = np.unique((x << 40) + (y << 20) + z, return_index=True, return_inverse=True)
        merged = kept[of][model.mesh_face[start : start + faces]]
        a, b, c = merged.T
        rows = np.flatnonzero((a != b) & (b != c) & (a != c))
        model.mesh_face[start : start + len(rows)] = merged[rows]
        model.mesh_facenormal[start : start + len(rows)] = model.mesh_facenormal[start + rows]
        model.mesh_facenum[i] = len(rows)


class CubeEnv(TaskEnv):
    """One arm with a cube, registered as `lewm/Cube-v0`; see `TaskEnv` and `Cube`."""

    metadata: ClassVar[dict[str, Any]] = {**TaskEnv.metadata, "render_fps": round(1 / Cube.seconds)}
    task_type = Cube


class CubeVectorEnv(TaskVectorEnv):
    """N arms with a cube each: the vector form of `lewm/Cube-v0`; see `TaskVectorEnv` and `Cube`."""

    metadata: ClassVar[dict[str, Any]] = {**TaskVectorEnv.metadata, "render_fps": CubeEnv.metadata["render_fps"]}
    task_type = Cube

    def expert_policy(self) -> ExpertPolicy:
        """The behaviour policy that `lewm.collect(..., policy="expert")` uses."""
        return ExpertPolicy()


class ExpertPolicy:
    """The scripted heuristic behind OGBench's data: grasps the cube, carries it to a place, lets go, and again.

    Actions are those of ogbench's `CubeMarkovOracle` plus N(0, xi^2), three times that for the yaw and ten times for
    the gripper, clipped; xi is drawn from U(0, action_noise) for each episode. The first place is the goal's. After a
    placement, or 200 steps, the next one is drawn, as OGBench does; stable-worldmodel asks for the same place again.

    Args:
        action_noise: Largest standard deviation of the noise.
        seed: Of the policy's own generator, used by calls that bring none.

    Raises:
        ModuleNotFoundError: ogbench is not there.
    """

    def __init__(self, action_noise: float = 0.1, seed: int = 0) -> None:
        if not action_noise >= 0:
            raise ValueError(f"action_noise must be at least 0, got {action_noise}")
        self._task = Cube()
        from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle

        self._env = self._task._engine.env
        self._new_oracle = lambda: CubeMarkovOracle(env=self._env, min_norm=0.4)
        self.action_noise = action_noise
        self._rng = np.random.default_rng(seed)
        self.begin(0)

    def begin(self, n: int) -> None:
        """Forgets the episodes so far; n new ones begin."""
        self._jobs: list[_Job | None] = [None] * n

    def __call__(
        self, states: np.ndarray, goals: np.ndarray, rngs: Sequence[np.random.Generator] | None = None
    ) -> np.ndarray:
        """Actions (N, 5) float32 for states and goals (N, 48); row i draws from `rngs[i]`."""
        rngs = [self._rng] * len(states) if rngs is None else rngs
        if len(states) != len(self._jobs):
            self.begin(len(states))
        actions = np.empty((len(states), 5), dtype=np.float32)
        for i, (state, goal, rng) in enumerate(zip(states, goals, rngs, strict=True)):
            job = self._jobs[i]
            if job is None:
                w, x, y, z = goal[CUBE_QUATERNION]
                yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
                job = _Job(rng.uniform(0, self.action_noise), goal[CUBE].copy(), float(yaw))
                self._jobs[i] = job
                self._start(job, rng)
            elif job.oracle.done:
                low, high = self._env._target_sampling_bounds
                job.place = np.array([*rng.uniform(low, high), 0.02])
                job.yaw = rng.uniform(0, 2 * np.pi)
                self._start(job, rng)
            exact = job.oracle.select_action(None, self._task.expert_info(state, job.place, job.yaw))
            noise = rng.normal(size=5) * job.noise * [1, 1, 1, 3, 10]
            actions[i] = np.clip(exact + noise, -1, 1)
        return actions

    def _start(self, job: _Job, rng: np.random.Generator) -> None:
        job.oracle = self._new_oracle()
        job.oracle.reset(None, None)
        # The oracle draws where the gripper goes afterwards from NumPy's global generator.
        job.oracle._final_pos = rng.uniform(*self._env._arm_sampling_bounds)
        job.oracle._final_yaw = rng.uniform(-np.pi, np.pi)


class _Job:
    """What the expert of one episode is at."""

    oracle: Any

    def __init__(self, noise: float, place: np.ndarray, yaw: float) -> None:
        self.noise, self.place, self.yaw = noise, place, yaw
