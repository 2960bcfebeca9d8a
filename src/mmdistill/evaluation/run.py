"""Score a checkpoint few-shot: which networks, on which clips, shown how. The protocol is in `mmdistill.fewshot`."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from mmdistill.builders import (
    check_token_grid,
    load_rallies,
    make_clip_dataset,
    make_clip_index,
    make_clip_loader,
    make_demo_data,
    resolve_annotation_path,
    sampling_rate_warnings,
    token_grid,
)
from mmdistill.checkpoint import Checkpoint, CheckpointError, load_encoder_for_clips, read_checkpoint
from mmdistill.checkpoint.references import load_referenced_teacher
from mmdistill.config import (
    COMPONENT_PREFIXES,
    ConfigError,
    DataModuleConfig,
    DistillConfig,
    as_ints,
    as_names,
    modality_specs,
    to_plain,
)
from mmdistill.data.annotations.base import AnnotationError
from mmdistill.data.clips import ClipIndex, count_overlapping_clips
from mmdistill.data.dataset import ClipDataset
from mmdistill.data.fingerprint import data_fingerprint
from mmdistill.distributed.collectives import broadcast_run_dir
from mmdistill.distributed.device import autocast, resolve_precision
from mmdistill.distributed.process import Process, start_process
from mmdistill.evaluation.networks import Network, random_network
from mmdistill.evaluation.report.write import print_tables, to_json, write_report
from mmdistill.fewshot.encode import EncodingJob, Views, encode_cached
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.features import Features
from mmdistill.fewshot.protocol import Protocol, run_protocol
from mmdistill.modalities import STUDENT_MODALITY, ModalitySpec, modality_names, stored_statistics
from mmdistill.training.data_report import DataReport, missing_line

NETWORK = DistillConfig.eval_component  # what is scored by default
_LEFT_OUT = {"too_short": "rallies too short for a clip", "without_events": "rallies without an event"}


def evaluate_checkpoint(config: DistillConfig, checkpoint: str, run_dir: Path) -> dict[str, Any]:
    """Evaluate `config.eval_component` of a checkpoint, and the networks of `config.baselines` on the same episodes.

    Args:
        config: the validated config.
        checkpoint: a distilled ``.ckpt`` (needs no other file), or a pretraining checkpoint, whose encoder is scored.
        run_dir: ``fewshot.json`` and ``report.html`` go here.

    Returns:
        The content of ``fewshot.json``.

    Raises:
        ValueError: of this package, naming the key or the file.
    """
    process = start_process(accelerator=config.accelerator, seed=config.seed, timeout_s=config.distributed_timeout_s)
    run_dir = broadcast_run_dir(run_dir)
    make_demo_data(config.data_module)
    source = read_checkpoint(checkpoint)
    networks = _networks(config, source)
    modalities = tuple(m for m in modality_names() if any(n.modality == m for n in networks))
    dataset = make_clip_dataset(config.data_module, modalities, training=False, seed=config.seed)
    protocol = _protocol(config)
    lines = _checked(protocol, dataset.index)
    seen, told = _seen_in_training(config.data_module, dataset.index)
    lines += [*told, *sampling_rate_warnings(source.meta, config.data_module, checkpoint)]
    if config.compile:
        lines.append("compile=true is for training: an evaluation encodes each clip once, which compiling would delay")
    if process.is_main:
        print("\n".join(lines), flush=True)
    report = DataReport(dataset, run_dir, is_main=process.is_main)
    jobs = _jobs(config, networks, process)
    versions = {m: data_fingerprint(dataset, m) for m in modalities} if config.feature_cache else ""
    features = encode_cached(
        jobs,
        lambda: _loader(config, dataset, process),
        dataset.index,
        data=versions,
        cache=Path(config.feature_cache).expanduser() if config.feature_cache else None,
        show_progress=process.is_main,
        note=lambda: {"frames_repeated": report.collect()["missing"]["frames_repeated"]},
    )
    results = run_protocol(features, protocol, show_progress=process.is_main)
    missing = {**dataset.missing_report(), "frames_repeated": _frames_repeated(features)}
    extra = {
        "config": to_plain(config),
        "precision": resolve_precision(config.precision, process.device),
        "index": dataset.index.report,
        "missing": missing,
        "overlapping_clips": count_overlapping_clips(dataset.index.clips),
        "rallies_in_training": seen,
    }
    if process.is_main:
        print_tables(results)
        print(missing_line(missing, modalities))
        page = write_report(
            results, run_dir, picture=_picture(dataset) if STUDENT_MODALITY in modalities else None, extra=extra
        )
        print(f"report: {page}\nnumbers: {page.with_name('fewshot.json')}")
    return to_json(results, extra=extra)


def check_evaluation(config: DistillConfig) -> None:
    """What can be wrong with an evaluation and be known before the training that it follows: labels, heads, names.

    Raises:
        ConfigError: on every rank alike.
    """
    make_demo_data(config.data_module)
    try:
        _checked(_protocol(config), make_clip_index(config.data_module, training=False))
    except (FewshotError, AnnotationError) as error:
        raise ConfigError(f"test=True could not be done after the training: {error}") from error
    teachers = [f"teacher_{m}" for m in config.trainer.teachers]
    parts = ["student_rgb", *teachers, *(["student_ema_rgb"] if config.trainer.ema is not None else [])]
    named = [entry for entry in config.baselines if entry.startswith(COMPONENT_PREFIXES)]
    for key, part in [("eval_component", config.eval_component), *(("baselines", entry) for entry in named)]:
        if part not in parts:
            raise ConfigError(f"{key}: the distilled checkpoint will have no {part}, but {', '.join(parts)}")
    for entry in config.baselines:
        if entry != "random" and entry not in named and not Path(entry).expanduser().exists():
            raise ConfigError(
                f"baselines: {entry} is neither random, nor a part of the checkpoint, nor a path that exists"
            )


def _checked(protocol: Protocol, index: ClipIndex) -> list[str]:
    """What the labels hold, in lines; raises where that is not enough."""
    clips = index.clips
    lines = protocol.check([c.label for c in clips], [c.group for c in clips], index.classes)
    shared = count_overlapping_clips(clips)
    if shared and protocol.disjoint is None:
        lines.append(
            f"{shared} clips overlap in time with another clip of their class: support and query may show the same "
            "frames; data_module.disjoint=video keeps videos apart"
        )
    counts = {name: len(index.report[key]) for key, name in _LEFT_OUT.items() if index.report[key]}
    without = f"; {', '.join(f'{count} {name}' for name, count in counts.items())}" if counts else ""
    return [f"{len(clips)} evaluation clips of {len(index.classes)} classes{without}", *lines]


def _seen_in_training(data: DataModuleConfig, index: ClipIndex) -> tuple[int | None, list[str]]:
    """How many evaluated rallies are in `unlabel_json_path` too (None: it cannot be read), and what to say of it."""
    evaluated = {clip.video for clip in index.clips}
    try:
        trained = {rally.video for rally in load_rallies(data, resolve_annotation_path(data, training=True))}
    except (ConfigError, AnnotationError) as error:
        return None, [f"whether evaluated rallies were trained on is not known: {error}"]
    count = len(evaluated & trained)
    told = f"{count} of {len(evaluated)} evaluated rallies are also in {data.unlabel_json_path}: a training on it has "
    return count, [f"{told}seen their frames, without labels (scripts/make_unlabel.py --exclude)"] if count else []


def _frames_repeated(features: list[Features]) -> dict[str, dict[str, int]]:
    """By modality and rally, as counted when the features were made: cached ones too."""
    own = {f.info["modality"]: f.info.get("frames_repeated", {}).get(f.info["modality"]) for f in features}
    return {modality: counts for modality, counts in own.items() if counts}


def _networks(config: DistillConfig, source: Checkpoint) -> list[Network]:
    """The scored network first, then those of `baselines`."""
    path = source.path
    specs = modality_specs(config.data_module)
    distilled = any(key.startswith("student_rgb.") for key in source.state_dict)
    if distilled:
        named = config.eval_component not in source.components and config.eval_component in (
            source.meta.get("teachers") or {}
        )
        held = load_referenced_teacher(source, config.eval_component) if named else source
        scored = _load(config, specs, held, config.eval_component, config.eval_component)
    else:
        modality = source.meta.get("modality", STUDENT_MODALITY)
        name = f"pretrained_{modality}"
        if config.eval_component not in (NETWORK, name, "encoder"):
            raise ConfigError(
                f"eval_component={config.eval_component}: {path} is not a distilled checkpoint, it holds {name} alone"
            )
        scored = _load(config, specs, source, None, name)
    networks = [scored]
    for entry in config.baselines:
        if entry == "random":
            untrained = random_network(scored, seed=config.seed)
            networks.append(replace(untrained, checkpoint="none: untrained weights"))
        elif entry in source.meta.get("encoders", {}) or entry.startswith(COMPONENT_PREFIXES):
            if distilled:
                networks += _part(config, specs, source, entry)
            else:
                print(f"baselines: {path} is not a distilled checkpoint and has no {entry}; this row is left out")
        else:
            other = read_checkpoint(entry)
            networks.append(_load(config, specs, other, None, _run_name(entry)))
    if len({n.name for n in networks}) != len(networks):
        raise ConfigError(f"baselines: two rows have the same name: {', '.join(n.name for n in networks)}")
    return networks


def _part(config: DistillConfig, specs: Mapping[str, ModalitySpec], source: Checkpoint, part: str) -> list[Network]:
    """A part of a distilled checkpoint; of a slim one the teacher it names. Without either, say so and leave it out."""
    if part in source.components or part not in (source.meta.get("teachers") or {}):
        return [_load(config, specs, source, part, part)]  # the latter is an error, which lists those there are
    try:
        return [_load(config, specs, load_referenced_teacher(source, part), part, part)]
    except (ConfigError, CheckpointError) as error:
        print(f"baselines: {part} is not in {source.path}, a slim file; this row is left out: {error}")
        return []


def _run_name(path: str) -> str:
    """The run folder's name: ``.../mmdistill_rgb_only/checkpoints/last.ckpt`` -> ``mmdistill_rgb_only``."""
    parts = [p for p in Path(path).resolve().parts if p not in ("checkpoints", "checkpoint")]
    return parts[-2] if len(parts) > 2 else Path(path).name


