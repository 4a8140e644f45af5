"""What training may have beside the paper's two loss terms, each off by default; nothing of it is in the model file.

Two terms that buy training time. `TrainConfig.inverse_dynamics` weighs how badly a small head guesses the action block
between two latents: what the agent can move must be in them. `TrainConfig.reconstruction` weighs how badly a small
decoder paints a frame from its latent: what is large must be in them.

The terms of PLDM (Sobal et al., arXiv 2502.14819), which take SIGReg's place in it: over the batch at each time step a
hinge that keeps the deviation of every dimension above 1 (`variance`) and the squared covariances between dimensions
(`covariance`), both as in VICReg (Bardes et al., arXiv 2105.04906); the same over the time steps of each window
(`time_variance`, `time_covariance`); the squared step between latents that follow each other (`time_similarity`).
Inverse dynamics is its sixth, prediction its seventh.

`Average` is the encoder that predictions are compared with under `TrainConfig.target = "ema"`.
"""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lewm.config import TERMS, ModelConfig, TrainConfig
from lewm.network import Head, LeWM
from lewm.pixels import MEAN, STD

_EPS = 1e-4  # under the root of a variance, whose gradient is infinite at 0 without it
_WIDTH, _LEAST = 64, 16  # channels of the decoder, first and last


def hinge(z: Tensor) -> Tensor:
    """How far deviations fall short of 1: mean of max(0, 1 - sqrt(var + 1e-4)) over groups and dimensions.

    Args:
        z: (G, N, D), G groups of N samples, N at least 2; the variance is the unbiased one over a group's samples.
    """
    return (1 - (z.var(1) + _EPS).sqrt()).relu().mean()


def decorrelation(z: Tensor) -> Tensor:
    """Squares of the unbiased covariances between two dimensions, summed and divided by D, averaged over groups.

    Args:
        z: (G, N, D), G groups of N samples, N at least 2.
    """
    centred = z - z.mean(1, keepdim=True)
    covariance = centred.mT @ centred / (z.shape[1] - 1)
    off_diagonal = covariance - torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    return off_diagonal.square().sum((1, 2)).mean() / z.shape[2]


# Of latents (B, T, D): a group is the batch at a time step, or a window.
_OF_LATENTS = {
    "variance": lambda z: hinge(z.transpose(0, 1)),
    "covariance": lambda z: decorrelation(z.transpose(0, 1)),
    # A mean over dimensions too, like the prediction's.
    "time_similarity": lambda z: (z[:, 1:] - z[:, :-1]).square().mean(),
    "time_variance": hinge,
    "time_covariance": decorrelation,
}


class Average(nn.Module):
    """Exponential moving average of a network's encoder and projector; it gets no gradients.

    In training its BatchNorm takes the batch's statistics, and keeps running ones of its own, as any other.
    """

    def __init__(self, network: LeWM) -> None:
        super().__init__()
        self.encoder, self.projector = copy.deepcopy((network.encoder, network.projector))
        self.requires_grad_(False)

    def encode(self, frames: Tensor) -> Tensor:
        """As `LeWM.encode`."""
        return self.projector(self.encoder(frames.flatten(0, -4))).unflatten(0, frames.shape[:-3])

    @torch.no_grad()
    def follow(self, network: LeWM, decay: float) -> None:
        """Parameters become decay * themselves + (1 - decay) * the network's."""
        for part in ("encoder", "projector"):
            own, its = (list(getattr(of, part).parameters()) for of in (self, network))
            torch._foreach_lerp_(own, its, 1 - decay)


class Decoder(nn.Module):
    """Latents (N, D) -> normalised pictures (N, 3, S, S): a linear map to the coarsest grid, then doublings.

    The coarsest side is S halved while it is even and above 8, the channels are halved down to 16 on the way.
    """

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        doublings = 0
        while size % 2 == 0 and size > 8:
            size, doublings = size // 2, doublings + 1
        widths = [max(_LEAST, _WIDTH >> i) for i in range(doublings)] + [3]
        self.side, self.first = size, widths[0]
        self.linear = nn.Linear(dim, widths[0] * size * size)
        # Each convolution paints the four pixels that one becomes.
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, 4 * after, 3, padding=1) for before, after in itertools.pairwise(widths)
        )

    def forward(self, z: Tensor) -> Tensor:
        x = self.linear(z).unflatten(1, (self.first, self.side, self.side))
        for convolution in self.convolutions:
            x = F.pixel_shuffle(convolution(F.gelu(x)), 2)
        return x


class Auxiliary(nn.Module):
    """The terms whose weight is above 0, and the networks of those that have one."""

    def __init__(self, model: ModelConfig, config: TrainConfig) -> None:
        super().__init__()
        self.weights = {name: getattr(config, name) for name in TERMS if getattr(config, name) > 0}
        if "inverse_dynamics" in self.weights:
            self.inverse_dynamics = Head(2 * model.embed_dim, 2 * model.head_hidden, model.block_dim)
        if "reconstruction" in self.weights:
            self.reconstruction = Decoder(model.embed_dim, model.image_size)
            # On the device from the start: a step does not wait for them.
            for name, values in (("mean", MEAN), ("std", STD)):
                self.register_buffer(name, 255 * torch.tensor(values), persistent=False)

    def forward(self, z: Tensor, frames: Tensor, actions: Tensor) -> dict[str, Tensor]:
        """Losses by term, not weighted.

        Args:
            z: Latents (B, T, D).
            frames: Their pictures, (B, T, S, S, 3) uint8.
            actions: Normalised blocks between them, (B, T - 1, A).
        """
        losses: dict[str, Tensor] = {}
        if "inverse_dynamics" in self.weights:
            guessed = self.inverse_dynamics(torch.cat([z[:, :-1], z[:, 1:]], -1))
            losses["inverse_dynamics"] = (guessed.float() - actions).square().mean()
        if "reconstruction" in self.weights:
            # The frames of a window are alike, and painting costs more than encoding: the first and the last.
            ends = slice(None, None, z.shape[1] - 1)
            pictures = ((frames[:, ends].float() - self.mean) / self.std).flatten(0, 1).permute(0, 3, 1, 2)
            painted = self.reconstruction(z[:, ends].flatten(0, 1)).float()
            losses["reconstruction"] = (painted - pictures).square().mean()
        with torch.autocast(z.device.type, enabled=False):
            losses |= {name: term(z) for name, term in _OF_LATENTS.items() if name in self.weights}
        return losses
