"""What can be wrong with a few-shot evaluation."""

from mmdistill.errors import InputError


class FewshotError(InputError):
    """An evaluation that cannot be done as asked; the message says what is wrong and what to change."""


class EpisodeError(FewshotError):
    """The labels do not hold the episodes that were asked for; the message gives the counts."""


class FeatureError(FewshotError):
    """Features that cannot be trusted: not finite, of a wrong shape, or a damaged file."""
