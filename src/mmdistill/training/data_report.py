"""What a training run did with its data: log lines at start and end, and a JSON file in the run folder."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmdistill.data.dataset import ClipDataset
from mmdistill.distributed.collectives import all_gather_objects
from mmdistill.errors import format_count
from mmdistill.files import atomic_write_bytes


class DataReport:
    """Counts of one run since its start, over all ranks and loader workers. `is_main`: this process writes the file.

    `name` is the start of the log lines, and ``{name}_report.json`` is the file.
    """

    def __init__(self, dataset: ClipDataset, run_dir: Path, *, is_main: bool, name: str = "data") -> None:
        self.dataset, self.path, self.is_main, self.name = dataset, run_dir / f"{name}_report.json", is_main, name

    def collect(self) -> dict[str, Any]:
        """The counts. Collective.

        ``index`` describes how the clips were selected, ``missing`` what the policy did by modality and rally,
        ``modalities`` the same as sums.
        """
        stats = self.dataset.stats_tensor
        nonzero_rows = {int(i): stats[i].tolist() for i in stats.any(dim=1).nonzero().flatten().tolist()}
        for rows in all_gather_objects(nonzero_rows):
            for i, row in rows.items():
                stats[i] = torch.maximum(stats[i], torch.tensor(row, dtype=stats.dtype))
        missing = self.dataset.missing_report(stats)
        sums = {name: modality_sums(missing, name) for name in self.dataset.readers}
        return {"index": self.dataset.index.report, "modalities": sums, "missing": missing}

    def write(self) -> dict[str, Any]:
        """Collect the counts and write the file. Collective."""
        report = self.collect()
        if self.is_main:
            atomic_write_bytes(self.path, (json.dumps(report, indent=1, sort_keys=True) + "\n").encode())
        return report

    def start_summary(self) -> str:
        """Write the file; one line about the clips. Collective."""
        report = self.write()
        index, missing = report["index"], report["missing"]
        notes = (
            (len(index["too_short"]), "rally", "too short for a clip"),
            (len(index["without_events"]), "rally", "without an event"),
            (index["shifted_into_video"], "clip", "near the start or end of a video moved inside it"),
            (index.get("without_label", 0), "clip", "without a label left out"),
        )
        parts = [f"{format_count(missing['clips'], 'clip')} of {format_count(index['rallies'], 'rally')}"]
        parts += [f"{format_count(count, noun)} {text}" for count, noun, text in notes if count]
        return f"{self.name}: " + "; ".join(filter(None, [*parts, missing_line(missing, self.dataset.readers)]))

    def end_summary(self) -> str:
        """Write the file; one line about missing data, empty if none was missing. Collective."""
        line = missing_line(self.write()["missing"], self.dataset.readers)
        return f"{self.name}: {line}; details in {self.path}" if line else ""


def modality_sums(missing: Mapping[str, Any], modality: str) -> dict[str, int]:
    """Sums over all rallies of a `ClipDataset.missing_report`: clips skipped, frames repeated."""
    return {key: sum(missing[key].get(modality, {}).values()) for key in ("clips_skipped", "frames_repeated")}


def missing_line(missing: Mapping[str, Any], modalities: Iterable[str]) -> str:
    """The counts of a `ClipDataset.missing_report` that are not 0, in one line; empty if all are 0."""
    parts = []
    for name in modalities:
        sums = modality_sums(missing, name)
        for key, noun, text in (("clips_skipped", "clip", "skipped"), ("frames_repeated", "frame", "repeated")):
            if sums[key]:
                parts.append(f"{name}: {format_count(sums[key], noun)} {text}")
    if replaced := sum(missing["clips_replaced"].values()):
        parts.append(f"{format_count(replaced, 'clip')} replaced by other clips")
    return f"missing data (on_missing={missing['policy']}): {'; '.join(parts)}" if parts else ""
