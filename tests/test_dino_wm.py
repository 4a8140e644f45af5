import json
import math
import os
import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import lewm
from lewm import dino_wm, latents
from lewm.dino_wm import DinoConfig, DinoNetwork, DinoWM, FrozenViT, random_vit, read_dinov2, train_dino_wm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benches import dino_plan_time

SMALL = {
    "image_size": 32,
    "encoder_size": 28,
    "encoder_dim": 16,
    "encoder_depth": 2,
    "encoder_heads": 2,
    "encoder_mlp": 24,
    "action_embed": 3,
    "predictor_depth": 2,
    "predictor_heads": 2,
    "predictor_head_dim": 8,
    "predictor_mlp": 24,
    "dropout": 0.0,
}
STATS = {"mean": [0.1, 0.0], "std": [0.5, 0.6], "low": [-1.0, -1.0], "high": [1.0, 1.0]}
PLANNER = lewm.CEM(samples=12, iterations=2, elites=3, horizon=2)


def small(history=3, seed=0, meta=None, precision="auto", **overrides):
    config = DinoConfig(action_dim=2, action_block=2, history=history, **{**SMALL, **overrides})
    torch.manual_seed(seed)
    network = DinoNetwork(config)
    network.encoder.load_state_dict({k: torch.from_numpy(v) for k, v in random_vit(config, seed).items()})
    meta = {"encoder": {"source": "random", "seed": seed}} if meta is None else meta
    return DinoWM(config, network.state_dict(), stats=STATS, meta=meta, precision=precision, device="cpu")


def pictures(*shape, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("rooms") / "rooms.lewm"
    return lewm.collect("lewm/TwoRoom-v0", path, episodes=6, size=32, seed=0)


# ------------------------------------------------------------------------------------------------------ architecture


def test_sizes_are_those_of_the_paper():
    paper = DinoConfig(action_dim=2)
    assert (paper.tokens, paper.embed_dim, paper.predictor_dim) == (196, 196 * 384, 394)
    assert (paper.block_dim, paper.positions) == (10, 3 * 196)
    assert replace(paper, encoder_size=224).tokens == 256
    with torch.device("meta"):
        network = DinoNetwork(paper)
    count = sum(p.numel() for p in network.encoder.parameters())
    # ViT-S/14 has 22,056,576 with 37 x 37 positions and the mask token of its training.
    assert count == 22_056_576 - (37**2 - 14**2) * 384 - 384


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("action_dim", 0),
        ("image_size", 5000),
        ("encoder_size", 200),
        ("encoder_heads", 5),
        ("history", True),
        ("dropout", 1.0),
        ("dropout", None),
    ],
)
def test_a_bad_setting_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must.*{re.escape(repr(value))}"):
        DinoConfig(**{"action_dim": 2, name: value})


