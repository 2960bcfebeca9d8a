"""Load weights into modules: strict, and without a change to the module if anything does not fit."""

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
    infer_token_grid,
    is_sincos,
    resize_positions,
)
from mmdistill.checkpoint.errors import CheckpointError, WeightMismatchError
from mmdistill.checkpoint.keys import component_of, encoder_roots, top_level
from mmdistill.checkpoint.read import Checkpoint, read_checkpoint
from mmdistill.errors import format_count
from mmdistill.models.videomae import Encoder, EncoderConfig

log = logging.getLogger(__name__)

_MAX_LISTED = 10  # names per list in an error
_CLASSIFIER_PREFIXES = ("head.", "head_", "fc_norm.", "fc_dropout.")  # an encoder has none of them


@dataclass(frozen=True)
class LoadReport:
    """Result of a load.

    Attributes:
        source: the path as given.
        format: layout on disk.
        component: the encoder that was loaded, or None for a complete module.
        tensors, parameters: number of copied tensors, and number of values in them.
        conversions: number of tensors by conversion, such as ``'bfloat16 -> float32'``.
        missing: missing names that match `allow_missing`; they keep the module's values.
        ignored_keys: number of tensors outside the module, by component (``decoder``, ``teacher_rgb``, ``head``).
        notes: interpolated positions, inferred heads, fp32 masters; one sentence each.
    """

    source: Path
    format: str
    component: str | None
    tensors: int
    parameters: int
    conversions: dict[str, int]
    missing: tuple[str, ...]
    ignored_keys: dict[str, int]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """One line for the log."""
        lines = [
            f"{format_count(self.tensors, 'tensor')}, {self.parameters:,} parameters from {self.source} ({self.format})"
        ]
        if self.component:
            lines.append(f"component {self.component}")
        lines += [f"{format_count(count, 'tensor')} converted {kind}" for kind, count in self.conversions.items()]
        if self.missing:
            lines.append(
                f"{len(self.missing)} missing, as allow_missing permits: {', '.join(self.missing[:_MAX_LISTED])}"
            )
        if self.ignored_keys:
            lines.append("ignored: " + ", ".join(f"{name} ({count})" for name, count in self.ignored_keys.items()))
        return "; ".join([*lines, *self.notes])


def select_encoder(checkpoint: Checkpoint, component: str | None) -> tuple[dict[str, Tensor], str, dict[str, int]]:
    """Select the tensors of one encoder.

    Returns:
        Its tensors without the prefix, the name of the component, and the number of ignored tensors by component.

    Raises:
        CheckpointError: no encoder, or no component of that name; the message lists the available ones.
    """
    state = checkpoint.state_dict
    roots = {component_of(root): root for root in encoder_roots(state)}
    if not roots:
        found = ", ".join(f"{name} ({n})" for name, n in Counter(map(top_level, state)).items())
        raise CheckpointError(
            f"{checkpoint.path}: contains no encoder (no patch_embed.proj.weight); its tensors are: {found}"
        )
    selected = component or next((name for name in ("student_rgb", "encoder") if name in roots), None)
    if selected is None and len(roots) == 1:
        selected = next(iter(roots))
    if selected not in roots:
        problem = f"no component '{component}'" if component else "several encoders and no student"
        raise CheckpointError(f"{checkpoint.path}: {problem}; select one of {', '.join(roots)} (part=, --component)")
    root = roots[selected]
    tensors = {k.removeprefix(root): v for k, v in state.items() if k.startswith(root)}
    encoder = {k: v for k, v in tensors.items() if not k.startswith(_CLASSIFIER_PREFIXES)}
    ignored = Counter(top_level(k) for k in state if not k.startswith(root))
    ignored.update(top_level(k) for k in tensors if k.startswith(_CLASSIFIER_PREFIXES))
    return encoder, selected, dict(ignored)


