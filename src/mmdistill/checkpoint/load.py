"""Weights into modules: everything fits, or nothing changes."""

import fnmatch
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdistill.checkpoint.architecture import (
    encoder_config_from_meta,
    encoder_config_from_tensors,
    is_sincos,
    resize_positions,
    token_grid,
)
from mmdistill.checkpoint.errors import CheckpointError, WeightMismatchError
from mmdistill.checkpoint.keys import encoder_roots, part_of, top_level
from mmdistill.checkpoint.read import Checkpoint, read_checkpoint
from mmdistill.models.videomae import Encoder, EncoderConfig

log = logging.getLogger(__name__)

_SHOWN = 10  # names per list in an error
_HEADS = ("head.", "head_", "fc_norm.", "fc_dropout.")  # of classifiers; an encoder has none


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    Attributes:
        source: the path as given.
        format: its layout.
        part: the encoder that was taken, or None for the whole module.
        tensors, parameters: how many were copied, and the number of values in them.
        conversions: ``'bfloat16 -> float32'`` and the like, with the number of tensors.
        missing: names that `allow_missing` excused; they keep the module's values.
        left_out: tensors of the file that are not the module's business, by part (``decoder``, ``teacher_rgb``,
            ``head``).
        notes: positions interpolated, heads inferred, masters read; a sentence each.
    """

    source: Path
    format: str
    part: str | None
    tensors: int
    parameters: int
    conversions: dict[str, int]
    missing: tuple[str, ...]
    left_out: dict[str, int]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.tensors} tensors, {self.parameters:,} parameters from {self.source} ({self.format})"]
        if self.part:
            lines.append(f"part {self.part}")
        lines += [f"{count} tensors converted {kind}" for kind, count in self.conversions.items()]
        if self.missing:
            lines.append(f"{len(self.missing)} missing as allowed: {', '.join(self.missing[:_SHOWN])}")
        if self.left_out:
            lines.append("left out: " + ", ".join(f"{part} ({count})" for part, count in self.left_out.items()))
        return "; ".join([*lines, *self.notes])


def select_encoder(checkpoint: Checkpoint, part: str | None) -> tuple[dict[str, Tensor], str, dict[str, int]]:
    """Tensors of one encoder without its prefix, its part's name, and what was left out.

    Raises:
        CheckpointError: no encoder, or no part of that name; the message lists those there are.
    """
    state = checkpoint.state_dict
    roots = {part_of(root): root for root in encoder_roots(state)}
    if not roots:
        held = ", ".join(f"{name} ({n})" for name, n in Counter(map(top_level, state)).items())
        raise CheckpointError(
            f"{checkpoint.path}: holds no encoder (no patch_embed.proj.weight); its tensors are: {held}"
        )
    wanted = part or next((name for name in ("student_rgb", "encoder") if name in roots), None)
    if wanted is None and len(roots) == 1:
        wanted = next(iter(roots))
    if wanted not in roots:
        asked = f"no part '{part}'" if part else "several encoders and no student"
        raise CheckpointError(f"{checkpoint.path}: {asked}; it holds {', '.join(roots)}: give part=")
    root = roots[wanted]
    inside = {k.removeprefix(root): v for k, v in state.items() if k.startswith(root)}
    encoder = {k: v for k, v in inside.items() if not k.startswith(_HEADS)}
    left = Counter(top_level(k) for k in state if not k.startswith(root))
    left.update(top_level(k) for k in inside if k.startswith(_HEADS))
    return encoder, wanted, dict(left)


def _positions(
    state: dict[str, Tensor],
    target: Mapping[str, Tensor],
    meta: Mapping[str, Any] | None,
    grid: tuple[int, int, int] | None,
) -> str | None:
    """Make the file's position table fit the module, in place; what was done, in words."""
    name = "pos_embed"
    if name not in state:
        return None
    held = state[name]
    if held.ndim != 3:
        return None
    if name not in target:
        if is_sincos(held):
            del state[name]
            return f"sin-cos positions ({held.shape[1]} tokens) recomputed"
        return None
    if held.shape[1] == target[name].shape[1] or held.shape[2] != target[name].shape[2] or grid is None:
        return None
    if is_sincos(held):
        # the module starts from the table of its own length
        del state[name]
        return "sin-cos"
    source = encoder_config_from_meta(meta).grid if meta else token_grid(held.shape[1], grid[0])
    if source[0] * source[1] * source[2] != held.shape[1]:
        return None
    state[name] = resize_positions(held, source, grid)
    return f"learned positions interpolated from {source} to {grid} (T, H, W)"


