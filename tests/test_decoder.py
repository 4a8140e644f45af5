"""The decoder: its network against what it stands for, its training, and its file."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import lewm
from lewm import decoder as module
from lewm.config import configure
from lewm.decoder import Decoder, DecoderNetwork, load_decoder, patch_side, train_decoder
from lewm.latents import held_out
from lewm.model_file import read_tensors, write_tensors
from lewm.network import LeWM
from test_trainer import write_store

SMALL = {"image_size": 16, "patch_size": 8, "encoder_dim": 16, "encoder_depth": 1, "encoder_heads": 1,
         "encoder_mlp": 32, "embed_dim": 24, "projector_hidden": 32, "predictor_depth": 1}  # fmt: skip
STATS = {"mean": [0.0, 0.0], "std": [0.5, 0.5], "low": [-1.0, -1.0], "high": [1.0, 1.0]}
QUICK = {"steps": 150, "hidden": 32, "layers": 2, "device": "cpu"}


def small_model(seed=0, meta=None, **overrides):
    """Random weights: its latents say where things are, if not in so many words."""
    torch.manual_seed(seed)
    config, _ = configure("tiny", 2, {**SMALL, **overrides})
    weights = LeWM(config).state_dict()
    return lewm.Model(config, weights, stats=STATS, meta=meta, backend="cpu", precision="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "square.lewm")


@pytest.fixture(scope="module")
def model(data):
    training = {"validation_episodes": [1, 7]}
    return small_model(meta={"data": {"fingerprint": data.fingerprint()}, "training": training})


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "decoder.safetensors"
    return train_decoder(model, data, out=path, **QUICK), path


def test_patches_are_the_papers_at_its_size_and_divide_any():
    assert [patch_side(size) for size in (224, 64, 16, 37, 1)] == [16, 8, 2, 1, 1]
    for size in range(1, 300):
        side = patch_side(size)
        assert size % side == 0
        assert side <= 16
        assert side == 1 or size // side >= 8


def test_a_layer_is_cross_attention_to_one_token():
    """Against torch's own, in float64: queries, keys and softmax are there, and change nothing."""
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    layer = module._Layer(12).double()
    _, _, value = attention.in_proj_weight.chunk(3)
    with torch.no_grad():
        attention.in_proj_bias.normal_()
        attention.out_proj.bias.normal_()
        layer.value.weight.copy_(attention.out_proj.weight @ value)
        layer.value.bias.copy_(attention.out_proj(attention.in_proj_bias[24:]))
    x, latent = torch.randn(5, 7, 12, dtype=torch.float64), torch.randn(5, 1, 12, dtype=torch.float64)
    attended = x + attention(x, latent, latent)[0]
    torch.testing.assert_close(layer(x, latent), attended + layer.mlp(layer.norm(attended)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 13, 16, 48])
def test_each_query_paints_its_patch(size):
    torch.manual_seed(0)
    network = DecoderNetwork(5, size, hidden=12, layers=2)
    network.start_at(torch.randn(9, 5), torch.zeros(size, size, 3))
    with torch.no_grad():
        network.patches.bias.normal_()
        network.patches.weight.normal_()
        network.mean.normal_()
    z, p = torch.randn(3, 5), network.patch
    painted = network(z)
    assert painted.shape == (3, size, size, 3)
    latent = network.latent(z)[:, None]
    for query in range(network.side**2):
        x = network.queries[query].expand(3, 1, -1)
        for layer in network.layers:
            x = layer(x, latent)
        i, j = divmod(query, network.side)
        area = slice(i * p, (i + 1) * p), slice(j * p, (j + 1) * p)
        want = network.patches(network.norm(x))[:, 0].reshape(3, p, p, 3) + network.mean[area]
        torch.testing.assert_close(painted[:, area[0], area[1]], want)


def test_it_starts_at_the_mean_picture_with_latents_of_unit_scale():
    torch.manual_seed(0)
    network, z, mean = DecoderNetwork(6, 16, 8, 1), 40 + 9 * torch.randn(500, 6), torch.randn(16, 16, 3)
    fresh = (network.latent.weight.clone(), network.latent.bias.clone())
    network.start_at(z, mean)
    torch.testing.assert_close(network(z[:2]), mean.expand(2, -1, -1, -1))
    unit = (z - z.mean(0)) / z.std(0, correction=0)
    torch.testing.assert_close(network.latent(z), torch.nn.functional.linear(unit, *fresh), rtol=1e-4, atol=1e-4)


