"""Skipped steps, position and log, checkpoint files and stop signals as Lightning callbacks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmdistill.distill.callbacks import EpochCheckpoints, StepCallback, TrainingCallback, format_losses
from mmdistill.distributed.process import INTERRUPTED_EXIT_CODE
from mmdistill.training.run import Training
from tests.tiny_training import MakeTraining


class _Trainer(SimpleNamespace):
    """What the callbacks use of a Trainer: one process, one epoch of 4 batches."""

    def __init__(self, **values: Any) -> None:
        super().__init__(
            saved=[], is_global_zero=True, global_rank=0, world_size=1, current_epoch=0, global_step=0, max_epochs=4,
            check_val_every_n_epoch=1, callback_metrics={}, should_stop=False, strategy=None,
            precision_plugin=SimpleNamespace(), lr_scheduler_configs=[SimpleNamespace(scheduler=_Schedule())],
        )  # fmt: skip
        vars(self).update(values)

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        assert not weights_only
        self.saved.append(path.name)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"")


class _Schedule(SimpleNamespace):
    """Records its position."""

    lr, position = 0.5, -1

    def restore(self, step: int) -> None:
        self.position = step

    def step_update(self, step: int) -> None:
        self.position = step


class _Module(SimpleNamespace):
    """Records what is logged, and counts updates of the average."""

    def __init__(self) -> None:
        parameter = torch.nn.Parameter(torch.zeros(1))
        super().__init__(logged={}, num_updates=0, parameters=lambda: [parameter], flops_per_clip=lambda num: 2 * num)

    def log_dict(self, values: dict[str, Any], **_: Any) -> None:
        self.logged |= values

    def update_average(self) -> None:
        self.num_updates += 1


def _end_batch(callback: TrainingCallback, trainer: _Trainer, values: dict[str, float]) -> None:
    outputs = {"loss": torch.tensor(0.0), "values": values}
    callback.on_train_batch_end(trainer, _Module(), outputs, {"index": torch.arange(3)}, 0)  # type: ignore[arg-type]


def test_batches_are_counted_and_their_means_logged(make: MakeTraining) -> None:
    training = make("trainer.accumulate_grad_batches=2")
    callback, trainer, module = TrainingCallback(training, "distill"), _Trainer(), _Module()
    schedule = trainer.lr_scheduler_configs[0].scheduler
    callback.on_train_start(trainer, module)  # type: ignore[arg-type]
    assert schedule.position == 0
    for step, loss in ((0, 1.0), (1, None), (1, 2.0), (2, 6.0)):
        trainer.global_step = step
        _end_batch(callback, trainer, {} if loss is None else {"train_loss": loss})
    assert (training.state.batch, training.state.step, schedule.position) == (4, 2, 2)
    trainer.callback_metrics = {"val_top1_action": torch.tensor(0.25)}
    callback.on_train_epoch_end(trainer, module)  # type: ignore[arg-type]
    assert module.logged == {"train_loss": 3.0}
    rows = (training.run.directory / "metrics.csv").read_text().splitlines()
    assert {"train_loss", "val_top1_action", "grad_norm", "skipped_steps", "lr"} <= set(rows[0].split(","))
    trainer.current_epoch = 1
    callback.on_train_epoch_start(trainer, module)  # type: ignore[arg-type]
    assert (training.state.epoch, training.state.batch, training.data.sampler.epoch) == (1, 0, 1)
    assert training.flops_per_clip == 2 * training.data.dataset.mask.num_visible


def test_resumed_training_starts_at_the_stored_position(make: MakeTraining) -> None:
    training, trainer = make(), _Trainer()
    training.load_state_dict({**training.state_dict(), "epoch": 1, "batch": 3})
    TrainingCallback(training, "").on_train_start(trainer, _Module())  # type: ignore[arg-type]
    assert trainer.lr_scheduler_configs[0].scheduler.position == 7


def test_steps_are_seeded_by_their_position(make: MakeTraining) -> None:
    callback = TrainingCallback(make("seed=1"), "")

    def draw(epoch: int, batch: int) -> float:
        callback.on_train_batch_start(_Trainer(current_epoch=epoch), _Module(), None, batch)  # type: ignore[arg-type]
        return float(torch.rand(()))

    assert draw(0, 3) == draw(0, 3)
    assert len({draw(0, 3), draw(0, 2), draw(1, 3)}) == 3


@pytest.mark.parametrize(("gradient", "num_updates"), [(3.0, 1), (float("inf"), 0)])
def test_average_is_updated_after_a_step_that_is_not_skipped(
    make: MakeTraining, gradient: float, num_updates: int
) -> None:
    training, trainer, module = make("trainer.on_nonfinite=skip"), _Trainer(), _Module()
    callback = StepCallback(training)
    (parameter,) = module.parameters()
    parameter.grad = torch.tensor([gradient])
    assert training.guard.before_backward(torch.tensor(1.0), 1.0, torch.arange(3), is_first=True)
    callback.on_train_batch_end(trainer, module)  # type: ignore[arg-type]
    assert module.num_updates == 0  # the step is not complete
    callback.on_before_optimizer_step(trainer, module, None)  # type: ignore[arg-type]
    callback.on_train_batch_end(trainer, module)  # type: ignore[arg-type]
    assert (module.num_updates, training.guard.grad_norm) == (num_updates, gradient)
    assert (parameter.grad is None) == (num_updates == 0)


def _checkpoints(training: Training) -> EpochCheckpoints:
    return EpochCheckpoints(training, encoders={}, statistics={}, sources={"teacher_rgb": {}}, monitor="train_loss")


def test_checkpoints_every_n_epochs_and_at_the_end(make: MakeTraining) -> None:
    training, saved = make("trainer.save_ckpt_freq=2"), []
    callback = _checkpoints(training)
    for epoch in range(5):
        training.state.start_epoch(epoch)
        training.state.add_batch({"train_loss": 0.5}, 3)
        trainer = _Trainer(max_epochs=5)
        callback.on_train_epoch_end(trainer, _Module())  # type: ignore[arg-type]
        saved += trainer.saved
        assert not trainer.should_stop
    assert saved == [f"epoch={epoch:02d}-train_loss=0.5000.ckpt" for epoch in (1, 3, 4)]
    assert (training.run.checkpoints / "last.ckpt").is_file()
    assert list(callback.state_dict()["losses"].values()) == [0.5] * 3
    restored = make()
    _checkpoints(restored).load_state_dict(callback.state_dict())
    assert restored.state.losses == training.state.losses


def test_signal_in_the_last_step_of_an_epoch_stops_the_run(make: MakeTraining) -> None:
    trainer = _Trainer()
    _checkpoints(make("trainer.save_ckpt_freq=2", signal=15)).on_train_epoch_end(trainer, _Module())  # type: ignore[arg-type]
    assert (trainer.saved, trainer.should_stop) == (["last.ckpt"], True)


@pytest.mark.parametrize(
    ("batches_done", "signal", "stops"), [(2, 15, True), (1, 15, False), (2, None, False), (4, 15, False)]
)
def test_signal_stops_after_a_complete_optimizer_step(
    make: MakeTraining, batches_done: int, signal: int | None, stops: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 2 batches per step; after the 4th and last batch `on_train_epoch_end` handles it."""
    training, trainer = make("trainer.accumulate_grad_batches=2", signal=signal), _Trainer()
    training.state.batch = batches_done
    callback = _checkpoints(training)
    if stops:
        with pytest.raises(SystemExit, match=str(INTERRUPTED_EXIT_CODE)):
            callback.on_train_batch_end(trainer, _Module())  # type: ignore[arg-type]
        assert f"complete checkpoint written: {callback.last_path}" in capsys.readouterr().err
    else:
        callback.on_train_batch_end(trainer, _Module())  # type: ignore[arg-type]
    assert trainer.saved == (["last.ckpt"] if stops else [])


