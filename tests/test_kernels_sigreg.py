"""The Triton SIGReg kernels: on a GPU where there is one, else in Triton's interpreter (see conftest.py)."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import lewm.kernels.sigreg as kernels
from lewm.kernels.sigreg import sigreg_backward, sigreg_forward
from lewm.losses import Directions, characteristic_function, epps_pulley, sigreg, sigreg_directions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

# Ones, primes, exact blocks (B 128 and 32, P 32 and 16, D 16 and, with a key, 64), one past a block, two output blocks
# (D > 256), each size alone at 1.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 32, 16, 16), (1, 128, 64, 32), (1, 129, 17, 19), (3, 31, 13, 37),
          (1, 5, 259, 3), (2, 1, 65, 33), (2, 3, 1, 17), (3, 7, 11, 1)]  # fmt: skip
FORWARD, GRADIENT = 1e-5, 1e-4  # relative, float32: what issue and paper-size sums of 1024 x 17 terms call for


SEED, STEP = 2**63 + 3, 5  # what `make` makes its directions from


def make(T, B, D, P, dtype=torch.float32):
    z = 1.3 * torch.randn(T, B, D, generator=torch.Generator().manual_seed(T * B * D)) + 0.2
    return z.to(DEVICE, dtype), sigreg_directions(D, P, seed=SEED, step=STEP, device=DEVICE)


def key(u):
    """The key of directions that `make` made."""
    return Directions(u.shape[1], SEED, torch.tensor(STEP, device=DEVICE))


def gradient(function, z):
    z = z.detach().requires_grad_()
    value = function(z)
    (grad,) = torch.autograd.grad(value, z)
    assert grad.dtype == z.dtype
    return value.detach().double(), grad.double()


def check(z, u, reference, knots=17):
    """Along given directions, and along the same ones from their key."""
    want, want_grad = gradient(lambda z: reference(z, u, knots), z.double())
    for directions in (u, key(u)):
        value, grad = gradient(lambda z, d=directions: sigreg(z, d, knots=knots, backend="triton"), z)
        assert abs(value - want) <= FORWARD * want
        assert (grad - want_grad).norm() <= GRADIENT * want_grad.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_forward_and_gradient(shape, naive_sigreg):
    check(*make(*shape), naive_sigreg)


@pytest.mark.parametrize("knots", [2, 3, 8, 18])
@pytest.mark.usefixtures("poison")
def test_other_numbers_of_knots(knots, naive_sigreg):
    check(*make(2, 6, 5, 9), naive_sigreg, knots)


@pytest.mark.usefixtures("poison")
def test_large_projections(naive_sigreg):
    z, u = make(1, 9, 4, 5)
    check(300 * z, u, naive_sigreg)


@pytest.mark.usefixtures("poison")
def test_strides():
    z, u = make(3, 8, 6, 5)
    turned = z.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    columns = u.T.contiguous().T
    wide = torch.full((3, 16, 6), float("nan"), device=DEVICE)
    wide[:, ::2] = z
    want = gradient(lambda z: sigreg(z, u, backend="triton"), z)
    want_keyed = gradient(lambda z: sigreg(z, key(u), backend="triton"), z)
    for other in (turned, wide[:, ::2]):
        assert not other.is_contiguous()
        for directions, (want_value, want_grad) in ((columns, want), (key(u), want_keyed)):
            value, grad = gradient(lambda z, d=directions: sigreg(z, d, backend="triton"), other)
            assert torch.equal(value, want_value)
            assert torch.equal(grad, want_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32(dtype):
    z, u = make(2, 17, 6, 5, dtype)
    for directions in (u, key(u)):
        value, grad = gradient(lambda z, d=directions: sigreg(z, d, backend="triton"), z)
        want, want_grad = gradient(lambda z, d=directions: sigreg(z, d, backend="triton"), z.float())
        assert value == want
        assert torch.equal(grad, want_grad.to(dtype).double())


def test_without_gradient():
    z, u = make(2, 3, 4, 5)
    assert not sigreg(z, u, backend="triton").requires_grad
    u.requires_grad_()
    z.requires_grad_()
    sigreg(z, u, backend="triton").backward()
    assert z.grad is not None
    assert u.grad is None


def test_same_bits_every_time():
    z, u = make(2, 40, 20, 40)  # the backward pass adds three sums over P
    for directions in (u, key(u)):
        first, again = (gradient(lambda z, d=directions: sigreg(z, d, backend="triton"), z) for _ in range(2))
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 1), (2**64 - 1, 2**32 - 1), (2**40, 2**31)])
def test_every_key_is_that_of_its_directions(seed, step):
    z, _ = make(1, 4, 6, 5)
    u = sigreg_directions(6, 5, seed=seed, step=step, device=DEVICE)
    want = characteristic_function(z, u, backend="triton")
    for number in (step, torch.tensor(step, device=DEVICE)):
        got = characteristic_function(z, Directions(5, seed, number), backend="triton")
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("empty", range(3))
def test_zero_sizes_are_refused(empty):
    z, u = make(2, 3, 4, 5)
    z = z.narrow(empty, 0, 0)
    for directions in (u if empty < 2 else u[:0], key(u)):
        with pytest.raises(ValueError, match=r"z must have shape \(T, B, D\) without a zero, got"):
            sigreg(z, directions, backend="triton")


@pytest.mark.usefixtures("poison")
def test_averaged_characteristic_functions_give_the_whole_batch(naive_sigreg):
    z, u = make(2, 12, 5, 7)

    def in_parts(z):
        averaged = sum(characteristic_function(part, key(u), backend="triton") for part in z.split(4, dim=1)) / 3
        return epps_pulley(averaged, 12).mean()

    value, grad = gradient(in_parts, z)
    want, want_grad = gradient(lambda z: naive_sigreg(z, u), z.double())
    assert abs(value - want) <= FORWARD * want
    assert (grad - want_grad).norm() <= GRADIENT * want_grad.norm()


def test_gradients_of_both_results_add():
    z, u = make(2, 5, 4, 3)
    weight = torch.linspace(-1, 1, 2 * 2 * 16 * 3, device=DEVICE).view(2, 2, 16, 3)

    def both(z):
        statistic, ecf = sigreg_forward(z, u)
        return statistic.sum() + (weight * ecf).sum()

    _, grad = gradient(both, z)
    _, of_statistic = gradient(lambda z: sigreg_forward(z, u)[0].sum(), z)
    _, of_ecf = gradient(lambda z: (weight * sigreg_forward(z, u)[1]).sum(), z)
    torch.testing.assert_close(grad, of_statistic + of_ecf, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_nan_is_not_hidden():
    z, u = make(1, 4, 3, 2)
    z[0, 1, 2] = float("nan")
    assert torch.isnan(sigreg(z, u, backend="triton"))


def test_float64_is_refused():
    z, u = make(1, 2, 3, 4)
    with pytest.raises(TypeError, match="z must be float32, bfloat16 or float16, got torch.float64"):
        sigreg_forward(z.double(), u)


def test_opcheck():
    z, u = make(2, 3, 4, 5)
    z.requires_grad_()
    torch.library.opcheck(sigreg_forward, (z, u, 17, "ieee"))
    statistic, ecf = (result.detach() for result in sigreg_forward(z, u))
    torch.library.opcheck(sigreg_backward, (z.detach(), u, ecf, statistic, None, 17, "ieee"))
    torch.library.opcheck(sigreg_backward, (z.detach(), u, ecf, None, ecf, 17, "ieee"))
    step = torch.tensor(3, device=DEVICE)
    torch.library.opcheck(sigreg_forward, (z, step, 17, "ieee", -2, 5))
    torch.library.opcheck(sigreg_backward, (z.detach(), step, ecf, statistic, None, 17, "ieee", -2))


def test_torch_compile_keeps_one_graph():
    z, u = make(2, 3, 4, 5)
    compiled = torch.compile(lambda z: 0.5 * sigreg_forward(z, u)[0].mean(), backend="aot_eager", fullgraph=True)
    value, grad = gradient(compiled, z)
    want, want_grad = gradient(lambda z: 0.5 * sigreg(z, u, backend="triton"), z)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad, want_grad)


def test_a_compiled_step_that_counts_is_compiled_once():
    z, u = make(2, 3, 4, 5)
    step, graphs = torch.tensor(STEP - 1, device=DEVICE), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=count, fullgraph=True)
    def loss(z, step):
        return 0.5 * sigreg(z, Directions(5, SEED, step), backend="triton")

    other = loss(z, step)
    step += 1
    value, grad = gradient(lambda z: loss(z, step), z)
    want, want_grad = gradient(lambda z: 0.5 * sigreg(z, key(u), backend="triton"), z)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad, want_grad)
    assert other != value
    assert len(graphs) <= 2  # with and without a gradient


@pytest.mark.usefixtures("poison")
def test_parity_with_the_official_code(monkeypatch):
    if DEVICE == "cpu":
        # The interpreter takes its time per tile, whatever the size of the tile.
        large = {"BLOCK_B": 128, "BLOCK_P": 256, "BLOCK_D": 256}
        for name in ("forward_tiles", "backward_tiles"):
            tiles = getattr(kernels, name)
            monkeypatch.setattr(kernels, name, lambda *shape, tiles=tiles: tiles(*shape) | large)
    parity = Path(__file__).parent / "parity"
    monkeypatch.syspath_prepend(str(parity))
    sys.modules.pop("rule", None)
    import rule

    case, want = rule.inputs(1), np.load(parity / "expected_seed1.npz")
    u = torch.from_numpy(case["sigreg_directions"])
    u = (u / u.norm(dim=0)).to(DEVICE, torch.float32)
    z = torch.from_numpy(case["sigreg_z"]).to(DEVICE, torch.float32)
    value, grad = gradient(lambda z: sigreg(z, u, backend="triton"), z)
    want_grad = torch.from_numpy(want["sigreg_grad"]).to(DEVICE).double()
    assert abs(value - float(want["sigreg"])) <= FORWARD * float(want["sigreg"])
    assert (grad - want_grad).norm() <= GRADIENT * want_grad.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 128, 192, 1024), (4, 1000, 384, 1000)], ids=str)
def test_large_shapes_on_a_gpu(shape, naive_sigreg):
    z, u = make(*shape)
    check(z, u, naive_sigreg)
    captured = torch.cuda.CUDAGraph()
    step = torch.tensor(STEP - 1, device=DEVICE)
    sigreg(z, Directions(u.shape[1], SEED, step))  # compiles
    with torch.cuda.graph(captured):
        step += 1
        value = sigreg(z, Directions(u.shape[1], SEED, step))
    captured.replay()
    assert torch.equal(value, sigreg(z, key(u)))
    value, grad = gradient(lambda z: sigreg(z, u), z)  # "auto" is this kernel
    want, want_grad = gradient(lambda z: sigreg(z, u, backend="triton"), z)
    assert torch.equal(value, want)
    assert torch.equal(grad, want_grad)
