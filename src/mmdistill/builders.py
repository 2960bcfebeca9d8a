"""Objects from a validated config: encoder configs, datasets, loaders. Used by both trainings and the evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Sampler

from mmdistill.checkpoint.student import stored_resize
from mmdistill.config import (
    SHORT_KEYS,
    ConfigError,
    DataModuleConfig,
    DistillConfig,
    ModelConfig,
    PretrainConfig,
    extra_format,
    modality_setting,
    modality_setting_key,
    modality_specs,
    skeleton_format,
)
from mmdistill.config.compose import SOURCE_ROOT
from mmdistill.data.annotations.base import Rally, load_annotations
from mmdistill.data.clips import ClipIndex, ClipSource, ClipSpec, build_index, clip_sources, select_clips
from mmdistill.data.cores import default_loader_workers
from mmdistill.data.dataloader import ClipLoader
from mmdistill.data.dataset import ClipDataset, CropSpec, init_worker
from mmdistill.data.masking import MaskSpec
from mmdistill.data.readers.base import FrameError, FrameSizeError, KeypointReader, Reader
from mmdistill.data.readers.heatmaps import HeatmapReader
from mmdistill.errors import format_count, rename_key
from mmdistill.modalities import (
    STUDENT_MODALITY,
    ExtraKeypointFiles,
    ModalitySpec,
    ReaderOptions,
    get_modality,
    stored_joints,
)
from mmdistill.models.pooling import Pooling
from mmdistill.models.videomae import DecoderConfig, Encoder, EncoderConfig


def make_encoder_config(model: ModelConfig, data: DataModuleConfig, spec: ModalitySpec) -> EncoderConfig:
    """Sizes of the encoder of one modality. All modalities share one token grid."""
    return EncoderConfig(
        channels=spec.channels,
        num_frames=data.num_frames,
        height=data.crop_size[0] // spec.input_stride,
        width=data.crop_size[1] // spec.input_stride,
        patch=data.patch_size // spec.input_stride,
        tubelet=data.tubelet,
        dim=model.dim,
        depth=model.depth,
        heads=model.heads,
        head_dim=model.head_dim or model.dim // model.heads,
        mlp_dim=int(model.dim * model.mlp_ratio),
        pos_embed=model.pos_embed,
    )


def make_decoder_config(model: ModelConfig) -> DecoderConfig:
    """Sizes of the pretraining decoder."""
    width, heads = model.decoder_dim, model.decoder_heads
    return DecoderConfig(width, model.decoder_depth, heads, width // heads, int(width * model.mlp_ratio))


@contextmanager
def raise_as_config_error(key: str = "") -> Iterator[None]:
    """Convert a `ValueError` about an argument to a `ConfigError` that names `key` of `data_module`."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:
            raise  # a subclass, about a file
        raise ConfigError(f"data_module{'.' * bool(key)}{key}: {error}") from error


def _under_root(data: DataModuleConfig, value: str) -> Path:
    return Path(data.target_data_dir).expanduser() / Path(value).expanduser()


def resolve_data_path(data: DataModuleConfig, value: str | None, key: str) -> Path:
    """The existing file or folder of a key. A relative `value` is below `target_data_dir`.

    Raises:
        ConfigError: the key is not set, or the path does not exist.
    """
    if value is None:
        short = next((short for short, (m, k) in SHORT_KEYS.items() if key == f"modalities.{m}.{k}"), None)
        also = f" (and its short form data_module.{short} is not set)" if short else ""
        raise ConfigError(f"data_module.{key} is not set{also}; set it if dataset {data.name} has these files")
    path = _under_root(data, value)
    if not path.exists():
        raise ConfigError(
            f"data_module.{key}: {path} does not exist; set data_module.target_data_dir or data_module.{key}"
        )
    return path


def resolve_annotation_path(data: DataModuleConfig, *, training: bool) -> Path:
    """The annotation file for training or evaluation. Raises `ConfigError` if it does not exist."""
    key = "unlabel_json_path" if training else "fewshot_eval_json_path"
    return resolve_data_path(data, getattr(data, key), key)


