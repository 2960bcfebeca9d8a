"""Masked autoencoding of one modality on the DeepSpeed engine."""

from mmdistill.pretrain.trainer import pretrain

__all__ = ["pretrain"]
