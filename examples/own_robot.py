"""From NumPy arrays to a controller, on a fake robot with a camera. docs/own-robot.md explains it, block by block.

Takes about two minutes on two cores; needs the extra `train`.
"""

import time

import numpy as np

import lewm


class FakeRobot:
    """A crane seen from above: its boom turns (joint 0, rad) and a trolley drives along it (joint 1, m).

    `move` and `picture` are what a robot has to offer; `joints` is only looked at to count successes.
    """

    period = 0.1  # seconds between two actions
    low, high = np.array([-1.2, -0.6]), np.array([1.2, 0.6])  # bounds of an action, in rad/s and m/s
    ends = np.array([[-1.2, 0.4], [1.2, 1.4]])  # where the joints stop, in rad and m

    def __init__(self, seed):
        self.joints = np.random.default_rng(seed).uniform(*self.ends)

    def move(self, velocity):
        """Moves for a period; gives the velocity (2,) that the joints really had, for they stop at their ends."""
        before, velocity = self.joints, np.clip(velocity, self.low, self.high)
        self.joints = np.clip(before + self.period * velocity, *self.ends)
        return (self.joints - before) / self.period

    def picture(self, size=64):
        """(size, size, 3) uint8: 2 m x 2 m, the trolley in red."""
        angle, reach = self.joints
        y, x = np.mgrid[1 : -1 : size * 1j, -1 : 1 : size * 1j]
        away = np.hypot(x - reach * np.sin(angle), y + 0.8 - reach * np.cos(angle))
        covered = np.clip(1.5 - away / 0.2, 0, 1)[..., None]
        return (235 * (1 - covered) + np.array([200, 40, 40]) * covered).astype(np.uint8)


def wander(seed):
    """Random velocities (2,) without end, each kept for half a second on average."""
    rng = np.random.default_rng(seed)
    while True:
        velocity = rng.uniform(FakeRobot.low, FakeRobot.high)
        for _ in range(rng.geometric(0.2)):
            yield velocity


frames, actions, episode_ends = [], [], []
for episode in range(200):
    robot, velocities = FakeRobot([4, episode]), wander([5, episode])
    for _ in range(100):
        frames.append(robot.picture())
        actions.append(robot.move(next(velocities)))  # what was executed, not what was asked for
    frames.append(robot.picture())
    actions.append([np.nan, np.nan])  # the last picture of an episode leads nowhere
    episode_ends.append(len(frames))

data = lewm.Dataset.from_arrays(
    np.stack(frames),  # (N, 64, 64, 3) uint8
    np.array(actions),  # (N, 2) in rad/s and m/s
    episode_ends,
    "crane.lewm",
    low=FakeRobot.low,
    high=FakeRobot.high,
)

model = lewm.train(data, preset="tiny", steps=600, out="runs/crane")
print(model.describe())


def steer(goal):
    """A controller to the goal's picture; it plans anew every half second."""
    planner = lewm.ICEM(samples=100, iterations=10)
    return lewm.Controller(model, goal.picture(), planner=planner, execute=1, shrink=True, deadline_ms=50)


robot, goal = FakeRobot([1, 0]), FakeRobot([2, 0])
controller = steer(goal)
for _ in range(50):
    robot.move(controller(robot.picture()))
print("now", robot.joints, "goal", goal.joints)


def reaches(act, robot, goal):
    """Whether the robot comes within 0.1 rad and 0.05 m of the goal in 5 s."""
    for _ in range(50):
        robot.move(act(robot.picture()))
        if (np.abs(robot.joints - goal.joints) < [0.1, 0.05]).all():
            return True
    return False


planned, by_chance, trials = 0, 0, 100
for trial in range(trials):
    goal, velocities = FakeRobot([2, trial]), wander([3, trial])
    planned += reaches(steer(goal), FakeRobot([1, trial]), goal)
    by_chance += reaches(lambda _, velocities=velocities: next(velocities), FakeRobot([1, trial]), goal)
print(f"goals reached: {planned} of {trials}, with random velocities {by_chance}")

robot, goal = FakeRobot([1, 1]), FakeRobot([2, 1])
started = time.monotonic()


def read():
    """30 pictures a second; after a second the camera hangs, for half a second."""
    hangs = 1.0 < time.monotonic() - started < 1.4
    time.sleep(0.5 if hangs else 1 / 30)
    return robot.picture()


controller = steer(goal)
with lewm.Camera(read) as camera:
    controller(camera.latest(max_age_ms=1000, timeout_ms=5000).picture)  # the first picture, and a plan to warm up
    controller.reset()
    executed, due = None, time.monotonic()
    for _ in range(50):
        try:
            picture = camera.latest(max_age_ms=100).picture
        except lewm.StaleFrame as stale:
            print("holding:", stale)
            robot.move(np.zeros(2))
            controller.reset()  # plan anew from what is seen next
            executed = None
        else:
            executed = robot.move(controller(picture, executed=executed))
        due += robot.period
        time.sleep(max(0, due - time.monotonic()))
print("now", robot.joints, "goal", goal.joints)
