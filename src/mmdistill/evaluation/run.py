"""The few-shot evaluation of a checkpoint: its networks, clips, input modes and log. Scoring is in `fewshot`."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset

from mmdistill.builders import (
    load_rallies,
    make_clip_dataset,
    make_clip_index,
    make_clip_loader,
    make_demo_data,
    resolve_annotation_path,
    sampling_rate_warnings,
)
from mmdistill.checkpoint import read_checkpoint
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
from mmdistill.errors import format_count
from mmdistill.evaluation.networks import Network, load_networks, unknown_baseline
from mmdistill.evaluation.report.html_page import ReadFrame
from mmdistill.evaluation.report.write import print_tables, to_json, write_report
from mmdistill.fewshot.encode import EncodingJob, EvalMasks, encode_cached
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.features import Features
from mmdistill.fewshot.protocol import Protocol, run_protocol
from mmdistill.modalities import STUDENT_MODALITY, modality_names
from mmdistill.training.data_report import DataReport, missing_line
from mmdistill.training.signals import exit_on_stop_signal

# Keys that the page does not show: keys without an effect on the results, training keys, for which the page shows the
# config in the checkpoint, and keys whose value in use differs by network, which the page shows per network.
HIDDEN_KEYS = (
    "train",
    "test",
    "ckpt_path",
    "batch_size",
    "num_workers",
    "devices",
    "feature_cache",
    "resume",
    "stop_signals",
    "distributed_timeout_s",
    "loader_timeout_s",
    "logger",
    "strategy",
    "compile",
    "precision",
    "run_name",
    "trainer",
    "data_module.train_clips",
    "data_module.val_json_path",
    "data_module.hflip_prob",
    "data_module.random_crop_min_scale",
    "data_module.mask_ratio",
    "data_module.n_masks",
    "data_module.eval_mask_ratio",
    "data_module.eval_masks",
    "data_module.modalities.*.mean",
    "data_module.modalities.*.std",
    "data_module.modalities.*.sigma",
    "data_module.modalities.*.target",
)
_UNUSED_RALLIES = {"too_short": "too short for a clip", "without_events": "without an event"}


def evaluate_checkpoint(config: DistillConfig, checkpoint: str, run_dir: Path) -> dict[str, Any]:
    """Evaluate `config.eval_component` of a checkpoint, and the networks of `config.baselines` on the same episodes.

    Only rank 0 prints and writes files.

    Args:
        config: the validated config.
        checkpoint: a distilled ``.ckpt`` (needs no other file), or a pretraining checkpoint, whose encoder is scored.
        run_dir: folder of ``fewshot.json`` and ``report.html``.

    Returns:
        The content of ``fewshot.json``.

    Raises:
        InputError: the message names the key or the file.
    """
    with exit_on_stop_signal(config.stop_signals):
        return _evaluate(config, checkpoint, run_dir)


def _evaluate(config: DistillConfig, checkpoint: str, run_dir: Path) -> dict[str, Any]:
    process = start_process(accelerator=config.accelerator, seed=config.seed, timeout_s=config.distributed_timeout_s)
    run_dir = broadcast_run_dir(run_dir)
    make_demo_data(config.data_module)
    source = read_checkpoint(checkpoint)
    networks, lines = load_networks(config, source)
    modalities = tuple(m for m in modality_names() if any(n.modality == m for n in networks))
    dataset = make_clip_dataset(config.data_module, modalities, training=False, seed=config.seed)
    protocol = _make_protocol(config)
    lines += _check_clips(protocol, dataset.index)
    rallies_in_training, line = train_eval_overlap(config.data_module, dataset.index)
    caveats = [overlap_warning(protocol, dataset.index, config.data_module), line]
    caveats = [*filter(None, caveats), *sampling_rate_warnings(source.meta, config.data_module, checkpoint)]
    lines += caveats
    if config.compile:
        lines.append(
            "ignoring compile=true: the evaluation encodes each clip once, so compiling would take longer than it saves"
        )
    jobs, skipped = _make_jobs(config, networks, process)
    if process.is_main:
        print("\n".join([*lines, *skipped]), flush=True)
    report = DataReport(dataset, run_dir, is_main=process.is_main)
    features = encode_cached(
        jobs,
        lambda: _make_loader(config, dataset, process),
        dataset.index,
        data={m: data_fingerprint(dataset, m) for m in modalities} if config.feature_cache else "",
        cache=Path(config.feature_cache).expanduser() if config.feature_cache else None,
        show_progress=process.is_main,
        collect_info=lambda: {"frames_repeated": report.collect()["missing"]["frames_repeated"]},
    )
    results = run_protocol(features, protocol, show_progress=process.is_main)
    missing = {**dataset.missing_report(), "frames_repeated": _repeated_frames(features)}
    extra = {
        "config": to_plain(config),
        "precision": resolve_precision(config.precision, process.device),
        "index": dataset.index.report,
        "missing": missing,
        "overlapping_clips": count_overlapping_clips(dataset.index.clips),
        "rallies_in_training": rallies_in_training,
    }
    if process.is_main:
        print_tables(results)
        missing_summary = missing_line(missing, modalities)
        if missing_summary:
            print(missing_summary)
        read_frame = _middle_frame_reader(dataset) if STUDENT_MODALITY in modalities else None
        caveats += [missing_summary] if missing_summary else []
        settings = report_settings(config, extra, networks, source.meta)
        page = write_report(results, run_dir, read_frame=read_frame, extra=extra, caveats=caveats, settings=settings)
        print(f"report: {page}\nnumbers: {page.with_name('fewshot.json')}")
    return to_json(results, extra=extra)


def report_settings(
    config: DistillConfig, extra: Mapping[str, Any], networks: Iterable[Network], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The section Settings of the page: values that the results depend on, by the title of their block.

    Args:
        config: of the evaluation.
        extra: further keys of ``fewshot.json``.
        networks: the evaluated networks.
        meta: metadata of the evaluated checkpoint.
    """
    specs = modality_specs(config.data_module)
    evaluation = to_plain(config)
    for key in HIDDEN_KEYS:
        _delete_key(evaluation, key.split("."))
    counts = {key: extra[key] for key in ("index", "missing", "overlapping_clips", "rallies_in_training")}
    return {
        "Evaluation": {"precision": extra["precision"], **evaluation},
        "Clips": counts,
        "Statistics of the model input": {n.name: n.spec(specs[n.modality]).statistics for n in networks},
        "Training config in the checkpoint": meta.get("config") or "not stored",
    }


