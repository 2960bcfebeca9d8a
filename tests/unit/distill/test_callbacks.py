"""Checkpoint files, epoch means and stop signals as Lightning callbacks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmdistill.distill.callbacks import EpochCheckpoints, EpochMeans, SetEpochCallback, StopOnSignal
from mmdistill.distributed.process import INTERRUPTED_EXIT_CODE


class _Trainer(SimpleNamespace):
    """What the callbacks use of a Trainer: one process, one epoch of 4 batches."""

    def __init__(self, **values: Any) -> None:
        super().__init__(
            saved=[], is_global_zero=True, global_rank=0, current_epoch=0, max_epochs=4, num_training_batches=4,
            check_val_every_n_epoch=1, callback_metrics={}, should_stop=False,
            strategy=SimpleNamespace(
                reduce=lambda tensor, reduce_op: tensor, reduce_boolean_decision=lambda value, all: value
            ),
        )  # fmt: skip
        vars(self).update(values)

    def save_checkpoint(self, path: Path, *, weights_only: bool) -> None:
        assert weights_only is False  # otherwise Lightning logs that it is not set
        self.saved.append(path.name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")


def _position(started: int, ready: int) -> SimpleNamespace:
    def current(**values: int) -> SimpleNamespace:
        return SimpleNamespace(current=SimpleNamespace(**values))

    return SimpleNamespace(
        epoch_progress=current(started=started), epoch_loop=SimpleNamespace(batch_progress=current(ready=ready))
    )


class _Module(SimpleNamespace):
    """Records what is logged."""

    def __init__(self) -> None:
        super().__init__(logged={}, grad_norm=2.0, nonfinite=SimpleNamespace(skipped_steps=3))

    def log_dict(self, values: dict[str, Any], **_: Any) -> None:
        self.logged |= {name: float(value) for name, value in values.items()}


def _step(means: EpochMeans, loss: float | None, clips: int) -> None:
    values = {} if loss is None else {"train_loss": torch.tensor(loss)}
    outputs = {"loss": torch.tensor(loss or 0.0), "values": values}
    means.on_train_batch_end(None, None, outputs, {"index": torch.arange(clips)}, 0)  # type: ignore[arg-type]


def _log(means: EpochMeans) -> dict[str, float]:
    module = _Module()
    means.on_train_epoch_end(_Trainer(), module)  # type: ignore[arg-type]
    return module.logged


def test_means_weight_batches_by_their_clips() -> None:
    means = EpochMeans()
    for loss, clips in ((1.0, 3), (None, 5), (5.0, 1)):
        _step(means, loss, clips)
    assert _log(means) == {"train_loss": 2.0, "grad_norm": 2.0, "skipped_steps": 3.0}


def test_means_continue_after_a_resume() -> None:
    full, first, rest = EpochMeans(), EpochMeans(), EpochMeans()
    for loss in (0.1, 0.2, 0.7):
        _step(full, loss, 3)
    _step(first, 0.1, 3)
    rest.load_state_dict(first.state_dict())
    for loss in (0.2, 0.7):
        _step(rest, loss, 3)
    assert _log(rest) == _log(full)


def test_sums_of_more_ranks_go_to_rank_0() -> None:
    means = EpochMeans()
    means.load_state_dict({"names": ["train_loss"], "sums": [[2.0, 1.0], [], [4.0, 2.0]]})
    assert _log(means)["train_loss"] == 2.0


def test_names_of_older_checkpoints_are_translated() -> None:
    means = EpochMeans()
    means.load_state_dict({"names": ["train_loss", "trivial_loss_rgb"], "sums": [[2.0, 4.0, 2.0]]})
    assert _log(means)["constant_baseline_loss_rgb"] == 2.0


def _checkpoints(directory: Path, *, stop: bool = False, save_ckpt_freq: int = 2) -> EpochCheckpoints:
    return EpochCheckpoints(
        directory, save_ckpt_freq=save_ckpt_freq, keep_last=None, save_top_k=None, monitor="train_loss", source=None,
        stop_signal=lambda: 15 if stop else None,
    )  # fmt: skip


def test_checkpoints_every_n_epochs_and_at_the_end(tmp_path: Path) -> None:
    callback, saved = _checkpoints(tmp_path / "checkpoints"), []
    for epoch in range(5):
        trainer = _Trainer(current_epoch=epoch, max_epochs=5, callback_metrics={"train_loss": torch.tensor(0.5)})
        callback.on_train_epoch_end(trainer, _Module())  # type: ignore[arg-type]
        saved += trainer.saved
        assert not trainer.should_stop
    assert saved == [f"epoch={epoch:02d}-train_loss=0.5000.ckpt" for epoch in (1, 3, 4)]
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert list(callback.state_dict()["losses"].values()) == [0.5] * 3
    restored = _checkpoints(tmp_path)
    restored.load_state_dict(callback.state_dict())
    assert restored.losses == callback.losses


def test_signal_in_the_last_step_of_an_epoch_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = _Trainer()
    _checkpoints(tmp_path, stop=True).on_train_epoch_end(trainer, _Module())  # type: ignore[arg-type]
    assert (trainer.saved, trainer.should_stop) == (["last.ckpt"], True)
    assert f"complete checkpoint written: {tmp_path / 'last.ckpt'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batches_done", "signal", "stops"), [(2, 15, True), (1, 15, False), (2, None, False), (4, 15, False)]
)
def test_signal_stops_after_a_complete_optimizer_step(
    tmp_path: Path, batches_done: int, signal: int | None, stops: bool
) -> None:
    """With 2 batches per step; after the 4th and last batch `EpochCheckpoints` handles it."""
    trainer = _Trainer(fit_loop=_position(started=1, ready=batches_done))
    callback = StopOnSignal(lambda: signal, tmp_path / "last.ckpt", accumulate_grad_batches=2)
    if stops:
        with pytest.raises(SystemExit, match=str(INTERRUPTED_EXIT_CODE)):
            callback.on_train_batch_end(trainer, _Module())  # type: ignore[arg-type]
    else:
        callback.on_train_batch_end(trainer, _Module())  # type: ignore[arg-type]
    assert trainer.saved == (["last.ckpt"] if stops else [])


def test_steps_are_seeded_by_their_position() -> None:
    callback = SetEpochCallback(SimpleNamespace(), seed=1)

    def draw(epoch: int, batch: int) -> float:
        callback.on_train_batch_start(_Trainer(current_epoch=epoch), _Module(), None, batch)  # type: ignore[arg-type]
        return float(torch.rand(()))

    assert draw(0, 3) == draw(0, 3)
    assert len({draw(0, 3), draw(0, 2), draw(1, 3)}) == 3
