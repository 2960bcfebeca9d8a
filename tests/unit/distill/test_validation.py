"""The clips and the episodes of the few-shot validation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmdistill.config import ConfigError, DistillConfig
from mmdistill.distill.validation import make_validation
from mmdistill.distributed.process import Process
from mmdistill.fewshot.errors import EpisodeError
from tests.configs import distill_config
from tests.tiny_data import EVAL, make_tiny, overrides


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("validation")
    make_tiny(root / "data")
    return root


def _config(folder: Path, *more: str) -> DistillConfig:
    fixed = ["trainer.teachers=[rgb]", f"trainer.ckpt_path=[{folder / 'rgb.ckpt'}]", "accelerator=cpu", "test=False"]
    given = [*overrides(folder / "data"), *EVAL, *fixed, "trainer.lr=1.0", *more]
    return distill_config(*given)


def test_monitor_must_be_validated_at_each_checkpoint(folder: Path) -> None:
    for wrong in ([], ["trainer.check_val_every_n_epoch=2", "trainer.save_ckpt_freq=3"]):
        with pytest.raises(ConfigError, match=r"must divide trainer\.save_ckpt_freq"):
            _config(folder, "trainer.monitor=val_top1_action", *wrong)


def test_ranks_get_equal_numbers_of_clips(folder: Path) -> None:
    config = _config(folder, "trainer.check_val_every_n_epoch=2", "trainer.val_episodes=3", "data_module.n_way=2")
    parts = [make_validation(config, Process(torch.device("cpu"), rank, 5), print) for rank in range(5)]
    assert len({len(p.own_clips) for p in parts}) == 1
    assert set().union(*(p.own_clips for p in parts)) == set(parts[0].clips.tolist())
    assert len(parts[0].clips) < len(parts[0].dataset)  # clips outside the episodes are not encoded
    assert all(p.episodes.has_same_clips(parts[0].episodes) for p in parts)


def test_val_json_path_replaces_the_test_clips(folder: Path) -> None:
    data = folder / "data"
    (data / "other.json").write_text((data / "val.json").read_text().replace("rally_CC_0", "rally_absent"))
    config = _config(folder, "trainer.check_val_every_n_epoch=1", "data_module.val_json_path=other.json")
    made = make_validation(config, Process(torch.device("cpu"), 0, 1), print)
    assert "rally_absent" in {c.video for c in made.dataset.index.clips}
    assert make_validation(_config(folder), Process(torch.device("cpu"), 0, 1), print) is None
    with pytest.raises(ConfigError, match="val_episodes=1 must be at least 2"):
        _config(folder, "trainer.val_episodes=1")


def test_score_separates_perfect_and_constant_features(folder: Path) -> None:
    config = _config(folder, "trainer.check_val_every_n_epoch=1")
    validation = make_validation(config, Process(torch.device("cpu"), 0, 1), print)
    assert validation is not None
    clips = validation.dataset.index.clips
    one_hot = {i: np.eye(4, dtype=np.float32)[clips[i].label] for i in validation.clips.tolist()}
    assert validation.score(one_hot) == 1.0
    constant = {i: np.ones(4, np.float32) for i in one_hot}
    assert validation.score(constant) < 0.5


def test_summary_names_the_clips(folder: Path) -> None:
    config = _config(folder, "trainer.check_val_every_n_epoch=2")
    validation = make_validation(config, Process(torch.device("cpu"), 0, 1), print)
    assert validation is not None
    line = validation.summary(config)
    assert line.startswith(
        f"val_top1_action every 2 epochs on {len(validation.clips)} clips of val.json (the test clips"
    )


def test_episodes_of_the_validation_are_disjoint_by_match(folder: Path) -> None:
    """The rallies of the tiny data are matches of their own. They have no names of players."""
    fixed = ["trainer.check_val_every_n_epoch=1", "trainer.val_episodes=3"]
    validation = make_validation(
        _config(folder, *fixed, "data_module.disjoint=match"), Process(torch.device("cpu"), 0, 1), print
    )
    assert validation is not None
    assert validation.episodes.eligibility.disjoint == "match"
    config = _config(folder, *fixed, "data_module.disjoint=player")
    reason = make_validation(config, Process(torch.device("cpu"), 0, 1), print)
    assert isinstance(reason, str)  # the training continues without it
    assert "the player is unknown in 24 of 24 clips" in reason
    config = _config(
        folder, *fixed, "data_module.disjoint=player", "trainer.monitor=val_top1_action", "trainer.save_ckpt_freq=1"
    )
    with pytest.raises(EpisodeError, match="the player is unknown in 24 of 24 clips"):
        make_validation(config, Process(torch.device("cpu"), 0, 1), print)
