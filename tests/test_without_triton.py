"""What works without torch, and with torch but without Triton: on macOS, on Windows, with torch's CPU build."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Finds no module of the packages named, as if they were not installed; everything else is found as before.
HIDE = f"""
import importlib.metadata, importlib.util, sys

class Without:
    def __init__(self, finder, names):
        self.finder, self.names = finder, names

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

hidden = set(sys.argv[1].split(","))
sys.meta_path[:] = [Without(finder, hidden) for finder in sys.meta_path]
version = importlib.metadata.version
def known(name):
    if name in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = known
for name in hidden:
    assert importlib.util.find_spec(name) is None, name
sys.path.insert(0, {str(ROOT / "scripts")!r})
import lewm, numpy as np, smoke
"""

WITHOUT_TORCH = """
from pathlib import Path
from lewm.envs.two_room import frame

smoke.write_model(Path("model.safetensors"))
smoke.plan(Path("model.safetensors"))  # load, plan, Controller
model = lewm.load("model.safetensors")
goal = frame([150, 90], size=64)
small = dict(samples=20, iterations=2, elites=4)
for planner in (lewm.CEM(**small), lewm.ICEM(**small), lewm.MPPI(**small)):
    assert np.isfinite(lewm.plan(goal, goal, model=model, planner=planner).actions).all()

data = lewm.collect("lewm/TwoRoom-v0", "rooms.lewm", episodes=2, size=64)
batch = next(iter(data.loader(batch_size=4, frames=4, stride=5)))
assert batch.frames.shape == (4, 4, 64, 64, 3)
with lewm.StoreWriter("own.lewm", height=64, width=64, action_dim=2, columns={}, metadata="{}") as store:
    store.append(data[0].frames, data[0].actions, {})
np.testing.assert_array_equal(lewm.Dataset("own.lewm")[0].frames, data[0].frames)
lewm.convert("rooms.lewm", "again.h5")
lewm.convert("again.h5", "again.lewm")
np.testing.assert_array_equal(lewm.Dataset("again.lewm")[0].frames, data[0].frames)
result = lewm.evaluate(model, "two-room-25-50", pairs=2, planner=lewm.CEM(**small))
assert result.n == 2

for wanted in (lambda: lewm.train("rooms.lewm"), lambda: lewm.load("model.safetensors", backend="torch")):
    try:
        wanted()
    except ModuleNotFoundError as error:
        assert "torch" in str(error) and "lewm-fast[train]" in str(error), error
    else:
        raise AssertionError("torch was found")
from lewm.doctor import diagnose
found = diagnose()["Back ends"]
assert found["cpu"].startswith("works: float32"), found
assert found["cuda"] == found["torch"] == 'torch is not installed: pip install "lewm-fast[train]"', found
assert not {"torch", "triton"} & set(sys.modules)
print("all of it")
"""

WITHOUT_TRITON = """
from pathlib import Path
import torch
from lewm.losses import sigreg

data = lewm.collect("lewm/TwoRoom-v0", "rooms.lewm", episodes=6, size=64)
settings = dict(preset="tiny", steps=3, batch_size=16, device="cpu")
model = lewm.train(data, out="run", **settings)
assert (Path("run") / "model.safetensors").exists()
assert lewm.evaluate(model, "two-room-25-50", pairs=2).n == 2
obs, goal = data[0].frames[[0, -1]]
for backend in ("cpu", "torch"):
    assert np.isfinite(lewm.plan(obs, goal, model=lewm.load("run", backend=backend, device=None)).actions).all()

generator = torch.Generator().manual_seed(0)
z = torch.randn(2, 16, 8, generator=generator, requires_grad=True)
u = torch.nn.functional.normalize(torch.randn(8, 32, generator=generator), dim=0)
values, gradients = [], []
for backend in ("auto", "rust", "torch"):
    values.append(sigreg(z, u, backend=backend))
    gradients.append(torch.autograd.grad(values[-1], z)[0])
for value, gradient in zip(values, gradients):
    torch.testing.assert_close(value, values[-1], rtol=1e-5, atol=1e-6)  # float32 sums in another order
    torch.testing.assert_close(gradient, gradients[-1], rtol=1e-4, atol=1e-7)
try:
    sigreg(z, u, backend="triton")
except ValueError as error:
    assert "triton" in str(error), error
else:
    raise AssertionError("Triton was found")
try:
    lewm.load("run", backend="cuda")
except (ValueError, ModuleNotFoundError) as error:
    assert "cuda" in str(error).lower() or "triton" in str(error), error
else:
    raise AssertionError("the back end cuda ran without Triton")
from lewm.doctor import diagnose
found = diagnose()["Back ends"]
assert found["torch"].startswith("works: torch"), found
assert "riton" in found["cuda"], found
assert "triton" not in sys.modules
print("all of it")
"""


def run(code, hidden, folder):
    command = [sys.executable, "-c", HIDE + code, hidden]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all of it"


def test_without_torch(tmp_path):
    run(WITHOUT_TORCH, "torch,triton", tmp_path)


def test_with_torch_and_without_triton(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("tensorboard")
    run(WITHOUT_TRITON, "triton", tmp_path)
