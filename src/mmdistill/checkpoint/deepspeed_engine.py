"""Save and load DeepSpeed engines. Collective: every rank calls, and every rank gets the same result or error.

DeepSpeed is imported only by functions that take an engine.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mmdistill import __version__
from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError, ResumeMismatchError
from mmdistill.checkpoint.formats.deepspeed_zero import (
    GROUP_NAMES,
    adam_step,
    check_shards,
    read_model_states,
    read_shard,
    stage_in_config,
)
from mmdistill.checkpoint.formats.manifest import complete_directory, verify_manifest
from mmdistill.checkpoint.formats.names import (
    META,
    METADATA_KEY,
    MODEL_STATES,
    OPTIM_STATES,
    TAG,
    TMP_PREFIX,
    rank_files,
    state_files,
)
from mmdistill.checkpoint.formats.torch_zip import read_torch_file
from mmdistill.checkpoint.formats.zero_slices import Shapes, ZeroLayout, read_zero_state, slice_sizes, slice_state
from mmdistill.checkpoint.locate import read_json
from mmdistill.checkpoint.read import open_checkpoint
from mmdistill.checkpoint.write import (
    disk_errors,
    find_os_error,
    publish_directory,
    recover_interrupted_saves,
    remove_quietly,
    torch_file_size,
    write_torch,
)
from mmdistill.distributed.collectives import get_rank, get_world_size, run_on_all_ranks
from mmdistill.distributed.process import prepare_deepspeed_import
from mmdistill.files import temporary_folder

log = logging.getLogger(__name__)

CLIENT = "mmdistill_client"  # key of the states of the training loop, one per rank


class _CheckpointEngineShim:
    """Replaces DeepSpeed's checkpoint engine: writes synced files, and stores errors instead of raising them.

    An exception in ``save_checkpoint`` would leave the other ranks waiting at its barriers.
    """

    def __init__(self, engine: Any, contents: "_Contents | None") -> None:
        self._inner, self._contents = engine.checkpoint_engine, contents
        self.files: list[Path] = []
        self.error: Exception | None = None
        self._num_bytes = 0  # of all files of this rank, also of those that were not written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def report(self) -> list[Path]:
        """Return the files that were written, or raise the stored error."""
        if self.error is None:
            return self.files
        with disk_errors(self._num_bytes):
            raise self.error

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a directory, like DeepSpeed's method."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or error

    def save(self, state_dict: Any, path: str) -> None:
        """Write and sync one file of this rank."""
        try:
            if self.error is None:
                write_torch(state_dict, Path(path))
                self.files.append(Path(path))
                self._num_bytes += Path(path).stat().st_size
        except Exception as error:  # `report` raises it after the barriers
            self.error = error
        if self.error is not None and find_os_error(self.error):
            self._num_bytes += torch_file_size(state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return the given contents or read a file without executing code: DeepSpeed would unpickle any class."""
        if self._contents is not None:
            return dict(self._contents.shard if path.endswith(OPTIM_STATES) else self._contents.model)
        return read_torch_file(Path(path), verify=False, mapped=False, real_classes=_real_classes())


def _real_classes() -> list[Any]:
    """Return the classes that DeepSpeed's optimizers expect in their shards."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]


@dataclass(frozen=True)
class _Contents:
    """What DeepSpeed loads instead of the files of a checkpoint: this rank's files in the layout of this run.

    Attributes:
        model, shard: contents of the model file and of the optimizer shard.
        file: an existing model file, because DeepSpeed requires one.
    """

    model: Mapping[str, Any]
    shard: Mapping[str, Any]
    file: Path


@contextlib.contextmanager
def _shimmed(engine: Any, contents: _Contents | None = None) -> Iterator[_CheckpointEngineShim]:
    shim, original = _CheckpointEngineShim(engine, contents), engine.checkpoint_engine
    engine.checkpoint_engine = shim
    # DeepSpeed copies a conversion script into each checkpoint, and an error there would stop only rank 0
    engine._copy_recovery_script = lambda _path: None
    if contents is not None:
        engine._get_all_ckpt_names = lambda _folder, _tag: [str(contents.file)]
    try:
        yield shim
    finally:
        engine.checkpoint_engine = original
        vars(engine).pop("_copy_recovery_script")
        vars(engine).pop("_get_all_ckpt_names", None)


def _group_names(engine: Any) -> list[list[str]] | None:
    """Names of the parameters of stage 0 by parameter group, which DeepSpeed does not save; None at other stages."""
    if engine.zero_optimization_stage() != 0 or engine.optimizer is None:
        return None
    # with bf16 and fp16 the parameters of torch's optimizer are the fp32 masters
    groups = getattr(engine.optimizer, "fp16_groups", None) or [g["params"] for g in engine.optimizer.param_groups]
    try:
        return [[str(engine.param_names[p]) for p in group] for group in groups]
    except (KeyError, TypeError):
        return None


def _prepare_save(staged: Path, target: Path, meta: Mapping[str, Any], client: dict[str, Any]) -> dict[str, Any]:
    """Check that the metadata can be saved and return this rank's client state; rank 0 creates the folder."""
    json.dumps(meta)  # an error must occur here, on all ranks, and not at the end
    if get_rank() == 0:
        with disk_errors():
            target.parent.mkdir(parents=True, exist_ok=True)
            recover_interrupted_saves(target.parent)
            remove_quietly(staged)
            staged.mkdir()
    return client


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
    if (names := _group_names(engine)) is not None:
        extra[GROUP_NAMES] = names
    rank = get_rank()
    try:
        with _shimmed(engine) as shim:
            engine.save_checkpoint(str(staged), tag=TAG, client_state=extra, save_latest=False)
        reports = run_on_all_ranks(shim.report, error_class=CheckpointError, message=message)
        files = [path for report in reports for path in report]
        stage, step = int(engine.zero_optimization_stage()), int(engine.global_steps)

        def publish() -> None:
            if rank == 0:
                with disk_errors(sum(file.stat().st_size for file in files)):
                    complete_directory(staged, files, meta, world_size=get_world_size(), stage=stage, step=step)
                    publish_directory(staged, target)

        run_on_all_ranks(publish, error_class=CheckpointError, message=message)
    except CheckpointError:
        if rank == 0:
            remove_quietly(staged)
        raise
    return target


