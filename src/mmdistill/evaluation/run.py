"""The few-shot evaluation of a checkpoint: its networks, clips, input modes and log. Scoring is in `fewshot`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Subset

from mmdistill import builders
from mmdistill.checkpoint import open_checkpoint
from mmdistill.checkpoint.errors import name_setting
from mmdistill.checkpoint.references import labeled_sources
from mmdistill.config import (
    ConfigError,
    DataModuleConfig,
    DistillConfig,
    ModalityConfig,
    as_ints,
    as_names,
    baseline_component,
    modality_setting,
    modality_specs,
    teacher_paths,
    to_plain,
)
from mmdistill.config.compose import model_presets
from mmdistill.config.schema import DEFAULT_BASELINES
from mmdistill.console import record_warnings
from mmdistill.data.annotations.base import AnnotationError
from mmdistill.data.clips import ClipIndex, ClipSource, count_overlapping_clips
from mmdistill.data.dataset import ClipDataset
from mmdistill.data.fingerprint import data_fingerprint
from mmdistill.distributed.collectives import broadcast_run_dir
from mmdistill.distributed.device import resolve_precision
from mmdistill.distributed.process import Process, start_process
from mmdistill.distributed.stop_signals import exit_on_stop_signal
from mmdistill.errors import format_count
from mmdistill.evaluation.networks import Network, load_networks, unknown_baseline
from mmdistill.evaluation.report.html_page import ReadFrame
from mmdistill.evaluation.report.write import print_tables, to_json, write_report
from mmdistill.evaluation.token_probes import run_token_probes
from mmdistill.fewshot.encode import EncodingJob, EvalMasks, encode_cached
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.features import Features, cache_path
from mmdistill.fewshot.novel_classes import check_novel_classes
from mmdistill.fewshot.protocol import Protocol, run_protocol
from mmdistill.modalities import STUDENT_MODALITY, modality_names
from mmdistill.training.data_report import DataReport, missing_line

# Keys of the config that the page shows, because the numbers depend on them. The protocol, the masks, the precision and
# the statistics in use are in other blocks of the page.
SHOWN_KEYS = ("seed", "accelerator", "eval_component", "baselines")
SHOWN_DATA_KEYS = (
    *("name", "target_data_dir", "demo_nuisance", "annotations", "unlabel_json_path", "fewshot_eval_json_path"),
    "frame_number_offset",
    *("frame_size", "crop_size", "patch_size", "tubelet", "num_frames", "sampling_rate", "max_persons", "on_missing"),
    *("eval_clips", "window_stride", "clip_anchor", "label", "label_fields", "mask_type", "input_modes"),
    *("resize", "mask_temperature"),
    *("flow_bound", "flow_axes", "skeleton_joints", "skeleton_img_shape", "skeleton_score_max"),
)
KEYPOINT_KEYS = ("joints", "limb_channels", "heatmap_size", "extra_keypoints")  # of a modality, shown if they are set
_UNUSED_RALLIES = {"too_short": "too short for a clip", "without_events": "without an event"}


def evaluate_checkpoint(
    config: DistillConfig, checkpoint: str, run_dir: Path, *, stop_hint: str = "run the same command again"
) -> dict[str, Any]:
    """Evaluate `config.eval_component` of a checkpoint, and the networks of `config.baselines` on the same episodes.

    `checkpoint` is a distilled ``.ckpt``, or a pretraining checkpoint, whose encoder is scored. Only rank 0 prints, and
    writes ``fewshot.json`` and ``report.html`` into `run_dir`. Returns the content of ``fewshot.json``.
    `stop_hint` ends the message after a stop signal.

    Raises:
        InputError: the message names the key or the file.
    """
    with exit_on_stop_signal(config.stop_signals, hint=stop_hint), record_warnings() as warnings:
        return _evaluate(config, checkpoint, run_dir, warnings)


def _evaluate(
    config: DistillConfig, checkpoint: str, run_dir: Path, warnings: Callable[[], list[str]]
) -> dict[str, Any]:
    """See `evaluate_checkpoint`; `warnings` returns the warnings that were logged so far."""
    process = start_process(accelerator=config.accelerator, seed=config.seed, timeout_s=config.distributed_timeout_s)
    run_dir = broadcast_run_dir(run_dir)
    with name_setting("ckpt_path"):
        source = open_checkpoint(checkpoint)
    networks, caveats = load_networks(config, source)
    builders.make_demo_data(config.data_module)
    modalities = tuple(m for m in modality_names() if any(n.modality == m for n in networks))
    needs_motion = any(n.pooling is not None and n.pooling.name == "motion" for n in networks)
    dataset = builders.make_clip_dataset(
        config.data_module, modalities, training=False, seed=config.seed, needs_motion=needs_motion
    )
    protocol = _make_protocol(config)
    sources = builders.load_clip_sources(config.data_module, dataset.index, training=False)
    lines = _check_clips(protocol, dataset.index, sources)
    for network in networks:
        check_novel_classes(network.name, network.learned, config.data_module.name, dataset.index, sources)
    unused = lines[:1] if any(dataset.index.report[key] for key in _UNUSED_RALLIES) else []
    rallies_in_training, line = train_eval_overlap(config.data_module, dataset.index)
    num_overlapping = count_overlapping_clips(dataset.index.clips)
    caveats += filter(
        None, (labels_caveat(networks), overlap_warning(num_overlapping, protocol, config.data_module), line)
    )
    caveats += builders.clip_setting_warnings(source.meta, config.data_module, checkpoint)
    if config.compile:
        lines.append(
            "ignoring compile=true: the evaluation encodes each clip once, so compiling would take longer than it saves"
        )
    lines += run_folder_lines(config, run_dir)
    precision = resolve_precision(config.precision, process.device)
    jobs, skipped = _make_jobs(config, networks, process.device, precision)
    caveats += skipped
    if process.is_main:
        print("\n".join([*lines, *caveats]), flush=True)
    attentive = _run_attentive_probes(config, networks, dataset, process, precision)
    report = DataReport(dataset, run_dir, is_main=process.is_main)
    cache = Path(config.feature_cache).expanduser() if config.feature_cache else None
    fingerprints = {m: data_fingerprint(dataset, m) for m in modalities} if cache else ""
    features = encode_cached(
        jobs,
        lambda: builders.make_clip_loader(
            Subset(dataset, range(process.rank, len(dataset), process.world_size)),  # the share of this rank
            num_workers=config.num_workers,
            pin_memory=process.device.type == "cuda",
            batch_size=config.batch_size,
            timeout_s=config.loader_timeout_s,
        ),
        dataset.index,
        data=fingerprints,
        cache=cache,
        show_progress=process.is_main,
        collect_info=lambda: {"frames_repeated": report.collect()["missing"]["frames_repeated"]},
    )
    features = [replace(f, sources=sources) for f in features]
    results = run_protocol(features, protocol, show_progress=process.is_main)
    first_rows = {f.network: f.input_mode for f in reversed(features)}  # the configured input mode of each network
    probes = [
        {**p, **(attentive.get(p["network"], {}) if first_rows[p["network"]] == p["input_mode"] else {})}
        for p in results.probes
    ]
    results = replace(results, probes=tuple(probes))
    extra: dict[str, Any] = {
        "config": to_plain(config),
        "precision": precision,
        "index": dataset.index.report,
        "missing": {**dataset.missing_report(), "frames_repeated": _repeated_frames(features)},
        "overlapping_clips": num_overlapping,
        "rallies_in_training": rallies_in_training,
        **({"ledger": source.meta["ledger"]} if source.meta.get("ledger") else {}),
        "files": [feature_file(job, fingerprints, cache) for job in jobs],
    }
    if process.is_main:
        print_tables(results)
        missing_summary = missing_line(extra["missing"], modalities)
        if missing_summary:
            print(missing_summary)
            caveats.append(missing_summary)
        read_frame = _middle_frame_reader(dataset) if STUDENT_MODALITY in modalities else None
        settings = report_settings(config, extra, networks, source.meta)
        page = write_report(
            results,
            run_dir,
            read_frame=read_frame,
            extra=extra,
            caveats=[*unused, *caveats, *warnings()],
            settings=settings,
            facts=[f"Evaluation dataset: {config.data_module.name}.", *training_facts(source.stored_meta)],
        )
        print(f"report: {page}\nnumbers: {page.with_name('fewshot.json')}")
    return to_json(results, extra=extra)


def feature_file(job: EncodingJob, data: str | Mapping[str, str], cache: Path | None) -> str | None:
    """The absolute path of the features of a job in the cache; None if they are not cached. See `encode_cached`."""
    if cache is None or not job.weights:
        return None
    return str(cache_path(cache, job.cache_key(data)).absolute())


def run_folder_lines(config: DistillConfig, run_dir: Path) -> list[str]:
    """Log lines about the files of an earlier evaluation in `run_dir` and about `resume` without a training."""
    lines = []
    if config.resume and not config.train:
        lines.append(f"ignoring resume={config.resume}: train=False evaluates ckpt_path")
    replaced = [name for name in ("report.html", "fewshot.json") if (run_dir / name).exists()]
    if replaced:
        lines.append(f"replacing {' and '.join(replaced)} of an earlier evaluation in {run_dir}")
    return lines


def report_settings(
    config: DistillConfig, extra: Mapping[str, Any], networks: Iterable[Network], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The section Settings of the page: values that the results depend on, by the title of their block.

    `extra` has the further keys of ``fewshot.json``, `meta` is the metadata of the evaluated checkpoint.
    """
    data, specs, unset = config.data_module, modality_specs(config.data_module), to_plain(ModalityConfig())
    modalities = {
        name: {
            "dir": modality_setting(data, name, "dir"),
            "pattern": modality_setting(data, name, "pattern"),
            "input_stride": values.input_stride,
            **{key: value for key, value in to_plain(values).items() if key in KEYPOINT_KEYS and value != unset[key]},
        }
        for name, values in data.modalities.items()
    }
    shown_data = {**{key: getattr(data, key) for key in SHOWN_DATA_KEYS}, "modalities": modalities}
    shown = {key: getattr(config, key) for key in SHOWN_KEYS}
    counts = ("index", "missing", "overlapping_clips", "rallies_in_training")
    return {
        "Evaluation": {"precision": extra["precision"], **shown, "data_module": shown_data},
        "Clips": {key: extra[key] for key in counts},
        "Statistics of the model input": {n.name: n.spec(specs[n.modality]).statistics for n in networks},
        "Training config in the checkpoint": meta.get("config") or "not stored",
    }


