import pytest

from mmdistill.checkpoint import errors
from mmdistill.errors import InputError


@pytest.mark.parametrize(
    "name",
    ["ComponentError", "CorruptCheckpointError", "UnsafeCheckpointError", "WeightMismatchError", "ResumeMismatchError"],
)
def test_each_error_is_a_checkpoint_error_with_the_status_of_bad_input(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.CheckpointError)
    assert issubclass(errors.CheckpointError, InputError)
    assert error.exit_status == InputError.exit_status == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.UnsafeCheckpointError("a.pt: unsafe"), "init_from: a.pt: unsafe"),
        (errors.CheckpointError("init_from: a.pt"), "init_from: a.pt"),  # it names the key already
    ],
)
def test_an_error_begins_with_the_setting_that_gives_the_path(error: errors.CheckpointError, message: str) -> None:
    with pytest.raises(type(error)) as raised, errors.name_setting("init_from"):
        raise error
    assert str(raised.value) == message


def test_errors_of_another_class_do_not_name_the_setting() -> None:
    with pytest.raises(errors.CheckpointError) as raised, errors.name_setting("part", errors.ComponentError):
        raise errors.CheckpointError("a.pt")
    assert str(raised.value) == "a.pt"
