"""mmdistill: masked multimodal pretraining, distillation into one RGB student, few-shot evaluation."""

__version__ = "0.1.0"
