"""What a MONAI evaluator needs from here: reports at the end of an evaluation, and metrics to select models by."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor, decollate_batch
from monai.handlers import IgniteMetricHandler, from_engine
from monai.metrics import CumulativeIterationMetric
from numpy.typing import NDArray
from torch import Tensor

from evaluation.cases import TOLERANCE, Measuring, Postprocess, class_maps, largest_components
from evaluation.inferers import FileEvaluator, file_of, to_labels
from evaluation.intervals import spread
from evaluation.metrics import Engine as Computing
from evaluation.metrics import confusions
from evaluation.overlay import Panel, as_array, save_overview, save_panels, thumbnail
from evaluation.protocols import MissedDistance, per_image, strict_dice
from evaluation.results import REPORT, write_results
from evaluation.scores import METRICS, ImageScores, Row, Scores, Summary, VolumeScores, tolerances_of
from evaluation.tables import plus_minus, table
from transforms import stem

PICTURE = "overview.png"
PANELS = 4
PREDICTION_AND_LABEL = from_engine(["pred", "label"])


class ReportHandler(ABC):
    """Scores every case of an evaluator, and writes and prints the scores when the evaluation is complete.

    With several processes, rank 0 writes, prints and draws, for the cases of all. Of a `FileEvaluator` the cases that
    failed are listed, and a report without any other is not written.
    """

    def __init__(
        self, scores: Scores, output_dir: str | Path, picture: bool, weights: Mapping[str, str] | None, data: str
    ) -> None:
        self.scores = scores
        self.scores.weights, self.scores.data = dict(weights or {}), data
        self.output_dir = Path(output_dir)
        self.picture = picture
        # of each file, for the page
        self.thumbnails: dict[str, bytes] = {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.finish)

    def start(self, engine: Engine) -> None:
        for known in (self.scores.cases, self.scores.failures, self.thumbnails):
            known.clear()

    def collect(self, engine: Engine) -> None:
        output: Any = engine.state.output
        for item in decollate_batch(output) if isinstance(output, Mapping) else output:
            file = file_of(item) or f"case {len(self.scores.cases) + 1} of process {idist.get_rank() + 1}"
            try:
                self.add(file, item)
            except Exception as error:
                if not (isinstance(engine, FileEvaluator) and engine.refuse(error, item)):
                    raise
                self.scores.cases.pop(file, None)

    @abstractmethod
    def add(self, file: str, item: Mapping[str, Tensor]) -> None:
        """Score one case, given the evaluator's output for it."""

    def scored(self, prediction: Tensor) -> NDArray[Any]:
        """The class indices (…) of a prediction as they are scored, post-processed where that is asked for."""
        labels = as_array(prediction)
        if self.scores.measuring.postprocess == "largest":
            labels = largest_components(labels.astype(np.int32), len(self.scores.classes))
        return labels

    def finish(self, engine: Engine) -> None:
        if isinstance(engine, FileEvaluator):
            self.scores.failures.update(engine.failures)
        parts: tuple[dict[str, Any], ...] = (self.scores.cases, self.scores.failures, self.thumbnails)
        if idist.get_world_size() > 1:
            gathered: Any = idist.all_gather(parts)
            for part, found in ((part, one) for rank in gathered for part, one in zip(parts, rank, strict=True)):
                part.update(found)
        if self.scores.failures and not self.scores.cases:
            return
        summary = self.scores.summary()
        if idist.get_rank() == 0:
            names = self.scores.names()
            pictures = {names[file]: picture for file, picture in self.thumbnails.items()}
            write_results(self.output_dir, summary, self.scores.rows(), pictures)
            print(f"{table(summary)}\n\nreport: {self.output_dir / REPORT}", flush=True)
        self.report(engine, summary)

    @abstractmethod
    def report(self, engine: Engine, summary: Summary) -> None:
        """Set the engine's metrics, and finish the picture."""