def training_facts(meta: Mapping[str, Any]) -> list[str]:
    """Sentences about the dataset and the epochs of the training, from the metadata of mmdistill in a checkpoint."""
    stored = meta.get("config") or {}
    dataset, epochs = stored.get("data_module", {}).get("name"), stored.get("trainer", {}).get("epochs")
    if dataset is None or epochs is None or meta.get("epoch") is None:
        return []
    done = int(meta["epoch"]) + (not meta.get("batch"))
    return [f"Training: dataset {dataset}, {done} of {format_count(epochs, 'epoch')}."]


def check_evaluation(config: DistillConfig) -> None:
    """Raise `ConfigError` on every rank if the evaluation after a training will fail.

    The labels, the components, the baselines and the classes of the teachers' pretraining are checked.
    """
    teachers = [f"teacher_{m}" for m in config.trainer.teachers if m in modality_names()]  # others are files
    components = ["student_rgb", *teachers, *(["student_ema_rgb"] if config.trainer.ema is not None else [])]
    named = {entry: component for entry in config.baselines if (component := baseline_component(entry))}
    if tuple(config.baselines) == DEFAULT_BASELINES:  # `load_networks` skips those that the checkpoint lacks
        named = {entry: component for entry, component in named.items() if component in components}
    for key, component in [("eval_component", config.eval_component), *(("baselines", c) for c in named.values())]:
        if component not in components:
            raise ConfigError(f"{key}: the distilled checkpoint will have no {component}, only {', '.join(components)}")
    for entry in config.baselines:
        if entry not in DEFAULT_BASELINES and entry not in named and not Path(entry).expanduser().exists():
            raise unknown_baseline(entry, components)
    builders.make_demo_data(config.data_module)
    try:
        index = builders.make_clip_index(config.data_module, training=False)
        sources = builders.load_clip_sources(config.data_module, index, training=False)
        _check_clips(_make_protocol(config), index, sources)
        given = list(teacher_paths(config.trainer).values()) if config.trainer.ckpt_path is not None else []
        given += [config.student] if config.student and config.student not in model_presets() else []
        for path in given:
            if Path(path).expanduser().exists():  # not all need to exist with `resume`
                learned = labeled_sources(open_checkpoint(path, verify=False).stored_meta)
                check_novel_classes(path, learned, config.data_module.name, index, sources)
    except (FewshotError, AnnotationError, ConfigError) as error:
        raise ConfigError(
            f"the evaluation after the training (test=True) is not possible: {error}; or set test=False"
        ) from error


