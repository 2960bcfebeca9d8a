"""Few-shot classifiers and their registry.

A classifier is fitted to the support clips of an episode and predicts the queries. `CLASSIFIERS` has the names that
``classifier=`` and the reports use. Another distribution adds a `Classifier` through the entry point group
``mmdistill.classifiers``. See docs/extending.md.

Shapes: E episodes (a chunk: e), V views, N ways, K shots, Q queries per class, R references, D width.
"""

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker

import numpy as np
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed  # type: ignore[import-untyped]
from torch import Tensor

from mmdistill.data.dataloader import blocked_signals
from mmdistill.errors import InputError
from mmdistill.fewshot.episodes import Episodes, FloatArray, IntArray
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.logistic import default_num_workers, predict_logistic
from mmdistill.plugins import Registry

_COSINE_SCALE = 10.0  # softmax(10 s): a similarity s lies in [-1, 1] (Gidaris and Komodakis 2018, arXiv 1804.09458)
_VOTE_TEMPERATURE = 0.07  # weights exp(s / 0.07) of the neighbors (Wu et al. 2018, arXiv 1805.01978)
_CHUNK_BYTES = 64 << 20
_EPISODES_PER_TASK = 25


def ignore_progress(num_episodes: int) -> None:
    """The default of `PredictOptions.advance`."""


@dataclass(frozen=True)
class PredictOptions:
    """Options of `Classifier.predict`.

    Attributes:
        first_support_view: fit on the first view of the support clips, and classify every view of a query with it.
            Otherwise fit on view v and classify view v.
        workers: number of processes; None: all processors. The predictions do not depend on it.
        advance: called with the number of episodes that have been finished since the last call.
    """

    first_support_view: bool = False
    workers: int | None = None
    advance: Callable[[int], None] = ignore_progress


class Classifier(ABC):
    """A few-shot classifier.

    It is deterministic, and it classifies each query independently of the other queries.
    """

    @abstractmethod
    def predict(self, features: FloatArray, episodes: Episodes, options: PredictOptions) -> tuple[IntArray, int]:
        """Predict the queries of every episode; class probabilities are averaged over the views.

        `features` are finite float32 (clips, V, D). Returns predictions int64 (E, N * Q), positions 0..N-1 in the order
        of `episodes.query`, and the number of fits that did not converge.
        """


@dataclass(frozen=True)
class LogisticClassifier(Classifier):
    """``LogisticRegression(max_iter=1000)`` of scikit-learn: multinomial, L2, lbfgs, features without scaling.

    This is the paper's classifier (MM-CDFSL section 4.2 and its release). Its intercept makes centering redundant. The
    fits run on the CPU, in several processes.

    `normalize`: scale every feature to length 1 first.
    """

    normalize: bool = False

    def predict(self, features: FloatArray, episodes: Episodes, options: PredictOptions) -> tuple[IntArray, int]:  # noqa: D102
        starts = range(_EPISODES_PER_TASK, len(episodes), _EPISODES_PER_TASK)
        tasks = [episodes.take(rows) for rows in np.split(np.arange(len(episodes)), starts)]
        settings = {"normalize": self.normalize, "first_support_view": options.first_support_view}
        workers = default_num_workers() if options.workers is None else options.workers
        # loky starts new interpreters. A fork would inherit the locks of the torch and DeepSpeed threads.
        parallel = Parallel(n_jobs=max(1, min(workers, len(tasks))), return_as="generator", backend="loky")
        resource_tracker.ensure_running()  # loky calls it, and its first call unblocks SIGINT
        with blocked_signals([signal.SIGINT]):  # Ctrl-C would print a traceback in a worker that starts
            outputs = parallel(delayed(predict_logistic)(features, task, **settings) for task in tasks)
        predictions, num_not_converged = [], 0
        for predicted, count in outputs:
            predictions.append(predicted)
            num_not_converged += count
            options.advance(len(predicted))
        return np.concatenate(predictions), num_not_converged


