"""Position and means of a training."""

from mmdistill.training.state import TrainingState


def test_means_are_over_the_clips_of_finite_batches() -> None:
    state = TrainingState()
    assert state.means == {}
    for losses, num_clips in (({"loss": 1.0, "baseline": 4.0}, 3), ({}, 5), ({"loss": 5.0, "baseline": 8.0}, 1)):
        state.add_batch(losses, num_clips)
    assert state.means == {"loss": 2.0, "baseline": 5.0}
    assert (state.batch, state.num_clips) == (3, 4)
    state.start_epoch(1)
    assert state == TrainingState(epoch=1)


def test_means_continue_after_a_resume() -> None:
    full, first, rest = TrainingState(), TrainingState(), TrainingState()
    for loss in (0.1, 0.2, 0.7):
        full.add_batch({"loss": loss}, 3)
    first.add_batch({"loss": 0.1}, 3)
    rest.load_state_dict(first.state_dict())
    for loss in (0.2, 0.7):
        rest.add_batch({"loss": loss}, 3)
    assert rest == full


def test_stored_state_is_a_copy() -> None:
    state = TrainingState(losses={"a": 0.5})
    stored = state.state_dict()
    state.losses["b"] = 0.25
    assert stored["losses"] == {"a": 0.5}


def test_attributes_that_are_not_stored_keep_their_values() -> None:
    state = TrainingState(overflow_steps=2)
    state.load_state_dict({"epoch": 1, "of a newer version": 0})
    assert state == TrainingState(epoch=1, overflow_steps=2)
