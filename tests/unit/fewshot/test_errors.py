import pytest

from mmdistill.errors import InputError
from mmdistill.fewshot.errors import EpisodeError, FeatureError, FewshotError


@pytest.mark.parametrize("error", [EpisodeError, FeatureError, FewshotError])
def test_errors_are_input_errors_and_exit_with_status_2(error: type[FewshotError]):
    assert issubclass(error, FewshotError)
    assert issubclass(error, InputError)
    assert error("x").exit_status == 2
