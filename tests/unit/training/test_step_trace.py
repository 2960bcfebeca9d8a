"""Which steps a trace contains; its ranges are tested with each training."""

from torch import nn

from tests.tiny_training import MakeTraining


def test_trace_counts_optimizer_steps_and_writes_nothing_if_the_training_ends_before(make: MakeTraining) -> None:
    training = make("trainer.profile=1", "trainer.accumulate_grad_batches=2")
    training.log_start("distill", nn.Linear(2, 2))

    def run_batches(num: int) -> list[str]:
        for _ in range(num):
            training.state.add_batch({}, 3)
            training.end_batch(3)
            if training.state.batch == training.data.batches_per_epoch:
                training.state.start_epoch(training.state.epoch + 1)
        return sorted(path.name for path in training.run.directory.glob("trace-*"))

    assert run_batches(7) == []
    assert run_batches(1) == ["trace-steps=4-4.json"]
    (training.run.directory / "trace-steps=4-4.json").unlink()
    training.stop_trace()
    training.state.start_epoch(0)
    training._start_trace()
    run_batches(6)  # the next step is in the trace
    training.stop_trace()
    assert run_batches(0) == []
