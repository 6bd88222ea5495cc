"""What `inferring` does beside writing masks: the largest component, volumes of structures, pictures to look at."""

from __future__ import annotations

import csv
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

from evaluation.cases import largest_components
from evaluation.handlers import spacing_mm
from evaluation.overlay import save_overview
from transforms import InputError, on_grid, read_picture, replacing, stem

POSTPROCESS = ("none", "largest")
TABLE = "volumes.csv"


def class_indices(prediction: Tensor) -> Tensor:
    """The class of every pixel or voxel, (H, W) or (D, H, W) uint8, of what the bundles' inference gives.

    Args:
        prediction: of a picture the probabilities (K, H, W), or whole numbers (1, H, W), which are the classes; of a
            volume the label map (1, D, H, W), which probabilities may follow as further channels.

    Example:
        >>> class_indices(torch.tensor([[[0.2, 0.7]]])).tolist()
        [[0, 1]]
    """
    plain = prediction.as_tensor() if isinstance(prediction, MetaTensor) else prediction
    if plain.ndim == 4 or not plain.is_floating_point():
        return plain[0].to(torch.uint8)
    return (plain[0] > 0.5 if len(plain) == 1 else plain.argmax(0)).to(torch.uint8)


class LargestComponentd(MapTransform):
    """Leaves of each class the largest connected component; what else was predicted becomes background.

    Args:
        keys: of predictions, see `class_indices`.
        postprocess: "largest"; "none" changes nothing.

    Raises:
        InputError: for another word.

    Example:
        >>> pred = torch.tensor([[[0.9, 0.9, 0.1, 0.8]]])
        >>> LargestComponentd("pred", "largest")({"pred": pred})["pred"].tolist()
        [[[0.8999999761581421, 0.8999999761581421, 0.10000000149011612, 0.0]]]
    """

    def __init__(self, keys: KeysCollection, postprocess: str = "largest", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if postprocess not in POSTPROCESS:
            raise InputError(f"--postprocess {postprocess}: expected {' or '.join(POSTPROCESS)}")
        self.postprocess = postprocess

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The item with its predictions changed."""
        item = dict(data)
        for key in self.key_iterator(item) if self.postprocess == "largest" else ():
            labels = class_indices(item[key]).numpy(force=True)
            kept = largest_components(labels, int(labels.max()))
            dropped = torch.from_numpy(kept != labels).to(item[key].device)
            changed = item[key].clone()
            changed[:, dropped] = 0
            if changed.ndim == 3 and len(changed) > 1:
                changed[0, dropped] = 1
            item[key] = changed
        return item


class ClassIndicesd(MapTransform):
    """Turns what a network predicts into the class of every pixel, (1, H, W) uint8: what other programs take for it.

    Args:
        keys: of predictions, see `class_indices`.
        enabled: False leaves them as they are.

    Example:
        >>> ClassIndicesd("pred")({"pred": torch.tensor([[[0.2, 0.7]]])})["pred"].tolist()
        [[[0, 1]]]
    """

    def __init__(self, keys: KeysCollection, enabled: bool = True, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.enabled = enabled

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The item with its predictions changed."""
        item = dict(data)
        for key in self.key_iterator(item) if self.enabled else ():
            labels = class_indices(item[key])[None]
            item[key] = MetaTensor(labels).copy_meta_from(item[key]) if isinstance(item[key], MetaTensor) else labels
        return item


class VolumesTable:
    """Writes `volumes.csv`: of each file and class the volume in ml, or of pictures the area in pixels and per cent.

    A volume whose file does not know its spacing has an empty field.

    Args:
        output_dir: folder of the table.
        classes: names of the classes 1 … C.

    Example:
        >>> VolumesTable("predictions", ["lesion"]).attach(Engine(lambda engine, batch: None))
    """

    def __init__(self, output_dir: str | Path, classes: Sequence[str]) -> None:
        self.output_dir = Path(output_dir)
        self.classes = list(classes)
        self.rows: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.rows.clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.measure)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def measure(self, engine: Engine) -> None:
        """Adds the rows of the files that have just been predicted."""
        for name, prediction, _ in predictions(engine):
            labels = class_indices(prediction)
            counts = torch.bincount(labels.ravel(), minlength=len(self.classes) + 1).tolist()
            spacing = spacing_mm(prediction)
            for number, class_name in enumerate(self.classes, 1):
                row: dict[str, Any] = {"case": name, "class": class_name}
                if labels.ndim == 3:
                    ml = None if spacing is None else counts[number] * math.prod(spacing) / 1000
                    row |= {"voxels": counts[number], "ml": "" if ml is None else round(ml, 4)}
                else:
                    percent = 100 * counts[number] / labels.numel()
                    row |= {"pixels": counts[number], "percent": round(percent, 4)}
                self.rows.append(row)

    def write(self) -> None:
        """Writes the table of all processes' files."""
        rows = self.rows
        if idist.get_world_size() > 1:
            gathered: Any = idist.all_gather(rows)
            # lists of rows come one after the other, or as one
            rows = [row for part in gathered for row in (part if isinstance(part, list) else [part])]
        if idist.get_rank() or not rows:
            return
        rows = sorted(rows, key=lambda row: row["case"])
        with replacing(self.output_dir / TABLE) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


class Overlays:
    """Writes a picture beside each mask, `NAME_overlay.png`: the image with what was predicted.

    Args:
        output_dir: folder of the masks.
        classes: names of the classes 1 … C.
        enabled: False writes nothing.

    Example:
        >>> Overlays("predictions", ["lesion"], enabled=False).attach(Engine(lambda engine, batch: None))
    """

    def __init__(self, output_dir: str | Path, classes: Sequence[str], enabled: bool = True) -> None:
        self.output_dir = Path(output_dir)
        self.classes = list(classes)
        self.enabled = enabled

    def attach(self, engine: Engine) -> None:
        if self.enabled:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.draw)

    def draw(self, engine: Engine) -> None:
        """Draws the files that have just been predicted."""
        for name, prediction, image in predictions(engine):
            labels = class_indices(prediction).numpy(force=True)
            spacing = None
            if labels.ndim == 2:
                picture = np.moveaxis(read_picture(prediction.meta["filename_or_obj"]), -1, 0)
            else:
                picture = image[0].numpy(force=True)
                affines = [np.asarray(one.affine, float) for one in (prediction, image)]
                turned = on_grid(labels, affines[0], affines[1], picture.shape)
                if turned is None:
                    raise ValueError(f"{name}: image and mask do not lie on one grid")
                labels, spacing = turned, spacing_mm(image)
            path = self.output_dir / f"{name}_overlay.png"
            save_overview(path, picture, labels, None, self.classes, spacing_mm=spacing, title=Path(name).name)


def predictions(engine: Engine) -> Iterator[tuple[str, MetaTensor, MetaTensor]]:
    """Name, prediction and image of the files of an iteration, none where the file could not be read."""
    batches: Any = engine.state.batch
    outputs: Any = engine.state.output
    for batch, output in zip(batches, outputs, strict=False):
        if "pred" in output:
            pred = output["pred"]
            yield str(batch.get("name") or stem(pred.meta["filename_or_obj"])), pred, output["image"]
