"""The two optional loss terms: their formulas, that they train, resume, and leave nothing behind when they are off."""

import csv

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.test_trainer import TINY, write_store

import lewm
from lewm.auxiliary import Auxiliary, Decoder
from lewm.config import configure
from lewm.model_file import read_tensors
from lewm.pixels import MEAN, STD


def auxiliary(**settings):
    torch.manual_seed(0)
    return Auxiliary(*configure("tiny", 2, {**TINY, **settings}))


def inputs(dtype=torch.float32, frames=4):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, frames, 8, generator=generator, dtype=dtype)
    pictures = torch.randint(0, 256, (3, frames, 16, 16, 3), generator=generator, dtype=torch.uint8)
    return z, pictures, torch.randn(3, frames - 1, 10, generator=generator, dtype=dtype)


def test_terms_that_are_off_have_no_parameters_and_no_loss():
    both_off = auxiliary()
    assert not list(both_off.parameters())
    assert both_off(*inputs()) == {}
    assert list(auxiliary(reconstruction=0.5)(*inputs())) == ["reconstruction"]
    assert list(auxiliary(inverse_dynamics=0.5)(*inputs())) == ["inverse_dynamics"]


@pytest.mark.parametrize("frames", [2, 4])
def test_the_terms_are_mean_squared_errors(frames):
    terms = auxiliary(inverse_dynamics=1.0, reconstruction=1.0)
    z, pictures, actions = inputs(frames=frames)
    found = terms(z, pictures, actions)
    errors = [
        terms.inverse_dynamics(torch.cat([z[b, t], z[b, t + 1]])) - actions[b, t]
        for b in range(3) for t in range(frames - 1)
    ]  # fmt: skip
    torch.testing.assert_close(found["inverse_dynamics"], torch.stack(errors).square().mean())
    errors = [
        terms.reconstruction(z[b, t][None])[0, c] - (pictures[b, t, ..., c] / 255 - MEAN[c]) / STD[c]
        for b in range(3) for t in (0, frames - 1) for c in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(found["reconstruction"], torch.stack(errors).square().mean())


def test_both_terms_have_the_gradients_of_their_values():
    terms = auxiliary(inverse_dynamics=1.0, reconstruction=1.0, head_hidden=8).double()
    z, pictures, actions = inputs(torch.float64)

    def weighted(z):
        losses = terms(z, pictures, actions)
        return losses["inverse_dynamics"] + losses["reconstruction"]

    # A sum in float32 within: what is compared is a directional derivative.
    z.requires_grad_(True)
    (gradient,) = torch.autograd.grad(weighted(z), z)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)
    with torch.no_grad():
        numeric = (weighted(z + 1e-2 * direction) - weighted(z - 1e-2 * direction)) / 2e-2
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=2e-3)


@pytest.mark.parametrize("size", [8, 16, 21, 36, 64, 96, 224])
def test_a_decoder_paints_pictures_of_any_size(size):
    assert Decoder(5, size)(torch.zeros(2, 5)).shape == (2, 3, size, size)


def test_actions_that_latents_tell_are_learnt():
    terms = auxiliary(inverse_dynamics=1.0)
    optimiser = torch.optim.AdamW(terms.parameters(), 3e-3)
    z, pictures, _ = inputs()
    actions = (z[:, 1:] - z[:, :-1]).repeat(1, 1, 2)[..., :10]
    losses = []
    for _ in range(100):
        losses.append(terms(z, pictures, actions)["inverse_dynamics"])
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1].item() < 0.1 * losses[0].item()


def test_a_run_with_both_terms_lowers_them_resumes_and_saves_the_model_alone(tmp_path):
    store = write_store(tmp_path / "square.lewm")
    settings = {**TINY, "steps": 80, "inverse_dynamics": 0.5, "reconstruction": 0.5}
    arguments = {"preset": "tiny", "device": "cpu", "checkpoint_every": 20, **settings}
    whole = lewm.train(store, out=tmp_path / "whole", **arguments)
    with (tmp_path / "whole" / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert float(table[-1]["reconstruction"]) < 0.9 * float(table[0]["reconstruction"])
    assert 0 < float(table[-1]["inverse_dynamics"]) < 2
    tensors, _ = read_tensors(tmp_path / "whole" / "model.safetensors", "model")
    plain = lewm.train(store, preset="tiny", out=tmp_path / "plain", device="cpu", **{**TINY, "steps": 1})
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in read(tmp_path / "plain").items()}
    assert plain.config == whole.config

    def interrupt(done, total, metrics):
        if done == 47:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lewm.train(store, out=tmp_path / "cut", progress=interrupt, **arguments)
    assert lewm.train(store, out=tmp_path / "cut", resume=True, **arguments).hash() == whole.hash()


def read(folder):
    return read_tensors(folder / "model.safetensors", "model")[0]


@pytest.mark.parametrize("name", ["inverse_dynamics", "reconstruction"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "much"])
def test_a_weight_is_a_number_that_is_not_negative(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        configure("tiny", 2, {name: value})


def test_gradients_reach_the_latents_of_every_frame_that_a_term_sees():
    z, pictures, actions = inputs()
    z.requires_grad_(True)
    terms = auxiliary(inverse_dynamics=1.0, reconstruction=1.0)
    losses = terms(z, pictures, actions)
    (by_actions,) = torch.autograd.grad(losses["inverse_dynamics"], z, retain_graph=True)
    (by_pictures,) = torch.autograd.grad(losses["reconstruction"], z)
    assert (np.abs(by_actions.numpy()).sum((0, 2)) > 0).all()
    assert ((np.abs(by_pictures.numpy()).sum((0, 2)) > 0) == [True, False, False, True]).all()
