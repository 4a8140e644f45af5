"""The PyTorch network against the official code's outputs, and against plainer formulas in float64."""

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lewm.config import ModelConfig, configure
from lewm.network import LeWM, Projector

PARITY = Path(__file__).parent / "parity"
sys.path.insert(0, str(PARITY))
import rule

# float32 against outputs computed in float64: rounding of a 12-layer ViT, and of five predictor steps in `rollout`.
TOLERANCE = {"rollout": 1e-4, "costs": 1e-4}
TIGHT = 1e-5


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.fixture(scope="module")
def case():
    return rule.inputs(1), np.load(PARITY / "expected_seed1.npz")


@pytest.fixture(scope="module")
def official():
    network = LeWM(ModelConfig(action_dim=2))
    network.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in rule.weights(1).items()}, strict=True)
    return network.eval()


def test_the_paper_preset_has_the_official_tensors(official):
    assert len(official.state_dict()) == 303
    assert sum(v.numel() for v in official.state_dict().values()) == 18_042_672


def test_eval_outputs_agree_with_the_official_code(official, case):
    x, want = case
    actions, candidates = (torch.from_numpy(x[k]).float() for k in ("actions", "candidates"))
    with torch.no_grad():
        z = official.encode(torch.from_numpy(x["pixels"]))
        embedded = official.action_encoder(actions)
        now, goal = (official.encode(torch.from_numpy(x[k]))[0] for k in ("obs", "goal"))
        rollout = official.rollout(now.expand(64, 1, -1), candidates[0])
        got = {
            "eval_emb": z,
            "eval_act_emb": embedded,
            "eval_pred": official.predict(z[:, :3], embedded[:, :3]),
            "rollout": rollout[None],
            "costs": (rollout[:, -1] - goal).square().sum(-1)[None],
        }
    for name, value in got.items():
        assert value.shape == want[name].shape
        assert relative(value.numpy(), want[name]) < TOLERANCE.get(name, TIGHT), name


def test_training_losses_and_gradients_agree_with_the_official_code(case):
    from lewm.losses import prediction_loss, sigreg

    x, want = case
    network = LeWM(ModelConfig(action_dim=2, dropout=0.0))
    network.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in rule.weights(1).items()})
    network.train()
    z = network.encode(torch.from_numpy(x["pixels"]))
    embedded = network.action_encoder(torch.from_numpy(x["actions"]).float())
    prediction = prediction_loss(network.predict(z[:, :3], embedded[:, :3]), z[:, 1:])
    directions = torch.nn.functional.normalize(torch.from_numpy(x["sigreg_directions"]).float(), dim=0)
    regulariser = sigreg(z.transpose(0, 1), directions)
    loss = prediction + 0.09 * regulariser
    loss.backward()
    assert relative(prediction.item(), want["train_pred_loss"]) < TIGHT
    assert relative(regulariser.item(), want["train_sigreg"]) < TIGHT
    assert relative(loss.item(), want["train_loss"]) < TIGHT
    # A batch of two puts BatchNorm's gradient where float32 cancels.
    for name in ("encoder", "predictor", "action_encoder", "projector", "pred_proj"):
        key = f"grad_norm_{name}"
        assert key in want, key
        norm = torch.stack([p.grad.norm() for p in getattr(network, name).parameters()]).norm().item()
        assert relative(norm, want[key]) < 1e-3, key
    for key, parameter in (
        ("grad_pos_embedding", network.predictor.pos_embedding),
        ("grad_patch_bias", network.encoder.embeddings.patch_embeddings.projection.bias),
    ):
        assert relative(parameter.grad.numpy().reshape(want[key].shape), want[key]) < 1e-3, key


def small(history=3, **changes):
    config, _ = configure("tiny", 2, {"history": history, "image_size": 16, "patch_size": 8, **changes})
    torch.manual_seed(0)
    network = LeWM(config).double().eval()
    with torch.no_grad():  # open the gates, so that the predictor is not the identity
        for parameter in network.predictor.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def test_patch_embedding_with_folded_pixels_is_the_normalised_convolution():
    network = small()
    frames = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    embed = network.encoder.embeddings.patch_embeddings
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    normalised = (frames.permute(0, 3, 1, 2).double() / 255 - mean) / std
    want = embed.projection(normalised).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(frames), want, rtol=1e-12, atol=1e-12)


