"""The training clips of both trainings: sizes, order, position in the schedule."""

from pathlib import Path

import pytest
import torch

from mmdistill.config import ConfigError, DistillConfig
from mmdistill.distributed.process import Process
from mmdistill.training.state import TrainingState
from mmdistill.training.train_data import TrainData, make_train_data
from tests.configs import distill_config
from tests.tiny_data import make_tiny, overrides


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "data", per_class=1)  # 12 clips


def _data(root: Path, *more: str, world_size: int = 1, whole_steps: bool = False) -> TrainData:
    given = [*overrides(root), "trainer.ckpt_path=[a,b,c]", "batch_size=2", "accelerator=cpu", *more]
    config: DistillConfig = distill_config(*given)
    process = Process(torch.device("cpu"), 0, world_size)
    return make_train_data(config, ("rgb",), process, whole_steps=whole_steps)


def test_loader_starts_at_the_position_of_the_sampler(root: Path) -> None:
    data = _data(root)
    data.sampler.set_state(1, 4)
    assert len(list(data.loader)) == 2  # of 6 batches


def test_batches_of_an_incomplete_step_are_dropped_on_request(root: Path) -> None:
    """6 batches, 4 per step."""
    accumulate = "trainer.accumulate_grad_batches=4"
    data, whole = _data(root, accumulate), _data(root, accumulate, whole_steps=True)
    assert (data.batches_per_epoch, data.steps_per_epoch) == (6, 2)
    assert (whole.batches_per_epoch, whole.steps_per_epoch) == (4, 1)
    assert whole.summary == "12 clips, 4 batches of 2 per process and epoch (4 clips skipped each epoch)"


def test_position_in_the_schedule(root: Path) -> None:
    data = _data(root, "trainer.accumulate_grad_batches=4")
    positions = [data.schedule_step(TrainingState(epoch=1, batch=batch)) for batch in range(7)]
    assert positions == [2, 2, 2, 2, 3, 3, 4]


def test_order_depends_on_the_number_of_processes(root: Path) -> None:
    order = _data(root, world_size=2).order
    assert order == {"seed": 0, "num_clips": 12, "global_batch": 4, "accumulate_grad_batches": 1}


def test_too_few_clips_are_an_error(root: Path) -> None:
    with pytest.raises(ConfigError, match="12 clips cannot fill one training step of 13 clips; lower batch_size=13"):
        _data(root, "batch_size=13")
    with pytest.raises(ConfigError, match="12 clips cannot fill one training step of 16 clips; lower batch_size=2"):
        _data(root, "trainer.accumulate_grad_batches=8", whole_steps=True)