def load_rallies(data: DataModuleConfig, path: Path) -> list[Rally]:
    """The rallies of an annotation file in the dataset's format."""
    folder = modality_setting(data, STUDENT_MODALITY, "dir")
    frames_dir = None if folder is None else _under_root(data, folder)
    offset = data.frame_number_offset
    return load_annotations(path, annotations=data.annotations, frames_dir=frames_dir, frame_number_offset=offset)


def make_clip_index(data: DataModuleConfig, *, training: bool) -> ClipIndex:
    """Training clips (labels unused) or labeled evaluation clips. Raises `ConfigError` if there is none."""
    path = resolve_annotation_path(data, training=training)
    with raise_as_config_error():
        rallies = load_rallies(data, path)
        spec = ClipSpec(
            data.train_clips if training else data.eval_clips,
            data.num_frames,
            sampling_rate=data.sampling_rate,
            stride=data.window_stride,
            anchor=data.clip_anchor,
            label_fields=data.label_fields,
            label=data.label,
        )
        index = build_index(rallies, spec)
    if not index.clips:
        too_short, without_events = (len(index.report[key]) for key in ("too_short", "without_events"))
        raise ConfigError(
            f"{path}: no {'training' if training else 'evaluation'} clip. Rallies: {len(rallies)}. Shorter than the "
            f"{(data.num_frames - 1) * data.sampling_rate + 2} frames that num_frames={data.num_frames} with "
            f"sampling_rate={data.sampling_rate} needs: {too_short}. Without an event: {without_events}. "
            f"Lower these keys, or give annotations with {'longer rallies' if training else 'events'}"
        )
    return index


def load_clip_sources(data: DataModuleConfig, index: ClipIndex, *, training: bool) -> tuple[ClipSource, ...]:
    """Match, label and player of each clip of `make_clip_index`."""
    return clip_sources(index.clips, load_rallies(data, resolve_annotation_path(data, training=training)))


def open_readers(data: DataModuleConfig, modalities: tuple[str, ...]) -> dict[str, Reader]:
    """Readers of the dataset's files by modality.

    Raises:
        ConfigError: a folder is not set or does not exist, or a file name pattern is invalid.
    """
    readers = {}
    for modality in modalities:
        dir_key, pattern_key = (modality_setting_key(data, modality, key) for key in ("dir", "pattern"))
        offset = data.modalities[modality].frame_number_offset if modality in data.modalities else None
        keypoints = {} if get_modality(modality).keypoints is None else _keypoint_options(data, modality)
        options = ReaderOptions(
            frame_size=(data.frame_size[0], data.frame_size[1]),
            pattern=modality_setting(data, modality, "pattern"),
            frame_number_offset=data.frame_number_offset if offset is None else offset,
            flow_bound=data.flow_bound,
            flow_axes=data.flow_axes,
            max_persons=data.max_persons,
            **keypoints,
        )
        try:
            root = resolve_data_path(data, modality_setting(data, modality, "dir"), dir_key)
        except ConfigError as error:
            others = [name for name in modalities if name != modality]
            if modality == STUDENT_MODALITY or STUDENT_MODALITY not in others:
                raise
            raise ConfigError(
                f"{error}; to work without {modality}, set trainer.teachers=[{','.join(others)}] (distillation) or "
                f"--modalities {' '.join(others)} (check-data, browse, compute-stats)"
            ) from error
        with raise_as_config_error(pattern_key):
            readers[modality] = get_modality(modality).open_reader(root, options)
    return readers


def _keypoint_options(data: DataModuleConfig, modality: str) -> dict[str, Any]:
    """The `ReaderOptions` of a modality with keypoints. Raises `ConfigError`, see `resolve_data_path`."""
    options: dict[str, Any] = {"skeleton": skeleton_format(data, modality)}
    settings, extra_files = data.modalities.get(modality), extra_format(data, modality)
    if settings is None:
        return options
    if settings.heatmap_size is not None:
        options["heatmap_size"] = tuple(settings.heatmap_size)
    if extra_files is not None:
        extra = settings.extra_keypoints
        root = resolve_data_path(data, extra.dir, f"modalities.{modality}.extra_keypoints.dir")
        options["extra_keypoints"] = ExtraKeypointFiles(root, extra.pattern, extra_files)
    return options