def _load(
    config: DistillConfig, specs: Mapping[str, ModalitySpec], source: Checkpoint, part: str | None, name: str
) -> Network:
    """One encoder with the statistics that it was trained with."""
    if part and part not in source.components and source.components != ["encoder"]:
        raise ConfigError(
            f"{source.path}: no part {part!r}, set eval_component and baselines to {', '.join(source.components)}"
        )
    modality = part.rpartition("_")[2] if part else source.meta.get("modality", STUDENT_MODALITY)
    if modality not in specs:
        raise ConfigError(f"{source.path}: part {part} is of modality {modality}, the dataset has {', '.join(specs)}")
    spec, data = specs[modality], config.data_module
    try:
        inside = None if part and source.components == ["encoder"] else part  # a teacher's own checkpoint
        encoder = load_encoder_for_clips(source, component=inside, num_frames=data.num_frames, token_grid=token_grid(data))
    except CheckpointError as error:
        raise ConfigError(f"ckpt_path: {error}") from error
    check_token_grid(encoder, spec, data, source.path)
    return Network(name, encoder, modality, str(source.path), stored_statistics(source.meta, modality))


def _protocol(config: DistillConfig) -> Protocol:
    data = config.data_module
    return Protocol(
        n_way=tuple(as_ints("data_module.n_way", data.n_way)),
        k_shot=tuple(as_ints("data_module.k_shot", data.k_shot)),
        q_sample=data.q_sample,
        episodes=data.episodes,
        seed=config.seed,
        heads=tuple(as_names("classifier", config.classifier)),
        disjoint=data.disjoint,
        probe=config.probe,
    )


