"""Few-shot heads that run in torch over many episodes at once: nearest centroid and k nearest neighbours.

The names in `HEADS` are what `head=` and the reports use; `Head` allows any other combination.

Shapes: E (a chunk: e) episodes, V views, N ways, K shots, S = N * K support clips, Q queries per class, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mmdistill.fewshot.episodes import Episodes
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.logistic import FloatArray

_COSINE_SCALE = 10.0  # softmax(10 s): a similarity s lies in [-1, 1] (Gidaris and Komodakis 2018, arXiv 1804.09458)
_VOTE_TEMPERATURE = 0.07  # weights exp(s / 0.07) of the neighbours (Wu et al. 2018, arXiv 1805.01978)
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Head:
    """A few-shot classifier.

    Attributes:
        kind: "logistic" (scikit-learn), "centroid" (Snell et al. 2017, arXiv 1703.05175) or "knn".
        metric: "cosine" or "euclidean"; not used by logistic.
        centre: subtract the mean of the episode's support features first. Queries take no part in the mean: each is
            classified as if it were alone (SimpleShot, arXiv 1911.04623, uses a training set's mean instead).
        normalise: scale features to length 1 first (after centring).
        c: inverse L2 strength of logistic.
        neighbours: of knn; 0 = K, so that one shot is the nearest neighbour.
    """

    kind: str
    metric: str = "cosine"
    centre: bool = False
    normalise: bool = False
    c: float = 1.0
    neighbours: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("logistic", "centroid", "knn"):
            raise FewshotError(f"head kind {self.kind!r} is not one of logistic, centroid, knn")
        if self.metric not in ("cosine", "euclidean"):
            raise FewshotError(f"metric {self.metric!r} is not one of cosine, euclidean")
        if self.kind == "logistic" and self.centre:
            raise FewshotError("logistic has an intercept: centring would not change it; leave centre off")
        if self.c <= 0 or self.neighbours < 0:
            raise FewshotError(f"c={self.c} must be positive and neighbours={self.neighbours} not negative")


HEADS: dict[str, Head] = {
    "logistic": Head("logistic"),
    "logistic_l2": Head("logistic", normalise=True),
    "centroid": Head("centroid"),
    "centroid_centered": Head("centroid", centre=True),
    "centroid_euclidean": Head("centroid", "euclidean"),
    "centroid_l2": Head("centroid", "euclidean", normalise=True),
    "centroid_cl2": Head("centroid", "euclidean", centre=True, normalise=True),
    "knn": Head("knn"),
    "knn_euclidean": Head("knn", "euclidean"),
}


def find_head(head: "str | Head") -> Head:
    """The head of this name. Raises FewshotError listing the known names."""
    if isinstance(head, Head):
        return head
    if head not in HEADS:
        raise FewshotError(f"head {head!r} is not one of {', '.join(HEADS)}")
    return HEADS[head]


def predict_batched(
    features: FloatArray,
    episodes: Episodes,
    head: Head,
    *,
    first_support_view: bool,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> NDArray[np.int64]:
    """Predict the queries of every episode with a centroid or k-NN head; probabilities are averaged over views.

    Args:
        features: float32 (clips, V, D).
        episodes: E episodes.
        head: kind centroid or knn.
        first_support_view: compare every view of a query with the support's first view; otherwise with its own view.
        device: where to compute.
        advance: called with the number of episodes done.

    Returns:
        int64 (E, N * Q), positions 0..N-1.
    """
    table = torch.from_numpy(features).to(device)
    if head.normalise and not head.centre:
        table = F.normalize(table, dim=2)
    if head.metric == "euclidean":
        table = table - table.mean(dim=(0, 1))  # distances stay the same; smaller numbers lose less in float32
    clips = episodes.n_way * (episodes.k_shot + episodes.q_sample)
    chunk = max(1, _CHUNK_BYTES // (4 * clips * features.shape[1] * features.shape[2]))
    out = []
    for start in range(0, len(episodes), chunk):
        part = episodes.take(np.arange(start, min(start + chunk, len(episodes))))
        support = _gather(table, part.support)  # (e, V, S, D)
        query = _gather(table, part.query)  # (e, V, N * Q, D)
        if first_support_view:
            support = support[:, :1].expand(-1, query.shape[1], -1, -1)
        if head.centre:
            mean = support.mean(dim=2, keepdim=True)
            support, query = support - mean, query - mean
            if head.normalise:
                support, query = F.normalize(support, dim=3), F.normalize(query, dim=3)
        probabilities = _probabilities(support, query, head, episodes.n_way, episodes.k_shot)
        out.append(probabilities.mean(dim=1).argmax(dim=2).cpu().numpy())
        if advance is not None:
            advance(len(part))
    return np.concatenate(out).astype(np.int64)


def _gather(table: Tensor, index: NDArray[np.int64]) -> Tensor:
    """Features of the clips of each episode, view by view. (clips, V, D), (e, N, K) -> (e, V, N * K, D)"""
    rows = torch.from_numpy(index.reshape(len(index), -1)).to(table.device)
    return table[rows].transpose(1, 2)


def _probabilities(support: Tensor, query: Tensor, head: Head, n_way: int, k_shot: int) -> Tensor:
    """Class probabilities of each view, float64. (e, V, S, D), (e, V, N * Q, D) -> (e, V, N * Q, N)"""
    e, v, _, width = support.shape
    scale = _spread(support) if head.metric == "euclidean" else None
    if head.kind == "centroid":
        centroids = support.reshape(e, v, n_way, k_shot, width).mean(dim=3)  # (e, V, N, D)
        return (_COSINE_SCALE * _similarity(query, centroids, scale)).softmax(dim=3)
    similarity = _similarity(query, support, scale)  # (e, V, N * Q, S)
    # Shares of all support clips, of which the nearest vote. Shares of the nearest alone are 1 where those agree, and
    # two views that disagree would then be an exact tie.
    shares = (similarity / _VOTE_TEMPERATURE).softmax(dim=3)
    weight, index = shares.topk(min(head.neighbours or k_shot, n_way * k_shot), dim=3)
    votes = torch.zeros(*similarity.shape[:3], n_way, dtype=weight.dtype, device=weight.device)
    return votes.scatter_add_(3, index // k_shot, weight)


def _spread(support: Tensor) -> Tensor:
    """Mean squared distance between two support clips. (e, V, S, D) -> (e, V, 1, 1)

    Distances are measured in this unit: probabilities then do not depend on the scale of the features. With raw squared
    distances of wide features every softmax is 0 or 1, and the mean over views is a vote with ties.
    """
    clips = support.shape[2]
    spread = (support - support.mean(dim=2, keepdim=True)).square().sum(dim=(2, 3)) * (2 / (clips - 1))
    return spread.clamp(min=1e-12)[..., None, None]


def _similarity(query: Tensor, other: Tensor, scale: Tensor | None) -> Tensor:
    """Cosine, or minus the squared distance over `scale`, as float64. (e, V, A, D), (e, V, B, D) -> (e, V, A, B)"""
    if scale is None:
        return (F.normalize(query, dim=3) @ F.normalize(other, dim=3).transpose(2, 3)).double()
    squares = other.square().sum(dim=3)[:, :, None] + query.square().sum(dim=3)[..., None]
    return (2 * query @ other.transpose(2, 3) - squares).double() / scale
