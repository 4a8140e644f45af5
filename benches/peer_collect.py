"""stable-worldmodel's World collecting with random actions: what `benches.collecting` starts in the Python that has it.

PYTHON benches/peer_collect.py ID SIZE EPISODES STEPS NUM_ENVS FORMAT     prints frames a second
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from importlib.metadata import version

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def main() -> None:
    import stable_worldmodel as swm
    from stable_worldmodel.policy import RandomPolicy

    name, form = sys.argv[1], sys.argv[6]
    size, episodes, steps, count = map(int, sys.argv[2:6])
    world = swm.World(name, num_envs=count, image_shape=(size, size), max_episode_steps=steps)
    world.set_policy(RandomPolicy(seed=0))
    with tempfile.TemporaryDirectory() as folder:
        for part, number in (("warm", count), ("timed", episodes)):
            started = time.perf_counter()
            world.collect(path=os.path.join(folder, part), episodes=number, seed=0, format=form, progress=False)
            seconds = time.perf_counter() - started
    print(json.dumps({"frames_per_s": episodes * steps / seconds, "version": version("stable-worldmodel")}))


if __name__ == "__main__":
    main()
