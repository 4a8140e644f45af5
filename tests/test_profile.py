"""The profile: it counts what is computed, times the steps that are trained, and tells the device from the host."""

import json

import pytest

torch = pytest.importorskip("torch")

import lewm
from lewm import profile, trainer
from lewm.config import configure
from lewm.profile import Profile, peak_flop, profiled, training_flop
from test_trainer import TINY, run_of, store  # noqa: F401 (a fixture)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"history": 2, "dropout": 0.1},
        {"history": 1, "dropout": 0.1},
        {"history": 1, "action_prefix": True, "prefix_blocks": 3, "frames": 6},
        {"embed_dim": 16, "encoder_depth": 3, "predictor_depth": 2, "frames": 5, "history": 3},
    ],
)
def test_the_work_of_a_step_is_what_torch_counts(store, monkeypatch, settings):  # noqa: F811
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Torch does not see into SIGReg, which is no product of its own: projections and their gradient, by hand.
    monkeypatch.setattr(trainer, "sigreg", lambda z, *_, **__: z.square().mean())
    run = run_of(store, **settings)
    batch = next(run._batches(0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run._step(*batch)
    config, model = run.config, run.model_config
    sigreg = 2 * 2 * config.batch_size * config.frames * model.embed_dim * config.directions
    assert counter.get_total_flops() + sigreg == training_flop(model, config)


def test_the_work_of_a_step_of_the_paper_is_as_published():
    model, config = configure("paper", 2, {})
    # The published count has the last encoder layer for all patches, and a gradient for pixels.
    more = 3 * (256 * (2 * 192 * 192 + 2 * 192 * 768) + 2 * 256 * 257 * 192) + 256 * 588 * 192
    total = training_flop(model, config) + 2 * 4 * 128 * more
    assert total == pytest.approx(5.24e12, rel=2e-3)
    assert training_flop(model, config) == pytest.approx(4.8475e12, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "tflop"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
    ],
)
def test_known_devices_have_the_peak_of_their_data_sheet(monkeypatch, name, tflop):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flop(torch.device("cuda"), "bfloat16") == (tflop * 1e12, "data sheet")


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "float32"),
        ("Another GPU", "bfloat16"),
    ],
)
def test_the_peak_of_other_devices_is_measured(monkeypatch, name, precision):
    class Measured(Exception):
        pass

    def arange(size, device, dtype):
        assert size == 8192**2
        raise Measured

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "arange", arange)
    with pytest.raises(Measured):
        peak_flop(torch.device("cuda"), precision)


