"""Save and load DeepSpeed engines. Collective: every rank calls, and every rank gets the same result or error.

DeepSpeed is imported only by functions that take an engine.
"""

import contextlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmdistill import __version__
from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError, ResumeMismatchError
from mmdistill.checkpoint.formats.deepspeed_zero import GROUP_NAMES, adam_step, check_shards, read_model_file
from mmdistill.checkpoint.formats.manifest import manifest_bytes, manifest_entry, verify_manifest
from mmdistill.checkpoint.formats.names import LATEST, MANIFEST, META, METADATA_KEY, TAG, TMP_PREFIX, CheckpointFormat
from mmdistill.checkpoint.formats.torch_zip import read_torch_file
from mmdistill.checkpoint.locate import Location, locate, read_json
from mmdistill.checkpoint.write import (
    fsync_path,
    publish_directory,
    recover_interrupted_saves,
    remove_quietly,
    write_bytes,
    write_torch,
)
from mmdistill.distributed.collectives import get_rank, get_world_size, run_on_all_ranks

log = logging.getLogger(__name__)

CLIENT = "mmdistill_client"  # key of the states of the training loop, one per rank


class _CheckpointEngineShim:
    """Replaces DeepSpeed's checkpoint engine: writes synced files, and stores errors instead of raising them.

    An exception in ``save_checkpoint`` would leave the other ranks waiting at its barriers.
    """

    def __init__(self, engine: Any) -> None:
        self._inner = engine.checkpoint_engine
        self.files: list[str] = []
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _guard(self, action: Callable[[], Any]) -> None:
        if self.error is None:
            try:
                action()
            except Exception as error:  # `report` raises it after the barriers
                self.error = error

    def report(self) -> list[str]:
        """Return the files that were written, or raise the stored error."""
        if self.error is not None:
            raise self.error
        return self.files

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a directory, like DeepSpeed's method."""
        self._guard(lambda: os.makedirs(path, exist_ok=exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        """Write and sync one file of this rank."""

        def write() -> None:
            write_torch(state_dict, Path(path))
            self.files.append(path)

        self._guard(write)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read without executing code: DeepSpeed's own loader would unpickle any class."""
        return read_torch_file(Path(path), verify=False, mapped=False, real_classes=_real_classes())


def _real_classes() -> list[Any]:
    """Return the classes that DeepSpeed's optimizers expect in their shards."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]


@contextlib.contextmanager
def _shimmed(engine: Any) -> Iterator[_CheckpointEngineShim]:
    shim, original = _CheckpointEngineShim(engine), engine.checkpoint_engine
    engine.checkpoint_engine = shim
    # DeepSpeed copies a conversion script into each checkpoint, and an error there would stop only rank 0
    engine._copy_recovery_script = lambda _path: None
    try:
        yield shim
    finally:
        engine.checkpoint_engine = original
        del engine._copy_recovery_script


def _master_names(engine: Any) -> list[list[str]] | None:
    """Names of stage-0 fp32 masters by parameter group, which DeepSpeed does not save; None if there are none."""
    masters = getattr(engine.optimizer, "fp32_groups", None)
    copies = getattr(engine.optimizer, "fp16_groups", None)
    if engine.zero_optimization_stage() != 0 or not isinstance(masters, list) or not isinstance(copies, list):
        return None
    try:
        return [[str(engine.param_names[p]) for p in group] for group in copies]
    except (KeyError, TypeError):
        return None


def _prepare_save(staged: Path, target: Path, meta: Mapping[str, Any], client: dict[str, Any]) -> dict[str, Any]:
    """Check that the metadata can be saved and return this rank's client state; rank 0 creates the folder."""
    json.dumps(meta)  # an error must occur here, on all ranks, and not at the end
    if get_rank() == 0:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover_interrupted_saves(target.parent)
        remove_quietly(staged)
        staged.mkdir()
    return client


def _publish(staged: Path, target: Path, meta: Mapping[str, Any], files: list[str], counts: dict[str, Any]) -> None:
    """Write metadata and manifest and rename the folder; on rank 0."""
    entries = {os.path.relpath(path, staged): manifest_entry(Path(path)) for path in files}
    for name, data in (
        (LATEST, TAG.encode()),
        (META, (json.dumps(dict(meta), indent=1, sort_keys=True) + "\n").encode()),
    ):
        entries[name] = manifest_entry(staged / name, write_bytes(staged / name, data))
    fsync_path(staged / TAG)
    summary = {key: meta.get(key) for key in ("epoch", "kind", "modality", "loss")}
    if summary["loss"] is not None and not math.isfinite(summary["loss"]):
        summary["loss"] = None
    write_bytes(staged / MANIFEST, manifest_bytes(entries, **counts, **summary))
    fsync_path(staged)
    publish_directory(staged, target)


def save_deepspeed(
    engine: Any, directory: str | os.PathLike[str], meta: dict[str, Any], client_state: dict[str, Any]
) -> Path:
    """Save an engine atomically as a checkpoint directory. Collective.

    Args:
        engine: a DeepSpeed engine; its optimizer, weights and counters are saved.
        directory: the directory of the checkpoint, such as ``checkpoints/epoch=49-loss=0.6095``; the same on all ranks.
        meta: plain values that describe the checkpoint (see docs/checkpoint_formats.md), for ``meta.json`` and the
            model file.
        client_state: this rank's state of the training loop (position, RNG states): tensors and primitives. The state
            of each rank is saved, and `load_deepspeed` returns it to the same rank.

    Returns:
        `directory` with ``~`` expanded.

    Raises:
        CheckpointError: the same on all ranks; names the rank that failed. The previous checkpoint is unchanged.
    """
    target = Path(directory).expanduser()
    staged, message = target.with_name(TMP_PREFIX + target.name), f"{target}: not saved"
    meta = {"mmdistill_version": __version__, **meta}
    clients = run_on_all_ranks(
        lambda: _prepare_save(staged, target, meta, client_state), error_class=CheckpointError, message=message
    )
    extra = {METADATA_KEY: meta, CLIENT: clients}
    if (names := _master_names(engine)) is not None:
        extra[GROUP_NAMES] = names
    rank = get_rank()
    try:
        with _shimmed(engine) as shim:
            engine.save_checkpoint(str(staged), tag=TAG, client_state=extra, save_latest=False)
        reports = run_on_all_ranks(shim.report, error_class=CheckpointError, message=message)
        files = [path for report in reports for path in report]
        stage, step = int(engine.zero_optimization_stage()), int(engine.global_steps)
        counts = {"world_size": get_world_size(), "stage": stage, "step": step}
        run_on_all_ranks(
            lambda: _publish(staged, target, meta, files, counts) if rank == 0 else None,
            error_class=CheckpointError,
            message=message,
        )
    except CheckpointError:
        if rank == 0:
            remove_quietly(staged)
        raise
    return target


def _precision(config: Any) -> str:
    for name in ("bf16", "bfloat16", "fp16"):
        entry = config.get(name) if isinstance(config, Mapping) else None
        if isinstance(entry, Mapping) and entry.get("enabled") is True:
            return "fp16" if name == "fp16" else "bf16"
    return "fp32"


def _check_fit(engine: Any, location: Location, model: Mapping[str, Any]) -> None:
    """Raise a clear error where DeepSpeed would raise an obscure one or load only part of the state."""
    config = model.get("ds_config") or {}
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    stage = int(zero.get("stage", 0)) if isinstance(zero, Mapping) else 0
    saved = (stage, int(model.get("dp_world_size") or 1), _precision(config))
    precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    own = (int(engine.zero_optimization_stage()), int(engine.dp_world_size), precision)
    same_layout = saved[0] == own[0] and saved[2] == own[2]
    if same_layout and (saved[0] == 0 or saved[1] == own[1]):
        return
    settings = [f"ZeRO stage {s}, {w} process{'es' if w > 1 else ''}, {p}" for s, w, p in (saved, own)]
    raise ResumeMismatchError(
        f"{location.given}: written with {settings[0]}, this run has {settings[1]}; use the same settings, or "
        "load only the weights (`mmdistill convert` writes them as .safetensors)"
    )


def _check_steps(location: Location, model: Mapping[str, Any]) -> None:
    """Raise if the directory mixes two saves: the steps of Adam must be those of the engine."""
    assert location.tag is not None
    if not location.optim_files:
        return
    shards = [read_torch_file(f, verify=False) for f in location.optim_files]
    check_shards(location.tag, shards, location.optim_files)
    shard_step, model_step = adam_step(shards[0]), model.get("global_steps")
    if shard_step is None or not isinstance(model_step, int):
        return
    if shard_step != model_step - int(model.get("skipped_steps") or 0):
        raise CorruptCheckpointError(
            f"{location.tag}: a mix of two saves: the model file is at step {model_step}, the optimizer shards at step "
            f"{shard_step}; use another checkpoint"
        )


@contextlib.contextmanager
def _glob_safe_path(path: Path) -> Iterator[str]:
    """Name of `path` without glob characters, because DeepSpeed uses it in a glob pattern."""
    if not any(c in str(path) for c in "[]*?"):
        yield str(path)
        return
    with tempfile.TemporaryDirectory(prefix="mmdistill-") as folder:
        link = Path(folder) / "checkpoint"
        link.symlink_to(path.absolute(), target_is_directory=True)
        yield str(link)


def _select_client_state(states: Mapping[str, Any], rank: int) -> dict[str, Any]:
    clients = states.get(CLIENT)
    if isinstance(clients, list) and clients:
        return dict(clients[rank] if rank < len(clients) else clients[0])
    excluded = {METADATA_KEY, GROUP_NAMES, "ds_config", "ds_version", "param_shapes", "buffer_names", "shared_params"}
    return {k: v for k, v in states.items() if k not in excluded}


def load_deepspeed(engine: Any, directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Restore an engine: weights, optimizer, scheduler and counters. Collective.

    The ranks first verify the manifest, each a part of it, or the archives of a directory without manifest. Pickles
    are read without executing code.

    Args:
        engine: with the ZeRO stage and precision of the run that saved, and for stages 1-3 its world size.
        directory: path of the checkpoint at any level.

    Returns:
        The `client_state` that this rank saved (that of rank 0 if there were fewer ranks; for directories of other
        programs, the client state that DeepSpeed returns).

    Raises:
        ResumeMismatchError: another stage, precision or world size; names both and a way to continue.
        CorruptCheckpointError, CheckpointError: the same on every rank.
    """
    rank, world_size = get_rank(), get_world_size()

    def check() -> Location:
        location = locate(directory)
        if location.format is not CheckpointFormat.DEEPSPEED or location.tag is None:
            raise CheckpointError(
                f"{directory}: a {location.format} file; a DeepSpeed run resumes only from a DeepSpeed directory"
            )
        manifest = verify_manifest(location.root, rank=rank, world_size=world_size)
        if manifest is not None:
            read_json(location.root / META)
        model = read_model_file(location.model_files[0], verify=manifest is None)
        _check_fit(engine, location, model)
        _check_steps(location, model)
        if manifest is None:
            for file in (*location.model_files, *location.optim_files)[rank::world_size]:
                read_torch_file(file)
        return location

    location: Location = run_on_all_ranks(check, error_class=CheckpointError)[rank]
    assert location.tag is not None

    def restore() -> dict[str, Any]:
        with _shimmed(engine), _glob_safe_path(location.tag.parent) as name:  # type: ignore[union-attr]
            loaded, states = engine.load_checkpoint(name, tag=location.tag.name)  # type: ignore[union-attr]
        if loaded is None:
            raise CheckpointError(
                f"{directory}: DeepSpeed found nothing to load in {location.tag}; use another checkpoint"
            )
        return _select_client_state(states or {}, rank)

    # engine.load_checkpoint waits at barriers; `check` raised every foreseeable error on all ranks before
    client: dict[str, Any] = run_on_all_ranks(restore, error_class=CheckpointError, message=f"{directory}: not loaded")[
        rank
    ]
    return client
