"""The log line of an epoch."""

from mmdistill.distill.logging_callback import format_losses


def test_losses_with_ratios() -> None:
    means = {
        "train_loss": 0.0919,
        "train_loss_rgb": 0.0127,
        "constant_baseline_loss_rgb": 0.334,
        "train_loss_flow": 0.0008,
        "constant_baseline_loss_flow": 0.0009,
        "train_loss_skeleton": 0.9411,
        "constant_baseline_loss_skeleton": 0.006,
        "grad_norm": 1.0,
    }
    assert format_losses(means) == (
        "loss 0.0919: rgb 0.0127 (ratio to constant baseline 0.038), flow 0.0008 (ratio 0.89), "
        "skeleton 0.9411 (ratio 157)"
    )


def test_epoch_without_finite_losses() -> None:
    assert format_losses({}) == "loss nan"


def test_constant_features_have_no_ratio() -> None:
    means = {"train_loss": 0.5, "train_loss_rgb": 0.5, "constant_baseline_loss_rgb": 0.0}
    assert format_losses(means) == "loss 0.5000: rgb 0.5000 (ratio to constant baseline nan)"
