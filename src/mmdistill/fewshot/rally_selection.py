"""Select the rallies to label next from per-frame features.

k-center selection (Gonzalez 1985; for active learning: Sener and Savarese, arXiv 1708.00489): each step selects the
rally that is farthest from the selected ones. The distance of a rally is the mean over its frames of the distance to
the nearest frame of all selected rallies. A single unusual frame then has little influence.

Shapes: T frames of a rally, D feature width.
"""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from mmdistill.errors import format_count
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.spotting_head import FrameFeatures


def select_rallies(
    features: FrameFeatures, budget: int, *, labeled: Sequence[str] = (), first: str | None = None
) -> list[str]:
    """The rallies to label, in the order of the selection.

    Features are standardized per dimension over all frames. Distances are Euclidean.

    Args:
        features: (T, D) of the labeled rallies and of the candidates.
        budget: number of rallies to select.
        labeled: rallies that have labels.
        first: the first selected rally if there is no labeled one. None: the rally whose mean feature is nearest to
            the mean of all frames.

    Raises:
        FewshotError: there are fewer than `budget` candidates.
    """
    candidates = sorted(set(features) - set(labeled))
    if not 1 <= budget <= len(candidates):
        raise FewshotError(
            f"budget={budget} of {format_count(len(candidates), 'rally')} without labels; select between 1 and "
            f"{len(candidates)}"
        )
    frames = np.concatenate([features[video] for video in candidates]).astype(np.float32)
    mean, std = frames.mean(axis=0), frames.std(axis=0) + 1e-6
    scaled = {video: (x.astype(np.float32) - mean) / std for video, x in features.items()}
    selected = []
    if not labeled:
        central = min(candidates, key=lambda video: float(np.linalg.norm(scaled[video].mean(axis=0))))
        selected.append(first or central)
    distances = {video: np.full(len(scaled[video]), np.inf, dtype=np.float32) for video in candidates}
    _update(distances, scaled, [*labeled, *selected])
    while len(selected) < budget:
        remaining = [video for video in candidates if video not in selected]
        selected.append(max(remaining, key=lambda video: float(distances[video].mean())))
        _update(distances, scaled, selected[-1:])
    return selected


def _update(
    distances: dict[str, NDArray[np.float32]], scaled: dict[str, NDArray[np.float32]], added: Collection[str]
) -> None:
    """Lower the distances (T,) of all frames to that of the nearest frame of the rallies in `added`."""
    for center in added:
        b = scaled[center]
        squares = (b**2).sum(axis=1)
        for video, nearest in distances.items():
            a = scaled[video]
            found = (a**2).sum(axis=1) + (squares - 2 * a @ b.T).min(axis=1)
            np.minimum(nearest, np.sqrt(np.maximum(found, 0)), out=nearest)
