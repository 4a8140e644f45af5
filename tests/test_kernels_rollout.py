"""The rollout kernels: on a GPU where there is one, else in Triton's interpreter (see conftest.py)."""

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from lewm.config import configure
from lewm.kernels.rollout import Rollout, Tiles, obstacle, pack
from lewm.network import LeWM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

# Small, with widths that are not powers of two; 3 heads.
SMALL = {
    "image_size": 16, "patch_size": 8, "encoder_dim": 32, "encoder_depth": 1, "encoder_heads": 2, "encoder_mlp": 32,
    "embed_dim": 48, "predictor_dim": 48, "predictor_depth": 2, "predictor_heads": 3, "predictor_head_dim": 16,
    "predictor_mlp": 96, "projector_hidden": 80, "action_hidden": 32, "history": 3,
}  # fmt: skip
OTHER = {"embed_dim": 16, "predictor_heads": 4}  # a latent is not yet a token
WHOLE = Tiles((16, 1, 4), (16, 1, 4), 32, 1)
SHARED = Tiles((16, 3, 4), (32, 3, 4), 32, 1, 16)
PREFIX = {"history": 1, "action_prefix": True, "prefix_blocks": 5}
FORWARD = {"float32": 1e-5, "bfloat16": 2e-2}


def network(seed=0, action_dim=2, **overrides):
    """A network in float64 in which nothing is zero or one."""
    config, _ = configure("tiny", action_dim, {**SMALL, **overrides})
    torch.manual_seed(seed)
    network = LeWM(config).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.1)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.LayerNorm) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
    return config, network


def task(config, environments, samples, frames, horizon, seed=1):
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(environments, frames, config.embed_dim, generator=draw)
    past = torch.randn(environments, frames - 1, config.block_dim, generator=draw) if frames > 1 else None
    return z, past, torch.randn(environments * samples, horizon, config.block_dim, generator=draw)


def rolled(weights, z, past, candidates, **options):
    rollout = Rollout(weights, len(candidates), z.shape[1], candidates.shape[1], **options)
    rollout.candidates.copy_(candidates)
    rollout.observe(z.to(DEVICE), None if past is None else past.to(DEVICE))
    rollout.run()
    return rollout


def reference(network, z, past, candidates):
    each = len(candidates) // len(z)
    with torch.no_grad():
        z, past = (None if t is None else t.double().repeat_interleave(each, 0) for t in (z, past))
        return network.rollout(z, candidates.double(), past)[:, z.shape[1] :].transpose(0, 1)


def error(got, want):
    return ((got.double().cpu() - want).norm() / want.norm()).item()