def _jobs(config: DistillConfig, networks: list[Network], process: Process) -> list[EncodingJob]:
    """Every network with the clips shown as configured; the scored one also in the other ways (`input_modes=all`)."""
    data, specs = config.data_module, modality_specs(config.data_module)
    precision = resolve_precision(config.precision, process.device)
    context = partial(autocast, precision, process.device)
    views = Views(data.n_masks, data.eval_mask_ratio, data.mask_type, data.eval_masks, config.seed)
    grid = networks[0].encoder.config.grid
    ways = [views, *(way for way in views.alternatives()[1:] if data.input_modes == "all" and _masks_exist(way, grid))]
    shown = [(networks[0], way) for way in ways] + [(network, views) for network in networks[1:]]
    return [
        network.job(specs[network.modality], way, device=process.device, autocast=context, precision=precision)
        for network, way in shown
    ]


def _masks_exist(way: Views, grid: tuple[int, int, int]) -> bool:
    """Whether a input_mode that nobody asked for leaves a token visible; if not, say that it is left out."""
    try:
        way.check(grid)
    except FewshotError as error:
        print(f"input_modes=all: left out: {error}")
        return False
    return True


def _loader(config: DistillConfig, dataset: ClipDataset, process: Process) -> Iterable[Mapping[str, Tensor]]:
    """This rank's share of the clips, in order."""
    mine = range(process.rank, len(dataset), process.world_size)
    return make_clip_loader(
        Subset(dataset, mine),
        num_workers=config.num_workers,
        pin_memory=process.device.type == "cuda",
        batch_size=config.batch_size,
        timeout_s=config.loader_timeout_s,
    )


def _picture(dataset: ClipDataset) -> Any:
    """The middle frame of a clip, uint8 (H, W, 3)."""

    def middle(index: int) -> np.ndarray:
        clip = dataset.index.clips[index]
        frame: np.ndarray = dataset.readers[STUDENT_MODALITY].read(clip.video, [clip.frames[len(clip.frames) // 2]])[0]
        return frame

    return middle
