"""The log lines of Lightning."""

import logging
import warnings

import pytest

from mmdistill.distill.trainer import _is_no_noise, hide_lightning_noise


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
