"""Errors of the few-shot evaluation."""

from mmdistill.errors import InputError


class FewshotError(InputError):
    """The evaluation is not possible with these arguments. The message names the cause and the fix."""


class EpisodeError(FewshotError):
    """The labels do not supply the requested episodes. The message gives the counts."""


class FeatureError(FewshotError):
    """Features that are not finite or have a wrong shape, or a corrupt file of features."""
