"""What a MONAI evaluator needs from here: the report at the end of an evaluation, and a metric to select models by."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor, decollate_batch
from monai.handlers import IgniteMetricHandler, from_engine
from monai.metrics import CumulativeIterationMetric
from torch import Tensor

from evaluation.report import Report, VolumeScores


class _ReportHandler:
    """Feeds a `Report` with every case of an evaluator and writes it when the evaluation is complete."""

    def __init__(self, report: Report, output_dir: str | Path) -> None:
        self.report = report
        self.output_dir = Path(output_dir)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self.report.cases.clear()

    def _collect(self, engine: Engine) -> None:
        output = engine.state.output
        for item in decollate_batch(output) if isinstance(output, Mapping) else output:
            case = _case_name(item) or f"rank {idist.get_rank()} case {len(self.report.cases) + 1}"
            self.report.add(case, item["pred"][0], item["label"][0], spacing_mm(item["label"]))

    def _finish(self, engine: Engine) -> None:
        if idist.get_world_size() > 1:
            for cases in idist.all_gather(self.report.cases):
                self.report.cases.update(cases)
        if idist.get_rank() == 0:
            self.report.write(self.output_dir)
            print(self.report.table(), flush=True)


class VolumeReport(_ReportHandler):
    """Evaluator handler: scores label maps of volumes per organ under both protocols of `evaluation.protocols`.

    Expects `pred` and `label`, (1, D, H, W) maps of class indices, in the evaluator's output, decollated or in a batch.
    When the evaluation is complete it writes `metrics.csv` and `summary.json` to `output_dir`, prints the organ table and
    sets `engine.state.metrics["mean_dice"]`, the strict mean. Under several processes the cases of all are put together.

    Args:
        output_dir: folder of the files.
        organs: names of the classes 1 … C.
        selection: how the model was selected, for the summary and the table.
        title: heading of the table.
        published: a published row to print beside the results, see `evaluation.report.Report`.
    """

    def __init__(
        self,
        output_dir: str | Path,
        organs: Sequence[str],
        selection: str = "",
        title: str = "",
        published: Mapping[str, Any] | None = None,
    ) -> None:
        self.scores = VolumeScores(organs, title, selection, published)
        super().__init__(self.scores, output_dir)

    def _finish(self, engine: Engine) -> None:
        super()._finish(engine)
        engine.state.metrics["mean_dice"] = self.scores.mean_dice()


class VolumeDice(IgniteMetricHandler):
    """Strict mean Dice as an evaluator's key metric: over cases per organ, then over organs, without any surface metric.

    The same number as `VolumeReport` gives, but a case that a padded distributed sampler repeats counts twice here.

    Args:
        organs: names of the classes 1 … C.
        output_transform: gives (predictions, labels), each a batch or a list of (1, D, H, W) maps of class indices.
        save_details: put the cases × organs array into `engine.state.metric_details`.
    """

    def __init__(
        self,
        organs: Sequence[str],
        output_transform: Callable = from_engine(["pred", "label"]),  # noqa: B008
        save_details: bool = True,
    ) -> None:
        super().__init__(_StrictDice(len(organs)), output_transform=output_transform, save_details=save_details)


class _StrictDice(CumulativeIterationMetric):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        if y is None or y_pred.shape != y.shape:
            raise ValueError(
                f"predictions {tuple(y_pred.shape)} and labels {y if y is None else tuple(y.shape)} differ"
            )
        return torch.stack([self._dice(p, t) for p, t in zip(y_pred, y, strict=True)])

    def _dice(self, prediction: Tensor, label: Tensor) -> Tensor:
        """(C,) Dice per class, NaN where neither map has the class."""
        n = self.classes + 1
        confusion = torch.zeros(n * n, dtype=torch.int64, device=label.device)
        for predicted, true in zip(
            prediction.flatten(0, -3), label.flatten(0, -3), strict=True
        ):  # slices: small copies
            confusion += torch.bincount((true.long() * n + predicted.long()).flatten(), minlength=n * n)
        table = confusion.view(n, n).double()
        return (2 * table.diagonal() / (table.sum(0) + table.sum(1)))[1:]

    def aggregate(self) -> Tensor:
        """The mean; ValueError where no case has any of the classes, in the label or predicted."""
        scores = self.get_buffer()
        mean = torch.nanmean(torch.nanmean(scores, dim=0))
        if torch.isnan(mean):
            raise ValueError("no organ occurs in any label or prediction: there is no mean Dice to compute")
        return mean


def spacing_mm(image: Tensor) -> tuple[float, ...] | None:
    """Voxel size per spatial axis, from the affine or from the meta entry `spacing_mm`; None where neither knows it.

    The affine comes first because transforms keep it up to date. One of unit voxels is what readers put where a file
    says nothing, and is not believed without `spacing_mm`.
    """
    if not isinstance(image, MetaTensor):
        return None
    sizes = torch.linalg.norm(image.affine[:3, :3], dim=0)[: image.ndim - 1]
    if not torch.equal(sizes, torch.ones_like(sizes)):
        return tuple(sizes.tolist())
    stated = image.meta.get("spacing_mm")
    return None if stated is None else tuple(float(size) for size in stated)


def _case_name(item: Mapping[str, Any]) -> str | None:
    """The file name, without the suffixes of the formats in use, of the first of image, label and prediction that has one."""
    for key in ("image", "label", "pred"):
        name = item[key].meta.get("filename_or_obj") if isinstance(item.get(key), MetaTensor) else None
        if name:
            return re.sub(r"(\.npy)?\.(h5|hdf5|nii|nii\.gz|npz|png|jpg|jpeg|bmp|tif|tiff)$", "", Path(str(name)).name)
    return None
