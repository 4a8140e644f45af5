"""The CPU engine against this package's `torch` back end in float32: same weights, same pictures, same candidates."""

import functools

import numpy as np
import pytest
import torch
from benches.cpu_plan import STATS, first_candidates, frames, weights_of
from common import compare, precisions

import lewm
from lewm.config import PRESETS

# Candidates of one call: the whole of tiny's own budget, a fifth of the paper's.
SAMPLES = {"tiny": 100, "paper": 60}


@functools.cache
def model(preset, backend, precision="float32"):
    _, weights = weights_of(preset)
    return lewm.Model.from_state_dict(weights, preset=preset, stats=STATS, backend=backend, precision=precision)


def circumstances(preset, **more):
    return {"preset": preset, "torch": torch.__version__, "threads": torch.get_num_threads(), **more}


@pytest.mark.parametrize("precision", precisions())
@pytest.mark.parametrize("preset", SAMPLES)
def test_costs(benchmark, preset, precision):
    """What a planner asks for in each iteration: candidates rolled out over five blocks and scored."""
    ours, theirs = model(preset, "cpu", precision), model(preset, "torch")
    z, goal = (theirs.encode(picture) for picture in frames(ours.config.image_size, 1, False))
    candidates = first_candidates(theirs, lewm.CEM(samples=SAMPLES[preset]), 1)
    case = z[None], goal, candidates
    tolerance = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.1}[precision]
    np.testing.assert_allclose(ours.costs(*case), theirs.costs(*case), rtol=tolerance)
    compare(
        benchmark,
        lambda: ours.costs(*case),
        lambda: theirs.costs(*case),
        **circumstances(preset, precision=precision, samples=SAMPLES[preset]),
    )


@pytest.mark.parametrize("preset", SAMPLES)
def test_encode(benchmark, preset):
    """One picture, as a controller sees it."""
    ours, theirs = model(preset, "cpu"), model(preset, "torch")
    picture = frames(ours.config.image_size, 1, False)[0][0]
    np.testing.assert_allclose(ours.encode(picture), theirs.encode(picture), rtol=1e-3, atol=1e-4)
    compare(benchmark, lambda: ours.encode(picture), lambda: theirs.encode(picture), **circumstances(preset))


def test_plan(benchmark):
    """Both pictures encoded and tiny's own budget, 100 x 10, from first to last."""
    ours, theirs = model("tiny", "cpu"), model("tiny", "torch")
    obs, goal = (picture[0] for picture in frames(ours.config.image_size, 1, False))
    planner = lewm.CEM(**PRESETS["tiny"].planner)

    def plan(model):
        return lewm.plan(obs, goal, model=model, planner=planner)

    np.testing.assert_allclose(plan(ours).cost, plan(theirs).cost, rtol=0.01)
    compare(benchmark, lambda: plan(ours), lambda: plan(theirs), **circumstances("tiny", precision="float32"))
