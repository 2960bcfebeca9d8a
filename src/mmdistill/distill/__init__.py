"""Distillation of frozen teachers into one RGB student with PyTorch Lightning."""

from mmdistill.distill.trainer import distill

__all__ = ["distill"]