class Seer:
    """Latents are where the square is."""

    config, meta = SimpleNamespace(image_size=16, embed_dim=2), {}

    def encode(self, frames):
        there = frames[..., 0] / frames[..., 0].sum((-2, -1), keepdims=True)
        return np.stack([(there.sum(axis) * np.arange(16)).sum(-1) for axis in (-1, -2)], -1).astype(np.float32)

    def hash(self):
        return "5" * 64


def test_it_learns_to_paint_what_the_latents_say(data):
    decoder = train_decoder(Seer(), data, **{**QUICK, "steps": 250})
    training = decoder.meta["training"]
    assert training["psnr"] > training["psnr_mean"] + 4
    [episode] = training["validation_episodes"]
    frames = data.frames(episode)
    z = Seer().encode(frames)
    painted = decoder(z)
    assert painted.dtype == np.uint8
    assert painted.shape == frames.shape
    np.testing.assert_allclose(Seer().encode(painted), z, atol=2)
    np.testing.assert_array_equal(decoder(z[3]), painted[3])
    assert f"{training['psnr']:.1f} dB" in repr(decoder)


def test_metrics_are_of_the_held_out_frames(trained, model, data):
    decoder, _ = trained
    assert decoder.meta["training"]["validation_episodes"] == [1, 7]
    assert held_out(decoder, data).tolist() == [1, 7]
    frames = np.concatenate([data.frames(1), data.frames(7)])
    painted = decoder(model.encode(frames))
    assert decoder.meta["training"]["psnr"] == pytest.approx(
        10 * np.log10(255**2 / np.mean((painted - 1.0 * frames) ** 2))
    )
    error = (painted - 1.0 * frames) / 255 / [0.229, 0.224, 0.225]
    assert decoder.meta["training"]["mse"] == pytest.approx(np.mean(error**2))


@pytest.mark.parametrize("frames", [1000, 24])
def test_it_learns_from_training_episodes_alone(model, data, frames, monkeypatch):
    drawn, asked = module._drawn, []

    def noted(model, data, episodes, frames, seed):
        asked.append((sorted(episodes), frames))
        found = drawn(model, data, episodes, frames, seed)
        assert len(found[0]) == len(found[1]) == min(frames, 40 * len(episodes))
        np.testing.assert_allclose(found[1], model.encode(found[0]), rtol=1e-5, atol=1e-6)
        return found

    monkeypatch.setattr(module, "_drawn", noted)
    train_decoder(model, data, **{**QUICK, "steps": 1, "frames": frames})
    assert asked == [([0, 2, 3, 4, 5, 6, 8, 9], frames), ([1, 7], frames)]
    asked.clear()
    decoder = train_decoder(small_model(), data, **{**QUICK, "steps": 1, "frames": frames})  # which learnt elsewhere
    assert [len(episodes) for episodes, _ in asked] == [9, 1]
    assert decoder.meta["training"]["validation_episodes"] == asked[1][0]


def test_it_is_a_function_of_its_seed(model, data, tmp_path):
    before = torch.get_rng_state()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train_decoder(model, data, seed=seed, out=tmp_path / f"{name}.safetensors", **{**QUICK, "steps": 8})
    a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert torch.equal(before, torch.get_rng_state())


def test_progress_is_told(model, data):
    calls = []
    train_decoder(model, data, progress=lambda *call: calls.append(call), **{**QUICK, "steps": 25})
    assert [call[:2] for call in calls] == [(20, 25), (25, 25)]
    assert all(call[2].startswith("mse 0.") for call in calls)


def test_a_file_gives_the_same_pictures(trained, model):
    decoder, path = trained
    again = load_decoder(path, model)
    z = np.random.default_rng(0).standard_normal((2, 3, 24), np.float32)
    assert again(z).shape == (2, 3, 16, 16, 3)
    np.testing.assert_array_equal(again(z), decoder(z))
    assert again.meta == decoder.meta
    assert lewm.load_decoder is load_decoder


def test_a_decoder_of_another_model_is_refused(trained):
    _, path = trained
    with pytest.raises(ValueError, match=r"of another model \(\w{12}, this is \w{12}\): train one of this model"):
        load_decoder(path, small_model(seed=1))