class VolumeReport(ReportHandler):
    """Evaluator handler: scores volumes class by class under both protocols of `evaluation.protocols`.

    Expects `pred` and `label`, (1, D, H, W) maps of class indices, in the evaluator's output, decollated or in a batch.
    When the evaluation is complete it writes `metrics.csv`, `summary.json` and `report.html`, prints the table and sets
    `engine.state.metrics["mean_dice"]`, the strict mean.

    Args:
        output_dir: folder of the files.
        classes: names of the classes 1 … C.
        selection: how the model was selected, for summary and table.
        title: heading of the table.
        published: a published row to print beside the results, see `evaluation.scores.Published`.
        picture: save slices of the first case with outlines as `overview.png`, which takes `image` in the output too.
        tolerance_mm: of the surface Dice, one number or {class: number}.
        missed_distance: HD95 and ASSD of a missed class under the strict protocol, "undefined" or "diagonal".
        postprocess: "none", or "largest" to score only the largest connected component of each predicted class.
        engine: "fast" or "medpy", what computes.
        weights: which these are, see `networks.training.Origin.weights`; for the summary.
        data: what they say of themselves, see `transforms.DataSplit.note`; for the summary.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     report = VolumeReport(folder, classes=["liver"], title="Phantoms")
        ...     report.add("case1.nii.gz", {"pred": torch.ones(1, 2, 3, 4), "label": torch.ones(1, 2, 3, 4)})
        ...     report.finish(Engine(lambda engine, batch: batch))
        <BLANKLINE>
        Phantoms: 1 case; model selected by: not stated
        ...
    """

    scores: VolumeScores

    def __init__(
        self,
        output_dir: str | Path,
        classes: Sequence[str],
        selection: str = "",
        title: str = "",
        published: Mapping[str, Any] | None = None,
        picture: bool = False,
        tolerance_mm: float | Mapping[str, float] = TOLERANCE,
        missed_distance: MissedDistance = "undefined",
        postprocess: Postprocess = "none",
        engine: Computing = "fast",
        weights: Mapping[str, str] | None = None,
        data: str = "",
    ) -> None:
        measuring = Measuring(tolerances_of(classes, tolerance_mm), engine, postprocess)
        scores = VolumeScores(
            classes, title, selection, published, measuring=measuring, missed_distance=missed_distance
        )
        super().__init__(scores, output_dir, picture, weights, data)

    def add(self, file: str, item: Mapping[str, Tensor]) -> None:
        spacing = spacing_mm(item["label"])
        first = not self.scores.cases
        rows = self.scores.add(file, item["pred"][0], item["label"][0], spacing)
        self.thumbnails[file] = thumbnail(item.get("image"), self.scored(item["pred"][0]), item["label"][0], spacing)
        if self.picture and first and idist.get_rank() == 0:
            title = f"{self.scores.title}: {stem(file)}, mean Dice {plus_minus(_mean(rows, 'dice'), None, 100)} %"
            save_overview(
                self.output_dir / PICTURE, item["image"], self.scored(item["pred"][0]), item["label"],
                self.scores.classes, spacing_mm=spacing, title=title,
            )  # fmt: skip

    def report(self, engine: Engine, summary: Summary) -> None:
        mean = summary.protocols["strict"].mean["dice"].mean
        engine.state.metrics["mean_dice"] = math.nan if mean is None else mean