def _precision(config: Any) -> str:
    for name in ("bf16", "bfloat16", "fp16"):
        entry = config.get(name) if isinstance(config, Mapping) else None
        if isinstance(entry, Mapping) and entry.get("enabled") is True:
            return "16" if name == "fp16" else "bf16"
    return "32"


def _must_reslice(engine: Any, path: Path, model: Mapping[str, Any]) -> bool:
    """Whether the ZeRO stage or, from stage 1 on, the number of ranks differ. Raises if the precision differs."""
    config = model.get("ds_config")
    saved = (ZeroLayout(stage_in_config(config), int(model.get("dp_world_size") or 1)), _precision(config))
    precision = "bf16" if engine.bfloat16_enabled() else "16" if engine.fp16_enabled() else "32"
    own = (_layout(engine), precision)
    if saved[1] != own[1]:
        settings = [f"{layout}, precision={precision}" for layout, precision in (saved, own)]
        raise ResumeMismatchError(
            f"{path}: written with {settings[0]}, this run has {settings[1]}; use the same precision, or "
            "load only the weights (`mmdistill convert` writes them as .safetensors)"
        )
    return saved[0] != own[0] and (saved[0].stage, own[0].stage) != (0, 0)


def _layout(engine: Any) -> ZeroLayout:
    return ZeroLayout(int(engine.zero_optimization_stage()), int(engine.dp_world_size))


def make_loss_scaler(scale: Mapping[str, Any]) -> Any:
    """DeepSpeed's loss scaler with the attributes `ZeroState.loss_scale`. Imports DeepSpeed."""
    prepare_deepspeed_import()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    if not scale["dynamic"]:
        return LossScaler(scale["cur_scale"])
    scaler = DynamicLossScaler(
        init_scale=scale["cur_scale"],
        scale_window=scale["scale_window"],
        min_scale=scale["min_scale"],
        delayed_shift=scale["delayed_shift"],
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,  # trainer.on_nonfinite handles such an overflow
    )
    vars(scaler).update(scale)
    return scaler


def _own_groups(engine: Any) -> list[Shapes]:
    """Shape of each trained parameter by name, per parameter group of the engine."""
    if engine.zero_optimization_stage():
        return [{name: tuple(shape) for name, shape in group.items()} for group in engine._get_zero_param_shapes()]
    shapes = {name: tuple(parameter.shape) for parameter, name in engine.param_names.items()}
    return [{name: shapes[name] for name in group} for group in _group_names(engine) or []]


def _check_shapes(engine: Any, path: Path, model: Mapping[str, Any]) -> None:
    """Raise unless a state in the layout of this run has the parameters of this run."""
    if groups := model.get("param_shapes"):
        stored = [{name: tuple(shape) for name, shape in group.items()} for group in groups]
        _check_groups(path, stored, _own_groups(engine))
        return
    own = {name: tuple(parameter.shape) for name, parameter in engine.module.named_parameters()}
    buffers = {name for name, _ in engine.module.named_buffers()}
    shapes = {name: tuple(x.shape) for name, x in model["module"].items() if name not in buffers}
    _check_groups(path, [dict(sorted(shapes.items()))], [dict(sorted(own.items()))])