def make_clip_dataset(
    data: DataModuleConfig,
    modalities: tuple[str, ...],
    *,
    training: bool,
    seed: int,
    augment: bool | None = None,
    masked: bool | None = None,
    cached_epochs: int = 0,
    index: ClipIndex | None = None,
    needs_motion: bool = False,
) -> ClipDataset:
    """The dataset for training or evaluation. Evaluation clips have a center crop and no mask and are never replaced.

    Args:
        data: the settings.
        modalities: the modalities of a sample.
        training: whether the clips are those of the training or those of the evaluation.
        seed: see `ClipDataset`.
        augment: whether crops are random, with flips, and unreadable clips are replaced; None: as `training`.
        masked: whether ``data.mask_ratio`` applies; None: as `training`.
        cached_epochs: see `ClipDataset`.
        index: the clips; None: those of `make_clip_index`.
        needs_motion: whether the samples have ``motion`` also without ``data.mask_type=motion``.

    Raises:
        ConfigError: a modality or folder is missing, a value is invalid, or no clip is left.
    """
    has_motion = needs_motion or data.mask_type == "motion"
    if has_motion and not training:
        modalities = tuple(dict.fromkeys((STUDENT_MODALITY, *modalities)))
    read = (STUDENT_MODALITY,) if cached_epochs else modalities  # in each epoch
    _check_modalities(data, modalities)
    index = make_clip_index(data, training=training) if index is None else index
    with raise_as_config_error():
        dataset = ClipDataset(
            index,
            open_readers(data, modalities),
            CropSpec(
                (data.frame_size[0], data.frame_size[1]),
                (data.crop_size[0], data.crop_size[1]),
                augment=training if augment is None else augment,
                random_crop_min_scale=data.random_crop_min_scale,
                hflip_prob=data.hflip_prob,
                resize=data.resize,
            ),
            MaskSpec(
                (data.num_frames // data.tubelet, *token_grid(data)),
                data.mask_type,
                data.mask_ratio if (training if masked is None else masked) else 0.0,
                data.mask_temperature,
            ),
            seed=seed,
            on_missing=data.on_missing,
            cached_epochs=cached_epochs,
            always_decoded=(STUDENT_MODALITY,),
            motion_source=_motion_source(read, training=training) if has_motion else None,
        )
    if not len(dataset):
        skipped = {m: sum(counts.values()) for m, counts in dataset.missing_report()["clips_skipped"].items()}
        message = ", ".join(f"{format_count(count, 'clip')} without {m} files" for m, count in skipped.items())
        raise ConfigError(
            f"data_module.on_missing={data.on_missing} leaves none of {format_count(len(index.clips), 'clip')}: "
            f"{message}; check data_module.target_data_dir and its folders with `mmdistill check-data`"
        )
    _check_frame_size(dataset)
    return dataset


def _check_modalities(data: DataModuleConfig, modalities: Sequence[str]) -> None:
    specs = modality_specs(data)
    for modality in modalities:
        if modality not in specs:
            raise ConfigError(
                f"data_module.modalities has no entry {modality}, only {', '.join(specs)}; add it, or use one of these"
            )


def _motion_source(modalities: Sequence[str], *, training: bool) -> str:
    """The modality whose motion a clip has: in a training flow, then frames, then the first one; otherwise frames."""
    preferred = ("flow", STUDENT_MODALITY) if training else (STUDENT_MODALITY,)
    return next((m for m in preferred if m in modalities), modalities[0])


def make_source_dataset(source: DataModuleConfig, modality: str, *, seed: int) -> ClipDataset:
    """The labeled clips of the source of a joint pretraining, without a mask.

    `eval_clips` selects the clips in the training file, `unlabel_json_path`. Clips without a label are omitted and
    counted as ``without_label`` in the report of the index.

    Raises:
        ConfigError: there are fewer than two classes, or see `make_clip_dataset`; names the keys of `source`.
    """
    with rename_key("data_module.", "source."):
        index = make_clip_index(replace(source, train_clips=source.eval_clips), training=True)
        labeled = [i for i, clip in enumerate(index.clips) if clip.label >= 0]
        if len(index.classes) < 2:
            fields = f" (with source.label_fields=[{','.join(source.label_fields)}])" if source.label_fields else ""
            other_fields = ", or choose other source.label_fields" if fields else ""
            raise ConfigError(
                f"{resolve_annotation_path(source, training=True)}: its {format_count(len(index.clips), 'clip')} have "
                f"{format_count(len(index.classes), 'class')}{fields}, and a source needs at least two; set "
                "source.unlabel_json_path to an annotation file with labels, and source.eval_clips=events"
                f"{other_fields}"
            )
        report = {**index.report, "clips": len(labeled), "without_label": len(index.clips) - len(labeled)}
        index = ClipIndex(select_clips(index.clips, labeled), index.classes, report)
        source = replace(source, mask_type="tube")  # its clips have the mask of the target, so they need no motion
        return make_clip_dataset(source, (modality,), training=True, seed=seed, masked=False, index=index)


def _check_frame_size(dataset: ClipDataset) -> None:
    """Raise `ConfigError` if the first files of three clips have one other size than `data_module.frame_size`."""
    clips = dataset.index.clips
    sizes: set[tuple[tuple[int, ...], str]] = set()
    for clip in (clips[i] for i in (0, len(clips) // 2, len(clips) - 1)):
        for reader in dataset.readers.values():
            if isinstance(reader, KeypointReader | HeatmapReader):  # their size does not depend on that of the frames
                continue
            try:
                reader.read(clip.video, clip.frames[:1])
            except FrameSizeError as error:
                sizes.add((error.size or (), str(error).partition(": ")[0]))
            except FrameError:  # reported when the clip is needed
                continue
            else:
                return
    if len({size for size, _ in sizes}) == 1:
        size, path = min(sizes)
        raise ConfigError(
            f"data_module.frame_size is [{','.join(map(str, dataset.crop.frame_size))}], but the stored frames have "
            f"{' x '.join(map(str, size))} px (height x width), for example {path}; set "
            f"data_module.frame_size=[{','.join(map(str, size))}]"
        )


def make_clip_loader(
    dataset: Dataset[Any],
    *,
    num_workers: int | None,
    pin_memory: bool,
    batch_sampler: Sampler[Any] | None = None,
    batch_size: int = 1,
    timeout_s: float = 0.0,
    loader_class: type[ClipLoader] = ClipLoader,
) -> ClipLoader:
    """A loader over `batch_sampler`, or over batches of `batch_size` in order without one.

    `num_workers` is the number of processes; 0: this process loads the data; None: see `default_loader_workers`.
    Workers persist between epochs. The loader raises an error if a worker dies or needs more than `timeout_s` for a
    batch (0: no limit).
    """
    num_workers = default_loader_workers() if num_workers is None else num_workers
    return loader_class(
        dataset,
        batch_sampler=batch_sampler,
        batch_size=1 if batch_sampler is not None else batch_size,
        num_workers=num_workers,
        worker_init_fn=init_worker,
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers > 0 else None,
        pin_memory=pin_memory,
        timeout=timeout_s if num_workers > 0 else 0,
    )


def make_demo_data(data: DataModuleConfig) -> None:
    """Render the demo dataset if the config uses it and it does not exist yet.

    Raises:
        ConfigError: a relative `target_data_dir` does not exist, but the source tree or a parent folder has it.
        DemoError: see `make_demo`.
    """
    if data.name != "demo":
        return
    root = Path(data.target_data_dir).expanduser()
    folders = [*([SOURCE_ROOT] if SOURCE_ROOT else []), *Path.cwd().parents]
    existing = next((folder / root for folder in folders if (folder / root / "demo.json").is_file()), None)
    if existing and not root.exists():
        raise ConfigError(
            f"data_module.target_data_dir={root}: there is no such folder here, but the demo data are in {existing}; "
            f"set data_module.target_data_dir={existing}, or create the folder (mkdir -p {root}) to render them again"
        )
    from mmdistill.demo.dataset import make_demo
    from mmdistill.demo.scene import DemoParameters

    make_demo(root, DemoParameters(nuisance=data.demo_nuisance, frame_size=(data.frame_size[0], data.frame_size[1])))


def token_grid(data: DataModuleConfig) -> tuple[int, int]:
    """Rows and columns of tokens per frame, the same for all modalities."""
    rows, columns = (side // data.patch_size for side in data.crop_size)
    return rows, columns


def configured_pooling(config: PretrainConfig | DistillConfig) -> Pooling:
    """The pooling of a training."""
    return Pooling(config.pooling or "mean", config.pooling_last_k)


def check_pooling(pooling: Pooling, encoder: Encoder, name: str) -> None:
    """Raise `ConfigError` if `pooling` cannot be used with the encoder `name`."""
    if misfit := pooling.describe_misfit(encoder.config.grid, encoder.config.depth):
        is_deep = pooling.name == "last_k"
        fix = f"set pooling_last_k to {encoder.config.depth} or less" if is_deep else "use another pooling"
        raise ConfigError(f"pooling={pooling.name}: {name}: {misfit}; {fix}")


def check_token_grid(encoder: Encoder, spec: ModalitySpec, data: DataModuleConfig, source: object) -> None:
    """Check that the encoder fits the dataset's clips: channels, frames, size, tubelet, patch.

    Raises:
        ConfigError: it does not; names each value that differs.
    """
    g = encoder.config
    if g.channels != spec.channels:
        joints = f", or set data_module.modalities.{spec.name}.joints to its keypoints" if spec.keypoints else ""
        raise ConfigError(
            f"{source} has {g.channels} input channels, but {spec.name} has {spec.channels}; "
            f"give a {spec.name} checkpoint{joints}"
        )
    names = ("frames", "height", "width", "tubelet", "patch")
    found = (g.num_frames, g.height, g.width, g.tubelet, g.patch)
    height, width = data.crop_size[0] // spec.input_stride, data.crop_size[1] // spec.input_stride
    expected = (data.num_frames, height, width, data.tubelet, data.patch_size // spec.input_stride)
    if found != expected:
        differences = ", ".join(f"{n} {a} / {b}" for n, a, b in zip(names, found, expected, strict=True) if a != b)
        stride = max(data.patch_size // g.patch, 1)
        input_size = (data.crop_size[0] // stride, data.crop_size[1] // stride)
        fits = found == (data.num_frames, *input_size, data.tubelet, data.patch_size / stride)
        hint = f"; set data_module.modalities.{spec.name}.input_stride={stride}" if fits else ""
        raise ConfigError(
            f"{source} does not fit the dataset's {spec.name} input (checkpoint / data_module): {differences}{hint}"
        )


def check_joints(meta: Mapping[str, Any], spec: ModalitySpec, source: object) -> None:
    """Check that the keypoints of a checkpoint with metadata `meta` are those of the dataset, in their order.

    Raises:
        ConfigError: they are not; names the first channel that differs.
    """
    stored, own = stored_joints(meta, spec.name), spec.keypoints.channel_names if spec.keypoints else None
    if stored is None or own is None or stored == own:
        return
    channel = next(i for i, pair in enumerate(zip_longest(stored, own)) if pair[0] != pair[1])
    names = [layout[channel] if channel < len(layout) else "none" for layout in (stored, own)]
    counts = "" if len(stored) == len(own) else f", {len(stored)} in place of {len(own)} channels"
    raise ConfigError(
        f"data_module.modalities.{spec.name}: {source} was trained with other keypoints{counts}; the first difference "
        f"is channel {channel} (checkpoint / data_module): {' / '.join(names)}; use the same joints, limb_channels and "
        "extra_keypoints in both trainings"
    )


def clip_setting_warnings(meta: Mapping[str, Any], data: DataModuleConfig, path: object) -> list[str]:
    """A warning for each of `sampling_rate` and `resize` that differs from the checkpoint with metadata `meta`."""
    stored = (meta.get("config") or {}).get("data_module") or {}
    rate, resize = stored.get("sampling_rate", data.sampling_rate), stored_resize(meta)
    lines = []
    if rate != data.sampling_rate:
        lines.append(
            f"data_module.sampling_rate={data.sampling_rate}, but {path} was trained with {rate}: "
            "the clips show motion at a different speed than in training"
        )
    if (stored or "resize" in meta) and resize != data.resize:
        lines.append(
            f"data_module.resize={data.resize}, but {path} was trained with {resize}: the clips have another aspect "
            "ratio than in training"
        )
    return lines