class ImageReport(ReportHandler):
    """Evaluator handler: scores single images, per image and pooled, and their outlines.

    Expects `pred` and `label` (1, H, W) in the evaluator's output, decollated or in a batch. When the evaluation is
    complete it writes `metrics.csv`, `summary.json` and `report.html`, prints the table and sets every per-image mean
    in `engine.state.metrics`: "iou", "dice", "f1", …

    Args:
        output_dir: folder of the files.
        classes: names of the classes 1 … C.
        selection: how the model was selected, for summary and table.
        title: heading of the table.
        published: a published row to print beside the results, see `evaluation.scores.Published`.
        logits: `pred` holds logits (K, H, W): one channel is cut where the sigmoid is 0.5, of several the largest wins.
            Otherwise it holds class indices (1, H, W).
        tolerance_px: of the surface Dice, one number or {class: number}.
        picture: save the first images with outlines as `overview.png`, which takes `image` in the output too.
        bgr: `image` has its channels in the order blue, green, red.
        postprocess: "none", or "largest" to score only the largest connected component of each predicted class.
        engine: "fast" or "medpy", what computes.
        weights: which these are, see `networks.training.Origin.weights`; for the summary.
        data: what they say of themselves, see `transforms.DataSplit.note`; for the summary.

    Example:
        >>> report = ImageReport("results", classes=["lesion"])
        >>> report.add("a.png", {"pred": torch.tensor([[[-3.0, 2.0]]]), "label": torch.tensor([[[0, 1]]])})
        >>> report.scores.summary().protocols["per image"].mean["iou"].mean
        1.0
    """

    scores: ImageScores

    def __init__(
        self,
        output_dir: str | Path,
        classes: Sequence[str] = ("lesion",),
        selection: str = "",
        title: str = "",
        published: Mapping[str, Any] | None = None,
        logits: bool = True,
        tolerance_px: float | Mapping[str, float] = TOLERANCE,
        picture: bool = False,
        bgr: bool = False,
        postprocess: Postprocess = "none",
        engine: Computing = "fast",
        weights: Mapping[str, str] | None = None,
        data: str = "",
    ) -> None:
        measuring = Measuring(tolerances_of(classes, tolerance_px), engine, postprocess)
        scores = ImageScores(classes, title, selection, published, measuring)
        super().__init__(scores, output_dir, picture, weights, data)
        self.logits = logits
        self.bgr = bgr
        self.panels: list[Panel] = []

    def start(self, engine: Engine) -> None:
        super().start(engine)
        self.panels.clear()

    def add(self, file: str, item: Mapping[str, Tensor]) -> None:
        prediction, label = image_maps(item["pred"], item["label"], len(self.scores.classes), self.logits)
        rows = self.scores.add(file, prediction, label)
        image = item["image"].flip(0) if self.bgr and "image" in item else item.get("image")
        self.thumbnails[file] = thumbnail(image, self.scored(prediction), label)
        if self.picture and image is not None and len(self.panels) < PANELS:
            caption = f"{stem(file)}, IoU {plus_minus(_mean(rows, 'iou'), None, 100)} %"
            self.panels.append(Panel(as_array(image), self.scored(prediction), as_array(label), caption))

    def report(self, engine: Engine, summary: Summary) -> None:
        if self.picture and idist.get_rank() == 0:
            save_panels(self.output_dir / PICTURE, self.panels, self.scores.classes, self.scores.title)
        means = {key: summary.protocols["per image"].mean[key].mean for key in METRICS}
        engine.state.metrics.update({key: math.nan if mean is None else mean for key, mean in means.items()})


class VolumeDice(IgniteMetricHandler):
    """Key metric: the strict mean Dice, over cases for each class, then over classes, without any surface metric.

    It equals the number of `VolumeReport`, unless a padding sampler repeats a case: here each repetition counts.

    Args:
        classes: names of the classes 1 … C.
        output_transform: gives (predictions, labels), each a batch or a list of (1, D, H, W) maps of class indices.

    Example:
        >>> evaluator = Engine(lambda engine, batch: batch)
        >>> VolumeDice(["liver", "spleen"]).attach(evaluator, "dice")
        >>> evaluator.run([[{"pred": torch.ones(1, 2, 3, 4), "label": torch.ones(1, 2, 3, 4)}]]).metrics["dice"]
        1.0
    """

    def __init__(self, classes: Sequence[str], output_transform: Callable = PREDICTION_AND_LABEL) -> None:
        def score(prediction: Tensor, label: Tensor) -> list[float]:
            case = file_of({"label": label, "pred": prediction}) or "the case"
            counts = confusions(*class_maps(prediction[0], label[0], len(classes), case), len(classes))
            return [strict_dice(one) for one in counts]

        super().__init__(_MeanOfClasses(score), output_transform=output_transform)