def norm(x, weight, bias, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def attend(q, k, v, allowed):
    scores = np.where(allowed, q @ k.T / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def naive_predictor(w, config, z, actions):
    """(W, P, D), (W, A) -> (W, P, D): one token, one head at a time, in float64."""
    frames, each, dim = z.shape
    embedded = actions @ w["action_encoder.weight"].T + w["action_encoder.bias"]
    x = np.concatenate([z, np.repeat(embedded[:, None], each, 1)], -1).reshape(frames * each, -1)
    x = x + w["predictor.pos_embedding"][0, : len(x)]
    frame = np.arange(len(x)) // each
    allowed = frame[:, None] >= frame[None]
    heads, width = config.predictor_heads, config.predictor_head_dim
    for i in range(config.predictor_depth):
        a, m = f"predictor.attention.{i}", f"predictor.mlp.{i}"
        qkv = norm(x, w[f"{a}.norm.weight"], w[f"{a}.norm.bias"], 1e-5) @ w[f"{a}.to_qkv.weight"].T
        q, k, v = (part.reshape(len(x), heads, width) for part in np.split(qkv, 3, 1))
        out = np.concatenate([attend(q[:, h], k[:, h], v[:, h], allowed) for h in range(heads)], 1)
        x = x + out @ w[f"{a}.to_out.0.weight"].T + w[f"{a}.to_out.0.bias"]
        hidden = norm(x, w[f"{m}.0.weight"], w[f"{m}.0.bias"], 1e-5) @ w[f"{m}.1.weight"].T + w[f"{m}.1.bias"]
        x = x + gelu(hidden) @ w[f"{m}.4.weight"].T + w[f"{m}.4.bias"]
    x = norm(x, w["predictor.norm.weight"], w["predictor.norm.bias"], 1e-5)
    return x.reshape(frames, each, -1)[..., :dim]


def test_rollouts_and_costs_are_those_of_the_formula():
    model = small(precision="float64")
    config, rng = model.config, np.random.default_rng(0)
    weights = {name: value.numpy() for name, value in model._engine.network.state_dict().items()}
    z = rng.normal(size=(1, 2, config.embed_dim))
    goal = rng.normal(size=(1, config.embed_dim))
    past, candidates = rng.normal(size=(1, 1, 4)), rng.normal(size=(1, 3, 3, 4))
    zs = model.rollout(z, candidates, past)
    assert zs.shape == (1, 3, 5, config.embed_dim)
    for s in range(3):
        blocks = np.concatenate([past[0], candidates[0, s]])
        frames = list(z[0].reshape(2, config.tokens, -1))
        for t in range(2, 5):
            window = slice(max(0, t - 3), t)  # never more than the history
            frames.append(naive_predictor(weights, config, np.stack(frames[window]), blocks[window])[-1])
        np.testing.assert_allclose(zs[0, s], np.stack(frames).reshape(5, -1), rtol=1e-9, atol=1e-9)
        want = np.square(frames[-1].ravel() - goal[0]).mean()
        assert model.costs(z, goal, candidates, past)[0, s] == pytest.approx(want, rel=1e-9)
        assert model.cost(zs, goal)[0, s] == pytest.approx(want, rel=1e-9)


def test_a_frame_sees_all_of_itself_and_nothing_later():
    model = small(precision="float64")
    network, config = model._engine.network, model.config
    z = torch.randn(1, 3, config.embed_dim, dtype=torch.float64)
    actions = torch.randn(1, 3, config.action_embed, dtype=torch.float64)
    before = network.predict(z, actions).unflatten(-1, (config.tokens, -1))
    other = z.clone()
    other[0, 1, -1] += 1  # the last token of the second frame
    after = network.predict(other, actions).unflatten(-1, (config.tokens, -1))
    assert torch.equal(before[:, 0], after[:, 0])
    changed = (before != after).any(-1)[0]
    assert changed[1:].all()


def test_parts_of_candidates_give_the_same(monkeypatch):
    model, rng = small(), np.random.default_rng(1)
    z, goal = rng.normal(size=(2, 1, 64)).astype("f4"), rng.normal(size=(2, 64)).astype("f4")
    candidates = rng.normal(size=(2, 5, 3, 4)).astype("f4")
    whole = model.costs(z, goal, candidates), model.rollout(z, candidates)
    sizes = []
    imagine = DinoNetwork.imagine
    monkeypatch.setattr(DinoNetwork, "imagine", lambda self, z, *rest: sizes.append(len(z)) or imagine(self, z, *rest))
    monkeypatch.setitem(dino_wm._TOKENS, "cpu", 3 * model.config.positions + 1)
    np.testing.assert_allclose(model.costs(z, goal, candidates), whole[0], rtol=1e-5)
    assert sizes == [3, 3, 3, 1]
    np.testing.assert_allclose(model.rollout(z, candidates), whole[1], rtol=1e-4, atol=1e-5)


def test_bfloat16_ranks_alike():
    exact, rng = small(), np.random.default_rng(2)
    z, goal = rng.normal(size=(1, 1, 64)).astype("f4"), rng.normal(size=(1, 64)).astype("f4")
    candidates = rng.normal(size=(1, 40, 2, 4)).astype("f4")
    a, b = (m.costs(z, goal, candidates)[0] for m in (exact, small(precision="bfloat16")))
    np.testing.assert_allclose(a, b, rtol=0.03)  # of values rounded to 8 bits
    assert np.corrcoef(a, b)[0, 1] > 0.99


# --------------------------------------------------------------------------------------------------- DINOv2's weights


def released(grid=5, dim=128, depth=2, mlp=256, seed=0):
    """A random state dict as torch.hub has it: all tensors matter."""
    config = DinoConfig(
        1, encoder_size=14 * grid, encoder_dim=dim, encoder_depth=depth, encoder_heads=dim // 64, encoder_mlp=mlp
    )
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(0, 1 if value.ndim == 1 else value[0].numel() ** -0.5, value.shape).astype("f4")
        for name, value in FrozenViT(config).state_dict().items()
    }
    return {**tensors, "mask_token": np.zeros((1, dim), "f4")}


def transformers_names(tensors, release):
    """The same under transformers' names."""
    attention = "attention" if release == 5 else "attention.attention"
    qkv = ("q_proj", "k_proj", "v_proj") if release == 5 else ("query", "key", "value")
    out = "o_proj" if release == 5 else "output.dense"
    named = {}
    for name, value in tensors.items():
        name = re.sub(r"^(cls_token|mask_token)", r"embeddings.\1", name)
        name = name.replace("pos_embed", "embeddings.position_embeddings")
        name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        name = re.sub(r"^norm\.", "layernorm.", name)
        name = re.sub(r"^blocks\.(\d+)", r"encoder.layer.\1", name)
        name = re.sub(r"ls([12])\.gamma", r"layer_scale\1.lambda1", name)
        name = name.replace("attn.proj", f"attention.{out}")
        if ".attn.qkv." in name:
            parts = zip(qkv, np.split(value, 3), strict=True)
            named |= {name.replace("attn.qkv", f"{attention}.{n}"): part for n, part in parts}
        else:
            named[name] = value
    return named


def write_pth(path, tensors):
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, path)
    return path


