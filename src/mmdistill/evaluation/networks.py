"""The networks of an evaluation: an encoder of any checkpoint with the statistics of its training data."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mmdistill.builders import check_joints, check_pooling, check_token_grid, token_grid
from mmdistill.checkpoint import Checkpoint, CheckpointError, load_encoder_for_clips, open_checkpoint
from mmdistill.checkpoint.errors import ComponentError, name_setting
from mmdistill.checkpoint.formats.metadata import exported_student
from mmdistill.checkpoint.keys import ENCODER_EMA
from mmdistill.checkpoint.load import select_encoder
from mmdistill.checkpoint.references import (
    labeled_sources,
    labeled_sources_entry,
    load_referenced_teacher,
    weights_digest,
)
from mmdistill.checkpoint.student import stored_pooling
from mmdistill.config import (
    RANDOM_PREFIX,
    ConfigError,
    DataModuleConfig,
    DistillConfig,
    baseline_component,
    modality_specs,
)
from mmdistill.config.schema import DEFAULT_BASELINES
from mmdistill.errors import suggest_nearest
from mmdistill.fewshot.encode import ClipEncoder, EncodingJob, EvalMasks
from mmdistill.fewshot.errors import FewshotError
from mmdistill.modalities import ModalitySpec, get_modality, modality_names, stored_statistics
from mmdistill.models.pooling import Pooling
from mmdistill.models.videomae import Encoder
from mmdistill.randomness import seed_torch


@dataclass(frozen=True)
class Network:
    """One encoder.

    Attributes:
        name: name in every output: ``student_rgb``, ``teacher_flow``, ``pretrained_rgb``, ``random`` ...
        encoder: with its weights.
        modality: name of its input modality.
        checkpoint: path of its file or folder; "" for none.
        statistics: (mean, std, sigma, compensate) stored in the checkpoint, or None.
        learned: sources of joint pretrainings whose labels it has learned, see `labeled_sources`.
        pooling: stored in the checkpoint, or None; `choose_pooling` sets it.
    """

    name: str
    encoder: Encoder
    modality: str
    checkpoint: str = ""
    statistics: tuple[Any, ...] | None = None
    learned: tuple[Mapping[str, Any], ...] = ()
    pooling: Pooling | None = None

    def choose_pooling(self, config: DistillConfig, default: Pooling | None = None) -> "Network":
        """This network with the pooling of the config; without one with its own, `default` or the mean.

        Raises:
            ConfigError: the encoder does not support it.
        """
        configured = Pooling(config.pooling, config.pooling_last_k).for_evaluation if config.pooling else None
        pooling = configured or self.pooling or default or Pooling()
        check_pooling(pooling, self.encoder, self.name)
        return replace(self, pooling=pooling)

    def spec(self, dataset: ModalitySpec) -> ModalitySpec:
        """The dataset's spec with the statistics that this network was trained with.

        Raises:
            FewshotError: another modality or number of channels.
        """
        channels = self.encoder.config.channels
        if (dataset.name, dataset.channels) != (self.modality, channels):
            raise FewshotError(
                f"{self.name} needs {self.modality} with {channels} channels, but the input is {dataset.name} with "
                f"{dataset.channels}; evaluate it on {self.modality}"
            )
        return dataset if self.statistics is None else dataset.with_statistics(*self.statistics)

    def encoding_job(
        self, dataset: ModalitySpec, masks: EvalMasks, *, device: torch.device | str = "cpu", precision: str = "32"
    ) -> EncodingJob:
        """The job that encodes clips with this network in one input mode; see `ClipEncoder`.

        Raises:
            FewshotError: see `spec`, or the masks leave no token visible.
        """
        spec, grid = self.spec(dataset), self.encoder.config.grid
        masks.require_visible_tokens(grid)
        info = {"checkpoint": self.checkpoint, "modality": self.modality, **labeled_sources_entry(self.learned)}
        digest = f"{weights_digest(self.encoder)} {spec} {precision}"
        pooling = self.pooling or Pooling()
        encode = ClipEncoder(self.encoder, spec, device=device, precision=precision, pooling=pooling)
        return EncodingJob(self.name, encode, grid, masks, digest, info, pooling)


def load_network(
    source: str | Path | Checkpoint,
    *,
    data: DataModuleConfig,
    component: str | None = None,
    modality: str | None = None,
    name: str | None = None,
) -> Network:
    """Load an encoder from a checkpoint of any format.

    Args:
        source: anything that `open_checkpoint` reads, or its result.
        data: the dataset of the clips. It gives the input size of a checkpoint without metadata.
        component: None: the default of `select_encoder`.
        modality: needed only if neither the metadata nor the number of channels determines it.
        name: name in the outputs; None: the component, or ``pretrained_MODALITY``.

    Raises:
        CheckpointError: the path cannot be read or has no such component.
        FewshotError: the modality is unknown, or not the given one.
        ConfigError: the encoder does not fit the clips of `data`.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    path = checkpoint.path
    components = checkpoint.components
    if component and component not in components:
        raise ComponentError(f"{path}: no component {component!r}; select one of {', '.join(components)}")
    component = component or select_encoder(checkpoint.state_dict, None, path).component
    specs = modality_specs(data)
    modality = _find_modality(checkpoint, component, modality, {name: spec.channels for name, spec in specs.items()})
    if modality not in specs:
        raise ConfigError(
            f"{path}: {component} has the modality {modality}, but the dataset has only {', '.join(specs)}"
            f"{_training_dataset_hint(checkpoint, data)}"
        )
    encoder = load_encoder_for_clips(
        checkpoint, component=component, num_frames=data.num_frames, token_grid=token_grid(data)
    )
    try:
        check_joints(checkpoint.meta, specs[modality], path)
        check_token_grid(encoder, specs[modality], data, path)
    except ConfigError as error:
        raise ConfigError(f"{error}{_training_dataset_hint(checkpoint, data)}") from error
    name = name or (_own_name(checkpoint, modality) if component == "encoder" else component)
    statistics, learned = stored_statistics(checkpoint.meta, modality), tuple(labeled_sources(checkpoint.meta))
    return Network(name, encoder, modality, str(path), statistics, learned, stored_pooling(checkpoint.meta))


