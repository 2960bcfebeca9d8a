"""mmdistill: masked multimodal pretraining, distillation into one RGB student, few-shot evaluation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdistill.checkpoint.student import load_student as load_student

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `load_student` on first use, because it imports torch."""
    if name == "load_student":
        from mmdistill.checkpoint.student import load_student

        return load_student
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
