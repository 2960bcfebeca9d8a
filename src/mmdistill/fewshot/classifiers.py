"""Few-shot classifiers and their registry.

A classifier is fitted to the support clips of an episode and predicts the queries. `CLASSIFIERS` has the names that
``classifier=`` and the reports use. Another distribution adds a `Classifier` through the entry point group
``mmdistill.classifiers``. See docs/extending.md.

Shapes: E (a chunk: e) episodes, V views, N ways, K shots, S = N * K support clips, Q queries per class, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mmdistill.errors import InputError
from mmdistill.fewshot.episodes import Episodes, IntArray
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.logistic import FloatArray, predict_logistic
from mmdistill.plugins import Registry

_COSINE_SCALE = 10.0  # softmax(10 s): a similarity s lies in [-1, 1] (Gidaris and Komodakis 2018, arXiv 1804.09458)
_VOTE_TEMPERATURE = 0.07  # weights exp(s / 0.07) of the neighbors (Wu et al. 2018, arXiv 1805.01978)
_CHUNK_BYTES = 64 << 20


class Classifier(ABC):
    """A few-shot classifier.

    It is deterministic, and it classifies each query independently of the other queries.
    """

    @abstractmethod
    def predict(
        self,
        features: FloatArray,
        episodes: Episodes,
        *,
        first_support_view: bool,
        workers: int | None = None,
        device: torch.device | str = "cpu",
        advance: Callable[[int], None] | None = None,
    ) -> tuple[IntArray, int]:
        """Predict the queries of every episode; class probabilities are averaged over the views.

        Args:
            features: float32 (clips, V, D), finite.
            episodes: E episodes, as indices into `features`.
            first_support_view: fit on the first view of the support clips, and classify every view of a query with it.
                Otherwise fit on view v and classify view v.
            workers: number of processes; None: all processors. The predictions do not depend on it.
            device: the device of tensor operations.
            advance: called with the number of episodes that have been finished since the last call.

        Returns:
            predictions int64 (E, N * Q), positions 0..N-1, in the order of `episodes.query`, and the number of fits
            that did not converge.
        """


@dataclass(frozen=True)
class LogisticClassifier(Classifier):
    """Multinomial logistic regression of scikit-learn, the paper's classifier.

    Its intercept makes centering redundant.

    Attributes:
        c: inverse strength of the L2 penalty.
        normalize: scale every feature to length 1 first.
    """

    c: float = 1.0
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.c <= 0:
            raise FewshotError(f"c={self.c} must be positive")

    def predict(
        self,
        features: FloatArray,
        episodes: Episodes,
        *,
        first_support_view: bool,
        workers: int | None = None,
        device: torch.device | str = "cpu",
        advance: Callable[[int], None] | None = None,
    ) -> tuple[IntArray, int]:
        """See `Classifier.predict`. Each fit runs on the CPU."""
        return predict_logistic(
            features,
            episodes,
            c=self.c,
            first_support_view=first_support_view,
            normalize=self.normalize,
            workers=workers,
            advance=advance,
        )


@dataclass(frozen=True)
class _BatchedClassifier(Classifier):
    """A classifier that torch computes over many episodes at once.

    Attributes:
        metric: "cosine" or "euclidean".
        center: subtract the mean of the episode's support features first. Queries do not contribute to the mean, so
            each is classified independently (SimpleShot, arXiv 1911.04623, uses a training set's mean instead).
        normalize: scale features to length 1 first (after centering).
    """

    metric: str = "cosine"
    center: bool = False
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.metric not in ("cosine", "euclidean"):
            raise FewshotError(f"metric {self.metric!r} is not one of cosine, euclidean")

    def predict(
        self,
        features: FloatArray,
        episodes: Episodes,
        *,
        first_support_view: bool,
        workers: int | None = None,
        device: torch.device | str = "cpu",
        advance: Callable[[int], None] | None = None,
    ) -> tuple[IntArray, int]:
        """See `Classifier.predict`. It uses one process."""
        table = torch.from_numpy(features).to(device)
        if self.normalize and not self.center:
            table = F.normalize(table, dim=2)
        if self.metric == "euclidean":
            table = table - table.mean(dim=(0, 1))  # same distances; smaller numbers lose less precision in float32
        clips = episodes.n_way * (episodes.k_shot + episodes.q_sample)
        chunk = max(1, _CHUNK_BYTES // (4 * clips * features.shape[1] * features.shape[2]))
        predictions = []
        for start in range(0, len(episodes), chunk):
            part = episodes.take(np.arange(start, min(start + chunk, len(episodes))))
            support = _gather(table, part.support)  # (e, V, S, D)
            query = _gather(table, part.query)  # (e, V, N * Q, D)
            if first_support_view:
                support = support[:, :1].expand(-1, query.shape[1], -1, -1)
            if self.center:
                mean = support.mean(dim=2, keepdim=True)
                support, query = support - mean, query - mean
                if self.normalize:
                    support, query = F.normalize(support, dim=3), F.normalize(query, dim=3)
            scale = _mean_squared_distance(support) if self.metric == "euclidean" else None
            probabilities = self._probabilities(support, query, scale, episodes.n_way, episodes.k_shot)
            predictions.append(probabilities.mean(dim=1).argmax(dim=2).cpu().numpy())
            if advance is not None:
                advance(len(part))
        return np.concatenate(predictions).astype(np.int64), 0

    @abstractmethod
    def _probabilities(self, support: Tensor, query: Tensor, scale: Tensor | None, n_way: int, k_shot: int) -> Tensor:
        """Class probabilities of each view, float64. (e, V, S, D), (e, V, N * Q, D) -> (e, V, N * Q, N)."""


@dataclass(frozen=True)
class CentroidClassifier(_BatchedClassifier):
    """Nearest class centroid (Snell et al. 2017, arXiv 1703.05175)."""

    def _probabilities(self, support: Tensor, query: Tensor, scale: Tensor | None, n_way: int, k_shot: int) -> Tensor:
        e, v, _, width = support.shape
        centroids = support.reshape(e, v, n_way, k_shot, width).mean(dim=3)  # (e, V, N, D)
        return (_COSINE_SCALE * _similarity(query, centroids, scale)).softmax(dim=3)


@dataclass(frozen=True)
class KnnClassifier(_BatchedClassifier):
    """Weighted vote of the nearest support clips.

    Attributes:
        num_neighbors: 0 means K, so that one shot is the nearest neighbor.
    """

    num_neighbors: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_neighbors < 0:
            raise FewshotError(f"num_neighbors={self.num_neighbors} must not be negative")

    def _probabilities(self, support: Tensor, query: Tensor, scale: Tensor | None, n_way: int, k_shot: int) -> Tensor:
        similarity = _similarity(query, support, scale)  # (e, V, N * Q, S)
        # The softmax covers all support clips. Over the nearest clips alone it would be 1 wherever they agree, and two
        # views that disagree would then tie exactly.
        shares = (similarity / _VOTE_TEMPERATURE).softmax(dim=3)
        weight, index = shares.topk(min(self.num_neighbors or k_shot, n_way * k_shot), dim=3)
        votes = torch.zeros(*similarity.shape[:3], n_way, dtype=weight.dtype, device=weight.device)
        return votes.scatter_add_(3, index // k_shot, weight)


CLASSIFIERS: Registry[Classifier] = Registry("classifier", "mmdistill.classifiers")
for _name, _classifier in {
    "logistic": LogisticClassifier(),
    "logistic_l2": LogisticClassifier(normalize=True),
    "centroid": CentroidClassifier(),
    "centroid_centered": CentroidClassifier(center=True),
    "centroid_euclidean": CentroidClassifier("euclidean"),
    "centroid_l2": CentroidClassifier("euclidean", normalize=True),
    "centroid_cl2": CentroidClassifier("euclidean", center=True, normalize=True),
    "knn": KnnClassifier(),
    "knn_euclidean": KnnClassifier("euclidean"),
}.items():
    CLASSIFIERS.register(_name, _classifier)


def get_classifier(name: str) -> Classifier:
    """The classifier of this name.

    Raises:
        FewshotError: there is no such name (the message lists the names), or its entry point is not a `Classifier`.
    """
    try:
        classifier = CLASSIFIERS.get(name)
    except InputError as error:
        raise FewshotError(str(error)) from error
    if not isinstance(classifier, Classifier):
        raise FewshotError(
            f"classifier {name!r}: the entry point must name an instance of mmdistill.fewshot.classifiers.Classifier, "
            f"but it names {classifier!r}"
        )
    return classifier


def _gather(table: Tensor, index: NDArray[np.int64]) -> Tensor:
    """Features of the clips of each episode, view by view. (clips, V, D), (e, N, K) -> (e, V, N * K, D)."""
    rows = torch.from_numpy(index.reshape(len(index), -1)).to(table.device)
    return table[rows].transpose(1, 2)


def _mean_squared_distance(support: Tensor) -> Tensor:
    """Mean squared distance between two support clips. (e, V, S, D) -> (e, V, 1, 1).

    Squared distances are divided by it, so that probabilities do not depend on the scale of the features. With raw
    squared distances of wide features every softmax is 0 or 1, and the mean over views is a vote with ties.
    """
    clips = support.shape[2]
    distance = (support - support.mean(dim=2, keepdim=True)).square().sum(dim=(2, 3)) * (2 / (clips - 1))
    return distance.clamp(min=1e-12)[..., None, None]


def _similarity(query: Tensor, other: Tensor, scale: Tensor | None) -> Tensor:
    """Cosine, or minus the squared distance over `scale`, as float64. (e, V, A, D), (e, V, B, D) -> (e, V, A, B)."""
    if scale is None:
        return (F.normalize(query, dim=3) @ F.normalize(other, dim=3).transpose(2, 3)).double()
    squares = other.square().sum(dim=3)[:, :, None] + query.square().sum(dim=3)[..., None]
    return (2 * query @ other.transpose(2, 3) - squares).double() / scale