def _complain(
    source: Path, missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str], matched: int
) -> None:
    if not (missing or unexpected or shapes) and matched:
        return
    lines = [f"{source}: does not fit the module, which was left unchanged"]
    if not matched:
        lines[0] = f"{source}: not one tensor matches the module, which was left unchanged"
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if names:
            more = f" ... and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"  {len(names)} {title}: {', '.join(names[:_SHOWN])}{more}")
    if missing:
        lines.append("  (Python callers may excuse names with allow_missing=[patterns])")
    raise WeightMismatchError("\n".join(lines))


def copy_state(
    module: nn.Module, state: Mapping[str, Tensor], source: Path, allow_missing: Sequence[str] = ()
) -> tuple[int, int, dict[str, int], tuple[str, ...]]:
    """Copy a state_dict into a module of exactly these names and shapes, or raise and change nothing.

    Returns:
        Tensors and parameters copied, dtype conversions, and the names that `allow_missing` excused.

    Raises:
        WeightMismatchError: with the lists.
    """
    target = module.state_dict()
    absent = [name for name in target if name not in state]
    excused = tuple(name for name in absent if any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_missing))
    shapes = [
        f"{name} {list(state[name].shape)} in the file, {list(target[name].shape)} in the module"
        for name in target
        if name in state and state[name].shape != target[name].shape
    ]
    matched = len(target) - len(absent) - len(shapes)
    missing = [name for name in absent if name not in excused]
    _complain(source, missing, [name for name in state if name not in target], shapes, matched)
    conversions: Counter[str] = Counter()
    parameters = 0
    with torch.no_grad():
        for name, own in target.items():
            if name in excused:
                continue
            given = state[name]
            if given.dtype != own.dtype:
                conversions[
                    f"{str(given.dtype).removeprefix('torch.')} -> {str(own.dtype).removeprefix('torch.')}"
                ] += 1
            own.copy_(given)
            parameters += own.numel()
    return matched, parameters, dict(conversions), excused


def _check_unseen(source: Path, found: EncoderConfig, own: EncoderConfig) -> None:
    """Whether what no shape shows is the same: with other heads all weights fit, and the features are wrong."""
    names = ["heads", "head_dim"]
    if "sincos_separable" in (found.pos_embed, own.pos_embed):  # a fixed table, of which no tensor tells the kind
        names.append("pos_embed")
    other = [f"{n} {getattr(found, n)} / {getattr(own, n)}" for n in names if getattr(found, n) != getattr(own, n)]
    if other:
        raise WeightMismatchError(
            f"{source}: does not fit the module, which was left unchanged: (checkpoint / module) {', '.join(other)}"
        )


def load_into(
    module: nn.Module, checkpoint: Checkpoint, *, part: str | None = None, allow_missing: Sequence[str] = ()
) -> LoadReport:
    """`load_weights` for a checkpoint that has been read already."""
    target = module.state_dict()
    notes = list(checkpoint.notes)
    left: dict[str, int] = {}
    config = getattr(module, "config", None)
    if "patch_embed.proj.weight" in target:
        state, part, left = select_encoder(checkpoint, part)
        fields = (checkpoint.meta.get("encoders") or {}).get(part)
        if fields and isinstance(config, EncoderConfig):
            _check_unseen(checkpoint.path, encoder_config_from_meta(fields), config)
        note = _positions(state, target, fields, config.grid if isinstance(config, EncoderConfig) else None)
        if note == "sin-cos":
            assert isinstance(config, EncoderConfig)
            state["pos_embed"] = Encoder(replace(config, depth=1)).pos_embed.detach()
            note = "sin-cos positions of another length recomputed"
        if note:
            notes.append(note)
    else:
        state = dict(checkpoint.state_dict)
        if part is not None:
            state = {k.removeprefix(part + "."): v for k, v in state.items() if k.startswith(part + ".")}
            left = dict(Counter(top_level(k) for k in checkpoint.state_dict if not k.startswith(part + ".")))
    tensors, parameters, conversions, missing = copy_state(module, state, checkpoint.path, allow_missing)
    report = LoadReport(
        checkpoint.path, str(checkpoint.format), part, tensors, parameters, conversions, missing, left, tuple(notes)
    )
    log.info("loaded %s", report)
    return report