def _delete_key(config: dict[str, Any], path: list[str]) -> None:
    """Delete a dotted key, given as the list of its parts. ``*`` is every key."""
    head, *rest = path
    if not rest:
        del config[head]
        return
    for name in list(config) if head == "*" else [head]:
        _delete_key(config[name], rest)


def check_evaluation(config: DistillConfig) -> None:
    """Check before a training that the evaluation after it is possible: labels, components and baselines.

    Raises:
        ConfigError: on every rank.
    """
    make_demo_data(config.data_module)
    try:
        _check_clips(_make_protocol(config), make_clip_index(config.data_module, training=False))
    except (FewshotError, AnnotationError) as error:
        raise ConfigError(
            f"the evaluation after the training (test=True) is not possible: {error}; or set test=False"
        ) from error
    teachers = [f"teacher_{m}" for m in config.trainer.teachers]
    components = ["student_rgb", *teachers, *(["student_ema_rgb"] if config.trainer.ema is not None else [])]
    named = [entry for entry in config.baselines if entry.startswith(COMPONENT_PREFIXES)]
    for key, component in [("eval_component", config.eval_component), *(("baselines", entry) for entry in named)]:
        if component not in components:
            raise ConfigError(f"{key}: the distilled checkpoint will have no {component}, only {', '.join(components)}")
    for entry in config.baselines:
        if entry != "random" and entry not in named and not Path(entry).expanduser().exists():
            raise unknown_baseline(entry, components)


def _check_clips(protocol: Protocol, index: ClipIndex) -> list[str]:
    """Log lines about the evaluation clips. Raises `FewshotError` if their labels do not supply the episodes."""
    clips = index.clips
    lines = protocol.check([c.label for c in clips], [c.group for c in clips], index.classes)
    unused = [
        f"{format_count(len(index.report[key]), 'rally')} {name}"
        for key, name in _UNUSED_RALLIES.items()
        if index.report[key]
    ]
    summary = f"{format_count(len(clips), 'evaluation clip')} of {format_count(len(index.classes), 'class')}"
    return [f"{summary}; skipping {', '.join(unused)}" if unused else summary, *lines]