def write_safetensors(path, tensors):
    from safetensors.numpy import save

    path.write_bytes(save({name: np.ascontiguousarray(value) for name, value in tensors.items()}))
    return path


@pytest.mark.parametrize("release", [4, 5])
def test_both_namings_are_read_alike(tmp_path, release):
    tensors = released()
    ours, sizes = read_dinov2(write_pth(tmp_path / "dinov2.pth", tensors), 42)
    assert sizes == {
        "patch_size": 14,
        "encoder_dim": 128,
        "encoder_depth": 2,
        "encoder_heads": 2,
        "encoder_mlp": 256,
    }
    theirs, same = read_dinov2(
        write_safetensors(tmp_path / "model.safetensors", transformers_names(tensors, release)), 42
    )
    assert same == sizes
    assert ours.keys() == theirs.keys() == FrozenViT(DinoConfig(1, encoder_size=42, **sizes)).state_dict().keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])
        if name != "pos_embed":
            np.testing.assert_array_equal(value, tensors[name])
    assert ours["pos_embed"].shape == (1, 10, 128)
    same_grid, _ = read_dinov2(tmp_path / "dinov2.pth", 70)
    np.testing.assert_array_equal(same_grid["pos_embed"], tensors["pos_embed"])


@pytest.mark.parametrize("size", [70, 42, 112])
def test_the_vit_is_that_of_transformers(tmp_path, size):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2, image_size=70, patch_size=14
    )
    torch.manual_seed(0)
    theirs = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for value in theirs.parameters():  # also those that start at zero or one
            value.normal_(0, 1 if value.ndim == 1 else value[0].numel() ** -0.5)
    theirs.save_pretrained(tmp_path / "dinov2")
    weights, sizes = read_dinov2(tmp_path / "dinov2", size)
    assert sizes["encoder_heads"] == 4  # by its config.json: they are 32 wide
    ours = FrozenViT(DinoConfig(1, image_size=size, encoder_size=size, **sizes))
    ours.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    frames = torch.from_numpy(pictures(2, size=size))
    pixels = (frames / 255 - torch.tensor(lewm.pixels.MEAN)) / torch.tensor(lewm.pixels.STD)
    with torch.no_grad():
        want = theirs(pixels.permute(0, 3, 1, 2)).last_hidden_state[:, 1:]
        # The order of sums differs; tokens are of size 1.
        torch.testing.assert_close(ours(frames), want, rtol=1e-4, atol=1e-4)