@dataclass(frozen=True)
class _BatchedClassifier(Classifier):
    """A classifier by similarity to reference features, which torch computes over many episodes at once.

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

    def predict(self, features: FloatArray, episodes: Episodes, options: PredictOptions) -> tuple[IntArray, int]:
        table = torch.from_numpy(features)
        if self.normalize and not self.center:
            table = F.normalize(table, dim=2)
        clips = episodes.n_way * (episodes.k_shot + episodes.q_sample)
        chunk = max(1, _CHUNK_BYTES // (4 * clips * features.shape[1] * features.shape[2]))
        predictions = []
        for start in range(0, len(episodes), chunk):
            part = episodes.take(np.arange(start, min(start + chunk, len(episodes))))
            support, query = (
                table[torch.from_numpy(index)].movedim(3, 1) for index in (part.support, part.query)
            )  # (e, V, N, K, D), (e, V, N, Q, D)
            if options.first_support_view:
                support = support[:, :1].expand(-1, query.shape[1], -1, -1, -1)
            if self.center:
                mean = support.mean(dim=(2, 3), keepdim=True)
                support, query = support - mean, query - mean
                if self.normalize:
                    support, query = F.normalize(support, dim=4), F.normalize(query, dim=4)
            query = query.flatten(2, 3)  # (e, V, N * Q, D)
            similarity = self._similarity(query, self._references(support), support.flatten(2, 3))
            probabilities = self._probabilities(similarity, episodes.n_way, episodes.k_shot)
            predictions.append(probabilities.mean(dim=1).argmax(dim=2).numpy())
            options.advance(len(part))
        return np.concatenate(predictions).astype(np.int64), 0

    def _similarity(self, query: Tensor, references: Tensor, support: Tensor) -> Tensor:
        """Cosine, or minus the squared distance / the mean squared distance of two support clips, as float64.

        With raw squared distances of wide features every softmax is 0 or 1, and the mean over views is a vote with
        ties. (e, V, N * Q, D), (e, V, R, D), (e, V, N * K, D) -> (e, V, N * Q, R).
        """
        if self.metric == "cosine":
            return (F.normalize(query, dim=3) @ F.normalize(references, dim=3).mT).double()
        distance = torch.cdist(query, references, compute_mode="donot_use_mm_for_euclid_dist")  # exact in float32
        deviation = support - support.mean(dim=2, keepdim=True)
        scale = deviation.square().sum(dim=(2, 3)) * (2 / (support.shape[2] - 1))
        return -distance.double().square() / scale.clamp(min=1e-12)[..., None, None]

    @abstractmethod
    def _references(self, support: Tensor) -> Tensor:
        """The features that queries are compared with. (e, V, N, K, D) -> (e, V, R, D)."""

    @abstractmethod
    def _probabilities(self, similarity: Tensor, n_way: int, k_shot: int) -> Tensor:
        """Class probabilities of each view. float64 (e, V, N * Q, R) -> float64 (e, V, N * Q, N)."""


@dataclass(frozen=True)
class CentroidClassifier(_BatchedClassifier):
    """Nearest class centroid (Snell et al. 2017, arXiv 1703.05175)."""

    def _references(self, support: Tensor) -> Tensor:
        return support.mean(dim=3)

    def _probabilities(self, similarity: Tensor, n_way: int, k_shot: int) -> Tensor:
        return (_COSINE_SCALE * similarity).softmax(dim=3)


@dataclass(frozen=True)
class KnnClassifier(_BatchedClassifier):
    """Weighted vote of the K nearest support clips."""

    def _references(self, support: Tensor) -> Tensor:
        return support.flatten(2, 3)

    def _probabilities(self, similarity: Tensor, n_way: int, k_shot: int) -> Tensor:
        # The softmax covers all support clips. Over the nearest clips alone it would be 1 wherever they agree, and two
        # views that disagree would then tie exactly.
        shares = (similarity / _VOTE_TEMPERATURE).softmax(dim=3)
        weight, index = shares.topk(k_shot, dim=3)
        votes = weight.new_zeros(*similarity.shape[:3], n_way)
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
