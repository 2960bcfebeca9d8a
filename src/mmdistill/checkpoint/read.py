"""Open a checkpoint of any format: tensors under canonical names, metadata, and its encoders."""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdistill.checkpoint.architecture import (
    decoder_config_from_tensors,
    encoder_config_from_meta,
    encoder_config_from_tensors,
)
from mmdistill.checkpoint.errors import (
    CheckpointError,
    ComponentError,
    CorruptCheckpointError,
    WeightMismatchError,
    name_setting,
)
from mmdistill.checkpoint.formats.deepspeed_zero import RawTensors, read_model_states, read_zero_checkpoint
from mmdistill.checkpoint.formats.huggingface import ModelSettings, read_model_settings, read_shard_index
from mmdistill.checkpoint.formats.manifest import verify_manifest
from mmdistill.checkpoint.formats.names import (
    FILE_SUFFIXES,
    HEADS_KEY,
    HUGGINGFACE_WEIGHTS,
    META,
    METADATA_KEY,
    SHARD_INDEX_SUFFIX,
    CheckpointFormat,
    state_files,
)
from mmdistill.checkpoint.formats.safetensors_file import (
    SafetensorsContent,
    is_safetensors,
    read_safetensors,
    verify_safetensors,
)
from mmdistill.checkpoint.formats.torch_zip import is_pickle, is_zip, read_torch_file, verify_zip
from mmdistill.checkpoint.keys import COMPONENT_PREFIXES, canonical_state, component_of, encoder_roots, top_level
from mmdistill.checkpoint.load import LoadReport, adapt_positions, check_hidden_hparams, copy_state, select_encoder
from mmdistill.checkpoint.locate import locate, read_json
from mmdistill.errors import format_count
from mmdistill.models.videomae import DecoderConfig, Encoder, EncoderConfig

log = logging.getLogger(__name__)

_STATE_DICT_KEYS = ("state_dict", "module", "model")


