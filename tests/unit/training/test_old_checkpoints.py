"""States of older checkpoints: pretraining and distillation."""

from typing import Any

import pytest

from mmdistill.config import to_plain
from mmdistill.models.videomae import EncoderConfig
from mmdistill.training.compatibility import diff_settings
from mmdistill.training.old_checkpoints import upgrade_distill_checkpoint, upgrade_pretrain_state
from mmdistill.training.state import TrainingState

ORDER = {"seed": 0, "clips": 72, "global_batch": 8, "accumulate": 1}  # the names of commit ae7d5c0
NEW_ORDER = {"seed": 0, "num_clips": 72, "global_batch": 8, "accumulate_grad_batches": 1}


def _state(stored: dict[str, Any]) -> TrainingState:
    state = TrainingState()
    state.load_state_dict(stored)
    return state


def test_pretrain_state_of_the_first_version_is_read() -> None:
    """The names of commit ae7d5c0."""
    encoder = EncoderConfig(3, 4, 16, 16, 8, 2, 16, 2, 2, 8, 32, pos_embed="sincos_separable")
    fields = {k: v for k, v in to_plain(encoder).items() if k != "pos_embed"}
    learned = {**fields, "learned_positions": False, "separable_positions": True, "mean": [0.5]}
    stored: dict[str, Any] = {
        "progress": {"epoch": 1, "batch": 2, "loss_sum": 3.0, "trivial_sum": 4.0, "unusable": 1},
        "learned": learned,
        "order": {**ORDER, "batches": 9},
        "step": 11,
        "saved": {"a/epoch=00-loss=0.5000": 0.5, "a/epoch=01-loss=0.2000-step=10": 0.2},
        "skipped_steps": 1,
    }
    found = upgrade_pretrain_state(stored)
    state = _state(found)
    assert (state.epoch, state.batch, state.step, state.skipped_steps) == (1, 2, 11, 1)
    assert state.means == {"loss": 3.0, "constant_baseline_loss": 4.0}
    assert state.num_clips == 8
    assert state.losses == {"a/epoch=00-loss=0.5000": 0.5}
    assert found["data_order"] == {**NEW_ORDER, "batches_per_epoch": 9}
    own = {**to_plain(encoder), "mean": [0.5]}
    assert diff_settings(found["weight_compat"], own) == ""
    other = {**own, "pos_embed": "learned"}
    assert diff_settings(found["weight_compat"], other) == "pos_embed sincos_separable / learned"


def test_pretrain_state_without_settings_is_read() -> None:
    """Versions before that stored neither "learned" nor "order"."""
    found = upgrade_pretrain_state({"progress": {"epoch": 1, "batch": 0, "loss_sum": 0.0, "trivial_sum": 0.0}})
    assert (found["weight_compat"], found["data_order"]) == ({}, {})
    assert _state(found) == TrainingState(epoch=1)


def test_pretrain_state_of_this_version_is_unchanged() -> None:
    stored = {**TrainingState(epoch=1).state_dict(), "data_order": NEW_ORDER, "weight_compat": {}}
    assert upgrade_pretrain_state(stored) == stored


def _upgraded(**more: Any) -> tuple[TrainingState, dict[str, Any]]:
    stored = upgrade_distill_checkpoint({"epoch": 1, "global_step": 13, **more})["callbacks"]["EpochCheckpoints"]
    return _state(stored), stored


def test_distill_checkpoint_of_the_first_version_is_read() -> None:
    state, stored = _upgraded(
        callbacks={
            "EpochMeans": {"names": ["train_loss", "trivial_loss_rgb"], "sums": [[2.0, 4.0, 2.0]]},
            "EpochCheckpoints": {"losses": {"a.ckpt": 0.5}},
        },
        DistillData={**ORDER, "epoch": 1, "batch": 4},
        mmdistill={"skipped_steps": 3, "overflow_steps": 2},
    )
    assert (state.epoch, state.batch, state.step) == (1, 4, 13)
    assert (state.skipped_steps, state.overflow_steps) == (3, 2)
    assert state.means == {"train_loss": 1.0, "constant_baseline_loss_rgb": 2.0}
    assert (state.losses, state.validations) == ({"a.ckpt": 0.5}, {})
    assert stored["data_order"] == NEW_ORDER


def test_sums_of_several_ranks_are_added() -> None:
    means = {"names": ["train_loss"], "sums": [[2.0, 1.0], [], [4.0, 2.0]]}
    state, _ = _upgraded(callbacks={"EpochMeans": means, "EpochCheckpoints": {}})
    assert (state.means, state.num_clips) == ({"train_loss": 2.0}, 3)


@pytest.mark.parametrize("callbacks", [None, {}, {"EpochMeans": {"names": [], "sums": [[]]}}])
def test_distill_checkpoint_without_a_position_was_written_at_an_epochs_end(callbacks: Any) -> None:
    state, _ = _upgraded(callbacks=callbacks)
    assert state == TrainingState(epoch=2, step=13)


def test_distill_checkpoint_of_this_version_is_unchanged() -> None:
    content = {"epoch": 0, "callbacks": {"EpochCheckpoints": TrainingState().state_dict()}}
    assert upgrade_distill_checkpoint(content) is content