def test_a_profile_is_of_the_steps_that_are_trained_and_writes_nothing(store, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profile, "_STEPS", 4)
    watched, plain = run_of(store, dropout=0.1, steps=2), run_of(store, dropout=0.1, steps=2)
    found = profiled(watched)
    assert found.steps == 4
    for batch in plain._batches(0, 4 + 4):  # after four of warming up, whatever the length of the run
        plain._step(*batch)
        plain.step += 1
    for a, b in zip(watched.network.state_dict().values(), plain.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert watched.clock is None
    assert not list(tmp_path.iterdir())
    assert list(found.parts) == ["data", "copy", *profile._COMPUTED, "host"]
    assert all(ms > 0 for ms in found.parts.values())
    assert found.p95_ms >= found.p50_ms
    assert found.frames_per_s == pytest.approx(1e3 * 16 * 4 / found.p50_ms, rel=1e-3)
    assert found.mfu == pytest.approx(1e3 * found.tflop / found.p50_ms / found.peak_tflop_per_s, rel=0.01)
    assert (found.device, found.peak_from, found.peak_mb) == ("cpu", "measured", None)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_train_profiles_when_asked(store, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(profile, "_STEPS", 3)
    arguments = {"preset": "tiny", "device": "cpu", "profile": True, "out": tmp_path / "run", **TINY}
    found = lewm.train(store, **arguments)
    assert isinstance(found, Profile)
    assert not (tmp_path / "run").exists()
    text = str(found)
    assert "MFU" in text
    assert all(part in text for part in found.parts)
    with pytest.raises(ValueError, match="resume must be False with profile"):
        lewm.train(store, resume=True, **arguments)


class Machine:
    """A host that issues work to a device, in milliseconds, behind the part of torch.cuda that a profile uses."""

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        torch_cuda = {
            "current_stream": lambda device: self,
            "Event": lambda enable_timing: Event(self),
            "synchronize": lambda device: self.wait(self.device),
            "reset_peak_memory_stats": lambda device: None,
            "max_memory_allocated": lambda device: 5e6,
            "get_device_name": lambda device: "NVIDIA H100 80GB HBM3",
            "device": lambda device: pytest.MonkeyPatch.context(),
            "_sleep": lambda cycles: self.issue(0, cycles / 2e6),
        }
        for name, value in torch_cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(profile.time, "perf_counter", lambda: self.host / 1e3)

    def issue(self, host, device):
        self.host += host
        self.device = max(self.device, self.host) + device

    def wait(self, time):
        self.host = max(self.host, time)

    def record_event(self, event):
        event.at = self.device = max(self.device, self.host)
        return event


class Event:
    def __init__(self, machine):
        self.machine = machine

    def synchronize(self):
        self.machine.wait(self.at)

    def elapsed_time(self, other):
        return other.at - self.at


class Simulated:
    """A run whose parts take what they are said to take: (host, device) each."""

    preset, amp, compiled, step, clock = "tiny", True, True, 0, None
    device = torch.device("cuda")

    def __init__(self, machine, host, device, loader=0.0, copy=0.0):
        self.machine, self.host, self.parts, self.loader, self.copy = machine, host, device, loader, copy
        self.model_config, self.config = configure("tiny", 2, {})

    def _batches(self, start, end):
        ready = self.machine.host
        for _ in range(start, end):
            ready += self.loader  # one batch after the other, whatever the host does
            self.machine.wait(ready)
            self.mark("data")
            self.machine.device = max(self.machine.device, ready + self.copy)
            self.mark("copy")
            yield None, None

    def _step(self, frames, actions):
        self.mark("host")
        for part, device in zip(profile._COMPUTED, self.parts, strict=True):
            self.machine.issue(self.host, device)
            self.mark(part)

    def mark(self, part):
        if self.clock:
            self.clock(part)


def test_on_cuda_the_parts_are_the_devices_and_the_host_is_what_it_waits_for(monkeypatch):
    parts = [5.0, 2.0, 1.0, 4.0, 9.0, 3.0]
    # The host is fast: the device is never idle.
    found = profiled(Simulated(Machine(monkeypatch), 0.1, parts))
    assert list(found.parts.values()) == pytest.approx([0, 0, *parts, 0], abs=1e-6)
    assert found.p50_ms == pytest.approx(24)
    assert found.mfu == pytest.approx(found.tflop / 24e-3 / 989.4, rel=1e-3)
    assert (found.device, found.peak_from, found.peak_mb) == ("NVIDIA H100 80GB HBM3", "data sheet", 5)
    # It takes 6 ms to issue each part: 36 ms a step, of which the device computes as much as before.
    found = profiled(Simulated(Machine(monkeypatch), 6.0, parts))
    assert list(found.parts.values()) == pytest.approx([0, 0, *parts, 12], abs=1e-6)
    assert found.p50_ms == pytest.approx(36)
    # The loader takes 40 ms for a batch. The device gets through its work meanwhile and waits.
    found = profiled(Simulated(Machine(monkeypatch), 0.1, parts, loader=40))
    assert found.p50_ms == pytest.approx(40)
    assert found.parts["data"] == pytest.approx(16, abs=0.2)
    assert found.parts["host"] == pytest.approx(0, abs=0.2)
    # The copy comes 2 ms after the batch: hidden behind the last step, unless the loader is late as well.
    found = profiled(Simulated(Machine(monkeypatch), 0.1, parts, loader=40, copy=2))
    assert found.parts["copy"] == pytest.approx(2, abs=0.2)
    assert found.parts["data"] == pytest.approx(14, abs=0.3)
    assert found.p50_ms == pytest.approx(40)


def test_devices_without_a_clock_are_refused(store):  # noqa: F811
    run = run_of(store)
    run.device = torch.device("mps")
    with pytest.raises(ValueError, match="device must be a CPU or CUDA for a profile, got 'mps'"):
        profiled(run)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_profile_on_a_gpu_adds_up(store, compiled):  # noqa: F811
    found = lewm.train(store, preset="tiny", device="cuda", compile=compiled, profile=True, **TINY)
    assert 0 < found.mfu < 1
    assert found.compiled is compiled
    assert found.peak_mb > 0
    assert all(found.parts[part] > 0 for part in profile._COMPUTED)
    assert sum(found.parts.values()) >= 0.95 * found.p50_ms
    assert trainer._generator(torch.device("cuda")) is torch.cuda.default_generators[torch.cuda.current_device()]