@dataclass(frozen=True)
class _Shards:
    """Content of each file of a checkpoint in several files."""

    files: dict[Path, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A located checkpoint. Metadata and tensors are read on first use, each file at most once.

    Attributes:
        path: the path as given.
        format: layout on disk.
        root: the file, the index of several files, or the directory that holds ``latest``, ``meta.json`` and the tag.
        tag: the directory with the ``*_states.pt`` files; None for a single file.
        content: content of a single file: tensors (memory-mapped) and metadata.
        verify_on_read: compare every byte that is read with the checksums of the format.
    """

    path: Path
    format: CheckpointFormat
    root: Path
    tag: Path | None = None
    content: Any = field(default=None, repr=False, compare=False)
    verify_on_read: bool = True

    @property
    def _entries(self) -> Any:
        """Content of a single file as ``torch.save`` stores it."""
        if isinstance(self.content, SafetensorsContent):
            return {"model": self.content.tensors, METADATA_KEY: self.content.meta}
        if isinstance(self.content, _Shards):
            found = [_shard_tensors(content, path) for path, content in self.content.files.items()]
            return {"model": {name: tensor for tensors in found for name, tensor in tensors.items()}}
        return self.content

    @cached_property
    def settings(self) -> ModelSettings:
        """Settings in the ``config.json`` of a Hugging Face folder; else the heads given to `convert_checkpoint`."""
        is_folder = self.tag is None and self.root.name in HUGGINGFACE_WEIGHTS
        given = ModelSettings(**(self.stored_meta.get(HEADS_KEY) or {}))
        return (read_model_settings(self.root.parent) if is_folder else None) or given

    @cached_property
    def _model_states(self) -> Mapping[str, Any]:
        assert self.tag is not None
        return read_model_states(self.tag, verify=self.verify_on_read)

    @cached_property
    def raw(self) -> RawTensors:
        """Tensors under the names in the file, on the CPU, possibly memory-mapped.

        Raises:
            CheckpointError: or a subclass; one sentence that names the file.
        """
        if self.tag is None:
            if self.verify_on_read:
                self.verify()
            return RawTensors(_find_state_dict(self._entries, self.path))
        verify_manifest(self.root, payload=False)  # the CRCs, which its digests cover, are compared during the read
        return read_zero_checkpoint(self.tag, self._model_states, verify=self.verify_on_read)

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """Tensors under canonical names; copy them before changing them. Raises the errors of `raw`."""
        if not self.raw.weights:
            raise CheckpointError(f"{self.path}: contains no tensors; use another checkpoint")
        try:
            return canonical_state(self.raw.weights)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    @cached_property
    def stored_meta(self) -> dict[str, Any]:
        """Metadata in the file, read without the tensors; of other programs ``epoch`` and ``step``, if present."""
        if self.tag is None:
            return _find_meta(self._entries)
        if (self.root / META).exists():
            return read_json(self.root / META)
        return _find_meta(self._model_states)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """`stored_meta`, verified, with ``kind``: ``pretrain``, ``distill`` or ``weights``.

        Raises:
            CheckpointError: its ``encoders`` are not configs.
        """
        if self.tag is not None and "raw" not in vars(self):
            verify_manifest(self.root, payload=False)
        encoders = self.stored_meta.get("encoders") or {}
        if not isinstance(encoders, dict) or not all(isinstance(fields, dict) for fields in encoders.values()):
            raise CheckpointError(f"{self.path}: 'encoders' in its metadata must map each encoder to its config")
        return self.stored_meta if "kind" in self.stored_meta else {**self.stored_meta, "kind": self._infer_kind()}

    def _infer_kind(self) -> str:
        if any(key.startswith((*COMPONENT_PREFIXES, "cmt.")) for key in self.state_dict):
            return "distill"
        return "pretrain" if any(key.startswith("decoder.") for key in self.state_dict) else "weights"

    @property
    def components(self) -> list[str]:
        """Names of the encoders: ``['encoder']`` or ``['student_rgb', 'teacher_rgb', ...]``."""
        return [component_of(root) for root in encoder_roots(self.state_dict)]

    def encoder_config(self, component: str) -> EncoderConfig | None:
        """Config of an encoder in the metadata; None if it has none."""
        fields = (self.meta.get("encoders") or {}).get(component)
        return encoder_config_from_meta(fields) if fields else None

    def find_encoder_config(self, component: str | None, **size: int | None) -> tuple[EncoderConfig, list[str]]:
        """Config of an encoder, from the metadata or else from ``config.json`` and the tensors; a note per assumption.

        Raises:
            CheckpointError: see `encoder_config_from_tensors`.
        """
        selected = select_encoder(self.state_dict, component, self.path)
        try:
            if config := self.encoder_config(selected.component):
                given: dict[str, Any] = {name: value for name, value in size.items() if value and name != "heads"}
                return replace(config, **given), []
            has_fc_norm = "fc_norm" in selected.ignored
            return encoder_config_from_tensors(
                selected.tensors, settings=self.settings, has_fc_norm=has_fc_norm, **size
            )
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def find_decoder_config(self) -> DecoderConfig | None:
        """Config of the decoder, from the same sources; None if there is none. Raises `CheckpointError` as above."""
        if stored := self.meta.get("decoder"):
            return DecoderConfig(**stored)
        try:
            return decoder_config_from_tensors(self.state_dict, self.settings.decoder_heads)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def verify(self, *, full: bool = False) -> None:
        """Compare all files with their checksums; a directory of another program, which has no digests, is read.

        Args:
            full: also compare the sha256 of archives in manifests of older versions.

        Raises:
            CheckpointError: the reason why the checkpoint cannot be used.
        """
        if self.tag is not None:
            if verify_manifest(self.root, full=full) is None:
                for file in state_files(self.tag):
                    read_torch_file(file)
                self.raw  # noqa: B018 - raises an error if a file is missing
        else:
            files = self.content.files if isinstance(self.content, _Shards) else {self.root: self.content}
            for file, content in files.items():
                if isinstance(content, SafetensorsContent):
                    verify_safetensors(file, content)
                elif is_zip(file):
                    verify_zip(file)

    def load_into(
        self,
        module: nn.Module,
        *,
        component: str | None = None,
        allow_missing: Sequence[str] = (),
        state_dict: Mapping[str, Tensor] | None = None,
        notes: Sequence[str] = (),
        log_report: bool = True,
    ) -> LoadReport:
        """Load the tensors into a module, as `load_weights` does.

        `state_dict` replaces the tensors of the checkpoint, if they were adapted; `notes` are added to the report.
        `log_report`: whether to log the report.
        """
        state = dict(self.state_dict if state_dict is None else state_dict)
        target = module.state_dict()
        ignored: Mapping[str, int] = {}
        note = None
        if "patch_embed.proj.weight" in target:
            state, component, ignored = select_encoder(state, component, self.path)
            stored, config = self.encoder_config(component), getattr(module, "config", None)
            own = config if isinstance(config, EncoderConfig) else None
            if stored and own:
                check_hidden_hparams(self.path, stored, own)
            elif own and self.settings.heads not in (None, own.heads):
                raise WeightMismatchError(
                    f"{self.path}: does not fit the module, which was left unchanged (checkpoint / module): heads "
                    f"{self.settings.heads} / {own.heads}"
                )
            note = adapt_positions(state, target.get("pos_embed"), own, stored)
        elif component is not None:
            prefix = component + "."
            ignored = Counter(top_level(k) for k in state if not k.startswith(prefix))
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        report = replace(
            copy_state(module, state, self.path, allow_missing),
            format=str(self.format),
            component=component,
            ignored_keys=dict(ignored),
            notes=(*self.raw.notes, *notes, *([note] if note else [])),
        )
        if log_report:
            log.info("loaded %s", report)
        return report

    def encoder(self, component: str | None = None, **size: int | None) -> Encoder:
        """Build an encoder and load its weights; `size`, other arguments and errors as in `load_encoder`."""
        config, notes = self.find_encoder_config(component, **size)
        try:
            encoder = Encoder(config)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        self.load_into(encoder, component=component, notes=notes)
        return encoder


def _select_tensors(entries: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Select the entries that are tensors. Raises `CheckpointError` that names a tensor which cannot be a weight."""
    found = {k: v for k, v in entries.items() if isinstance(v, Tensor)}
    for key, tensor in found.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: a tensor has the key {key!r}, which is not a string; use a string")
        if tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
            problem = "has no values" if tensor.is_meta else "is quantized" if tensor.is_quantized else "is sparse"
            raise CheckpointError(f"{path}: '{key}' {problem}; save it as a dense tensor")
    return found


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the state_dict in the content of a file."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: contains a {type(content).__name__}, no tensors; use another checkpoint")
    for candidate in (*(content.get(key) for key in _STATE_DICT_KEYS), content):
        if isinstance(candidate, Mapping) and any(isinstance(v, Tensor) for v in candidate.values()):
            return _select_tensors(candidate, path)
    raise CheckpointError(
        f"{path}: no tensors under 'state_dict', 'module', 'model' or at the top level, only "
        f"{', '.join(map(repr, list(content)[:8])) or 'nothing'}; use another checkpoint"
    )