def damaged(tmp_path, **changes):
    return write_pth(tmp_path / "dinov2.pth", {**released(), **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"blocks.1.attn.proj.weight": np.zeros((128, 64), "f4")},
            r"blocks.1.attn.proj.weight \(128, 64\), want \(128, 128\)",
        ),
        ({"register_tokens": np.zeros((1, 4, 128), "f4")}, r"1 unexpected \(register_tokens\)"),
        ({"pos_embed": np.zeros((1, 12, 128), "f4")}, "pos_embed must be of .* a square grid, got 12"),
        ({"pos_embed": np.zeros((1, 26, 64), "f4")}, r"pos_embed \(1, 26, 64\), want \(1, 26, 128\)"),
        ({"patch_embed.proj.weight": np.zeros((128, 4, 14, 14), "f4")}, r"patch_embed.proj.weight must be .*4, 14, 14"),
        (
            {"patch_embed.proj.weight": np.zeros((128, 3, 16, 16), "f4")},
            "encoder_size must be a multiple of patch_size 16",
        ),
        ({"patch_embed.proj.weight": np.zeros(128, "f4")}, r"patch_embed.proj.weight with 4 axes, got \(128,\)"),
        ({"norm.bias": np.full(128, np.nan, "f4")}, "norm.bias holds values that are not finite"),
    ],
)
def test_weights_of_another_architecture_are_refused(tmp_path, changes, text):
    with pytest.raises(ValueError, match=rf"weights: .*dinov2.pth is no DINOv2 ViT.*{text}"):
        read_dinov2(damaged(tmp_path, **changes), 42)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="weights: no such file: .*none.pth"):
        read_dinov2(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        read_dinov2(tmp_path)  # a folder without it
    tensors = released()
    del tensors["norm.weight"]
    with pytest.raises(ValueError, match=r"1 missing \(norm.weight\)"):
        read_dinov2(write_pth(tmp_path / "less.pth", tensors), 42)


def test_a_bad_description_is_refused(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", released())
    for text in ("{", "[]", '{"num_attention_heads": "two"}', '{"num_attention_heads": 0}', "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json does not describe a ViT"):
            read_dinov2(tmp_path, 42)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    with pytest.raises(ValueError, match="encoder_heads must divide encoder_dim 128, got 3"):
        read_dinov2(tmp_path, 42)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_pickles_are_not_run(tmp_path, suffix):
    bomb = Bomb()
    bomb.path = tmp_path / "ran"
    path = tmp_path / f"weights{suffix}"
    with path.open("wb") as file:
        pickle.dump({"cls_token": bomb}, file, protocol=2)  # the one that torch.load reads without a warning
    with pytest.raises(ValueError, match="not run here|is a pickle"):
        read_dinov2(path)
    torch.save({"cls_token": bomb}, path)
    with pytest.raises(ValueError, match="not run here|is a pickle"):
        read_dinov2(path)
    assert not bomb.path.exists()


def test_what_is_no_state_dict_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="holds a list of other things"):
        read_dinov2(path)
    torch.save({"cls_token": torch.zeros(1).expand(10**12)}, path)
    with pytest.raises(ValueError, match="cls_token .* is no plain tensor"):
        read_dinov2(path)
    path.write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="or is damaged"):
        read_dinov2(path)


def test_the_random_vit_is_seeded():
    config = DinoConfig(1, **SMALL)
    one, same, other = random_vit(config, 1), random_vit(config, 1), random_vit(config, 2)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["patch_embed.proj.weight"], other["patch_embed.proj.weight"])
    with pytest.raises(ValueError, match="seed"):
        random_vit(config, -1)


# ----------------------------------------------------------------------------------------------------------- the model


def test_frames_of_other_sizes(tmp_path):
    model = small()
    frames = pictures(2, 3)
    z = model.encode(frames)
    assert z.shape == (2, 3, 4 * 16)
    assert z.dtype == np.float32
    np.testing.assert_allclose(model.encode(frames[1, 2]), z[1, 2], rtol=1e-4, atol=1e-5)
    large = frames[0].repeat(2, 1).repeat(2, 2)
    np.testing.assert_allclose(model.encode(large), z[0], rtol=1e-4, atol=1e-5)
    assert torch.is_tensor(model.encode(torch.from_numpy(frames)))
    with pytest.raises(ValueError, match="frames must be square.*32x16"):
        model.encode(frames[..., :16, :])
    with pytest.raises(ValueError, match="frames must be uint8"):
        model.encode(frames / 255)


