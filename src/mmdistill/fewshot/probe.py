"""Classification over the full label set: a linear probe and k nearest neighbors on a seeded split of the clips.

Shapes: N clips, V views, D width.
"""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmdistill.errors import format_count
from mmdistill.fewshot.episodes import IntArray
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.scores import as_views

log = logging.getLogger(__name__)

_OMIT_PROBE = "set probe=false (mmdistill evaluate-features: omit --probe)"
FOLDS = 4  # one of them is the test part
_NUM_NEIGHBORS = 20
_TEMPERATURE = 0.07
_MAX_ITERATIONS = 300


def split_by_group(labels: IntArray, groups: Sequence[str], *, seed: int) -> tuple[IntArray, IntArray]:
    """Split clips: one of `FOLDS` stratified parts is the test part, and no group is in both parts.

    Returns:
        int64 positions of the training and the test clips. Classes without training clips have no test clips.

    Raises:
        FewshotError: fewer groups than folds, fewer than two classes, or no test clip.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    labeled = np.flatnonzero(labels >= 0)
    owners = np.asarray(groups)[labeled]
    videos, largest = len(np.unique(owners)), int(np.bincount(labels[labeled]).max(initial=0))
    if min(videos, largest) < FOLDS:
        raise FewshotError(
            f"the probe needs at least {FOLDS} videos and a class with at least {FOLDS} clips; the data have "
            f"{format_count(videos, 'video')}, and the largest class has {format_count(largest, 'clip')}; {_OMIT_PROBE}"
        )
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed % 2**32)
    with warnings.catch_warnings():  # rare classes are expected; clips without a training class are counted
        warnings.filterwarnings("ignore", message="The least populated class")
        train, test = next(splitter.split(labeled, labels[labeled], owners))
    has_training_class = np.isin(labels[labeled[test]], labels[labeled[train]])
    classes = len(np.unique(labels[labeled[train]]))
    if classes < 2 or not has_training_class.any():
        raise FewshotError(
            f"the probe needs at least 2 classes in its training split, and test clips of these; the split by video "
            f"gives {format_count(classes, 'class')} and {format_count(int(has_training_class.sum()), 'test clip')}; "
            f"{_OMIT_PROBE}"
        )
    return labeled[train], labeled[test[has_training_class]]


def probe_full_label_set(
    features: ArrayLike, labels: IntArray, *, groups: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Accuracy over all classes, trained on 3/4 of the videos and tested on the rest.

    The linear probe is multinomial logistic regression on features scaled to zero mean and unit variance (statistics of
    the training part). k-NN weights the nearest training clips by exp(cos / 0.07) (Wu et al. 2018, arXiv 1805.01978;
    DINO, arXiv 2104.14294). It uses 20 neighbors, or the mean number of training clips per class if that is smaller.
    The views of a clip are averaged first.

    `features` are (N, D) or (N, V, D), `labels` int64 (N,) with -1 for none, `groups` the names of the videos.

    Returns:
        `linear_top1`, `linear_macro` (mean over classes), `knn_top1`, `majority` (always predict the most frequent
        training class): fractions; `knn_num_neighbors`, `train_clips`, `test_clips`, `classes`, `skipped_clips` (test
        clips of classes without training clips).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = as_views(features).mean(axis=1)
    train, test = split_by_group(labels, groups, seed=seed)
    y, truth = labels[train], labels[test]
    values, counts = np.unique(y, return_counts=True)
    num_neighbors = max(1, min(_NUM_NEIGHBORS, round(len(y) / len(values))))  # more would force in other classes
    regression = LogisticRegression(max_iter=_MAX_ITERATIONS, tol=1e-3)
    linear = make_pipeline(StandardScaler(), regression).fit(x[train], y).predict(x[test])
    if int(max(regression.n_iter_)) >= _MAX_ITERATIONS:
        log.warning("the linear probe did not converge in %d iterations", _MAX_ITERATIONS)
    nearest = KNeighborsClassifier(num_neighbors, weights=_vote_weights, metric="cosine").fit(x[train], y)
    correct = linear == truth
    return {
        "linear_top1": float(correct.mean()),
        "linear_macro": float(np.mean([correct[truth == v].mean() for v in np.unique(truth)])),
        "knn_top1": float((nearest.predict(x[test]) == truth).mean()),
        "majority": float((truth == values[counts.argmax()]).mean()),
        "knn_num_neighbors": num_neighbors,
        "train_clips": len(train),
        "test_clips": len(test),
        "classes": len(values),
        "skipped_clips": int((labels >= 0).sum()) - len(train) - len(test),
    }


def _vote_weights(distance: NDArray[Any]) -> NDArray[np.float64]:
    """exp((cos - 1) / 0.07) of the cosine distance 1 - cos."""
    return np.exp(-distance.astype(np.float64) / _TEMPERATURE)
