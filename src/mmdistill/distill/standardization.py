"""Standardized targets (`trainer.standardize_targets`): each teacher's features with statistics of the first epoch.

In the first epoch each batch is added to the statistics before its features are standardized. From the second epoch on
the statistics do not change. They are buffers in float64, so a checkpoint contains them and a resume is exact. Each
operation scales exactly with a power of two, and no constant is added to a variance. The targets therefore do not
change if all features of a teacher are multiplied by a power of two.

Shapes: B clips of a batch, D width of the teacher's feature.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmdistill.distributed.collectives import all_reduce_sum, broadcast_object
from mmdistill.models.hadamard import hadamard

# A standard deviation of at most this fraction of the mean is rounding of float32 values: the dimension is constant.
RELATIVE_STD_OF_CONSTANT = 2.0**-20


class TargetStandardizer(nn.Module):
    """Statistics of one teacher, and the targets that they give.

    ``standard``: each dimension is centered and divided by its standard deviation. A constant dimension gives 0.

    ``phi_s``: PHI-S (Ranzinger et al., arXiv 2410.01680): ``H @ U.T @ (x - mean) / s``, where the columns of U are the
    eigenvectors of the covariance, H is a normalized Hadamard matrix, and s² is the mean variance of the dimensions.
    Each dimension then has variance 1, and one scale applies to all. The rotation ``H @ U.T`` is the identity until
    `finish` is called at the end of the first epoch. A constant teacher gives 0.

    Args:
        width: D.
        method: ``standard`` or ``phi_s``.

    Raises:
        ValueError: ``phi_s``, and no Hadamard matrix of order D is known.
    """

    def __init__(self, width: int, method: str) -> None:
        super().__init__()
        self.count: Tensor
        self.mean: Tensor
        self.scatter: Tensor
        self.rotation: Tensor
        self.is_rotated = method == "phi_s"
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))  # clips
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        # sum over clips of the squares (D,), or products (D, D), of the deviations from the mean
        shape = (width, width) if self.is_rotated else (width,)
        self.register_buffer("scatter", torch.zeros(shape, dtype=torch.float64))
        if self.is_rotated:
            hadamard(width)  # raises before the training
            self.register_buffer("rotation", torch.eye(width, dtype=torch.float64))

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add the features of a batch on all ranks, (B, D); ignored if one of them is not finite. Collective."""
        x = features.double()
        ones = torch.ones((), dtype=torch.float64, device=x.device)
        count, total = all_reduce_sum([ones * len(x), x.sum(dim=0)])
        batch_mean = total / count
        deviation = x - batch_mean
        scatter = deviation.T @ deviation if self.is_rotated else deviation.square().sum(dim=0)
        (scatter,) = all_reduce_sum([scatter])
        # Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979)
        difference = batch_mean - self.mean
        products = torch.outer(difference, difference) if self.is_rotated else difference.square()
        merged_count = self.count + count
        new_values = {
            "mean": self.mean + difference * (count / merged_count),
            "scatter": self.scatter + scatter + products * (self.count * count / merged_count),
            "count": merged_count,
        }
        is_finite = torch.isfinite(new_values["mean"]).all() & torch.isfinite(new_values["scatter"]).all()
        for name, value in new_values.items():
            buffer = self.get_buffer(name)
            buffer.copy_(torch.where(is_finite, value, buffer))

    @torch.no_grad()
    def finish(self) -> None:
        """Compute the rotation of ``phi_s`` from the statistics, on rank 0. Collective."""
        if self.is_rotated:
            self.rotation.copy_(broadcast_object(phi_s_rotation(self.scatter.cpu())))

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """The targets of features, (B, D) -> float32 (B, D)."""
        deviation = features.double() - self.mean
        variance = self.variance
        if self.is_rotated:
            scale, offset = variance.mean().sqrt(), self.mean.square().mean().sqrt()
            deviation = deviation @ self.rotation.T
        else:
            scale, offset = variance.sqrt(), self.mean.abs()
        is_constant = scale <= RELATIVE_STD_OF_CONSTANT * offset
        return torch.where(is_constant, 0.0, deviation / scale).float()

    @property
    def variance(self) -> Tensor:
        """Variance of each dimension of the features, float64 (D,)."""
        scatter = self.scatter.diagonal() if self.is_rotated else self.scatter
        return scatter / self.count.clamp(min=1)


def phi_s_rotation(scatter: Tensor) -> Tensor:
    """``H @ U.T`` of a symmetric matrix with the eigenvectors U, float64 (D, D) -> (D, D).

    In the rotated coordinates all diagonal entries of the matrix are equal. The matrix is divided by a power of two
    first, so that the result is bit-identical if all features are multiplied by a power of two.
    """
    exponent = int(torch.frexp(scatter.trace()).exponent)
    vectors = torch.linalg.eigh(scatter * 2.0**-exponent).eigenvectors  # (D, D), one per column
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    vectors = vectors * largest.sign()  # an eigenvector has no sign of its own
    width = len(scatter)
    rotation: Tensor = hadamard(width) @ vectors.T / width**0.5
    return rotation


def make_standardizers(widths: Mapping[str, int], method: str | None) -> nn.ModuleDict:
    """A `TargetStandardizer` per teacher; none if `method` is None. Raises `ValueError`, naming the teacher."""
    standardizers = nn.ModuleDict()
    for name, width in widths.items() if method else ():
        try:
            standardizers[name] = TargetStandardizer(width, str(method))
        except ValueError as error:
            raise ValueError(
                f"phi_s needs a Hadamard matrix of the width {width} of teacher {name}, and none is known here; use "
                "standard"
            ) from error
    return standardizers
