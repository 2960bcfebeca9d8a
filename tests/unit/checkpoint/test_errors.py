import pytest

from mmdistill.checkpoint import errors
from mmdistill.errors import InputError


@pytest.mark.parametrize(
    "name", ["CorruptCheckpointError", "UnsafeCheckpointError", "WeightMismatchError", "ResumeMismatchError"]
)
def test_each_error_is_a_checkpoint_error_with_the_status_of_bad_input(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.CheckpointError)
    assert issubclass(errors.CheckpointError, InputError)
    assert error.exit_status == InputError.exit_status == 2
