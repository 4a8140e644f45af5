"""Plans with the installed lewm from a tiny model file, and says how long each step took.

    python scripts/smoke.py            # what `pip install lewm-fast` alone must be able to do
    python scripts/smoke.py --train    # the same, then trains a model on collected episodes: wants torch, not triton

The release runs it on every wheel, in an environment that holds the wheel and its base dependencies. It imports nothing
of the checkout: run it from anywhere but `python/`.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STARTED = time.perf_counter()


@contextmanager
def step(name: str) -> Iterator[None]:
    """Prints how long the block took."""
    start = time.perf_counter()
    yield
    print(f"{name}: {time.perf_counter() - start:.2f} s", flush=True)


def write_model(path: Path) -> None:
    """Writes an untrained model of preset tiny for two actions: weights from a seed, and all that planning needs."""
    import numpy as np

    import lewm
    from lewm.config import PRESETS, configure
    from lewm.model_file import tensor_shapes

    config, _ = configure("tiny", 2, {})
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("num_batches_tracked"):
            weights[name] = np.asarray(1, np.int64)
        elif name.endswith("running_var"):
            weights[name] = np.ones(shape, np.float32)
        else:
            weights[name] = rng.normal(0, 0.1, shape).astype(np.float32)
    stats = {"mean": [0.0, 0.1], "std": [0.5, 0.6], "low": [-1.0, -1.0], "high": [1.0, 1.0]}
    meta = {"preset": "tiny", "planner": PRESETS["tiny"].planner}
    lewm.Model(config, weights, stats=stats, meta=meta, backend="cpu").save(path)


def plan(path: Path) -> None:
    """Loads the model, plans twice and runs a controller; what comes out must be within bounds, and repeatable."""
    import numpy as np

    import lewm
    from lewm.envs.two_room import frame

    with step("lewm.load"):
        model = lewm.load(path)
    obs, goal = (frame(point, size=64) for point in ([60, 60], [150, 90]))
    with step("lewm.plan"):
        found = lewm.plan(obs, goal, model=model, seed=1)
    again = lewm.plan(obs, goal, model=model, seed=1)
    assert np.array_equal(found.actions, again.actions), "the same plan came out different"
    assert np.abs(found.actions).max() <= 1, found.actions  # nor is NaN
    controller = lewm.Controller(model, goal)
    actions = np.array([controller(obs) for _ in range(2 * model.config.action_block)])
    assert np.abs(actions).max() <= 1, actions
    print(f"planned on {found.backend} in {found.precision}, {found.latency_ms:.1f} ms a plan", flush=True)


def train(folder: Path) -> None:
    """Collects a few episodes, trains on them for five steps, and plans with what came out."""
    import numpy as np

    import lewm

    with step("lewm.collect"):
        data = lewm.collect("lewm/TwoRoom-v0", folder / "rooms.lewm", episodes=6, size=64)
    with step("lewm.train"):
        model = lewm.train(data, preset="tiny", out=folder / "run", steps=5, batch_size=32)
    frames = data[0].frames
    with step("lewm.plan with it"):
        found = lewm.plan(frames[0], frames[-1], model=model)
    assert np.isfinite(found.actions).all(), found.actions


def main() -> None:
    """Runs what was asked for; an exception ends it with a status other than 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train and plan with what was trained; wants torch")
    arguments = parser.parse_args()
    with step("import lewm"):
        import lewm
    print(f"lewm {lewm.__version__}, Python {platform.python_version()}, {platform.platform()}", flush=True)
    assert not {"torch", "triton"} & set(sys.modules), "importing lewm loaded torch or triton"
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder, "model.safetensors"))
        plan(Path(folder, "model.safetensors"))
        if arguments.train:
            train(Path(folder))
    print(f"all: {time.perf_counter() - STARTED:.2f} s", flush=True)


if __name__ == "__main__":
    main()
