"""LeWorldModel in plain PyTorch: the readable truth that the other back ends are tested against.

Encoder (ViT, [CLS] of the last layer) and projector turn a frame into one latent; the action encoder embeds a block of
actions; the AdaLN transformer predicts the next latent (paper section 3.1, appendix D). Module names are those of the
official checkpoints (transformers 5 layout), so that state dicts are interchangeable.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lewm.config import ModelConfig
from lewm.pixels import MEAN, STD

_VIT_EPS = 1e-12
_PREDICTOR_EPS = 1e-6


class _PatchEmbeddings(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, config.encoder_dim, config.patch_size, config.patch_size)

    def forward(self, frames: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, patches, D). The pixel normalisation is folded into the weights."""
        p = self.projection.kernel_size[0]
        n, h, w, _ = frames.shape
        patches = frames.view(n, h // p, p, w // p, p, 3).transpose(2, 3).reshape(n, (h // p) * (w // p), p * p * 3)
        channels = self.projection.weight.unbind(1)  # of (D, p, p) each
        bias = self.projection.bias - sum(w.sum((1, 2)) * (m / s) for w, m, s in zip(channels, MEAN, STD, strict=True))
        weight = torch.stack([w / (255 * s) for w, s in zip(channels, STD, strict=True)], -1).flatten(1)
        return F.linear(patches.to(weight.dtype), weight, bias)


class _Embeddings(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        side = config.image_size // config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.encoder_dim))
        self.position_embeddings = nn.Parameter(torch.zeros(1, side * side + 1, config.encoder_dim))
        self.patch_embeddings = _PatchEmbeddings(config)

    def forward(self, frames: Tensor) -> Tensor:
        x = self.patch_embeddings(frames)
        positions = self.position_embeddings
        patches = x + positions[:, 1:]
        cls = (self.cls_token + positions[:, :1]).expand(len(x), 1, -1)
        return torch.cat([cls.to(patches.dtype), patches], 1)


class _ViTAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.encoder_dim
        self.heads = config.encoder_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, queries: Tensor) -> Tensor:
        q, k, v = (
            projection(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, t in ((self.q_proj, queries), (self.k_proj, x), (self.v_proj, x))
        )
        return self.o_proj(_attention(q, k, v).transpose(1, 2).flatten(2))


class _ViTMlp(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.encoder_dim, config.encoder_mlp)
        self.fc2 = nn.Linear(config.encoder_mlp, config.encoder_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _ViTLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = _ViTAttention(config)
        self.mlp = _ViTMlp(config)
        self.layernorm_before = nn.LayerNorm(config.encoder_dim, eps=_VIT_EPS)
        self.layernorm_after = nn.LayerNorm(config.encoder_dim, eps=_VIT_EPS)

    def forward(self, x: Tensor, cls_only: bool) -> Tensor:
        normed = self.layernorm_before(x)
        # Only [CLS] leaves the encoder, so the last layer computes nothing else.
        x, queries = (x[:, :1], normed[:, :1]) if cls_only else (x, normed)
        x = x + self.attention(normed, queries)
        return x + self.mlp(self.layernorm_after(x))


class Encoder(nn.Module):
    """ViT; (N, H, W, 3) uint8 RGB -> (N, encoder_dim), the normalised [CLS] token of the last layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.layers = nn.ModuleList(_ViTLayer(config) for _ in range(config.encoder_depth))
        self.layernorm = nn.LayerNorm(config.encoder_dim, eps=_VIT_EPS)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_in = module.weight[0].numel()
                nn.init.trunc_normal_(module.weight, std=fan_in**-0.5 if config.init == "scaled" else 0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.embeddings.cls_token, std=0.02)
        if config.init == "scaled":
            side = config.image_size // config.patch_size
            with torch.no_grad():
                self.embeddings.position_embeddings[0, 1:] = _sincos_2d(side, config.encoder_dim)
        else:
            nn.init.trunc_normal_(self.embeddings.position_embeddings, std=0.02)

    def forward(self, frames: Tensor) -> Tensor:
        x = self.embeddings(frames)
        for i, layer in enumerate(self.layers):
            x = layer(x, cls_only=i == len(self.layers) - 1)
        return self.layernorm(x[:, 0])


class Projector(nn.Module):
    """Linear, BatchNorm, GELU, Linear; without it the ViT's final LayerNorm keeps SIGReg from its target."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.GELU(), nn.Linear(hidden, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class ActionEncoder(nn.Module):
    """Normalised action blocks (..., A) -> (..., embed_dim)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # A convolution of width 1, kept as such for the shape of its weight in official checkpoints.
        self.patch_embed = nn.Conv1d(config.block_dim, config.action_smoothed, 1)
        self.embed = nn.Sequential(
            nn.Linear(config.action_smoothed, config.action_hidden),
            nn.SiLU(),
            nn.Linear(config.action_hidden, config.embed_dim),
        )

    def forward(self, actions: Tensor) -> Tensor:
        return self.embed(F.linear(actions, self.patch_embed.weight[..., 0], self.patch_embed.bias))


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.predictor_heads * config.predictor_head_dim
        self.heads = config.predictor_heads
        self.dropout = config.dropout
        self.norm = nn.LayerNorm(config.predictor_dim)
        self.to_qkv = nn.Linear(config.predictor_dim, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, config.predictor_dim), nn.Dropout(config.dropout))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = _attention(q, k, v, causal=True, dropout=self.dropout if self.training else 0.0)
        return self.to_out(out.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(config.predictor_dim),
            nn.Linear(config.predictor_dim, config.predictor_mlp),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.predictor_mlp, config.predictor_dim),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _AdaLNLayer(nn.Module):
    """DiT-style block: the action decides shift, scale and gate; all six start at zero."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn = _Attention(config)
        self.mlp = _FeedForward(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.predictor_dim, 6 * config.predictor_dim))
        nn.init.zeros_(self.adaLN_modulation[1].weight)
        nn.init.zeros_(self.adaLN_modulation[1].bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, -1)
        x = x + gate_a * self.attn(_norm(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(_norm(x) * (1 + scale_m) + shift_m)


class _Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Identity at the paper's widths, where the official checkpoints have no such keys.
        same = config.embed_dim == config.predictor_dim
        self.input_proj = nn.Identity() if same else nn.Linear(config.embed_dim, config.predictor_dim)
        self.cond_proj = nn.Identity() if same else nn.Linear(config.embed_dim, config.predictor_dim)
        self.output_proj = nn.Identity() if same else nn.Linear(config.predictor_dim, config.embed_dim)
        self.layers = nn.ModuleList(_AdaLNLayer(config) for _ in range(config.predictor_depth))
        self.norm = nn.LayerNorm(config.predictor_dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x, condition = self.input_proj(x), self.cond_proj(condition)
        for layer in self.layers:
            x = layer(x, condition)
        return self.output_proj(self.norm(x))


class Predictor(nn.Module):
    """Causal AdaLN transformer over at most `config.positions` tokens; (N, W, D), (N, W, D) -> (N, W, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transformer = _Transformer(config)
        if config.init == "scaled":
            positions = _sincos_1d(torch.arange(config.positions), config.embed_dim)
        else:
            positions = torch.randn(config.positions, config.embed_dim)
        self.pos_embedding = nn.Parameter(positions[None].clone())

    def forward(self, z: Tensor, actions: Tensor) -> Tensor:
        return self.transformer(z + self.pos_embedding[:, : z.shape[1]], actions)


class Head(nn.Module):
    """Two hidden layers on frozen latents; (..., inputs) -> (..., outputs)."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class LeWM(nn.Module):
    """The whole model. Everything it takes and gives is a tensor; `lewm.Model` is the NumPy face of it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.predictor = Predictor(config)
        self.action_encoder = ActionEncoder(config)
        self.projector = Projector(config.encoder_dim, config.projector_hidden, config.embed_dim)
        self.pred_proj = Projector(config.embed_dim, config.projector_hidden, config.embed_dim)
        # Last, so that the rest starts the same with heads and without.
        if config.distance_head:
            self.distance_head = Head(config.embed_dim, config.head_hidden, config.embed_dim)
        if config.action_prior:
            blocks = config.prior_blocks * config.block_dim
            self.action_prior = Head(2 * config.embed_dim, config.head_hidden, blocks)

    def encode(self, frames: Tensor) -> Tensor:
        """Latents of frames: (..., H, W, 3) uint8 RGB -> (..., D)."""
        z = self.projector(self.encoder(frames.flatten(0, -4)))
        return z.unflatten(0, frames.shape[:-3])

    def predict(self, z: Tensor, actions: Tensor) -> Tensor:
        """Teacher-forced predictions (paper Eq. 1); of an action-prefix model, those of all prefixes.

        Args:
            z: Latents, (N, W, D) with W <= `config.positions`; of an action-prefix model W times the current one.
            actions: Embedded action blocks, (N, W, D); block t leads from z[t] to z[t + 1]. Of an action-prefix model
                they follow each other.

        Returns:
            (N, W, D): entry t is the prediction of z[t + 1] from z[: t + 1], or of what is reached t + 1 blocks later.
        """
        return self.pred_proj(self.predictor(z, actions))

    def rollout(self, z: Tensor, candidates: Tensor, past_actions: Tensor | None = None) -> Tensor:
        """Latents along imagined action sequences.

        Args:
            z: Latents of the observed frames, (N, T, D).
            candidates: Normalised future action blocks, (N, H, A).
            past_actions: Normalised blocks between the observed frames, (N, T - 1, A); None when T is 1.

        Returns:
            (N, T + H, D): the observed latents, then the imagined ones.
        """
        if self.config.action_prefix:
            for part in self.action_encoder(candidates).split(self.config.prefix_blocks, 1):
                z = torch.cat([z, self.predict(z[:, -1:].expand(-1, part.shape[1], -1), part)], 1)
            return z
        blocks = candidates if past_actions is None else torch.cat([past_actions, candidates], 1)
        actions = self.action_encoder(blocks)
        for t in range(z.shape[1], blocks.shape[1] + 1):
            window = slice(max(0, t - self.config.history), t)
            following = self.pred_proj(self.predictor(z[:, window], actions[:, window])[:, -1:])
            z = torch.cat([z, following], 1)
        return z

    def distance(self, z: Tensor, goal: Tensor) -> Tensor:
        """Estimated action blocks from `z` (..., D) to `goal` (..., D); a metric: |head(z) - head(goal)|."""
        return torch.linalg.vector_norm(self.distance_head(z) - self.distance_head(goal), dim=-1)

    def prior(self, z: Tensor, goal: Tensor) -> Tensor:
        """Guessed normalised blocks (N, P, A) that lead from `z` (N, D) towards `goal` (N, D)."""
        return self.action_prior(torch.cat([z, goal], -1)).unflatten(-1, (-1, self.config.block_dim))


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, dropout: float = 0.0) -> Tensor:
    if k.shape[2] == 1 and not dropout:
        return v  # one key: its weight is 1 whatever the scores
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The backward of bfloat16 attention is very slow on CPUs (more than half of a training step).
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal, dropout_p=dropout)
        return out.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_PREDICTOR_EPS)


def _sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """(n,) -> (n, dim): sines, then cosines, at `ceil(dim / 2)` frequencies from 1 down to 1e-4."""
    half = math.ceil(dim / 2)
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / max(half, 1))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :dim].float()


def _sincos_2d(side: int, dim: int) -> Tensor:
    """(side * side, dim), row-major: the first half of the width encodes the row, the second the column."""
    index = torch.arange(side * side)
    half = dim // 2
    return torch.cat([_sincos_1d(index // side, half), _sincos_1d(index % side, dim - half)], 1)
