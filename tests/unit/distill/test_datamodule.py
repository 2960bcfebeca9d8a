"""The training clips of a distillation and the position in them."""

from pathlib import Path

import pytest
import torch

from mmdistill.config import ConfigError, DistillConfig
from mmdistill.config.compose import load_config
from mmdistill.distill.datamodule import DistillData, ResumableLoader
from mmdistill.distributed.process import Process
from tests.tiny_data import make_tiny, overrides


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "data", per_class=1)  # 12 clips


def _data(root: Path, *more: str, world_size: int = 1) -> DistillData:
    given = [*overrides(root), "trainer.ckpt_path=[a,b,c]", "batch_size=2", "accelerator=cpu", *more]
    config: DistillConfig = load_config(DistillConfig, "config_mmdistill", given)
    return DistillData(config, ("rgb",), Process(torch.device("cpu"), 0, world_size))


def test_loader_starts_at_the_stored_position(root: Path) -> None:
    data = _data(root)
    data.load_state_dict({**data.state_dict(), "epoch": 1, "batch": 4})
    loader = data.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    assert (data.sampler.epoch, data.sampler.start_batch) == (1, 4)
    assert len(list(loader)) == 2  # of 6 batches


def test_state_of_older_checkpoints_is_read(root: Path) -> None:
    """The names of commit ae7d5c0."""
    data = _data(root)
    old = {"seed": 0, "clips": 12, "global_batch": 2, "accumulate": 1, "epoch": 1, "batch": 4}
    data.load_state_dict(old)
    with pytest.raises(ConfigError, match=r"in the middle of epoch 1.*num_clips 13 / 12"):
        data.load_state_dict({**old, "clips": 13})


def test_another_batch_order_is_rejected_inside_an_epoch_only(root: Path) -> None:
    state = {**_data(root).state_dict(), "epoch": 1}
    other = _data(root, world_size=2)
    with pytest.raises(ConfigError, match=r"in the middle of epoch 1.*global_batch 2 / 4"):
        other.load_state_dict({**state, "batch": 2})
    other.load_state_dict({**state, "batch": 0})


def test_fewer_clips_than_a_batch_are_an_error(root: Path) -> None:
    with pytest.raises(ConfigError, match="12 clips cannot fill one batch of batch_size=13"):
        _data(root, "batch_size=13")


def test_no_validation_loader_without_validation(root: Path) -> None:
    assert _data(root).val_dataloader() == []