def _adapt_positions(
    state: dict[str, Tensor],
    target: Mapping[str, Tensor],
    meta: Mapping[str, Any] | None,
    grid: tuple[int, int, int] | None,
) -> str | None:
    """Adapt the position table of `state` to the module, in place; return a note, or None if nothing changed."""
    name = "pos_embed"
    if name not in state:
        return None
    stored = state[name]
    if stored.ndim != 3:
        return None
    if name not in target:
        if is_sincos(stored):
            del state[name]
            return f"sin-cos position embedding ({format_count(stored.shape[1], 'token')}) recomputed"
        return None
    if stored.shape[1] == target[name].shape[1] or stored.shape[2] != target[name].shape[2] or grid is None:
        return None
    if is_sincos(stored):
        # the caller computes the table of the module's own length
        del state[name]
        return "sin-cos"
    source = encoder_config_from_meta(meta).grid if meta else infer_token_grid(stored.shape[1], grid[0])
    if source[0] * source[1] * source[2] != stored.shape[1]:
        return None
    state[name] = resize_positions(stored, source, grid)
    return f"learned position embedding interpolated from {source} to {grid} (T, H, W)"


def _raise_on_mismatch(
    source: Path, missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str], matched: int
) -> None:
    if not (missing or unexpected or shapes) and matched:
        return
    lines = [f"{source}: does not fit the module, which was left unchanged"]
    if not matched:
        lines[0] = f"{source}: no tensor matches the module, which was left unchanged"
    for title, names in (("missing", missing), ("unexpected", unexpected), ("with a different shape", shapes)):
        if names:
            more = f" ... and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
            lines.append(f"  {len(names)} {title}: {', '.join(names[:_MAX_LISTED])}{more}")
    if missing:
        lines.append("  (Python callers can allow missing names with allow_missing=[patterns])")
    raise WeightMismatchError("\n".join(lines))


def copy_state(
    module: nn.Module, state: Mapping[str, Tensor], source: Path, allow_missing: Sequence[str] = ()
) -> tuple[int, int, dict[str, int], tuple[str, ...]]:
    """Copy a state_dict into a module with exactly these names and shapes, or raise and change nothing.

    Returns:
        Numbers of copied tensors and parameters, dtype conversions, and the missing names that `allow_missing` matches.

    Raises:
        WeightMismatchError: lists the tensors that do not fit.
    """
    target = module.state_dict()
    not_in_file = [name for name in target if name not in state]
    allowed = tuple(
        name for name in not_in_file if any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_missing)
    )
    shapes = [
        f"{name} {list(state[name].shape)} in the file, {list(target[name].shape)} in the module"
        for name in target
        if name in state and state[name].shape != target[name].shape
    ]
    matched = len(target) - len(not_in_file) - len(shapes)
    missing = [name for name in not_in_file if name not in allowed]
    _raise_on_mismatch(source, missing, [name for name in state if name not in target], shapes, matched)
    conversions: Counter[str] = Counter()
    parameters = 0
    with torch.no_grad():
        for name, tensor in target.items():
            if name in allowed:
                continue
            stored = state[name]
            if stored.dtype != tensor.dtype:
                conversions[
                    f"{str(stored.dtype).removeprefix('torch.')} -> {str(tensor.dtype).removeprefix('torch.')}"
                ] += 1
            tensor.copy_(stored)
            parameters += tensor.numel()
    return matched, parameters, dict(conversions), allowed


def _check_hidden_hparams(source: Path, stored: EncoderConfig, own: EncoderConfig) -> None:
    """Compare settings that do not affect shapes: with another number of heads all tensors fit but features differ."""
    names = ["heads", "head_dim"]
    if "sincos_separable" in (stored.pos_embed, own.pos_embed):  # fixed tables, which have no tensor in the file
        names.append("pos_embed")
    diff = [f"{n} {getattr(stored, n)} / {getattr(own, n)}" for n in names if getattr(stored, n) != getattr(own, n)]
    if diff:
        raise WeightMismatchError(
            f"{source}: does not fit the module, which was left unchanged (checkpoint / module): {', '.join(diff)}"
        )


