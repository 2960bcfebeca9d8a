"""The tolerances of the GPU tests, which themselves run on GPUs only."""

import pytest

from tests.integration.test_gpu import assert_same_scores
from tests.tiny_data import SCORE_STEP


def test_score_comparison_accepts_two_queries_and_rejects_three() -> None:
    scores = {"student_rgb": 0.5, "random": 0.3}
    assert_same_scores({**scores, "random": 0.3 + 2 * SCORE_STEP}, scores)
    with pytest.raises(AssertionError):
        assert_same_scores({**scores, "random": 0.3 + 3 * SCORE_STEP}, scores)