@pytest.mark.parametrize(
    ("overrides", "environments", "samples", "frames", "horizon"),
    [
        ({"history": 1}, 1, 1, 1, 1),
        ({"history": 1}, 1, 17, 1, 2),
        ({}, 1, 1, 1, 5),  # the window grows, is full, slides
        ({}, 2, 5, 1, 5),
        ({}, 1, 3, 2, 1),
        ({}, 3, 7, 2, 3),
        ({}, 1, 5, 3, 2),  # it is full from the start
        ({"history": 2}, 1, 4, 1, 3),
        ({"history": 4, "predictor_depth": 1}, 1, 2, 1, 6),
        (OTHER, 1, 5, 1, 4),
        ({"action_dim": 11, "action_block": 3}, 1, 3, 1, 2),
        ({"predictor_dim": 16, "embed_dim": 16, "predictor_heads": 1, "predictor_mlp": 16}, 1, 3, 1, 2),
        (PREFIX, 3, 7, 1, 5),  # one pass, in two programs
        (PREFIX, 1, 1, 1, 1),
        (PREFIX, 1, 17, 1, 2),
        (PREFIX | {"prefix_blocks": 2}, 2, 5, 1, 5),  # the last pass is shorter
        (PREFIX | {"prefix_blocks": 2}, 1, 3, 2, 4),
        (PREFIX | OTHER | {"prefix_blocks": 4}, 2, 3, 1, 7),
        (PREFIX | {"prefix_blocks": 8, "predictor_depth": 1}, 1, 2, 1, 8),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poison")
def test_float32(overrides, environments, samples, frames, horizon):
    config, net = network(**overrides)
    z, past, candidates = task(config, environments, samples, frames, horizon)
    weights = pack(config, net.state_dict(), "float32", DEVICE)
    got = rolled(weights, z, past, candidates, every=True, cut=WHOLE)
    assert error(got.latents, reference(net, z, past, candidates)) < FORWARD["float32"]


@pytest.mark.parametrize(
    ("overrides", "cut"),
    [(OTHER, WHOLE), ({}, SHARED), (PREFIX | {"prefix_blocks": 3}, SHARED), (PREFIX | OTHER, SHARED)],
    ids=["whole", "shared", "shared prefixes", "whole pass"],
)
@pytest.mark.usefixtures("poison")
def test_bfloat16(overrides, cut):
    config, net = network(**overrides)
    z, past, candidates = task(config, 2, 3, 1, 4)
    weights = pack(config, net.state_dict(), "bfloat16", DEVICE)
    got = rolled(weights, z, past, candidates, every=True, cut=cut)
    assert error(got.latents, reference(net, z, past, candidates)) < FORWARD["bfloat16"]
    first = got.latents.clone()
    got.run()  # what is added to was cleared
    assert torch.equal(got.latents, first)


def test_sums_of_shares_do_not_depend_on_their_order():
    """Addends are multiples of 2^-16, so even float32 sums are exact; and they are near what they were."""
    config, net = network(projector_hidden=96)
    z, past, candidates = task(config, 1, 5, 1, 4)
    weights = pack(config, net.state_dict(), "float32", DEVICE)
    whole, shared = (rolled(weights, z, past, candidates, cut=cut).latents[-1] for cut in (WHOLE, SHARED))
    assert torch.equal(shared * 2**16, (shared * 2**16).round())
    assert 0 < error(whole, shared.double().cpu()) < 2e-4


def test_a_candidate_does_not_depend_on_the_others():
    config, net = network()
    z, past, candidates = task(config, 1, 21, 1, 3)
    weights = pack(config, net.state_dict(), "float32", DEVICE)
    together = rolled(weights, z, past, candidates, cut=WHOLE).latents[-1]
    alone = rolled(weights, z, past, candidates[19:20], cut=WHOLE).latents[-1]
    assert error(together[19:20], alone.double().cpu()) < 1e-6


@pytest.mark.parametrize("cut", [WHOLE, SHARED], ids=["whole", "shared"])
def test_only_the_last_latent_of_passes(cut):
    """What earlier predictions of a pass are left out does not change the last one."""
    config, net = network(**PREFIX | {"prefix_blocks": 4})
    z, past, candidates = task(config, 2, 5, 1, 6)
    weights = pack(config, net.state_dict(), "float32", DEVICE)
    last = rolled(weights, z, past, candidates, cut=cut)
    assert error(last.latents[-1:], reference(net, z, past, candidates)[-1:]) < (1e-5 if cut is WHOLE else 5e-4)
    first = last.latents[-1].clone()
    last.run()
    assert torch.equal(last.latents[-1], first)


def test_only_the_last_latent_unless_all_are_asked_for():
    config, net = network(**OTHER)
    z, past, candidates = task(config, 1, 3, 1, 3)
    weights = pack(config, net.state_dict(), "float32", DEVICE)
    every, last = (rolled(weights, z, past, candidates, every=every, cut=WHOLE) for every in (True, False))
    assert torch.equal(every.latents[-1], last.latents[-1])
    assert len(last.launches) == len(every.launches) - 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"predictor_mlp": 100}, "predictor_mlp 100 is not a multiple of 16"),
        ({"predictor_head_dim": 24}, "predictor_head_dim 24 is not 16, 32, 64 or 128"),
        ({"history": 5}, "history 5 is above 4"),
        (PREFIX | {"prefix_blocks": 9}, "prefix_blocks 9 is above 8"),
    ],
)
def test_what_the_kernels_cannot_run(change, text):
    config, _ = configure("tiny", 2, {**SMALL, **change})
    assert obstacle(config) == text
    assert obstacle(configure("paper", 2, {})[0]) is None
    assert obstacle(configure("small", 2, {})[0]) is None
    assert obstacle(configure("tiny", 2, {})[0]) is None