def _check_clips(protocol: Protocol, index: ClipIndex, sources: Sequence[ClipSource]) -> list[str]:
    """Log lines about the evaluation clips. Raises `FewshotError` if their labels do not supply the episodes."""
    clips = index.clips
    lines = protocol.check([c.label for c in clips], [c.group for c in clips], index.classes, sources)
    unused = [
        f"{format_count(len(index.report[key]), 'rally')} {name}"
        for key, name in _UNUSED_RALLIES.items()
        if index.report[key]
    ]
    summary = f"{format_count(len(clips), 'evaluation clip')} of {format_count(len(index.classes), 'class')}"
    return [f"{summary}; skipping {', '.join(unused)}" if unused else summary, *lines]


def labels_caveat(networks: Sequence[Network]) -> str:
    """A line about networks that have learned labels of a source; empty if there is none."""
    names = [network.name for network in networks if network.learned]
    found = [
        f"{format_count(len(source['classes']), 'class')} of {source['dataset']}"
        for network in networks
        for source in network.learned
    ]
    if not found:
        return ""
    return (
        f"the training of {', '.join(names)} used labels of a source: {', '.join(dict.fromkeys(found))}; no evaluated "
        "class has the name of one of these"
    )


def overlap_warning(num_overlapping: int, protocol: Protocol, data: DataModuleConfig) -> str:
    """A line about clips that overlap in time with another clip of their class; empty if the episodes exclude these."""
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
    """Number of evaluated rallies that are also in `unlabel_json_path` (None: unreadable), and a log line (0: "")."""
    evaluated = {clip.video for clip in index.clips}
    try:
        trained = {
            rally.video for rally in builders.load_rallies(data, builders.resolve_annotation_path(data, training=True))
        }
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
        support_views=data.support_views,
        probe=bool(config.probe),
        report_card=config.report_card,
        shortcut_audit=config.shortcut_audit,
    )