def _find_meta(content: Any) -> dict[str, Any]:
    """Metadata in the content of a file: mmdistill's entry, and epoch and step of other programs."""
    if not isinstance(content, Mapping):
        return {}
    meta = dict(content[METADATA_KEY]) if isinstance(content.get(METADATA_KEY), Mapping) else {}
    for key, names in (("epoch", ("epoch",)), ("step", ("global_step", "global_steps", "step"))):
        for name in names:
            if key not in meta and isinstance(content.get(name), int):
                meta[key] = content[name]
    return meta


def _shard_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """Tensors of one file of a sharded checkpoint."""
    return content.tensors if isinstance(content, SafetensorsContent) else _find_state_dict(content, path)


def _read_shards(index: Path) -> _Shards:
    """Read the shards of an index. Raises `CorruptCheckpointError` if a shard or a tensor is missing."""
    files = {}
    for path, names in read_shard_index(index).items():
        files[path] = _read_file(path)
        if missing := set(names) - _shard_tensors(files[path], path).keys():
            raise CorruptCheckpointError(
                f"{path}: lacks {format_count(len(missing), 'tensor')} that {index.name} lists, such as "
                f"'{min(missing)}'; copy it again"
            )
    return _Shards(files)


def _read_file(path: Path) -> Any:
    """Read a single file. Its content determines the format; the name is used for damaged files."""
    if is_safetensors(path):
        return read_safetensors(path)
    is_torch = is_zip(path) or is_pickle(path)
    if path.suffix == ".safetensors" and not is_torch:
        return read_safetensors(path)
    try:
        if is_torch or path.name.endswith(FILE_SUFFIXES):
            return read_torch_file(path, verify=False)
        problem = ""
    except CorruptCheckpointError as error:
        if path.name.endswith(FILE_SUFFIXES):
            raise
        problem = f", or damaged: {error}"
    expected = ", ".join(FILE_SUFFIXES)
    raise CheckpointError(f"{path}: not a known checkpoint format{problem}; expected a directory or {expected}")


