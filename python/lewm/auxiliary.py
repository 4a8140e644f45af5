"""Two further loss terms, each off by default: they buy training time, and leave nothing in the model file.

`TrainConfig.inverse_dynamics` weighs how badly a small head guesses the action block between two latents: what the
agent can move must be in them. `TrainConfig.reconstruction` weighs how badly a small decoder paints a frame from its
latent: what is large must be in them. The paper has neither (its section 3 has two terms, prediction and SIGReg).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lewm.config import ModelConfig, TrainConfig
from lewm.network import Head
from lewm.pixels import MEAN, STD

TERMS = ("inverse_dynamics", "reconstruction")
_WIDTH, _LEAST = 64, 16  # channels of the decoder, first and last


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
    """The networks of the terms whose weight is above 0."""

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
        """Mean squared errors by term, not weighted.

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
        return losses