def test_it_says_what_its_encoder_is():
    model = small()
    for text in (model.describe(), repr(model), model.label):
        assert "random frozen ViT (no DINOv2 weights given)" in text
    assert "4 tokens of 16" in model.describe()
    assert small(meta={"encoder": {"source": "dinov2"}}).label == "frozen DINOv2 ViT"
    assert small(meta={}).label == "frozen ViT of unknown origin"
    counts = model.parameters()
    assert f"{counts['frozen']:,} parameters frozen, {counts['trained']:,} trained" in model.describe()
    assert sum(counts.values()) == sum(value.size for value in model._engine.weights().values())


def test_a_saved_model_is_the_same(tmp_path):
    model = small(
        meta={"preset": "dino-wm-tiny", "planner": {"samples": 5, "elites": 2}, "encoder": {"source": "random"}}
    )
    model.save(tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        again = DinoWM.load(path, device="cpu")
        assert (again.hash(), again.config, again.meta) == (model.hash(), model.config, model.meta)
        assert all(np.array_equal(again.stats[k], model.stats[k]) for k in STATS)
    np.testing.assert_array_equal(again.encode(pictures(2)), model.encode(pictures(2)))
    other = DinoWM.load(tmp_path, device="cpu", stats={**STATS, "std": [1.0, 2.0]})
    assert other.stats["std"].tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="no model that this release reads"):
        lewm.load(tmp_path)
    with pytest.raises(ValueError, match="path must end in .safetensors"):
        model.save(tmp_path / "model.pt")


def rewritten(path, change):
    from lewm.model_file import read_tensors, write_tensors

    tensors, header = read_tensors(path, "test")
    change(tensors, header)
    write_tensors(path, tensors, header)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t, h: h.update(kind="lewm"), "kind 'lewm'"),
        (lambda t, h: h.update(format_version=9), "format version 9"),
        (lambda t, h: h.update(architecture=[]), "architecture must be a dict"),
        (lambda t, h: h["architecture"].update(depth=3), "unexpected keyword"),
        (lambda t, h: h["architecture"].update(encoder_depth=10**9), "encoder_depth must be an integer"),
        (lambda t, h: h["architecture"].update(predictor_mlp=25), r"predictor.mlp.0.1.bias \(24,\), want \(25,\)"),
        (lambda t, h: h.update(encoder="random"), "encoder must be a dict"),
        (lambda t, h: h.update(stats={}), "stats must hold"),
        (lambda t, h: t.pop("predictor.norm.bias"), r"1 missing \(predictor.norm.bias\)"),
        (lambda t, h: t["predictor.norm.bias"].fill(np.inf), "not finite"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, text):
    path = tmp_path / "model.safetensors"
    small().save(path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=f"DINO-WM: .*model.safetensors is no model.*{text}"):
        DinoWM.load(path)


def test_what_is_no_file_of_its_own_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="DINO-WM: no such file"):
        DinoWM.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="is a pickle"):
        DinoWM.load(tmp_path)
    with pytest.raises(ValueError, match="weights must be those of a LeWorldModel"):
        DinoWM.from_state_dict({})
    with pytest.raises(ValueError, match="form 'onnx' holds a LeWorldModel"):
        small().export("onnx", tmp_path / "onnx")
    with pytest.raises(ValueError, match="no distance head"):
        small().cost_of("distance")
    with pytest.raises(ValueError, match="no action prior"):
        small().prior(np.zeros((1, 64)), np.zeros((1, 64)))
    with pytest.raises(ValueError, match="precision must be"):
        small(precision="int8")


