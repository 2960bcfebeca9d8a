"""From a validated config to objects: geometries, datasets, loaders. Used by both trainings and the evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.data import Dataset, Sampler

from mmdistill.config import ConfigError, DataModuleConfig, ModelConfig, modality_specs
from mmdistill.data.annotations.base import Rally, load_annotations
from mmdistill.data.clips import ClipIndex, build_index
from mmdistill.data.dataloader import ClipLoader
from mmdistill.data.dataset import ClipDataset, worker_init
from mmdistill.data.readers.base import Reader
from mmdistill.data.readers.flow import FlowReader
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.data.readers.skeleton import SkeletonReader
from mmdistill.modalities.base import ModalitySpec
from mmdistill.models.videomae import DecoderGeometry, Encoder, EncoderGeometry


def encoder_geometry(model: ModelConfig, data: DataModuleConfig, spec: ModalitySpec) -> EncoderGeometry:
    """Sizes of the encoder of one modality; all modalities share the token grid."""
    return EncoderGeometry(
        channels=spec.channels,
        num_frames=data.num_frames,
        height=data.crop_size[0] // spec.scale,
        width=data.crop_size[1] // spec.scale,
        patch=data.patch_size // spec.scale,
        tubelet=data.tubelet,
        dim=model.dim,
        depth=model.depth,
        heads=model.heads,
        head_dim=model.head_dim or model.dim // model.heads,
        mlp_dim=int(model.dim * model.mlp_ratio),
        learned_positions=model.learned_positions,
        separable_positions=model.separable_positions,
    )


def decoder_geometry(model: ModelConfig) -> DecoderGeometry:
    """Sizes of the pretraining decoder."""
    width, heads = model.decoder_dim, model.decoder_heads
    return DecoderGeometry(width, model.decoder_depth, heads, width // heads, int(width * model.mlp_ratio))


@contextmanager
def _values_of_the_config() -> Iterator[None]:
    """What refuses an argument here refuses a value of the config."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:
            raise  # about a file
        raise ConfigError(f"data_module: {error}") from error


def _under_root(data: DataModuleConfig, value: str) -> Path:
    """A file or folder, there or not; relative ones lie under `target_data_dir`."""
    return Path(data.target_data_dir).expanduser() / Path(value).expanduser()


def data_path(data: DataModuleConfig, value: str | None, key: str) -> Path:
    """The file or folder `value` of key `key`; relative ones lie under `target_data_dir`. Raises if absent."""
    if value is None:
        raise ConfigError(f"data_module.{key} is not set; dataset {data.name} has none, or give its folder")
    path = _under_root(data, value)
    if not path.exists():
        raise ConfigError(
            f"data_module.{key}: {path} does not exist; set data_module.target_data_dir or data_module.{key}"
        )
    return path


def annotation_path(data: DataModuleConfig, *, training: bool) -> Path:
    """The annotation file of one phase."""
    if training:
        return data_path(data, data.unlabel_json_path, "unlabel_json_path")
    return data_path(data, data.fewshot_eval_json_path, "fewshot_eval_json_path")


def load_rallies(data: DataModuleConfig, path: Path) -> list[Rally]:
    """The rallies of an annotation file, by the dataset's reader."""
    frames, first = _under_root(data, data.frames_dir), data.first_number
    return load_annotations(path, annotations=data.annotations, frames_dir=frames, first_number=first)


def clip_index(data: DataModuleConfig, *, training: bool) -> ClipIndex:
    """Training clips (labels unused) or labelled evaluation clips. Raises `ConfigError` where there is none."""
    path = annotation_path(data, training=training)
    with _values_of_the_config():
        rallies = load_rallies(data, path)
        index = build_index(
            rallies,
            clips=data.train_clips if training else data.eval_clips,
            num_frames=data.num_frames,
            sampling_rate=data.sampling_rate,
            stride=data.window_stride,
            anchor=data.clip_anchor,
            label_fields=data.label_fields,
            label=data.label,
        )
    if not index.clips:
        short, bare = (len(index.report[key]) for key in ("too_short", "without_events"))
        raise ConfigError(
            f"{path}: no {'training' if training else 'evaluation'} clip. Of {len(rallies)} rallies {short} have less "
            f"than the {(data.num_frames - 1) * data.sampling_rate + 2} frames that data_module.num_frames="
            f"{data.num_frames} with sampling_rate={data.sampling_rate} needs, and {bare} have no event"
        )
    return index


