"""What a training run did with its data: in its log at start and end, and in ``data_report.json`` in its folder."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmdistill.data.dataset import ClipDataset
from mmdistill.distributed.collectives import all_gather_objects


class DataReport:
    """Counts of one run, all ranks and loader workers together, since this start of it.

    Args:
        dataset: of the run.
        run_dir: its folder.
        is_main: whether this process writes the file.
    """

    def __init__(self, dataset: ClipDataset, run_dir: Path, *, is_main: bool) -> None:
        self.dataset, self.path, self.is_main = dataset, run_dir / "data_report.json", is_main

    def collect(self) -> dict[str, Any]:
        """The counts. Collective.

        ``index`` is how the clips came about, ``missing`` what the policy did by modality and rally, ``modalities``
        the same as sums.
        """
        marks = self.dataset.stats_tensor
        told = all_gather_objects({int(i): marks[i].tolist() for i in marks.any(dim=1).nonzero().flatten().tolist()})
        for rows in told:
            for i, row in rows.items():
                marks[i] = torch.maximum(marks[i], torch.tensor(row, dtype=marks.dtype))
        missing = self.dataset.missing_report(marks)
        sums = {name: modality_sums(missing, name) for name in self.dataset.readers}
        return {"index": self.dataset.index.report, "modalities": sums, "missing": missing}

    def write(self) -> dict[str, Any]:
        """Collect, and write the file. Collective."""
        report = self.collect()
        if self.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return report

    def first_line(self) -> str:
        """Write the file, and say where the clips are from. Collective."""
        report = self.write()
        index = report["index"]
        return (
            f"data: {report['missing']['clips']} clips of {index['rallies']} rallies ({len(index['too_short'])} too "
            f"short, {len(index['without_events'])} without events, {index['shifted_into_video']} clips shifted "
            f"into their video); {missing_line(report['missing'], self.dataset.readers)}"
        )

    def last_line(self) -> str:
        """Write the file, and say what the missing policy did. Collective."""
        return f"data: {missing_line(self.write()['missing'], self.dataset.readers)}; {self.path.name}"


def modality_sums(missing: Mapping[str, Any], modality: str) -> dict[str, int]:
    """Of a `ClipDataset.missing_report`: clips left out and frames repeated, over all rallies."""
    return {key: sum(missing[key].get(modality, {}).values()) for key in ("clips_skipped", "frames_repeated")}


def missing_line(missing: Mapping[str, Any], modalities: Iterable[str]) -> str:
    """A `ClipDataset.missing_report` in one line."""
    sums = {name: modality_sums(missing, name) for name in modalities}
    parts = [
        f"{m} {s['clips_skipped']} clips left out, {s['frames_repeated']} frames repeated" for m, s in sums.items()
    ]
    return f"missing={missing['policy']}: {'; '.join(parts)}; {sum(missing['clips_replaced'].values())} clips replaced"