def test_it_plans():
    model = small()
    obs, goal = pictures(2, seed=1), pictures(2, seed=2)
    found = lewm.plan(obs, goal, model=model, planner=PLANNER, return_rollout=True)
    assert found.actions.shape == (2, 4, 2)
    assert (found.backend, found.precision) == ("torch", "float32")
    assert found.imagined.shape == (2, 3, 64)
    want = np.square(found.imagined[:, -1] - model.encode(goal)).mean(-1)
    np.testing.assert_allclose(found.cost, want, rtol=1e-5)
    at_goal = lewm.plan(obs, model.encode(obs), model=model, planner=PLANNER)
    assert np.isfinite(at_goal.cost).all()
    for planner in (
        lewm.ICEM(samples=8, iterations=2, elites=3, horizon=2),
        lewm.MPPI(samples=8, iterations=2, elites=3),
    ):
        assert np.isfinite(lewm.plan(obs[0], goal[0], model=model, planner=planner).cost)
    again = lewm.plan(obs, goal, model=model, planner=PLANNER)
    np.testing.assert_array_equal(found.actions, again.actions)
    with pytest.raises(ValueError, match="history"):
        lewm.plan(pictures(4), goal[0], model=model, planner=PLANNER, past_actions=np.zeros((3, 4)))


def test_a_controller_uses_its_history():
    model = small(history=2)
    control = lewm.Controller(model, pictures(seed=2), planner=PLANNER, execute=1)
    actions = [control(frame) for frame in pictures(5)]
    assert all(a.shape == (2,) and (np.abs(a) <= 1).all() for a in actions)
    assert len(control._latents) == 2


# ------------------------------------------------------------------------------------------------------------ training


def trained(store, **settings):
    settings = {**SMALL, "steps": 8, "batch_size": 4, "warmup": 2, "device": "cpu", **settings}
    return train_dino_wm(store, **settings)


def test_training_is_seeded_and_leaves_the_encoder_alone(store, tmp_path, monkeypatch):
    seen = []
    model = trained(store, out=tmp_path / "run", progress=lambda *state: seen.append(state[:2]), dropout=0.1)
    assert seen == [(i, 8) for i in range(1, 9)]
    assert model.hash() == trained(store, dropout=0.1).hash() != trained(store, dropout=0.1, seed=1).hash()
    assert DinoWM.load(tmp_path / "run", device="cpu").hash() == model.hash()
    encoder = random_vit(model.config, 0)
    weights = model._engine.weights()
    assert all(np.array_equal(value, weights[f"encoder.{name}"]) for name, value in encoder.items())
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "8"]
    assert model.meta["preset"] == "dino-wm-tiny"
    assert model.meta["encoder"] == {"source": "random", "seed": 0}
    assert model.meta["training"]["metrics"]["validation_unchanged"] > 0
    assert len(latents.held_out(model, store)) == 1
    monkeypatch.setattr(dino_wm, "_CACHE", 0)  # every batch is encoded anew: only the rounding to 16 bits differs
    anew = trained(store, dropout=0.1)._engine.weights()
    for name, value in weights.items():
        np.testing.assert_allclose(anew[name], value, atol=2e-3)


def test_it_learns_what_an_action_does(tmp_path):
    """Frames are the sum of the actions so far: of each action a bright bar at one of two places."""
    rng = np.random.default_rng(0)
    actions = rng.choice([-1.0, 1.0], (400, 1))
    frames = np.zeros((400, 28, 28, 3), np.uint8)
    for t in range(1, 400):
        frames[t, :, 0 if actions[t - 1] < 0 else 14 :][:, :14] = 255
    data = lewm.Dataset.from_arrays(frames, actions, np.arange(20, 401, 20), tmp_path / "d.lewm", low=-1, high=1)
    settings = {**SMALL, "image_size": 28, "action_block": 1, "history": 2, "steps": 150, "learning_rate": 5e-3}
    model = train_dino_wm(data, device="cpu", warmup=10, **settings)
    metrics = model.meta["training"]["metrics"]
    # Who does not look at the action, and so guesses between the two, has 0.5 of it.
    assert metrics["validation_prediction"] < 0.25 * metrics["validation_unchanged"]
    z = model.encode(frames[1:3])
    goal = model.encode(frames[actions[:-1, 0].argmax() + 1])
    costs = model.costs(z[:1, None], goal[None], np.array([[[[1.0]], [[-1.0]]]], "f4"))[0]
    assert costs[0] < costs[1]


