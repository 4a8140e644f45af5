"""Surprise while it happens: how far the newest latent is from what the model predicted, as a calibrated p-value.

Surprise is the squared error of a one-step prediction in latent space, averaged over D (paper section 5.2). How large
it normally is depends on the model, so it is compared with what it was on held-out normal data: a conformal p-value,
which assumes nothing but that the present is exchangeable with those data.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lewm.checks import integer
from lewm.latents import held_out, tracks

if TYPE_CHECKING:
    from lewm.data import Dataset

_QUANTILES = 256
_EPISODES = 100


@dataclass(frozen=True)
class Surprise:
    """What a `lewm.Controller` with a monitor found at the last block boundary.

    Attributes:
        step: Raw actions executed since the reset when the picture was taken.
        score: Squared error of the prediction, averaged over D; (E,) for E environments.
        p_value: Share of normal scores at least as large, see `Calibration.p_value`; (E,) for E environments.
    """

    step: int
    score: Any
    p_value: Any


@dataclass(frozen=True)
class Calibration:
    """How surprising normal data are; made by `lewm.calibrate`, and by `lewm.train` for the model file.

    Attributes:
        count: Number n of scores.
        quantiles: Of the scores, ascending, at evenly spaced ranks from the least to the greatest; all of them if n is
            at most 256.
    """

    count: int
    quantiles: tuple[float, ...]

    def __post_init__(self) -> None:
        integer("count", self.count, 1, 2**53)
        values = self.quantiles
        if not isinstance(values, list | tuple) or not 1 <= len(values) <= min(self.count, _QUANTILES):
            raise ValueError(f"quantiles must be a list of 1 to {min(self.count, _QUANTILES)} numbers")
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
            raise ValueError("quantiles must be numbers")
        if not all(0 <= value < math.inf for value in values) or list(values) != sorted(values):
            raise ValueError("quantiles must be finite, not negative and ascending")
        object.__setattr__(self, "quantiles", tuple(map(float, values)))

    @classmethod
    def of(cls, scores: Any) -> Calibration:
        """That of normal scores (n,)."""
        chosen = np.sort(np.asarray(scores, np.float64))
        n = len(chosen)
        if n > _QUANTILES:
            chosen = np.maximum.accumulate(np.quantile(chosen, np.linspace(0, 1, _QUANTILES)))
        return cls(n, tuple(chosen.tolist()))

    def p_value(self, score: Any) -> Any:
        """`(1 + normal scores at least as large) / (1 + n)`, for scores (...).

        Uniform where scores come from the same distribution, so a threshold on it is a rate of false alarms. The least
        is 1 / (1 + n). Between two quantiles ranks are interpolated, which is exact for an n of up to 256 and errs
        towards large values in a thinning tail.
        """
        found = [self._p_value(each) for each in np.ravel(score).tolist()]
        return np.reshape(found, np.shape(score)) if np.ndim(score) else found[0]

    def _p_value(self, score: float) -> float:
        if math.isnan(score):
            return math.nan
        values, n = self.quantiles, self.count
        i = bisect.bisect_left(values, score)  # values[i - 1] < score <= values[i]
        if i == 0 or i == len(values):
            larger = n * (i == 0)
        else:
            part = (score - values[i - 1]) / (values[i] - values[i - 1])
            larger = math.floor(n - (i - 1 + part) * (n - 1) / (len(values) - 1))
        return (1 + larger) / (1 + n)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what a model's `meta["training"]["surprise"]` holds."""
        return {**asdict(self), "quantiles": list(self.quantiles)}

    @classmethod
    def of_model(cls, model: Any) -> Calibration:
        """The one in a model's file.

        Raises:
            ValueError: There is none, or it is malformed.
        """
        found = (model.meta.get("training") or {}).get("surprise")
        if found is None:
            raise ValueError(
                "monitor is True, but the model's file has no calibration (it is older, or no held-out episode was "
                "long enough): give monitor=lewm.calibrate(model, data), of normal episodes it has not learnt from"
            )
        try:
            return cls(**found)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"the calibration in the model's file is malformed: {error}") from None