def _check_groups(path: Path, stored: Sequence[Shapes], own: Sequence[Shapes]) -> None:
    """Raise unless the parameter groups have the same parameters, of the same shapes, in the same order."""
    if [list(group.items()) for group in stored] == [list(group.items()) for group in own]:
        return
    a, b = ({name: shape for group in groups for name, shape in group.items()} for groups in (stored, own))
    different = [f"{name} {a.get(name)} / {b.get(name)}" for name in {**a, **b} if a.get(name) != b.get(name)]
    detail = different[0] if different else f"{len(stored)} groups / {len(own)} groups, in another order"
    raise ResumeMismatchError(
        f"{path}: its optimizer has other parameters than this run's (checkpoint / run): {detail}; use the same model, "
        "source and trainer.layer_decay"
    )


def _reslice(engine: Any, path: Path, tag: Path, model: Mapping[str, Any], *, verify: bool) -> _Contents:
    """This rank's part of a training state in the layout of this run."""
    state, layout = read_zero_state(tag, model, verify=verify), _layout(engine)
    _check_groups(path, state.groups, _own_groups(engine))
    scaler = make_loss_scaler(state.loss_scale) if layout.stage else None
    own_model, shard = slice_state(state, layout, get_rank(), merge=state.merge, loss_scaler=scaler)
    if shard is not None:
        attribute = "fp32_partitioned_groups_flat" if layout.stage == 3 else "single_partition_of_fp32_groups"
        expected = [tensor.numel() for tensor in getattr(engine.optimizer, attribute)]
        if (sizes := slice_sizes(state.groups, layout)) != expected:
            raise ResumeMismatchError(
                f"{path}: DeepSpeed has slices of {expected} values, not {sizes}; resume with {state.layout}"
            )
    log.info("%s: written with %s; its training state is sliced for %s", path, state.layout, layout)
    return _Contents(own_model, shard or {}, rank_files(tag, MODEL_STATES)[0])


def _check_steps(tag: Path, model: Mapping[str, Any]) -> None:
    """Raise if the directory mixes two saves: the steps of Adam must be those of the engine."""
    files = rank_files(tag, OPTIM_STATES)
    if not files:
        return
    shards = [read_shard(file, verify=False) for file in files]
    check_shards(tag, shards, files)
    shard_step, model_step = adam_step(shards[0]), model.get("global_steps")
    if shard_step is None or not isinstance(model_step, int):
        return
    if shard_step != model_step - int(model.get("skipped_steps") or 0):
        raise CorruptCheckpointError(
            f"{tag}: a mix of two saves: the model file is at step {model_step}, the optimizer shards at step "
            f"{shard_step}; use another checkpoint"
        )


@contextlib.contextmanager
def _glob_safe_path(path: Path) -> Iterator[str]:
    """Name of `path` without glob characters, because DeepSpeed uses it in a glob pattern."""
    if not any(c in str(path) for c in "[]*?"):
        yield str(path)
        return
    with temporary_folder() as folder:
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

    With the ZeRO stage and the number of ranks of the run that saved, each rank reads its own files. Otherwise each
    rank reads all files and takes its slices of masters and moments.

    Args:
        engine: with the parameter groups and the precision of the run that saved.
        directory: path of the checkpoint at any level.

    Returns:
        The `client_state` that this rank saved (that of rank 0 if there were fewer ranks; for directories of other
        programs, the client state that DeepSpeed returns).

    Raises:
        ResumeMismatchError: another precision or other parameters; names both and a way to continue.
        CorruptCheckpointError, CheckpointError: the same on every rank.
    """
    rank, world_size = get_rank(), get_world_size()
    contents: _Contents | None = None

    def check() -> Path:
        nonlocal contents
        checkpoint = open_checkpoint(directory, verify=False)
        tag = checkpoint.tag
        if tag is None:
            raise CheckpointError(
                f"{directory}: a {checkpoint.format} file; a DeepSpeed run resumes only from a DeepSpeed directory"
            )
        manifest = verify_manifest(checkpoint.root, rank=rank, world_size=world_size)
        if manifest is not None:
            read_json(checkpoint.root / META)
        model = read_model_states(tag, verify=manifest is None)
        must_reslice = _must_reslice(engine, checkpoint.path, model)
        _check_steps(tag, model)
        if must_reslice:
            contents = _reslice(engine, checkpoint.path, tag, model, verify=manifest is None)
            return tag
        _check_shapes(engine, checkpoint.path, model)
        if manifest is None:
            for file in state_files(tag)[rank::world_size]:
                read_torch_file(file)
        return tag

    tag: Path = run_on_all_ranks(check, error_class=CheckpointError)[rank]

    def restore() -> dict[str, Any]:
        with _shimmed(engine, contents), _glob_safe_path(tag.parent) as name:
            loaded, states = engine.load_checkpoint(name, tag=tag.name)
        if loaded is None:
            raise CheckpointError(f"{directory}: DeepSpeed found nothing to load in {tag}; use another checkpoint")
        return _select_client_state(states or {}, rank)

    # engine.load_checkpoint waits at barriers; `check` raised every foreseeable error on all ranks before
    clients = run_on_all_ranks(restore, error_class=CheckpointError, message=f"{directory}: not loaded")
    return cast(dict[str, Any], clients[rank])