def _training_dataset_hint(checkpoint: Checkpoint, data: DataModuleConfig) -> str:
    """Names the dataset of the training if the config has another one; else nothing."""
    stored = ((checkpoint.meta.get("config") or {}).get("data_module") or {}).get("name", data.name)
    if stored == data.name:
        return ""
    return (
        f"; the checkpoint was trained on dataset {stored}, and the config selects dataset {data.name}: give the "
        "--config-name and dataset of the training"
    )


def _own_name(checkpoint: Checkpoint, modality: str) -> str:
    """Name of the only encoder of a checkpoint: an exported student keeps the name of its component."""
    return exported_student(checkpoint.meta) or f"pretrained_{modality}"


def unknown_baseline(entry: str, components: Collection[str]) -> ConfigError:
    """The error about an entry of `baselines` that is nothing known."""
    untrained = [c.replace("teacher_", RANDOM_PREFIX) for c in components if c.startswith("teacher_")]
    known = ("random", *components, *untrained)
    return ConfigError(
        f"baselines: {entry} is not one of {', '.join(known)}, nor an existing path{suggest_nearest(entry, known)}"
    )


def _find_modality(checkpoint: Checkpoint, component: str, given: str | None, own: Mapping[str, int]) -> str:
    """That of the component's name or the metadata, else `given`, else the first one with its channels.

    `own` are the channels of the dataset's modalities, which come before all registered ones.
    """
    path, found = checkpoint.path, component.rpartition("_")[2]
    if found not in modality_names():
        prefix = "" if component == "encoder" else f"{component}."
        weight = checkpoint.state_dict.get(f"{prefix}encoder.patch_embed.proj.weight")
        channels = None if weight is None else weight.shape[1]
        registered = {name: get_modality(name).channels for name in modality_names()}
        fitting = [name for name, count in [*own.items(), *registered.items()] if count == channels]
        found = str(checkpoint.meta.get("modality") or given or (fitting[0] if fitting else ""))
    if not found:
        raise FewshotError(f"{path}: the modality of {component} is unknown; set --modality of `mmdistill features`")
    if given not in (None, found):
        raise FewshotError(f"{path}: {component} has the modality {found}, not {given}")
    return found


def make_random_network(reference: Network, *, seed: int, name: str = "random") -> Network:
    """An untrained network of the same architecture: the baseline that shows the effect of training."""
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed)
        encoder = Encoder(reference.encoder.config)
    return Network(name, encoder, reference.modality, "none: untrained weights", reference.statistics)