class ImageMetric(IgniteMetricHandler):
    """Key metric: a metric of CMUNeXt's evaluation, mean over the images for each class, then over the classes.

    Args:
        metric: "iou", "dice", "sensitivity", "specificity", "precision", "f1" or "accuracy".
        classes: names of the classes 1 … C.
        logits: see `ImageReport`.
        output_transform: gives (predictions, labels), each a batch or a list of channel-first tensors.

    Raises:
        ValueError: when there is no such metric.

    Example:
        >>> evaluator = Engine(lambda engine, batch: batch)
        >>> ImageMetric("accuracy").attach(evaluator, "accuracy")
        >>> image = {"pred": torch.tensor([[[-3.0, 2.0]]]), "label": torch.tensor([[[0, 0]]])}
        >>> evaluator.run([[image]]).metrics["accuracy"]
        0.5
    """

    def __init__(
        self,
        metric: str = "iou",
        classes: Sequence[str] = ("lesion",),
        logits: bool = True,
        output_transform: Callable = PREDICTION_AND_LABEL,
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")

        def score(prediction: Tensor, label: Tensor) -> list[float]:
            case = file_of({"label": label, "pred": prediction}) or "the case"
            maps = class_maps(*image_maps(prediction, label, len(classes), logits), len(classes), case)
            counts = confusions(*maps, len(classes))
            # one class: 1 where both are empty, as published; of several, one that is nowhere is left out
            return [
                per_image(one)[metric] if len(counts) == 1 or one.tp + one.fp + one.fn else math.nan for one in counts
            ]

        super().__init__(_MeanOfClasses(score), output_transform=output_transform)


class MeanLoss(IgniteMetricHandler):
    """Key metric: the mean over the cases of a loss of logits and label; not a number where one case's is none.

    MONAI's `LossMetric` leaves such cases out, so that a network that has diverged scores a perfect 0.

    Args:
        loss: takes batches of logits and labels.
        output_transform: gives (predictions, labels), each a batch or a list of channel-first tensors.

    Example:
        >>> evaluator = Engine(lambda engine, batch: batch)
        >>> MeanLoss(torch.nn.BCEWithLogitsLoss()).attach(evaluator, "val_loss")
        >>> image = {"pred": torch.full((1, 2, 2), torch.nan), "label": torch.ones(1, 2, 2)}
        >>> evaluator.run([[image]]).metrics["val_loss"]
        nan
    """

    def __init__(
        self, loss: Callable[[Tensor, Tensor], Tensor], output_transform: Callable = PREDICTION_AND_LABEL
    ) -> None:
        def score(prediction: Tensor, label: Tensor) -> list[float]:
            return [float(loss(prediction[None], label[None]))]

        super().__init__(_MeanOfCases(score), output_transform=output_transform)


class _MeanOfClasses(CumulativeIterationMetric):
    """Collects one value for each case and class, NaN where there is none to give."""

    def __init__(self, score: Callable[[Tensor, Tensor], list[float]]) -> None:
        super().__init__()
        self.score = score

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The values of two batches, (cases, classes) float64."""
        if y is None or len(y_pred) != len(y):
            raise ValueError("as many labels as predictions are needed")
        return torch.tensor([self.score(p, t) for p, t in zip(y_pred, y, strict=True)], dtype=torch.float64)

    def aggregate(self) -> Tensor:
        """The mean over the cases for each class, then over the classes that occur; NaN when none does."""
        return self.get_buffer().nanmean(dim=0).nanmean()


class _MeanOfCases(_MeanOfClasses):
    """The mean of one value for each case, NaN where one is."""

    def aggregate(self) -> Tensor:
        return self.get_buffer().mean()


def _mean(rows: Sequence[Row], metric: str) -> float | None:
    """Of the rows that are not of the published protocol."""
    values = [getattr(row.score, metric) for row in rows if getattr(row.score, "protocol", "strict") == "strict"]
    return spread(values).mean


def image_maps(prediction: Tensor, label: Tensor, classes: int, logits: bool) -> tuple[Tensor, Tensor]:
    """Class indices (H, W) of a prediction (K, H, W) and a label (1, H, W); soft labels of one class are cut at 0.5.

    Example:
        >>> image_maps(torch.tensor([[[-3.0, 2.0]]]), torch.tensor([[[0.2, 0.7]]]), classes=1, logits=True)
        (tensor([[0, 1]], dtype=torch.uint8), tensor([[0, 1]], dtype=torch.uint8))
    """
    if logits:
        prediction = to_labels(prediction[None])[0]
    return prediction[0], (label[0] >= 0.5).to(torch.uint8) if classes == 1 else label[0]


def spacing_mm(image: Tensor) -> tuple[float, ...] | None:
    """Voxel size per spatial axis, from the affine or from the meta entry `spacing_mm`; None where neither knows it.

    The affine answers, because transforms keep it up to date, unless nobody gave it: a reader says so by the metadata
    `geometry: assumed`, and MONAI puts the identity where there is nothing.

    Example:
        >>> spacing_mm(MetaTensor(torch.zeros(1, 2, 2, 2), torch.tensor([3.0, 0.5, 0.5, 1.0]).diag()))
        (3.0, 0.5, 0.5)
        >>> spacing_mm(MetaTensor(torch.zeros(1, 2, 2, 2), meta={"geometry": "assumed"}))
    """
    if not isinstance(image, MetaTensor):
        return None
    by_default = torch.equal(image.affine, torch.eye(4, dtype=image.affine.dtype, device=image.affine.device))
    geometry = image.meta.get("geometry", "assumed" if by_default else "file")
    if geometry == "file":
        return tuple(torch.linalg.norm(image.affine[:3, :3], dim=0)[: image.ndim - 1].tolist())
    stated = image.meta.get("spacing_mm")
    return None if stated is None else tuple(float(size) for size in stated)