def load_weights(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    part: str | None = None,
    allow_missing: Sequence[str] = (),
) -> LoadReport:
    """Load a checkpoint into a module, strictly.

    Args:
        module: an `Encoder` (the encoder of the file, or of `part`, is taken and the rest left out and counted), or any
            module with the file's canonical names.
        path: anything that `read_checkpoint` reads.
        part: ``student_rgb``, ``teacher_flow``, ...: that part of a distilled checkpoint. For an `Encoder` None means
            ``student_rgb`` in a distilled file and ``encoder`` in a pretrained one.
        allow_missing: patterns (``fnmatch``) of names that may be absent from the file; they keep the module's values.

    Raises:
        WeightMismatchError: a tensor is missing, unexpected or of another shape, or none matches. The module then keeps
            its values.
        CheckpointError: the path cannot be read.
    """
    return load_into(module, read_checkpoint(path), part=part, allow_missing=allow_missing)


def load_encoder_with_report(
    source: str | os.PathLike[str] | Checkpoint,
    *,
    part: str | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    heads: int | None = None,
) -> tuple[Encoder, LoadReport]:
    """`load_encoder`, and what it did."""
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    state, part, _ = select_encoder(checkpoint, part)
    notes: list[str] = []
    fields = (checkpoint.meta.get("encoders") or {}).get(part)
    try:
        if fields:
            config = encoder_config_from_meta(fields)
            config = replace(
                config,
                num_frames=num_frames or config.num_frames,
                height=height or config.height,
                width=width or config.width,
            )
        else:
            config, notes = encoder_config_from_tensors(
                state, heads=heads, num_frames=num_frames, height=height, width=width
            )
        encoder = Encoder(config)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    report = load_into(encoder, replace(checkpoint, notes=(*checkpoint.notes, *notes)), part=part)
    return encoder, report


def load_encoder_for_clips(
    checkpoint: Checkpoint, *, part: str | None = None, num_frames: int, token_grid: tuple[int, int]
) -> Encoder:
    """`load_encoder` for clips of a given token grid, for files that may lack metadata.

    Such files do not store the input size, because sin-cos positions have no tensor. It is taken to be `num_frames`
    frames of `token_grid` patches of the size in the weights, at any resolution of the modality's input. Files with
    metadata keep their own size. The caller compares the size with its data.

    Args:
        checkpoint: what `read_checkpoint` returned.
        part: name of the component; None is the student or the only encoder.
        num_frames: frames per clip.
        token_grid: rows and columns of patches per frame.

    Raises:
        CheckpointError, WeightMismatchError: as `load_encoder`.
    """
    state, component, _ = select_encoder(checkpoint, part)
    if (checkpoint.meta.get("encoders") or {}).get(component):
        return load_encoder(checkpoint, part=component)
    patch = int(state["patch_embed.proj.weight"].shape[-1])
    height, width = (count * patch for count in token_grid)
    return load_encoder(checkpoint, part=component, num_frames=num_frames, height=height, width=width)


def load_encoder(
    source: str | os.PathLike[str] | Checkpoint,
    *,
    part: str | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    heads: int | None = None,
) -> Encoder:
    """Build the encoder that a checkpoint holds and load it.

    Args:
        source: anything that `read_checkpoint` reads, or what it returned.
        part: which encoder of a distilled checkpoint; None is the student.
        num_frames, height, width: another input size than the checkpoint's. Sin-cos positions are recomputed, learned
            ones interpolated, and the report (logged) says so.
        heads: number of attention heads, needed only for foreign files whose tensors leave it open.

    Returns:
        The encoder on the CPU in fp32, in training mode like any new module.

    Raises:
        CheckpointError, WeightMismatchError: as `load_weights`.
    """
    return load_encoder_with_report(source, part=part, num_frames=num_frames, height=height, width=width, heads=heads)[
        0
    ]