def load_networks(config: DistillConfig, source: Checkpoint) -> tuple[list[Network], list[str]]:
    """The scored network, then those of `baselines`; and one log line for each baseline that is skipped.

    Raises:
        ConfigError: the checkpoint has no `eval_component`, or two networks have the same name.
        CheckpointError: a component is missing, or a path of `baselines` cannot be read.
    """
    data, path = config.data_module, source.path
    is_distilled = "student_rgb" in source.components or len({*source.components} - {ENCODER_EMA}) > 1
    references = source.meta.get("teachers") or {}  # of a student-only checkpoint
    if is_distilled:
        with name_setting("eval_component", ComponentError):
            scored = _load_component(source, config.eval_component, data)
    else:
        own_component = select_encoder(source.state_dict, None, path).component
        channels = {name: spec.channels for name, spec in modality_specs(data).items()}
        own_modality = _find_modality(source, own_component, None, channels)
        own_name = _own_name(source, own_modality)
        own_names = {own_component: own_name}  # component -> name in the outputs
        if ENCODER_EMA in source.components:
            own_names[ENCODER_EMA] = f"pretrained_ema_{own_modality}"
        wanted = config.eval_component
        if wanted not in (DistillConfig.eval_component, own_name, "encoder", *own_names):
            raise ConfigError(
                f"eval_component={wanted}: {path} is not a distilled checkpoint, it contains only "
                f"{' and '.join([own_name, *list(own_names)[1:]])}"
            )
        own_component = wanted if wanted in own_names else own_component
        scored = load_network(source, component=own_component, name=own_names[own_component], data=data)
    networks, messages = [scored], []
    encoders = source.meta.get("encoders", {})
    components = [entry for entry in config.baselines if entry in encoders or baseline_component(entry)]
    paths = [entry for entry in config.baselines if entry != "random" and entry not in components]
    names = dict(zip(paths, _distinct_names(paths, {scored.name, *config.baselines} - set(paths)), strict=True))
    uses_default, omit = tuple(config.baselines) == DEFAULT_BASELINES, "; baselines=[random] omits it"
    for entry in config.baselines:
        if entry == "random":
            networks.append(make_random_network(scored, seed=config.seed))
        elif entry in paths:
            if os.sep not in entry and not Path(entry).exists():
                raise unknown_baseline(entry, source.components)
            with name_setting("baselines"):
                networks.append(load_network(entry, name=names[entry], data=data))
        elif not is_distilled and entry in own_names:
            networks.append(load_network(source, component=entry, name=own_names[entry], data=data))
        elif not is_distilled:
            messages.append(f"baselines: skipping {entry}: {path} is not a distilled checkpoint{omit}")
        elif uses_default and entry not in {*source.components, *references}:
            messages.append(f"baselines: skipping {entry}: {path} has no such teacher{omit}")
        else:
            component = baseline_component(entry) or entry
            try:
                with name_setting("baselines", ComponentError):
                    network = _load_component(source, component, data)
                if entry.startswith(RANDOM_PREFIX):
                    network = make_random_network(network, seed=config.seed, name=entry)
                    messages.append(f"baselines: {entry} is an untrained encoder with the architecture of {component}")
                networks.append(network)
            except (ConfigError, CheckpointError) as error:
                if component in source.components or component not in references:
                    raise
                messages.append(f"baselines: skipping {entry}: {path} is a student-only checkpoint: {error}")
    if len({n.name for n in networks}) != len(networks):
        raise ConfigError(f"baselines: two networks have the same name: {', '.join(n.name for n in networks)}")
    if config.pooling == "person":
        messages.append("pooling=person applies to the training; the evaluation, which reads no skeletons, uses mean")
    trained, scored = networks[0].pooling, networks[0].choose_pooling(config)
    if trained and trained != scored.pooling:
        messages.append(f"pooling={scored.pooling}: {path} was trained with pooling={trained}; omit the key to use it")
    return [scored, *(network.choose_pooling(config, scored.pooling) for network in networks[1:])], messages


def _load_component(source: Checkpoint, component: str, data: DataModuleConfig) -> Network:
    """A component of a distilled checkpoint. For a student-only checkpoint also a teacher that it references."""
    if component in source.components or component not in (source.meta.get("teachers") or {}):
        return load_network(source, component=component, data=data)
    teacher = load_referenced_teacher(source, component)
    own = None if "encoder" in teacher.components else component  # the teacher's own pretraining checkpoint
    return load_network(teacher, component=own, modality=component.rpartition("_")[2], name=component, data=data)


def _distinct_names(paths: Sequence[str], taken: Collection[str]) -> list[str]:
    """The shortest distinct name of each path: the run, with the file if needed, else the path."""

    def with_file(path: str) -> str:
        file = Path(path)
        return f"{_run_name(path)} ({file.name if file.is_dir() else file.stem})"

    names = [_run_name(path) for path in paths]
    for qualify in (with_file, str):
        names = [
            qualify(path) if names.count(name) > 1 or name in taken else name
            for path, name in zip(paths, names, strict=True)
        ]
    return names


def _run_name(path: str) -> str:
    """Name of the run folder: ``.../mmdistill_rgb/checkpoints/last.ckpt`` -> ``mmdistill_rgb``.

    Of a Hugging Face folder its own name.
    """
    if (Path(path) / "config.json").is_file():
        return Path(path).resolve().name
    parts = [p for p in Path(path).resolve().parts if p not in ("checkpoints", "checkpoint")]
    return parts[-2] if len(parts) > 2 else Path(path).name
