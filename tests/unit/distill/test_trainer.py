"""Which checkpoints are those of a complete distillation; the log lines of Lightning."""

import logging
import warnings
from typing import Any

import pytest

from mmdistill.distill.trainer import _is_complete, _is_no_noise, hide_lightning_noise


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"kind": "distill", "epoch": 1, "batch": None}, True),
        ({"kind": "distill", "epoch": 4, "batch": None}, True),  # trainer.epochs was larger
        ({"kind": "distill", "epoch": 0, "batch": None}, False),
        ({"kind": "distill", "epoch": 1, "batch": 3}, False),  # stopped inside the last epoch
        ({}, False),  # written by another program
    ],
)
def test_complete_checkpoints(meta: dict[str, Any], expected: bool) -> None:
    assert _is_complete(meta, epochs=2) is expected


def test_noise_of_lightning_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO, logger.name):
        warnings.simplefilter("always")
        hide_lightning_noise()
        hide_lightning_noise()  # a sweep runs several trainings in one process
        for message in ("TPU available: False, using: 0 TPU cores", "💡 Tip: try", "Restored all states from"):
            logger.info(message)
        warnings.warn("Found 46 module(s) in eval mode at the start of training.", stacklevel=1)
        warnings.warn("another warning", stacklevel=1)
    assert logger.filters.count(_is_no_noise) == 1
    logger.removeFilter(_is_no_noise)
    assert caplog.messages == ["Restored all states from"]
    assert [str(warning.message) for warning in caught] == ["another warning"]