def test_encoder_is_the_transformer_written_out():
    """Every layer over all tokens, attention by softmax: what `cls_only` must not change."""
    network = small(encoder_depth=3)
    frames = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    encoder = network.encoder
    x = encoder.embeddings(frames)
    for layer in encoder.layers:
        h, a = layer.layernorm_before(x), layer.attention
        q, k, v = (p(h).unflatten(-1, (a.heads, -1)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + a.o_proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp.fc2(torch.nn.functional.gelu(layer.mlp.fc1(layer.layernorm_after(x))))
    torch.testing.assert_close(encoder(frames), encoder.layernorm(x)[:, 0], rtol=1e-10, atol=1e-10)


def test_predictor_is_causal_and_window_relative():
    network = small()
    z, a = torch.randn(2, 3, 32, dtype=torch.float64), torch.randn(2, 3, 32, dtype=torch.float64)
    whole = network.predict(z, a)
    torch.testing.assert_close(network.predict(z[:, :2], a[:, :2]), whole[:, :2], rtol=1e-10, atol=1e-10)
    changed = z.clone()
    changed[:, 2] += 1
    torch.testing.assert_close(network.predict(changed, a)[:, :2], whole[:, :2], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(network.predict(changed, a)[:, 2], whole[:, 2])


@pytest.mark.parametrize("history", [1, 2, 3])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_rollout_is_prediction_step_by_step(history, frames):
    network = small(history)
    z = torch.randn(4, frames, 32, dtype=torch.float64)
    past = torch.randn(4, frames - 1, 10, dtype=torch.float64) if frames > 1 else None
    future = torch.randn(4, 5, 10, dtype=torch.float64)
    got = network.rollout(z, future, past)
    assert got.shape == (4, frames + 5, 32)
    blocks = future if past is None else torch.cat([past, future], 1)
    sequence = [z[:, t] for t in range(frames)]
    for step in range(5):
        end = frames + step
        start = max(0, end - history)
        context = torch.stack(sequence[start:end], 1)
        sequence.append(network.predict(context, network.action_encoder(blocks[:, start:end]))[:, -1])
    torch.testing.assert_close(got, torch.stack(sequence, 1), rtol=1e-10, atol=1e-10)


def test_a_new_predictor_ignores_actions():
    """AdaLN starts at zero (DiT), so the first gradient steps see a predictor without actions."""
    config, _ = configure("tiny", 2, {})
    network = LeWM(config).eval()
    z = torch.randn(2, 1, 32)
    a, b = torch.randn(2, 2, 1, 32)
    torch.testing.assert_close(network.predict(z, a), network.predict(z, b))


def test_projector_in_training_normalises_over_all_leading_axes():
    torch.manual_seed(0)
    projector = Projector(4, 8, 3).double().train()
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    hidden = projector.net[0](x.flatten(0, 1))
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    want = projector.net[3](torch.nn.functional.gelu(hidden)).unflatten(0, (5, 2))
    torch.testing.assert_close(projector(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("part", ["encode", "predict", "action_encoder"])
def test_gradients_against_finite_differences(part):
    network = small(history=2, encoder_dim=8, encoder_mlp=8, encoder_depth=1, embed_dim=4, projector_hidden=6,
                    predictor_dim=6, predictor_heads=1, predictor_head_dim=4, predictor_mlp=6,
                    action_hidden=5)  # fmt: skip
    frames = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    z, a = torch.randn(2, 2, 4, dtype=torch.float64), torch.randn(2, 2, 10, dtype=torch.float64)

    def run():
        if part == "encode":
            return network.encode(frames)
        embedded = network.action_encoder(a)
        return embedded if part == "action_encoder" else network.predict(z, embedded)

    names = {
        "encode": ("encoder", "projector"),
        "predict": ("predictor", "pred_proj"),
        "action_encoder": ("action_encoder",),
    }
    parameters = [p for name in names[part] for p in getattr(network, name).parameters()]
    torch.manual_seed(1)
    weights = torch.randn_like(run())
    gradients = torch.autograd.grad((run() * weights).sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            step = 1e-6
            parameter.add_(direction, alpha=step)
            above = (run() * weights).sum()
            parameter.sub_(direction, alpha=2 * step)
            below = (run() * weights).sum()
            parameter.add_(direction, alpha=step)
        numeric = ((above - below) / (2 * step)).item()
        analytic = 0.0 if gradient is None else (gradient * direction).sum().item()
        assert analytic == pytest.approx(numeric, rel=1e-5, abs=1e-7)