def calibrate(model: Any, data: Dataset, *, episodes: Iterable[int] | None = None, seed: int = 0) -> Calibration:
    """Measures how surprising normal data are to a model, for `lewm.Controller(..., monitor=...)`.

    Every predictor step of up to 100 episodes counts. `lewm.train` does this at its end with the episodes it held out.
    Those are of the policy that made the data; for p-values that are uniform under a planner, give episodes that the
    planner made.

    Args:
        model: What predicts.
        data: Normal episodes.
        episodes: Numbers of those to take; by default those that the model has not learnt from, see
            `lewm.latents.held_out`.
        seed: Of the choice, where there are more than 100.

    Raises:
        ValueError: No episode has a whole action block, the latents of all frames are the same (frames that do not
            change, or a model that has collapsed), or are not finite.
    """
    chosen = np.asarray(list(held_out(model, data) if episodes is None else episodes), np.int64)
    chosen = np.random.default_rng(seed).permutation(chosen)[:_EPISODES]
    found = list(tracks(model, data, chosen))
    if not found:
        block = model.config.action_block
        raise ValueError(
            f"data must have an episode of at least {block + 1} frames, one action block, among the {len(chosen)} "
            "to take"
        )
    z = np.concatenate([track.z for track in found])
    if (z == z[0]).all():
        raise ValueError("data must have frames that change: their latents are all the same, and nothing surprises")
    scores = np.concatenate(prediction_errors(model, [t.z for t in found], [t.blocks for t in found]))
    if not np.isfinite(scores).all():
        raise ValueError(f"surprise must be finite, but is not for {np.count_nonzero(~np.isfinite(scores))} steps")
    return Calibration.of(scores)


def prediction_errors(model: Any, z: Sequence[np.ndarray], blocks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Squared errors of one-step predictions along sequences of latents, averaged over D.

    Args:
        model: What predicts, from up to `config.history` latents: fewer at the start, which is never padded.
        z: Of each sequence the latents, (n, D).
        blocks: Of each the normalised action blocks between them, (n - 1, A).

    Returns:
        Of each (n - 1,) float64; entry t is that of the prediction of z[t + 1].
    """
    lengths = [len(each) for each in z]
    place = np.concatenate([np.arange(n) for n in lengths])  # of a latent in its sequence
    every_z = np.concatenate(z)
    every_block = np.concatenate([np.pad(each, ((0, 1), (0, 0))) for each in blocks]).astype(every_z.dtype)
    errors = np.empty(len(every_z))
    for seen in range(1, model.config.history + 1):
        # Fewer than `history` are seen by one step of a sequence, the others see all.
        targets = np.flatnonzero(place == seen if seen < model.config.history else place >= seen)
        if not len(targets):
            break
        rows = targets[:, None] + np.arange(-seen, 0)
        past = every_block[rows[:, :-1]] if seen > 1 else None
        ahead = model.rollout(every_z[rows], every_block[rows[:, -1], None, None], past_actions=past)
        errors[targets] = _error(ahead[:, 0, -1], every_z[targets])
    return np.split(errors[place > 0], np.cumsum([n - 1 for n in lengths])[:-1])


def newest_error(model: Any, latents: list[np.ndarray], blocks: list[np.ndarray], newest: np.ndarray) -> np.ndarray:
    """The error (E,) of the prediction of one more latent (E, D).

    Args:
        model: What predicts.
        latents: The latents before, at most `config.history`, each (E, D), oldest first.
        blocks: As many blocks of raw actions, each (E, A), the last one leading to `newest`.
        newest: The latent that came.
    """
    z = np.stack(latents, axis=1)
    *past, now = (model.normalise(block).astype(z.dtype) for block in blocks)
    ahead = model.rollout(z, now[:, None, None], past_actions=np.stack(past, axis=1) if past else None)
    return _error(ahead[:, 0, -1], newest)


def _error(predicted: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.square(predicted.astype(np.float64) - z).mean(axis=-1)
