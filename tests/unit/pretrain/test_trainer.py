"""Position and epoch means of a pretraining, and the client state of older checkpoints."""

import math
from typing import Any

import pytest
import torch

from mmdistill.config import ConfigError, PretrainConfig, to_plain
from mmdistill.config.compose import load_config
from mmdistill.distributed.process import Process
from mmdistill.models.videomae import EncoderConfig
from mmdistill.pretrain.trainer import PretrainTrainer, Progress, _read_client_state
from mmdistill.training.compatibility import diff_settings
from tests.tiny_data import MODEL, make_tiny, overrides


def test_means_are_over_finite_batches() -> None:
    progress = Progress()
    assert all(map(math.isnan, progress.means))
    for losses in ((1.0, 4.0), None, (3.0, 2.0)):
        progress.add_batch(losses)
    assert progress.means == (2.0, 3.0)
    assert (progress.batch, progress.num_skipped_batches) == (3, 1)
    progress.start_next_epoch()
    assert progress == Progress(epoch=1)


def test_client_state_of_older_versions_is_read() -> None:
    """The names of commit ae7d5c0."""
    encoder = EncoderConfig(3, 4, 16, 16, 8, 2, 16, 2, 2, 8, 32, pos_embed="sincos_separable")
    fields = {k: v for k, v in to_plain(encoder).items() if k != "pos_embed"}
    learned = {**fields, "learned_positions": False, "separable_positions": True, "mean": [0.5]}
    state: dict[str, Any] = {
        "progress": {"epoch": 1, "batch": 2, "loss_sum": 3.0, "trivial_sum": 4.0, "unusable": 1},
        "learned": learned,
        "order": {"seed": 0, "clips": 72, "global_batch": 8, "accumulate": 1, "batches": 9},
        "step": 11,
    }
    found = _read_client_state(state)
    assert Progress(**found["progress"]) == Progress(1, 2, 3.0, 4.0, 1)
    order = {"seed": 0, "num_clips": 72, "global_batch": 8, "accumulate_grad_batches": 1, "batches_per_epoch": 9}
    assert found["data_order"] == order
    assert found["step"] == 11
    own = {**to_plain(encoder), "mean": [0.5]}
    assert diff_settings(found["weight_compat"], own) == {}
    other = {**own, "pos_embed": "learned"}
    assert diff_settings(found["weight_compat"], other) == {"pos_embed": ("sincos_separable", "learned")}


def test_client_state_without_settings_is_read() -> None:
    """Versions before that stored neither "learned" nor "order"."""
    found = _read_client_state({"progress": {"epoch": 1, "batch": 0, "loss_sum": 0.0, "trivial_sum": 0.0}})
    assert (found["weight_compat"], found["data_order"]) == ({}, {})
    assert Progress(**found["progress"]) == Progress(epoch=1)


def test_too_few_clips_for_a_step_are_an_error(tmp_path: Any) -> None:
    data = overrides(make_tiny(tmp_path, per_class=1))
    arguments = ["modality=flow", *data, *MODEL, "batch_size=2", "trainer.accumulate_grad_batches=8"]
    config = load_config(PretrainConfig, "config_pretrain", arguments)
    with pytest.raises(ConfigError, match="12 clips cannot fill one optimizer step of 16; lower batch_size"):
        PretrainTrainer(config, tmp_path / "run", Process(torch.device("cpu"), 0, 1))