def _make_jobs(
    config: DistillConfig, networks: list[Network], device: torch.device, precision: str
) -> tuple[list[EncodingJob], list[str]]:
    """Encoding jobs of all networks, and one log line for each skipped input mode.

    Every network is encoded in the configured input mode. With ``input_modes=all`` the scored network is also encoded
    in the other two.
    """
    data, specs = config.data_module, modality_specs(config.data_module)
    shared = data.eval_masks == "shared"
    masks = EvalMasks(
        data.n_masks, data.eval_mask_ratio, data.mask_type, shared, config.seed, mask_temperature=data.mask_temperature
    )
    selected, skipped = [(networks[0], masks)], []
    for other in masks.input_modes()[1:] if data.input_modes == "all" else ():
        try:
            other.require_visible_tokens(networks[0].encoder.config.grid)
            selected.append((networks[0], other))
        except FewshotError as error:
            skipped.append(f"input_modes=all: skipping {error}")
    selected += [(network, masks) for network in networks[1:]]
    jobs = [n.encoding_job(specs[n.modality], mode, device=device, precision=precision) for n, mode in selected]
    return jobs, skipped


def _run_attentive_probes(
    config: DistillConfig, networks: Sequence[Network], dataset: ClipDataset, process: Process, precision: str
) -> dict[str, dict[str, Any]]:
    """The results by network; empty without ``probe=attentive``."""
    if config.probe != "attentive":
        return {}

    def make_loader() -> Iterable[Mapping[str, torch.Tensor]]:
        pin_memory = process.device.type == "cuda"
        return builders.make_clip_loader(
            dataset,
            num_workers=config.num_workers,
            pin_memory=pin_memory,
            batch_size=config.batch_size,
            timeout_s=config.loader_timeout_s,
        )

    return run_token_probes(
        networks,
        modality_specs(config.data_module),
        make_loader,
        dataset.index,
        seed=config.seed,
        device=process.device,
        precision=precision,
    )


def _middle_frame_reader(dataset: ClipDataset) -> ReadFrame:
    reader = dataset.readers[STUDENT_MODALITY]

    def read_middle_frame(index: int) -> NDArray[np.uint8]:
        clip = dataset.index.clips[index]
        frame: NDArray[np.uint8] = reader.read(clip.video, [clip.frames[len(clip.frames) // 2]])[0]
        return frame

    return read_middle_frame