def load_into(
    module: nn.Module, checkpoint: Checkpoint, *, component: str | None = None, allow_missing: Sequence[str] = ()
) -> LoadReport:
    """`load_weights` for the result of `read_checkpoint`."""
    target = module.state_dict()
    notes = list(checkpoint.notes)
    ignored: dict[str, int] = {}
    config = getattr(module, "config", None)
    if "patch_embed.proj.weight" in target:
        state, component, ignored = select_encoder(checkpoint, component)
        fields = (checkpoint.meta.get("encoders") or {}).get(component)
        if fields and isinstance(config, EncoderConfig):
            _check_hidden_hparams(checkpoint.path, encoder_config_from_meta(fields), config)
        note = _adapt_positions(state, target, fields, config.grid if isinstance(config, EncoderConfig) else None)
        if note == "sin-cos":
            assert isinstance(config, EncoderConfig)
            state["pos_embed"] = Encoder(replace(config, depth=1)).pos_embed.detach()
            note = "sin-cos position embedding recomputed for a different number of tokens"
        if note:
            notes.append(note)
    else:
        state = dict(checkpoint.state_dict)
        if component is not None:
            prefix = component + "."
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            ignored = dict(Counter(top_level(k) for k in checkpoint.state_dict if not k.startswith(prefix)))
    tensors, parameters, conversions, missing = copy_state(module, state, checkpoint.path, allow_missing)
    report = LoadReport(
        source=checkpoint.path,
        format=str(checkpoint.format),
        component=component,
        tensors=tensors,
        parameters=parameters,
        conversions=conversions,
        missing=missing,
        ignored_keys=ignored,
        notes=tuple(notes),
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
        module: an `Encoder` (the tensors of one encoder are loaded, the others are ignored and counted), or any module
            with the file's canonical names.
        path: anything that `read_checkpoint` reads.
        part: name of the component of a distilled checkpoint: ``student_rgb``, ``teacher_flow``, ... For an `Encoder`,
            None means ``student_rgb`` in a distilled file and ``encoder`` in a pretrained one.
        allow_missing: patterns (``fnmatch``) of names that may be missing in the file; they keep the module's values.

    Raises:
        WeightMismatchError: a tensor is missing, unexpected or of another shape, or no tensor matches. The module then
            keeps its values.
        CheckpointError: the path cannot be read.
    """
    return load_into(module, read_checkpoint(path), component=part, allow_missing=allow_missing)


def load_encoder_with_report(
    source: str | os.PathLike[str] | Checkpoint,
    *,
    part: str | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    heads: int | None = None,
) -> tuple[Encoder, LoadReport]:
    """`load_encoder` that also returns the report of the load."""
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    state, component, _ = select_encoder(checkpoint, part)
    notes: list[str] = []
    fields = (checkpoint.meta.get("encoders") or {}).get(component)
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
    report = load_into(encoder, replace(checkpoint, notes=(*checkpoint.notes, *notes)), component=component)
    return encoder, report


def load_encoder_for_clips(
    checkpoint: Checkpoint, *, component: str | None = None, num_frames: int, token_grid: tuple[int, int]
) -> Encoder:
    """`load_encoder` for clips of a given token grid, for files that may lack metadata.

    Such files do not store the input size, because sin-cos positions have no tensor. It is taken to be `num_frames`
    frames of `token_grid` patches of the size in the weights, at any resolution of the modality's input. Files with
    metadata keep their own size. The caller compares the size with its data.

    Args:
        checkpoint: what `read_checkpoint` returned.
        component: name of the component; None is the student or the only encoder.
        num_frames: frames per clip.
        token_grid: rows and columns of patches per frame.

    Raises:
        CheckpointError, WeightMismatchError: the errors of `load_encoder`.
    """
    state, component, _ = select_encoder(checkpoint, component)
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
    """Build the encoder of a checkpoint and load its weights.

    Args:
        source: anything that `read_checkpoint` reads, or its result.
        part: name of the component of a distilled checkpoint; None is the student.
        num_frames: frames per clip, if they differ from the checkpoint's. For another input size, sin-cos positions
            are recomputed and learned ones interpolated; the logged report notes it.
        height: height of the input in pixels, if it differs.
        width: width of the input in pixels, if it differs.
        heads: number of attention heads, for files of other programs whose tensors do not determine it.

    Returns:
        The encoder on the CPU in fp32, in training mode.

    Raises:
        CheckpointError, WeightMismatchError: the errors of `load_weights`.
    """
    return load_encoder_with_report(source, part=part, num_frames=num_frames, height=height, width=width, heads=heads)[
        0
    ]
