import pytest

from lewm.config import PRESETS, ModelConfig, TrainConfig, configure


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_only_changes_numbers(preset):
    model, train = configure(preset, 2, {})
    assert isinstance(model, ModelConfig)
    assert isinstance(train, TrainConfig)
    assert train.frames > model.history
    assert set(PRESETS[preset].planner) == {"samples", "iterations", "elites", "horizon"}


def test_paper_is_the_default_configuration():
    assert configure("paper", 2, {}) == (ModelConfig(action_dim=2), TrainConfig())


def test_overrides_reach_either_configuration_and_epochs_replace_steps():
    model, train = configure("tiny", 3, {"history": 3, "sigreg_weight": 0.5, "epochs": 2.0})
    assert (model.history, model.action_dim, train.sigreg_weight, train.steps, train.epochs) == (3, 3, 0.5, None, 2.0)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"histroy": 3}, TypeError, "'histroy' is no setting"),
        ({"history": 0}, ValueError, "history must be an integer from 1 to 1024, got 0"),
        ({"patch_size": 7}, ValueError, "patch_size must divide image_size 64, got 7"),
        ({"encoder_heads": 3}, ValueError, "encoder_heads must divide encoder_dim 64, got 3"),
        ({"predictor_depth": 10**9}, ValueError, "predictor_depth"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"init": "rope"}, ValueError, "init must be"),
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
        ({"batch_size": 1}, ValueError, "batch_size must be an integer of at least 2, got 1"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be positive"),
        ({"sigreg_weight": -1.0}, ValueError, "sigreg_weight must be finite and not negative"),
        ({"validation": 1.0}, ValueError, "validation"),
        ({"learning_rate": "fast"}, ValueError, "learning_rate must be a number, got 'fast'"),
        ({"dropout": None}, ValueError, "dropout must be a number, got None"),
        ({"epochs": float("inf")}, ValueError, "epochs must be positive and finite, got inf"),
    ],
)
def test_bad_settings_are_named(settings, error, text):
    with pytest.raises(error, match=text):
        configure("tiny", 2, settings)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="preset must be one of paper, small, tiny, got 'huge'"):
        configure("huge", 2, {})
