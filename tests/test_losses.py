"""The loss terms on the CPU: exact in float64 (PyTorch), close in float32 (Rust), frugal, no global generator."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode

import lewm.losses as losses
from lewm import _core
from lewm.losses import (
    Directions,
    characteristic_function,
    epps_pulley,
    prediction_loss,
    sigreg,
    sigreg_directions,
)

PARITY = Path(__file__).parent / "parity"
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 31, 17, 13), (4, 64, 32, 33)]


def make(T, B, D, P, dtype=torch.float64):
    z = 1.3 * torch.randn(T, B, D, dtype=dtype, generator=torch.Generator().manual_seed(T * B * D)) + 0.2
    return z.requires_grad_(), sigreg_directions(D, P, seed=3, step=0, dtype=dtype)


def gradient(function, z):
    """(value, gradient) of function at z, in float64."""
    z = z.detach().requires_grad_()
    value = function(z)
    (grad,) = torch.autograd.grad(value, z)
    assert grad.dtype == z.dtype
    return value.detach().double(), grad.double()


@pytest.mark.parametrize("knots", [2, 3, 17])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_float64_is_the_formula(shape, knots, naive_sigreg):
    z, u = make(*shape)
    value, grad = gradient(lambda z: sigreg(z, u, knots=knots), z)
    want, want_grad = gradient(lambda z: naive_sigreg(z, u, knots), z)
    torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-14)


def check(z, u, reference, knots=17, backend="auto", forward=5e-6, backward=1e-5):
    value, grad = gradient(lambda z: sigreg(z, u, knots=knots, backend=backend), z)
    want, want_grad = gradient(lambda z: reference(z, u, knots), z.double())
    assert abs(value - want) <= forward * want
    assert (grad - want_grad).norm() <= backward * want_grad.norm()


@pytest.mark.parametrize("backend", ["rust", "torch"])
@pytest.mark.parametrize("knots", [2, 3, 17, 18])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 97, 3, 129), (1, 5, 259, 3), (2, 1, 33, 257)], ids=str)
@pytest.mark.usefixtures("poison")
def test_float32_is_close_to_the_formula(shape, knots, backend, naive_sigreg):
    check(*make(*shape, dtype=torch.float32), naive_sigreg, knots, backend)


@pytest.mark.usefixtures("poison")
def test_large_projections(naive_sigreg):
    z, u = make(1, 9, 4, 5, dtype=torch.float32)
    check(300 * z.detach(), u, naive_sigreg, forward=1e-5, backward=1e-4)


def test_gradient_is_that_of_finite_differences():
    z, u = make(2, 5, 3, 4)
    assert torch.autograd.gradcheck(lambda z: sigreg(z, u), z)
    assert torch.autograd.gradcheck(lambda z: characteristic_function(z, u), z)


# The official code keeps knots and weights in float32, so float64 agrees with it no better than this.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)], ids=str)
def test_parity_with_the_official_code(dtype, tolerance, monkeypatch):
    monkeypatch.syspath_prepend(str(PARITY))
    sys.modules.pop("rule", None)
    import rule

    case, want = rule.inputs(1), np.load(PARITY / "expected_seed1.npz")
    u = torch.from_numpy(case["sigreg_directions"])
    u = (u / u.norm(dim=0)).to(dtype)
    value, grad = gradient(lambda z: sigreg(z, u), torch.from_numpy(case["sigreg_z"]).to(dtype))
    want_grad = torch.from_numpy(want["sigreg_grad"])
    assert abs(value - float(want["sigreg"])) <= tolerance * float(want["sigreg"])
    assert (grad - want_grad).norm() <= 10 * tolerance * want_grad.norm()


def test_chunks_of_time_change_nothing(monkeypatch):
    z, u = make(5, 7, 3, 11)
    whole = gradient(lambda z: sigreg(z, u), z)
    monkeypatch.setattr(losses, "_CHUNK", 2 * 7 * 11)
    for got, want in zip(gradient(lambda z: sigreg(z, u), z), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_no_large_intermediate(monkeypatch):
    T, B, D, P = 4, 64, 8, 256
    monkeypatch.setattr(losses, "_CHUNK", B * P)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    z, u = make(T, B, D, P)
    with Watch():
        sigreg(z, u).backward()
    assert 0 < largest <= max(B * P, T * 2 * 16 * P)  # a chunk of projections or the characteristic function


def test_averaged_characteristic_functions_give_the_whole_batch():
    z, u = make(2, 12, 5, 7)
    averaged = sum(characteristic_function(part, u) for part in z.split(4, dim=1)) / 3
    torch.testing.assert_close(epps_pulley(averaged, 12).mean(), sigreg(z, u), rtol=1e-12, atol=0)


def test_strides_and_missing_gradients():
    z, u = make(3, 8, 6, 5)
    turned = z.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not turned.is_contiguous()
    columns = u.T.contiguous().T
    assert not columns.is_contiguous()
    torch.testing.assert_close(sigreg(turned, columns), sigreg(z, u).detach())
    assert not sigreg(z.detach(), u).requires_grad
    u.requires_grad_()
    sigreg(z, u).backward()
    assert z.grad is not None
    assert u.grad is None


def test_bfloat16_is_computed_in_float32():
    z, u = make(2, 16, 8, 12, dtype=torch.float32)
    half = z.detach().bfloat16()
    value, grad = gradient(lambda z: sigreg(z, u), half)
    want, want_grad = gradient(lambda z: sigreg(z, u), half.float())
    assert value == want
    torch.testing.assert_close(grad, want_grad.bfloat16().double(), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        inside, inside_grad = gradient(lambda z: sigreg(z, u), half.float())
    assert inside == want
    assert torch.equal(inside_grad, want_grad)


def test_auto_is_rust_in_float32_and_torch_in_float64():
    z, u = make(2, 7, 5, 9, dtype=torch.float32)
    rust, auto, other = (gradient(lambda z, b=b: sigreg(z, u, backend=b), z) for b in ("rust", "auto", "torch"))
    assert torch.equal(auto[0], rust[0])
    assert torch.equal(auto[1], rust[1])
    assert not torch.equal(other[1], rust[1])
    z = z.double()
    assert torch.equal(sigreg(z, u), sigreg(z, u, backend="torch"))
    with pytest.raises(ValueError, match="backend 'rust' cannot run here: z is float64"):
        sigreg(z, u, backend="rust")
    with pytest.raises(ValueError, match="backend 'rust' cannot run here: z is on meta, not on a CPU device"):
        sigreg(z.to("meta"), u.to("meta"), backend="rust")


def test_rust_takes_any_strides():
    z, u = make(3, 8, 6, 5, dtype=torch.float32)
    turned, columns = z.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0), u.T.contiguous().T
    wide = torch.full((3, 16, 6), float("nan"))
    wide[:, ::2] = z.detach()
    want = gradient(lambda z: sigreg(z, u), z)
    for other in (turned, wide[:, ::2]):
        assert not other.is_contiguous()
        got = gradient(lambda z: sigreg(z, columns), other)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    z, u = make(2, 4, 3, 2, dtype=torch.float32)
    with torch.no_grad():
        z[0, 1, 2] = bad
    value, grad = gradient(lambda z: sigreg(z, u), z)
    assert value.isnan()
    assert grad[0].isnan().all()


def test_gradients_of_both_results_add():
    z, u = make(2, 5, 4, 3, dtype=torch.float32)
    weight = torch.linspace(-1, 1, 2 * 2 * 16 * 3).view(2, 2, 16, 3)

    def both(z):
        statistic, ecf = losses._sigreg_cpu(z, u, 17)
        return statistic.sum() + (weight * ecf).sum()

    def torch_only(z):
        ecf = characteristic_function(z, u)
        return epps_pulley(ecf, 5).sum() + (weight * ecf).sum()

    for got, want in zip(gradient(both, z), gradient(torch_only, z.double()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_opcheck():
    z, u = make(2, 3, 4, 5, dtype=torch.float32)
    torch.library.opcheck(losses._sigreg_cpu, (z, u, 17))
    statistic, ecf = (result.detach() for result in losses._sigreg_cpu(z, u, 17))
    for grads in ((statistic, None), (None, ecf), (statistic, ecf)):
        torch.library.opcheck(losses._sigreg_cpu_backward, (z.detach(), u, ecf, *grads))
    step = torch.tensor(3)
    torch.library.opcheck(losses._sigreg_cpu, (z, step, 17, 2, 5))
    torch.library.opcheck(losses._sigreg_cpu_backward, (z.detach(), step, ecf, statistic, None, 2))
    torch.library.opcheck(losses._keyed_directions, (step, 2, 5, 4))


@pytest.mark.skipif(sys.platform == "win32", reason="torch.compile wants a compiler there")
def test_torch_compile_keeps_one_graph():
    z, u = make(2, 3, 4, 5, dtype=torch.float32)
    compiled = torch.compile(lambda z: 0.5 * sigreg(z, u), backend="aot_eager", fullgraph=True)
    eager = gradient(lambda z: 0.5 * sigreg(z, u), z)
    for got, want in zip(gradient(compiled, z), eager, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.slow  # half a minute where nothing is compiled yet
@pytest.mark.skipif(sys.platform == "win32", reason="torch.compile wants a compiler there")
def test_compiled_by_default():
    z, _ = make(2, 3, 4, 5, dtype=torch.float32)

    def function(z):
        return 0.5 * sigreg(torch.tanh(z), Directions(5, 0, torch.tensor(3)))

    compiled = torch.compile(function, fullgraph=True)
    for got, want in zip(gradient(compiled, z), gradient(function, z), strict=True):
        torch.testing.assert_close(got, want)


def test_the_binding_names_what_it_refuses():
    T, B, D, P = 2, 3, 4, 5
    z, u, statistic, ecf = (np.ones(shape, np.float32) for shape in ((T, B, D), (D, P), (T, P), (T, 2, 16, P)))
    forward, backward = losses._core.sigreg_forward, losses._core.sigreg_backward
    forward(z, u, statistic, ecf)
    for arguments, message in [
        ((z[0], u, statistic, ecf), r"z must have shape \(T, B, D\), got \(3, 4\)"),
        ((z, u.T.copy(), statistic, ecf), r"directions must have shape \(4, P\), got \(5, 4\)"),
        ((z, u, statistic[0], ecf), r"statistic must have shape \(2, 5\), got \(5,\)"),
        ((z, u, statistic, ecf[0]), r"ecf must have shape \(2, 2, K - 1, 5\), got \(2, 16, 5\)"),
        ((z, np.ones((P, D), np.float32).T, statistic, ecf), "directions must be C-contiguous"),
        ((z, u, np.ones((P, T), np.float32).T, ecf), "statistic must be C-contiguous"),
        ((z[:0], u, statistic[:0], ecf[:0]), "none of them empty"),
        ((z, u, statistic, ecf[:, :, :0]), "none of them empty"),
        ((z, u, np.broadcast_to(statistic[:1], (T, P)), ecf), "statistic cannot be written to"),
        ((z, (-1, 0), statistic, ecf), r"seed must be an integer in 0\.\.2\^64, got -1"),
        ((z, (0, 2**32), statistic, ecf), r"step must be an integer in 0\.\.2\^32, got 4294967296"),
        ((z, (0, 0), statistic[:, :4], ecf), r"statistic must have shape \(2, 5\), got \(2, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            forward(*arguments)
    for directions in ((1, 2, 3), None, u.astype(float)):
        with pytest.raises(TypeError, match=r"directions must be a float32 array \(D, P\) or \(seed, step\), got"):
            forward(z, directions, statistic, ecf)
    with pytest.raises(ValueError, match=r"statistic_grad must have shape \(2, 5\), got \(5,\)"):
        backward(z, u, ecf, statistic[0], None, z.copy())
    with pytest.raises(ValueError, match=r"z_grad must have shape \(2, 3, 4\), got \(3, 4\)"):
        backward(z, u, ecf, statistic, ecf, z[0].copy())


# The threads of the parent are not those of the child: it has to make its own, and must not wait for the others.
FORK = """
import os, torch
from lewm.losses import Directions, sigreg
def run():
    z = torch.randn(3, 101, 37, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = sigreg(z, Directions(300, 0, 0))
    value.backward()
    return value.detach().numpy().tobytes() + z.grad.numpy().tobytes()
torch.set_num_threads(1)  # torch's own threads do hang
want = run()
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0 if run() == want and run() == want else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert run() == want
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_forked_child_does_not_wait_for_its_parents_threads():
    env = os.environ | {"LEWM_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", FORK], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# Argument: threads. Prints the bytes of value and gradient.
BITS = """
import torch
from lewm.losses import Directions, sigreg
z = torch.randn(3, 101, 37, generator=torch.Generator().manual_seed(0), requires_grad=True)
value = sigreg(z, Directions(300, seed=0, step=0))
value.backward()
print(value.detach().numpy().tobytes().hex(), z.grad.numpy().tobytes().hex())
"""


def test_threads_change_no_bit():
    def bits(threads):
        env = os.environ | {"LEWM_NUM_THREADS": threads}
        return subprocess.run([sys.executable, "-c", BITS], env=env, capture_output=True, text=True, check=True).stdout

    one, two, three = map(bits, "123")
    assert one == two == three != ""


# Arguments: "ours" or "official", and the folder of the benches. Prints by how many bytes the process grew at its
# largest, forward and backward.
PEAK = r"""
import re, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from bench_sigreg import official
from lewm.losses import Directions, sigreg, sigreg_directions

def run(T, B, D, P):
    z = torch.randn(T, B, D, requires_grad=True)
    ours = sys.argv[1] == "ours"
    directions = Directions(P, 0, 0) if ours else sigreg_directions(D, P, seed=0, step=0)
    z.grad = torch.zeros_like(z)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    (sigreg if ours else official)(z, directions).backward()
    return memory("VmHWM") - before

def memory(name):
    return int(re.search(name + r":\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

run(4, 2, 2, 2)
print(run(4, 128, 192, 1024))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell its peak")
def test_extra_memory_is_a_twentieth_of_the_official_formula():
    def peak(which):
        command = [sys.executable, "-c", PEAK, which, str(Path(__file__).parent.parent / "benches")]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    ours, official = peak("ours"), peak("official")
    print(f"{ours / 1e6:.1f} MB against {official / 1e6:.0f} MB")
    assert 0 < ours <= official / 20


def test_reference_values():
    batch, u = 128, sigreg_directions(16, 64, seed=0, step=0)
    assert float(sigreg(torch.zeros(2, batch, 16), u)) / batch == pytest.approx(0.402, abs=5e-4)
    for batch in (32, 256):
        normal = torch.randn(200, batch, 16, generator=torch.Generator().manual_seed(batch))
        assert float(sigreg(normal, u)) == pytest.approx(1.05, abs=0.05)


def test_directions_are_noise_of_their_key_divided_by_its_norm():
    for seed, step, dim, count in [(1, 2, 8, 5), (2**64 - 1, 2**32 - 1, 7, 33), (2**63, 0, 1, 20), (0, 1, 3, 1)]:
        u = sigreg_directions(dim, count, seed=seed, step=step)
        assert u.shape == (dim, count)
        assert u.dtype == torch.float32
        assert u.is_contiguous()
        noise = _core.noise(seed, [2**32 - 1], step, 0, count, dim)[0].T.astype(float)
        np.testing.assert_allclose(u, noise / np.linalg.norm(noise, axis=0), rtol=1e-7, atol=0)
        wide = sigreg_directions(dim, count, seed=seed, step=step, dtype=torch.float64)
        assert torch.equal(wide, u.double())


def test_directions_differ_by_seed_and_step_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    u = sigreg_directions(8, 5, seed=1, step=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(u, sigreg_directions(8, 5, seed=1, step=2))
    assert torch.equal(u, sigreg_directions(8, 9, seed=1, step=2)[:, :5])
    assert not torch.allclose(u, sigreg_directions(8, 5, seed=2, step=1))
    assert not torch.allclose(u, sigreg_directions(8, 5, seed=1, step=3))


@pytest.mark.parametrize("shape", [*SHAPES, (1, 97, 3, 129), (1, 5, 259, 3)], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), [("rust", torch.float32), ("torch", torch.float64)], ids=str)
@pytest.mark.usefixtures("poison")
def test_a_key_gives_the_bits_of_its_directions(shape, backend, dtype):
    z, _ = make(*shape, dtype=dtype)
    D, P = shape[2:]
    for seed, step in ((3, 4), (2**63 + 5, 2**32 - 1)):
        u = sigreg_directions(D, P, seed=seed, step=step)
        want = gradient(lambda z, u=u: sigreg(z, u, backend=backend), z)
        for keyed in (Directions(P, seed, step), Directions(P, seed, torch.tensor(step))):
            got = gradient(lambda z, keyed=keyed: sigreg(z, keyed), z)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
        ecf = characteristic_function(z, Directions(P, seed, step), backend=backend)
        assert torch.equal(ecf, characteristic_function(z, u, backend=backend))


@pytest.mark.skipif(sys.platform == "win32", reason="torch.compile wants a compiler there")
def test_a_compiled_step_that_counts_is_compiled_once():
    z, _ = make(2, 3, 4, 5, dtype=torch.float32)
    step, graphs = torch.tensor(7), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=count, fullgraph=True)
    def train(z, step):
        return 0.5 * sigreg(z, Directions(5, 3, step))

    values = []
    for number in (7, 8, 9):
        assert step == number
        value = train(z, step)
        torch.testing.assert_close(value, 0.5 * sigreg(z, Directions(5, 3, number)))
        value.backward()
        values.append(value.item())
        step += 1
    assert len(set(values)) == 3
    assert len(graphs) == 1


def test_a_step_that_counts_between_forward_and_backward_is_noticed():
    z, _ = make(2, 3, 4, 5, dtype=torch.float32)
    step = torch.tensor(7)
    value = sigreg(z, Directions(5, 3, step))
    step += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_directions_are_uniform_on_the_sphere():
    u = sigreg_directions(3, 20000, seed=0, step=0)
    assert u.mean(1).abs().max() < 0.02
    torch.testing.assert_close(u @ u.T / 20000, torch.eye(3) / 3, rtol=0, atol=0.01)


def test_prediction_loss():
    pred, target = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[0.0, 4.0]], requires_grad=True)
    loss = prediction_loss(pred, target)
    assert float(loss.detach()) == 2.5
    loss.backward()
    assert torch.equal(pred.grad, torch.tensor([[1.0, -2.0]]))
    assert torch.equal(target.grad, -pred.grad)
    assert prediction_loss(pred.bfloat16(), target.bfloat16()).dtype == torch.float32
    assert prediction_loss(pred.double(), target).dtype == torch.float64
    with pytest.raises(ValueError, match=r"\(1, 2\) and \(2,\)"):
        prediction_loss(pred, target[0])


Z, U = torch.zeros(2, 3, 4), torch.ones(4, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Z[0], U), {}, ValueError, r"z must have shape \(T, B, D\).*got \(3, 4\)"),
        ((Z[:, :0], U), {}, ValueError, r"z must have shape.*\(2, 0, 4\)"),
        ((Z.int(), U), {}, TypeError, r"z must be floating, got torch.int32"),
        ((Z, U.int()), {}, TypeError, r"directions must be floating"),
        ((Z, U.T), {}, ValueError, r"directions must have shape \(4, P\).*got \(5, 4\)"),
        ((Z, U[:, :0]), {}, ValueError, r"directions must have shape.*\(4, 0\)"),
        ((Z, U.to("meta")), {}, ValueError, r"directions must be on cpu like z, got meta"),
        ((Z, U), {"knots": 1}, ValueError, r"knots must be at least 2, got 1"),
        ((Z, U), {"backend": "cuda"}, ValueError, r"backend must be 'auto', 'rust', 'torch' or 'triton', got 'cuda'"),
    ],
)
def test_bad_input(arguments, options, error, message):
    for function in (sigreg, characteristic_function):
        with pytest.raises(error, match=message):
            function(*arguments, **options)


def test_triton_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="cannot run here: z is on cpu"):
        sigreg(Z, U, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="z is float64"):
        sigreg(Z.double(), U, backend="triton")
    monkeypatch.setattr(losses.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        sigreg(Z, U, backend="triton")
    assert torch.isfinite(sigreg(Z, U))


@pytest.mark.parametrize(
    ("name", "value"),
    [("dim", 0), ("dim", 2**18 + 1), ("count", 0), ("count", 2**32 + 1), ("seed", -1), ("seed", 2**64), ("step", -1),
     ("step", 2**32)],
)  # fmt: skip
def test_bad_directions(name, value):
    arguments = {"dim": 2, "count": 2, "seed": 0, "step": 0, name: value}
    with pytest.raises(ValueError, match=f"{name} must be in .*, got {value}"):
        sigreg_directions(**arguments)
    if name != "dim":
        arguments.pop("dim")
        with pytest.raises(ValueError, match=f"{name} must be in .*, got {value}"):
            Directions(**arguments)


def test_bad_keys():
    for step, got in ((torch.tensor(1.0), r"torch.float32 \(\)"), (torch.tensor([1]), r"torch.int64 \(1,\)")):
        with pytest.raises(TypeError, match=rf"step must be a number or an int64 tensor of shape \(\), got {got}"):
            Directions(2, 0, step)
    with pytest.raises(ValueError, match="step must be on cpu like z, got meta"):
        sigreg(Z, Directions(2, 0, torch.tensor(1, device="meta")))
    with pytest.raises(ValueError, match=r"z must have shape \(T, B, D\) without a zero, got \(2, 0, 4\)"):
        sigreg(Z[:, :0], Directions(2, 0, 0))
    with pytest.raises(ValueError, match="the width of z must be in .*, got 262145"):
        sigreg(torch.zeros(1, 1, 2**18 + 1), Directions(2, 0, 0))
