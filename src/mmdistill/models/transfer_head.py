"""The cross-modal transfer head of MM-CDFSL (Hatano et al., ECCV 2024, arXiv 2405.19917, section 3.3)."""

from collections.abc import Mapping

from torch import Tensor, nn


class CrossModalTransfer(nn.Module):
    """One two-layer MLP per teacher, from the student's feature of width `dim` to the teacher's feature.

    The activation is GELU, as in VideoMAE's blocks. That of the authors' code is ReLU.
    """

    def __init__(self, dim: int, teacher_dims: Mapping[str, int]) -> None:
        super().__init__()
        self.modalities = tuple(teacher_dims)
        for modality, width in teacher_dims.items():
            self.add_module(f"mlp_to_{modality}", nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, width)))

    def forward(self, feature: Tensor) -> dict[str, Tensor]:
        """(B, D) -> (B, width of the teacher) by modality."""
        return {m: self.get_submodule(f"mlp_to_{m}")(feature) for m in self.modalities}
