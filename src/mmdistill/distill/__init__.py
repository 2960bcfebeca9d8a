"""Distillation of frozen teachers into one RGB student, as a Lightning module."""

from mmdistill.distill.trainer import distill

__all__ = ["distill"]