def overlap_warning(protocol: Protocol, index: ClipIndex, data: DataModuleConfig) -> str:
    """A line about clips that overlap in time with another clip of their class; empty if the episodes exclude these."""
    num_overlapping = count_overlapping_clips(index.clips)
    if not num_overlapping or protocol.disjoint is not None:
        return ""
    fix = "; set data_module.disjoint=video to take them from different videos"
    if data.label == "video":  # the clips of a class come from one video
        fix = "; unset data_module.window_stride to avoid it" if data.eval_clips == "windows" else ""
    return (
        f"{num_overlapping} clips overlap in time with another clip of their class: support and query may show "
        f"the same frames{fix}"
    )


def train_eval_overlap(data: DataModuleConfig, index: ClipIndex) -> tuple[int | None, str]:
    """Number of evaluated rallies that are also in `unlabel_json_path`, and a log line.

    The number is None if that file cannot be read. The line is empty if the number is 0.
    """
    evaluated = {clip.video for clip in index.clips}
    try:
        trained = {rally.video for rally in load_rallies(data, resolve_annotation_path(data, training=True))}
    except (ConfigError, AnnotationError) as error:
        return None, f"cannot compare the evaluated rallies with the training file: {error}"
    count = len(evaluated & trained)
    line = (
        f"{count} of {len(evaluated)} evaluated rallies are also in {data.unlabel_json_path}: a training on it used "
        "their frames, without labels (mmdistill make-unlabel --exclude removes them)"
    )
    return count, line if count else ""


def _repeated_frames(features: list[Features]) -> dict[str, dict[str, int]]:
    """Repeated frames by modality and rally, counted when the features were encoded; also for cached features."""
    own = {f.info["modality"]: f.info.get("frames_repeated", {}).get(f.info["modality"]) for f in features}
    return {modality: counts for modality, counts in own.items() if counts}


def _make_protocol(config: DistillConfig) -> Protocol:
    data = config.data_module
    return Protocol(
        n_way=tuple(as_ints("data_module.n_way", data.n_way)),
        k_shot=tuple(as_ints("data_module.k_shot", data.k_shot)),
        q_sample=data.q_sample,
        episodes=data.episodes,
        seed=config.seed,
        classifiers=tuple(as_names("classifier", config.classifier)),
        disjoint=data.disjoint,
        probe=config.probe,
    )


def _make_jobs(config: DistillConfig, networks: list[Network], process: Process) -> tuple[list[EncodingJob], list[str]]:
    """Encoding jobs of all networks, and one log line for each skipped input mode.

    Every network is encoded in the configured input mode. With ``input_modes=all`` the scored network is also encoded
    in the other two.
    """
    data, specs = config.data_module, modality_specs(config.data_module)
    precision = resolve_precision(config.precision, process.device)
    context = partial(autocast, precision, process.device)
    masks = EvalMasks(
        data.n_masks, data.eval_mask_ratio, data.mask_type, shared_masks=data.eval_masks == "shared", seed=config.seed
    )
    selected, skipped = [(networks[0], masks)], []
    for other in masks.input_modes()[1:] if data.input_modes == "all" else ():
        try:
            other.require_visible_tokens(networks[0].encoder.config.grid)
            selected.append((networks[0], other))
        except FewshotError as error:
            skipped.append(f"input_modes=all: skipping {error}")
    selected += [(network, masks) for network in networks[1:]]
    jobs = [
        network.encoding_job(
            specs[network.modality], mode, device=process.device, autocast=context, precision=precision
        )
        for network, mode in selected
    ]
    return jobs, skipped


def _make_loader(config: DistillConfig, dataset: ClipDataset, process: Process) -> Iterable[Mapping[str, Tensor]]:
    """A loader of this rank's share of the clips, in order."""
    own = range(process.rank, len(dataset), process.world_size)
    return make_clip_loader(
        Subset(dataset, own),
        num_workers=config.num_workers,
        pin_memory=process.device.type == "cuda",
        batch_size=config.batch_size,
        timeout_s=config.loader_timeout_s,
    )


def _middle_frame_reader(dataset: ClipDataset) -> ReadFrame:
    """A function that reads the middle frame of a clip, uint8 (H, W, 3)."""
    reader = dataset.readers[STUDENT_MODALITY]

    def read_middle_frame(index: int) -> NDArray[np.uint8]:
        clip = dataset.index.clips[index]
        frame: NDArray[np.uint8] = reader.read(clip.video, [clip.frames[len(clip.frames) // 2]])[0]
        return frame

    return read_middle_frame
