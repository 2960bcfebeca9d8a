"""Saving and loading DeepSpeed engines. Collective: every rank calls, every rank gets the same answer.

DeepSpeed itself is imported only where an engine is at hand already.
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
from mmdistill.checkpoint.formats.manifest import describe, manifest_bytes, verify_manifest
from mmdistill.checkpoint.formats.names import LATEST, MANIFEST, META, TAG, TMP_PREFIX, CheckpointFormat
from mmdistill.checkpoint.formats.torch_zip import load_pickle
from mmdistill.checkpoint.locate import Location, locate, read_json
from mmdistill.checkpoint.read import EMBEDDED
from mmdistill.checkpoint.write import discard, publish_directory, recover, stream_torch, sync, write_bytes
from mmdistill.distributed.collectives import get_rank, get_world_size, run_on_all_ranks

log = logging.getLogger(__name__)

CLIENT = "mmdistill_client"  # one entry per rank: what the training loop asked to keep


class _Recorder:
    """Takes the place of DeepSpeed's checkpoint engine: writes our way, and remembers errors instead of raising them.

    An exception inside ``save_checkpoint`` would leave the other ranks in its barriers.
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
            except Exception as error:  # raised on every rank once they have met
                self.error = error

    def report(self) -> list[str]:
        """The files that were written. Raises what went wrong."""
        if self.error is not None:
            raise self.error
        return self.files

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """As DeepSpeed's."""
        self._guard(lambda: os.makedirs(path, exist_ok=exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        """Write and sync one file of this rank."""

        def write() -> None:
            stream_torch(state_dict, Path(path))
            self.files.append(path)

        self._guard(write)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read without running code: DeepSpeed's own loader would unpickle anything."""
        return load_pickle(Path(path), verify=False, mapped=False, real_classes=_real_classes())


def _real_classes() -> list[Any]:
    """The classes that DeepSpeed's optimizers expect to find again in their shards."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]


@contextlib.contextmanager
def _recording(engine: Any) -> Iterator[_Recorder]:
    recorder, original = _Recorder(engine), engine.checkpoint_engine
    engine.checkpoint_engine = recorder
    # DeepSpeed copies a script into each checkpoint, unguarded on rank 0; scripts/convert_checkpoint.py does its work
    engine._copy_recovery_script = lambda _path: None
    try:
        yield recorder
    finally:
        engine.checkpoint_engine = original
        del engine._copy_recovery_script


def _master_names(engine: Any) -> list[list[str]] | None:
    """Names of stage-0 fp32 masters by parameter group, which DeepSpeed does not write."""
    groups = getattr(engine.optimizer, "fp32_groups", None)
    halves = getattr(engine.optimizer, "fp16_groups", None)
    if engine.zero_optimization_stage() != 0 or not isinstance(groups, list) or not isinstance(halves, list):
        return None
    try:
        return [[str(engine.param_names[p]) for p in group] for group in halves]
    except (KeyError, TypeError):
        return None


def _prepare(staged: Path, target: Path, meta: Mapping[str, Any], client: dict[str, Any]) -> dict[str, Any]:
    """This rank's client state, once what it needs is known to work; rank 0 makes the folder."""
    json.dumps(meta)  # fails here, on all ranks, rather than at the end
    if get_rank() == 0:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target.parent)
        discard(staged)
        staged.mkdir()
    return client


def _finish(staged: Path, target: Path, meta: Mapping[str, Any], files: list[str], facts: dict[str, Any]) -> None:
    """Rank 0: metadata, manifest, name."""
    entries = {os.path.relpath(path, staged): describe(Path(path)) for path in files}
    for name, data in (
        (LATEST, TAG.encode()),
        (META, (json.dumps(dict(meta), indent=1, sort_keys=True) + "\n").encode()),
    ):
        entries[name] = describe(staged / name, write_bytes(staged / name, data))
    sync(staged / TAG)
    told = {key: meta.get(key) for key in ("epoch", "kind", "modality", "loss")}
    if told["loss"] is not None and not math.isfinite(told["loss"]):
        told["loss"] = None
    write_bytes(staged / MANIFEST, manifest_bytes(entries, **facts, **told))
    sync(staged)
    publish_directory(staged, target)


def save_deepspeed(
    engine: Any, directory: str | os.PathLike[str], meta: dict[str, Any], client_state: dict[str, Any]
) -> Path:
    """Save an engine as a checkpoint directory that appears whole or not at all. Collective.

    Args:
        engine: a DeepSpeed engine; its optimizer, weights and counters are saved.
        directory: the checkpoint's own directory, e.g. ``checkpoints/epoch=49-loss=0.6095``; ranks must agree.
        meta: plain primitives that describe the checkpoint (see docs/checkpoint_formats.md); goes to ``meta.json`` and
            into the model file.
        client_state: this rank's state of the training loop (position, RNG states): tensors and primitives. Every
            rank's own is kept and comes back to it.

    Returns:
        `directory`, expanded.

    Raises:
        CheckpointError: the same on all ranks, naming the rank that failed. What stood at `directory` is unchanged.
    """
    target = Path(directory).expanduser()
    staged, failed = target.with_name(TMP_PREFIX + target.name), f"{target}: not saved"
    meta = {"mmdistill_version": __version__, **meta}
    clients = run_on_all_ranks(
        lambda: _prepare(staged, target, meta, client_state), error_class=CheckpointError, message=failed
    )
    extra = {EMBEDDED: meta, CLIENT: clients}
    if (names := _master_names(engine)) is not None:
        extra[GROUP_NAMES] = names
    rank, world = get_rank(), get_world_size()
    try:
        with _recording(engine) as recorder:
            engine.save_checkpoint(str(staged), tag=TAG, client_state=extra, save_latest=False)
        reports = run_on_all_ranks(recorder.report, error_class=CheckpointError, message=failed)
        files = [path for report in reports for path in report]
        facts = {"world_size": world, "stage": int(engine.zero_optimization_stage()), "step": int(engine.global_steps)}
        run_on_all_ranks(
            lambda: _finish(staged, target, meta, files, facts) if rank == 0 else None,
            error_class=CheckpointError,
            message=failed,
        )
    except CheckpointError:
        if rank == 0:
            discard(staged)
        raise
    return target


def _precision(config: Any) -> str:
    for name in ("bf16", "bfloat16", "fp16"):
        entry = config.get(name) if isinstance(config, Mapping) else None
        if isinstance(entry, Mapping) and entry.get("enabled") is True:
            return "fp16" if name == "fp16" else "bf16"
    return "fp32"


def _check_fit(engine: Any, place: Location, model: Mapping[str, Any]) -> None:
    """One sentence where DeepSpeed would raise something obscure, or load half of it."""
    config = model.get("ds_config") or {}
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    stage = int(zero.get("stage", 0)) if isinstance(zero, Mapping) else 0
    found = (stage, int(model.get("dp_world_size") or 1), _precision(config))
    precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    wanted = (int(engine.zero_optimization_stage()), int(engine.dp_world_size), precision)
    same_layout = found[0] == wanted[0] and found[2] == wanted[2]
    if same_layout and (found[0] == 0 or found[1] == wanted[1]):
        return
    told = [f"ZeRO stage {s}, {w} process{'es' if w > 1 else ''}, {p}" for s, w, p in (found, wanted)]
    raise ResumeMismatchError(
        f"{place.given}: written with {told[0]}, this run has {told[1]}; start with the first, or take its weights "
        "only (scripts/convert_checkpoint.py makes a .safetensors of them)"
    )


def _check_steps(place: Location, model: Mapping[str, Any]) -> None:
    """Refuse a directory that holds files of two saves: Adam's steps must be the engine's."""
    assert place.tag is not None
    if not place.optim_files:
        return
    shards = [load_pickle(f, verify=False) for f in place.optim_files]
    check_shards(place.tag, shards, place.optim_files)
    done, counted = adam_step(shards[0]), model.get("global_steps")
    if done is not None and isinstance(counted, int) and done != counted - int(model.get("skipped_steps") or 0):
        raise CorruptCheckpointError(
            f"{place.tag}: a mix of two saves: the model file is at step {counted}, the optimizer shards at step "
            f"{done}; use another checkpoint"
        )


@contextlib.contextmanager
def _plain_path(path: Path) -> Iterator[str]:
    """A name for `path` that DeepSpeed can put into a glob pattern."""
    if not any(c in str(path) for c in "[]*?"):
        yield str(path)
        return
    with tempfile.TemporaryDirectory(prefix="mmdistill-") as folder:
        link = Path(folder) / "checkpoint"
        link.symlink_to(path.absolute(), target_is_directory=True)
        yield str(link)


def _client(states: Mapping[str, Any], rank: int) -> dict[str, Any]:
    kept = states.get(CLIENT)
    if isinstance(kept, list) and kept:
        return dict(kept[rank] if rank < len(kept) else kept[0])
    ours = {EMBEDDED, GROUP_NAMES, "ds_config", "ds_version", "param_shapes", "buffer_names", "shared_params"}
    return {k: v for k, v in states.items() if k not in ours}


def load_deepspeed(engine: Any, directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Restore an engine: weights, optimizer, scheduler and counters. Collective.

    The manifest is verified first, the work divided between ranks; directories of others get their own checks.
    Pickles are read without running code.

    Args:
        engine: as it was built for the run that saved: same ZeRO stage and precision, and for stages 1-3 the same
            world size.
        directory: the checkpoint at any level.

    Returns:
        The `client_state` that this rank saved (rank 0's where there were fewer ranks; for directories of others, what
        DeepSpeed returns).

    Raises:
        ResumeMismatchError: another stage, precision or world size: both are named, and the way out.
        CorruptCheckpointError, CheckpointError: the same on every rank; never a silent start from scratch.
    """
    rank, world = get_rank(), get_world_size()

    def check() -> Location:
        place = locate(directory)
        if place.format is not CheckpointFormat.DEEPSPEED or place.tag is None:
            raise CheckpointError(f"{directory}: a {place.format} file; a DeepSpeed run resumes from a directory")
        manifest = verify_manifest(place.root, rank=rank, world_size=world)
        if manifest is not None:
            read_json(place.root / META)
        model = read_model_file(place.model_files[0], verify=manifest is None)
        _check_fit(engine, place, model)
        _check_steps(place, model)
        if manifest is None:
            for file in (*place.model_files, *place.optim_files)[rank::world]:
                load_pickle(file)
        return place

    place: Location = run_on_all_ranks(check, error_class=CheckpointError)[rank]
    assert place.tag is not None

    def restore() -> dict[str, Any]:
        with _recording(engine), _plain_path(place.tag.parent) as name:  # type: ignore[union-attr]
            loaded, states = engine.load_checkpoint(name, tag=place.tag.name)  # type: ignore[union-attr]
        if loaded is None:
            raise CheckpointError(f"{directory}: DeepSpeed found nothing to load in {place.tag}")
        return _client(states or {}, rank)

    # engine.load_checkpoint meets at barriers, and every foreseeable reason to fail was agreed on above
    client: dict[str, Any] = run_on_all_ranks(restore, error_class=CheckpointError, message=f"{directory}: not loaded")[
        rank
    ]
    return client
