"""Masked autoencoding of one modality on the DeepSpeed engine."""

from mmdistill.pretrain.loop import pretrain

__all__ = ["pretrain"]