@pytest.mark.parametrize(("batch", "stored"), [(2, (2, None)), (4, (None, 0.5))])
def test_metadata_have_a_loss_at_the_end_of_an_epoch(make: MakeTraining, batch: int, stored: tuple[Any, Any]) -> None:
    training, content = make(), dict[str, Any]()
    training.state.add_batch({"train_loss": 0.5}, 3)
    training.state.batch = batch
    _checkpoints(training).on_save_checkpoint(_Trainer(), _Module(), content)  # type: ignore[arg-type]
    meta = content["mmdistill"]
    assert (meta["batch"], meta["loss"]) == stored
    assert (meta["kind"], meta["decoder"], meta["teachers"]) == ("distill", None, {"teacher_rgb": {}})


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
    assert format_losses(means, {}) == (
        "loss 0.0919: rgb 0.0127 (ratio to constant baseline 0.038), flow 0.0008 (ratio 0.89), "
        "skeleton 0.9411 (ratio 157)"
    )


def test_weighted_losses_show_their_weight() -> None:
    """The total is their sum: 0.9625 + 2 x 1.0644 + 1.0023 = 4.0936."""
    means = {"train_loss": 4.0936}
    for name, loss in (("rgb", 0.9625), ("flow", 1.0644), ("skeleton", 1.0023)):
        means |= {f"train_loss_{name}": loss, f"constant_baseline_loss_{name}": loss}
    assert format_losses(means, {"rgb": 1.0, "flow": 2.0}) == (
        "loss 4.0936: rgb 0.9625 (ratio to constant baseline 1), flow 2 x 1.0644 (ratio 1), skeleton 1.0023 (ratio 1)"
    )


def test_epoch_without_finite_losses() -> None:
    assert format_losses({}, {}) == "loss nan"


def test_constant_features_have_no_ratio() -> None:
    means = {"train_loss": 0.5, "train_loss_rgb": 0.1, "constant_baseline_loss_rgb": 0.0}
    means |= {"train_loss_flow": 0.4, "constant_baseline_loss_flow": 0.8}
    assert format_losses(means, {}) == (
        "loss 0.5000: rgb 0.1000 (constant target), flow 0.4000 (ratio to constant baseline 0.5)"
    )