def modality_readers(data: DataModuleConfig, modalities: tuple[str, ...]) -> dict[str, Reader]:
    """Readers of the dataset's own files. Raises `ConfigError` where a folder is not set or absent."""
    size = (data.frame_size[0], data.frame_size[1])
    makers = {
        "rgb": lambda: RgbReader(
            data_path(data, data.frames_dir, "frames_dir"),
            frame_size=size,
            pattern=data.frame_pattern,
            first_number=data.first_number,
        ),
        "flow": lambda: FlowReader(
            data_path(data, data.flow_dir, "flow_dir"),
            frame_size=size,
            pattern=data.flow_pattern,
            first_number=data.first_number,
        ),
        "skeleton": lambda: SkeletonReader(
            data_path(data, data.skeleton_dir, "skeleton_dir"), frame_size=size, max_persons=data.max_persons
        ),
    }
    return {m: makers[m]() for m in modalities}


def clip_dataset(data: DataModuleConfig, modalities: tuple[str, ...], *, training: bool, seed: int) -> ClipDataset:
    """The dataset of one phase. Evaluation clips are whole: centre crop, no mask, never replaced in silence."""
    specs = modality_specs(data)
    for modality in modalities:
        if modality not in specs:
            raise ConfigError(f"data_module.modalities has no entry {modality}; it has {', '.join(specs)}")
    index = clip_index(data, training=training)
    height, width = data.crop_size
    with _values_of_the_config():
        dataset = ClipDataset(
            index,
            modality_readers(data, modalities),
            grid=(data.num_frames // data.tubelet, height // data.patch_size, width // data.patch_size),
            crop=(height, width),
            frame_size=(data.frame_size[0], data.frame_size[1]),
            mask_kind=data.mask_type,
            mask_ratio=data.mask_ratio if training else 0.0,
            seed=seed,
            augment=training,
            min_scale=data.min_scale,
            flip=data.flip,
            missing=data.missing,
        )
    if not len(dataset):
        lacking = {m: sum(counts.values()) for m, counts in dataset.missing_report()["clips_left_out"].items()}
        told = ", ".join(f"{m} of {count}" for m, count in lacking.items())
        raise ConfigError(
            f"data_module.missing={data.missing} leaves out all {len(index.clips)} clips, for want of {told}; check "
            "data_module.target_data_dir and its folders, scripts/check_data.py says what is there"
        )
    return dataset


def clip_loader(
    dataset: Dataset,
    *,
    num_workers: int,
    pin: bool,
    batch_sampler: Sampler | None = None,
    batch_size: int = 1,
    timeout_s: float = 0.0,
    kind: type[ClipLoader] = ClipLoader,
) -> ClipLoader:
    """A loader over `batch_sampler`, or in order without one. Workers stay alive between epochs. `kind` is its class.

    One that needs more than `timeout_s` for a batch (0: no limit), or dies, makes the loader raise.
    """
    return kind(
        dataset,
        batch_sampler=batch_sampler,
        batch_size=1 if batch_sampler is not None else batch_size,
        num_workers=num_workers,
        worker_init_fn=worker_init,
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers > 0 else None,
        pin_memory=pin,
        timeout=timeout_s if num_workers > 0 else 0,
    )


def make_demo_data(data: DataModuleConfig) -> None:
    """Render the demo dataset where the config asks for it and it is not there yet."""
    if data.name == "demo":
        from mmdistill.demo.dataset import make_demo

        make_demo(Path(data.target_data_dir), frame_size=(data.frame_size[0], data.frame_size[1]))


def check_token_grid(encoder: Encoder, spec: ModalitySpec, data: DataModuleConfig, source: object) -> None:
    """Raise `ConfigError` unless the encoder takes this dataset's clips: channels, frames, size, tubelet, patch."""
    g = encoder.geometry
    if g.channels != spec.channels:
        raise ConfigError(
            f"{source} takes {g.channels} channels, {spec.name} has {spec.channels}: is it of another modality?"
        )
    names = ("frames", "height", "width", "tubelet", "patch")
    found = (g.num_frames, g.height, g.width, g.tubelet, g.patch)
    height, width = data.crop_size[0] // spec.scale, data.crop_size[1] // spec.scale
    wanted = (data.num_frames, height, width, data.tubelet, data.patch_size // spec.scale)
    if found != wanted:
        both = ", ".join(f"{n} {a} / {b}" for n, a, b in zip(names, found, wanted, strict=True) if a != b)
        scale, rest = divmod(data.patch_size, g.patch)
        set_it = f"; set data_module.modalities.{spec.name}.scale={scale}" if scale != spec.scale and not rest else ""
        raise ConfigError(
            f"{source} does not fit the dataset's {spec.name} input (checkpoint / data_module): {both}{set_it}"
        )
