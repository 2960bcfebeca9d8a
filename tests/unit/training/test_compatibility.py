"""Settings that must match on resume: comparison, message, what is checked where."""

from pathlib import Path
from typing import Any

import pytest

from mmdistill.config import ConfigError
from mmdistill.training.compatibility import check_compatible, convert_position, diff_settings
from mmdistill.training.state import TrainingState

RECORD = {"weight_compat": {"heads": 2}, "data_order": {"seed": 0, "global_batch": 2}}
CHECKPOINT = Path("old.ckpt")


def test_diff_ignores_keys_of_one_side() -> None:
    stored, own = {"seed": 0, "heads": 2, "only_stored": 1}, {"seed": 0, "heads": 4, "only_own": 1}
    assert diff_settings(stored, own) == "heads 2 / 4"
    assert diff_settings(own, own) == ""


def test_difference_gives_checkpoint_then_run() -> None:
    stored, own = {"heads": 2, "std": (1.0,)}, {"heads": 4, "std": (2.0,)}
    assert diff_settings(stored, own) == "heads 2 / 4, std (1.0,) / (2.0,)"


@pytest.mark.parametrize("batch", [0, 2])
def test_settings_of_the_weights_must_always_match(batch: int) -> None:
    stored = {**RECORD, "weight_compat": {"heads": 4}}
    with pytest.raises(ConfigError, match=r"old\.ckpt was trained with other settings .*: heads 4 / 2; .*resume=null"):
        check_compatible(stored, RECORD, TrainingState(batch=batch), CHECKPOINT)


def test_checkpoints_without_a_resize_were_trained_on_crops() -> None:
    own = {**RECORD, "weight_compat": {"resize": "squash"}}
    for stored in (RECORD, {}, {"weight_compat": {"resize": "crop"}}):
        with pytest.raises(ConfigError, match=r"\(checkpoint / run\): resize crop / squash; "):
            check_compatible(stored, own, TrainingState(), CHECKPOINT)
    check_compatible(own, own, TrainingState(), CHECKPOINT)


def test_another_batch_order_is_rejected_inside_an_epoch_only() -> None:
    stored = {**RECORD, "data_order": {"seed": 0, "global_batch": 4}}
    with pytest.raises(ConfigError, match=r"in the middle of epoch 1.*: global_batch 4 / 2; .*the end of an epoch"):
        check_compatible(stored, RECORD, TrainingState(epoch=1, batch=2), CHECKPOINT)
    check_compatible(stored, RECORD, TrainingState(epoch=1), CHECKPOINT)


def test_position_is_converted_if_the_clips_per_step_are_the_same() -> None:
    order = {"seed": 0, "num_clips": 70, "global_batch": 16, "accumulate_grad_batches": 1}
    own = {**order, "global_batch": 4, "accumulate_grad_batches": 4}
    stored = {"batch": 3, "epoch": 1, "data_order": {**order, "batches_per_epoch": 4}}
    converted = convert_position(stored, own)
    assert converted == {"batch": 12, "epoch": 1, "data_order": {**own, "batches_per_epoch": 16}}
    assert convert_position(converted, order) == stored
    for unchanged in (stored, {**stored, "data_order": {}}, {}):
        assert convert_position(unchanged, {**own, "accumulate_grad_batches": 2}) == unchanged


@pytest.mark.parametrize("stored", [RECORD, {}])
def test_equal_or_unknown_settings_pass(stored: dict[str, Any]) -> None:
    check_compatible(stored, RECORD, TrainingState(batch=2), CHECKPOINT)