def open_checkpoint(path: str | os.PathLike[str], *, verify: bool = True) -> Checkpoint:
    """Locate a checkpoint and determine its format; its tensors are read on first use.

    Args:
        path: a DeepSpeed directory (at any level, or a file inside it), a file of ``torch.save`` or safetensors with
            any suffix, the index of several files, or a Hugging Face folder.
        verify: compare the tensors with their checksums (zip CRCs, manifest, safetensors CRCs) when they are read.

    Raises:
        CheckpointError: or a subclass; one sentence that names the file. Nothing exists there, or it is a folder of
            several checkpoints (the message lists them), or the file is truncated or of another format.
    """
    root, tag = locate(path)
    if tag is not None:
        return Checkpoint(Path(path), CheckpointFormat.DEEPSPEED, root, tag, verify_on_read=verify)
    content = _read_shards(root) if root.name.endswith(SHARD_INDEX_SUFFIX) else _read_file(root)
    first = next(iter(content.files.values())) if isinstance(content, _Shards) else content
    if isinstance(first, SafetensorsContent):
        format_ = CheckpointFormat.SAFETENSORS
    elif isinstance(first, Mapping) and {"state_dict", "pytorch-lightning_version"} <= first.keys():
        format_ = CheckpointFormat.LIGHTNING
    else:
        format_ = CheckpointFormat.WEIGHTS
    return Checkpoint(Path(path), format_, root, content=content, verify_on_read=verify)


def read_checkpoint(path: str | os.PathLike[str], *, verify: bool = True) -> Checkpoint:
    """`open_checkpoint` that reads and verifies tensors and metadata at once, and raises their errors."""
    checkpoint = open_checkpoint(path, verify=verify)
    checkpoint.state_dict, checkpoint.meta  # noqa: B018 - read on access
    return checkpoint


def detect_format(path: str | os.PathLike[str]) -> CheckpointFormat:
    """Format of a path at any level of the checkpoint. Raises the errors of `open_checkpoint`."""
    return open_checkpoint(path).format


def load_weights(
    module: nn.Module, path: str | os.PathLike[str], *, part: str | None = None, allow_missing: Sequence[str] = ()
) -> LoadReport:
    """Load a checkpoint into a module, strictly.

    Args:
        module: an `Encoder` (the tensors of one encoder are loaded, the others are ignored and counted), or any module
            with the file's canonical names.
        path: see `open_checkpoint`.
        part: name of the component of a distilled checkpoint: ``student_rgb``, ``teacher_flow``, ... For an `Encoder`,
            None means ``student_rgb`` in a distilled file and ``encoder`` in a pretrained one.
        allow_missing: patterns (``fnmatch``) of names that may be missing in the file; they keep the module's values.

    Raises:
        WeightMismatchError: a tensor is missing, unexpected or of another shape, or no tensor matches. The module then
            keeps its values.
        CheckpointError: the path cannot be read.
    """
    with name_setting("part", ComponentError):
        return open_checkpoint(path).load_into(module, component=part, allow_missing=allow_missing)


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
        source: a checkpoint, or its path.
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
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    with name_setting("part", ComponentError):
        return checkpoint.encoder(part, num_frames=num_frames, height=height, width=width, heads=heads)


def load_encoder_for_clips(
    checkpoint: Checkpoint, *, component: str | None = None, num_frames: int, token_grid: tuple[int, int]
) -> Encoder:
    """`load_encoder` for clips of a given token grid, for files that may lack metadata.

    Such files do not store the input size, because sin-cos positions have no tensor. It is taken to be `num_frames`
    frames of `token_grid` (rows, columns) patches of the size in the weights, at any resolution of the modality's
    input. Files with metadata keep their own size. The caller compares the size with its data.

    Raises:
        CheckpointError, WeightMismatchError: the errors of `load_encoder`.
    """
    selected = select_encoder(checkpoint.state_dict, component, checkpoint.path)
    if checkpoint.encoder_config(selected.component):
        return checkpoint.encoder(selected.component)
    patch = int(selected.tensors["patch_embed.proj.weight"].shape[-1])
    height, width = (count * patch for count in token_grid)
    return checkpoint.encoder(selected.component, num_frames=num_frames, height=height, width=width)