def test_what_is_no_decoder_is_refused(trained, model, tmp_path):
    _, path = trained
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="it is a 'model' of format version 1, want a decoder"):
        load_decoder(tmp_path / "model.safetensors", model)
    with pytest.raises(FileNotFoundError, match="decoder: no such file"):
        load_decoder(tmp_path / "none.safetensors", model)
    torch.save({"x": torch.zeros(1)}, tmp_path / "pickle.safetensors")
    with pytest.raises(ValueError, match="is a pickle, which can run code"):
        load_decoder(tmp_path / "pickle.safetensors", model)
    content = path.read_bytes()
    for end in (0, 1, 8, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.safetensors").write_bytes(content[:end])
        with pytest.raises(ValueError, match="decoder: .*cut.safetensors"):
            load_decoder(tmp_path / "cut.safetensors", model)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format_version": 2}, "of format version 2, want"),
        ({"sizes": None}, "its sizes must be embed_dim"),
        ({"sizes": {"embed_dim": 24, "image_size": 16, "hidden": 32}}, "its sizes must be embed_dim"),
        ({"sizes": {"embed_dim": 24, "image_size": 16, "hidden": 32, "layers": True}}, "layers must be an integer"),
        ({"sizes": {"embed_dim": 24, "image_size": 16, "hidden": 10**9, "layers": 2}}, "below 65537, got 1000000000"),
        ({"sizes": {"embed_dim": 24, "image_size": 16, "hidden": "32", "layers": 2}}, "hidden must be an integer"),
        ({"sizes": {"embed_dim": 24, "image_size": 4093, "hidden": 65536, "layers": 2}}, "weights do not fit"),
        ({"sizes": {"embed_dim": 24, "image_size": 16, "hidden": 32, "layers": 3}}, "10 missing|8 missing"),
        ({"training": []}, "its data and training must be objects"),
        ({"training": {"psnr": "high", "psnr_mean": 1.0, "validation_episodes": []}}, "its psnr must be a number"),
        ({"training": {"psnr": 1.0, "psnr_mean": 1.0, "validation_episodes": [0.5]}}, "validation_episodes must be"),
        ({"model": None}, "of another model"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(trained, model, tmp_path, change, problem):
    tensors, header = read_tensors(trained[1], "decoder")
    write_tensors(tmp_path / "d.safetensors", tensors, {**header, **change})
    with pytest.raises(ValueError, match=problem):
        load_decoder(tmp_path / "d.safetensors", model)
    json.dumps(header)


def test_weights_that_are_no_numbers_are_refused(trained, model, tmp_path):
    tensors, header = read_tensors(trained[1], "decoder")
    broken = {**tensors, "queries": np.full_like(tensors["queries"], np.nan)}
    write_tensors(tmp_path / "d.safetensors", broken, header)
    with pytest.raises(ValueError, match="queries holds values that are not finite"):
        load_decoder(tmp_path / "d.safetensors", model)


def test_bad_arguments_are_named(model, data, tmp_path):
    for settings, error, text in (
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1"),
        ({"steps": 1.5}, TypeError, "steps must be an integer"),
        ({"frames": 0}, ValueError, "frames must be an integer"),
        ({"hidden": 0}, ValueError, "hidden must be an integer"),
        ({"layers": 1000}, ValueError, "layers must be an integer"),
        ({"seed": -1}, ValueError, "seed must be an integer"),
        ({"out": tmp_path / "decoder.pt"}, ValueError, "path must end in .safetensors"),
    ):
        with pytest.raises(error, match=text):
            train_decoder(model, data, **settings)
    decoder = Decoder(DecoderNetwork(24, 16, 8, 1), {"embed_dim": 24, "image_size": 16}, model.hash(), {})
    with pytest.raises(ValueError, match=r"z must be latents \(..., 24\), got shape \(2, 23\)"):
        decoder(np.zeros((2, 23)))
    with pytest.raises(ValueError, match="z must be finite"):
        decoder(np.full((2, 24), np.nan))


def test_frames_that_are_all_alike_teach_nothing(model, tmp_path):
    store = lewm.Dataset.from_arrays(
        np.full((12, 16, 16, 3), 90, np.uint8), np.random.default_rng(0).uniform(-1, 1, (12, 2)), [6, 12],
        tmp_path / "grey.lewm", low=-1, high=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="data must hold frames that differ, got 6 equal ones"):
        train_decoder(model, store, device="cpu")


def test_one_episode_cannot_be_divided(model, tmp_path):
    with pytest.raises(ValueError, match="a split needs at least 2 episodes"):
        train_decoder(model, write_store(tmp_path / "one.lewm", episodes=1), device="cpu")
