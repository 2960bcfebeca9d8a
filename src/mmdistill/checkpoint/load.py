"""Copy tensors into modules: strict, and without a change to the module if anything does not fit."""

import fnmatch
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdistill.checkpoint.architecture import infer_token_grid, is_sincos, resize_positions
from mmdistill.checkpoint.errors import CheckpointError, ComponentError, WeightMismatchError
from mmdistill.checkpoint.keys import component_of, encoder_roots, top_level
from mmdistill.errors import format_count
from mmdistill.models.videomae import EncoderConfig, sincos_positions

_MAX_LISTED = 10  # names per list in an error
CLASSIFIER_PREFIXES = ("head.", "head_", "fc_norm.", "fc_dropout.")  # an encoder and a decoder have none of them


@dataclass(frozen=True)
class LoadReport:
    """Result of a load.

    Attributes:
        source: the path as given.
        tensors, parameters: number of copied tensors, and number of values in them.
        conversions: number of tensors by conversion, such as ``'bfloat16 -> float32'``.
        missing: missing names that match `allow_missing`; they keep the module's values.
        format: layout on disk.
        component: the encoder that was loaded, or None for a complete module.
        ignored_keys: number of tensors outside the module, by component (``decoder``, ``teacher_rgb``, ``head``).
        notes: interpolated positions, inferred heads, fp32 masters; one sentence each.
    """

    source: Path
    tensors: int
    parameters: int
    conversions: dict[str, int]
    missing: tuple[str, ...]
    format: str = ""
    component: str | None = None
    ignored_keys: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for the log."""
        tensors = format_count(self.tensors, "tensor")
        lines = [f"{tensors}, {self.parameters:,} parameters from {self.source} ({self.format})"]
        if self.component:
            lines.append(f"component {self.component}")
        lines += [f"{format_count(count, 'tensor')} converted {kind}" for kind, count in self.conversions.items()]
        if self.missing:
            names = ", ".join(self.missing[:_MAX_LISTED])
            lines.append(f"{format_count(len(self.missing), 'tensor')} not in the file, not changed: {names}")
        if self.ignored_keys:
            lines.append("ignored: " + ", ".join(f"{name} ({count})" for name, count in self.ignored_keys.items()))
        return "; ".join([*lines, *self.notes])


class SelectedEncoder(NamedTuple):
    """Tensors of one encoder without their prefix, its component, and the number of other tensors by component."""

    tensors: dict[str, Tensor]
    component: str
    ignored: dict[str, int]


def select_encoder(state: Mapping[str, Tensor], component: str | None, source: Path) -> SelectedEncoder:
    """Select one encoder of a checkpoint; None is the student, or the only encoder.

    Raises:
        ComponentError: no component of that name; the message lists the available ones.
        CheckpointError: no encoder.
    """
    roots = {component_of(root): root for root in encoder_roots(state)}
    if not roots:
        found = ", ".join(f"{name} ({n})" for name, n in Counter(map(top_level, state)).items())
        raise CheckpointError(f"{source}: contains no encoder (no patch_embed.proj.weight); its tensors are: {found}")
    selected = component or next((name for name in ("student_rgb", "encoder") if name in roots), None)
    if selected is None and len(roots) == 1:
        selected = next(iter(roots))
    if selected not in roots:
        problem = f"no component '{component}'" if component else "several encoders and no student"
        raise ComponentError(f"{source}: {problem}; select one of {', '.join(roots)}")
    root = roots[selected]
    shape = list(state[f"{root}patch_embed.proj.weight"].shape)
    if len(shape) == 4:
        raise CheckpointError(
            f"{source}: weights of an image model (patch_embed.proj.weight {shape}); use those of a video model, "
            "[D, C, t, p, p] as in VideoMAE"
        )
    tensors: dict[str, Tensor] = {}
    ignored: Counter[str] = Counter()
    for key, tensor in state.items():
        name = key.removeprefix(root)
        if not key.startswith(root):
            ignored[top_level(key)] += 1
        elif name.startswith(CLASSIFIER_PREFIXES):
            ignored[top_level(name)] += 1
        else:
            tensors[name] = tensor
    return SelectedEncoder(tensors, selected, dict(ignored))


def adapt_positions(
    state: dict[str, Tensor], own: Tensor | None, config: EncoderConfig | None, stored: EncoderConfig | None
) -> str | None:
    """Adapt the position table of `state` to the module, in place.

    Args:
        state: tensors of the encoder; the table, if it has one, is ``pos_embed`` (1, L, D).
        own: learned positions (1, L', D) of the module; None if its positions are fixed.
        config: of the module.
        stored: config in the checkpoint, if there is one.

    Returns:
        A note, or None if nothing changed. A table that cannot be adapted stays, and is then reported as a mismatch.
    """
    table = state.get("pos_embed")
    if table is None or table.ndim != 3:
        return None
    length, dim = table.shape[1:]
    if own is None:
        if not is_sincos(table):
            return None
        del state["pos_embed"]
        return f"sin-cos position embedding ({format_count(length, 'token')}) recomputed"
    if config is None or own.shape[1] == length or own.shape[2] != dim:
        return None
    if is_sincos(table):
        state["pos_embed"] = sincos_positions(own.shape[1], dim)[None]
        return "sin-cos position embedding recomputed for a different number of tokens"
    source = stored.grid if stored else infer_token_grid(length, config.grid[0])
    if math.prod(source) != length:
        return None
    state["pos_embed"] = resize_positions(table, source, config.grid)
    return f"learned position embedding interpolated from {source} to {config.grid} (T, H, W)"


def _raise_mismatch(source: Path, matched: int, names: Mapping[str, Sequence[str]]) -> None:
    problem = "does not fit" if matched else "no tensor matches"
    lines = [f"{source}: {problem} the module, which was left unchanged"]
    for title, found in names.items():
        if found:
            more = f" ... and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
            lines.append(f"  {len(found)} {title}: {', '.join(found[:_MAX_LISTED])}{more}")
    if names["missing"]:
        lines.append("  (Python callers can allow missing names with allow_missing=[patterns])")
    raise WeightMismatchError("\n".join(lines))


def copy_state(
    module: nn.Module, state: Mapping[str, Tensor], source: Path, allow_missing: Sequence[str] = ()
) -> LoadReport:
    """Copy a state_dict into a module with exactly these names and shapes, or raise and change nothing.

    Raises:
        WeightMismatchError: lists the tensors that do not fit.
    """
    target = module.state_dict()
    not_in_file = [name for name in target if name not in state]
    allowed = [name for name in not_in_file if any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_missing)]
    missing = [name for name in not_in_file if name not in allowed]
    unexpected = [name for name in state if name not in target]
    shapes = [
        f"{name} {list(state[name].shape)} in the file, {list(target[name].shape)} in the module"
        for name in target
        if name in state and state[name].shape != target[name].shape
    ]
    matched = len(target) - len(not_in_file) - len(shapes)
    if missing or unexpected or shapes or not matched:
        names = {"missing": missing, "unexpected": unexpected, "with a different shape": shapes}
        _raise_mismatch(source, matched, names)
    conversions: Counter[str] = Counter()
    parameters = 0
    with torch.no_grad():
        for name in target.keys() & state.keys():
            stored, tensor = state[name], target[name]
            if stored.dtype != tensor.dtype:
                conversions[f"{stored.dtype} -> {tensor.dtype}".replace("torch.", "")] += 1
            tensor.copy_(stored)
            parameters += tensor.numel()
    return LoadReport(source, matched, parameters, dict(conversions), tuple(allowed))


def check_hidden_hparams(source: Path, stored: EncoderConfig, own: EncoderConfig) -> None:
    """Compare settings that do not affect shapes: with another number of heads all tensors fit but features differ."""
    names = ["heads", "head_dim"]
    if "sincos_separable" in (stored.pos_embed, own.pos_embed):  # fixed tables, which have no tensor in the file
        names.append("pos_embed")
    diff = [f"{n} {getattr(stored, n)} / {getattr(own, n)}" for n in names if getattr(stored, n) != getattr(own, n)]
    if diff:
        raise WeightMismatchError(
            f"{source}: does not fit the module, which was left unchanged (checkpoint / module): {', '.join(diff)}"
        )