def test_given_weights_are_the_encoder(store, tmp_path):
    tensors = released()
    path = write_pth(tmp_path / "dinov2.pth", tensors)
    settings = {k: v for k, v in SMALL.items() if not k.startswith("encoder_")}
    model = train_dino_wm(store, weights=path, steps=2, batch_size=2, device="cpu", encoder_size=42, **settings)
    assert model.label == "frozen DINOv2 ViT"
    assert model.meta["encoder"] == {"source": "dinov2", "file": "dinov2.pth"}
    assert (model.config.encoder_dim, model.config.tokens) == (128, 9)
    np.testing.assert_array_equal(model._engine.weights()["encoder.norm.weight"], tensors["norm.weight"])
    with pytest.raises(ValueError, match="encoder_dim must not be given with weights"):
        train_dino_wm(store, weights=path, encoder_dim=64)
    with pytest.raises(FileNotFoundError, match="none.pth"):
        train_dino_wm(store, weights=tmp_path / "none.pth")


def test_bad_arguments_of_training_are_named(store, tmp_path):
    for error, settings, text in (
        (ValueError, {"preset": "small"}, "preset must be one of paper, tiny, got 'small'"),
        (ValueError, {"seed": -1}, "seed"),
        (ValueError, {"steps": 0}, "steps"),
        (ValueError, {"batch_size": 0}, "batch_size"),
        (ValueError, {"learning_rate": float("nan")}, "learning_rate must be a number, finite"),
        (ValueError, {"validation": 1.5}, "validation must be above 0"),
        (ValueError, {"history": 100}, "no window of 101 frames"),
        (ValueError, {"device": "abacus"}, "device"),
        (TypeError, {"depth": 3}, "'depth' is no setting of DINO-WM"),
    ):
        with pytest.raises(error, match=text):
            train_dino_wm(store, **settings)
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="out must be a new or empty folder"):
        train_dino_wm(store, out=tmp_path)
    wide = lewm.Dataset.from_arrays(
        np.zeros((20, 16, 32, 3), np.uint8),
        np.random.default_rng(0).random((20, 2)),
        [10, 20],
        tmp_path / "wide.lewm",
        low=0,
        high=1,
    )
    with pytest.raises(ValueError, match="data must hold square frames, got 16x32"):
        train_dino_wm(wide)
    with pytest.raises(FloatingPointError, match="at step .* the loss is nan"):
        trained(store, learning_rate=1e20, clip=1e30, warmup=0, steps=60)
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".safetensors"] == []


def test_it_is_evaluated(store):
    model = trained(store, action_block=5)
    result = lewm.evaluate(model, "two-room-25-50", pairs=2, planner=PLANNER)
    assert result.n == 2
    assert result.model_hash == model.hash()
    assert result.training is None  # it is no run of LeWM's presets
    assert result.plan_ms["p50"] > 0


# -------------------------------------------------------------------------------------------------------- the bench


def test_the_work_of_a_plan_is_counted():
    """As by hand: a window of w frames is w * P tokens, all of which see each other before the mask."""
    model, planner = small(), lewm.CEM(samples=4, iterations=3, elites=2, horizon=5)
    c = model.config
    d, inner, patches, e = c.predictor_dim, 16, c.tokens, c.encoder_dim
    tokens = [w * patches for w in (1, 2, 3, 3, 3)]
    layer = sum(n * (4 * d * inner + 2 * d * c.predictor_mlp) + 2 * n * n * inner for n in tokens)
    candidate = c.predictor_depth * layer + 5 * c.block_dim * c.action_embed
    seen = patches + 1
    encode = c.encoder_depth * (seen * (4 * e * e + 2 * e * c.encoder_mlp) + 2 * seen * seen * e)
    encode += patches * 3 * c.patch_size**2 * e
    assert dino_plan_time.counted(model, planner) == 2 * (12 * candidate + 2 * encode)


@pytest.mark.slow
def test_the_bench_runs(tmp_path):
    out = tmp_path / "rows.jsonl"
    dino_plan_time.main(["--quick", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["preset"] for row in rows} == {"tiny", "paper"}
    for row in rows:
        assert row["device"]
        assert row["torch"] == torch.__version__
    dino = [row for row in rows if row["system"] == "DINO-WM"]
    assert all("random frozen ViT" in row["encoder"] and row["seconds_per_plan"] > 0 for row in dino)
    assert {row["extrapolated"] for row in dino if row["preset"] == "paper"} == {True}
    ratios = [row for row in rows if "times_lewm" in row]
    assert ratios
