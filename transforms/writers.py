"""From probabilities to pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from monai.config import KeysCollection, NdarrayOrTensor, PathLike
from monai.data import MetaTensor
from monai.transforms import SaveImage, SaveImaged
from monai.utils import convert_to_numpy
from PIL import Image

from transforms.files import replacing, stem


class SaveImageMask(SaveImage):
    """Writes the mask of a picture as `NAME_mask.png`, NAME being the picture's without suffix.

    The mask of one class is its probability cut at 0.5; of several classes the most probable wins. MONAI's tools know
    the step by its base class; its other options have no effect.

    Args:
        output_dir: folder of the masks, made if need be.
        label_map: {stored number: class}: masks hold the first number listed for a class. None writes one class as 0
            and 255, several as their indices.
        probabilities: also write `NAME_probability.png`, 0 … 255; with several classes one file for each but the
            background, `NAME_probability_1.png` …

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = SaveImageMask(folder)(np.full((1, 2, 2), 0.7), {"filename_or_obj": "images/a.jpg"})
        ...     np.asarray(Image.open(Path(folder) / "a_mask.png")).tolist()
        [[255, 255], [255, 255]]
    """

    def __init__(
        self, output_dir: PathLike, label_map: Mapping[int, int] | None = None, probabilities: bool = False
    ) -> None:
        super().__init__(output_dir, "mask", ".png", np.uint8, separate_folder=False, print_log=False)
        self.output_dir = Path(output_dir)
        self.numbers = {index: number for number, index in reversed(dict(label_map or {}).items())}
        self.probabilities = probabilities

    def __call__(
        self, img: NdarrayOrTensor, meta_data: Mapping | None = None, filename: PathLike | None = None
    ) -> NdarrayOrTensor:
        """Writes the files and returns `img`.

        Args:
            img: probabilities (K, H, W): one channel for one class, otherwise the background first.
            meta_data: has the picture's name as "filename_or_obj"; a MetaTensor brings its own.
            filename: folder and NAME to use instead.
        """
        meta = img.meta if isinstance(img, MetaTensor) else meta_data
        path = Path(filename or self.output_dir / stem(self.fname_formatter(meta, self)["subject"]))
        values = convert_to_numpy(img)
        indices = (values[0] > 0.5).astype(int) if len(values) == 1 else values.argmax(0)
        numbers = self.numbers or ({1: 255} if len(values) == 1 else {})
        stored = [numbers.get(index, index) for index in range(max(len(values), 2))]
        _save(np.array(stored, np.min_scalar_type(max(stored)))[indices], path, "mask")
        if self.probabilities:
            foreground = values if len(values) == 1 else values[1:]
            for index, channel in enumerate(foreground, 1):
                number = f"_{index}" if len(foreground) > 1 else ""
                _save((255 * channel).round().astype(np.uint8), path, f"probability{number}")
        self._data_index += 1
        return img


class SaveImageMaskd(SaveImaged):
    """Dictionary version of `SaveImageMask`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pred = MetaTensor(np.zeros((3, 2, 2)), meta={"filename_or_obj": "a.png"})
        ...     _ = SaveImageMaskd("pred", folder)({"pred": pred})
        ...     [file.name for file in Path(folder).iterdir()]
        ['a_mask.png']
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | Path,
        label_map: Mapping[int, int] | None = None,
        probabilities: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, output_dir=output_dir, allow_missing_keys=allow_missing_keys)
        self.saver = SaveImageMask(output_dir, label_map, probabilities)


def _save(array: np.ndarray, path: Path, what: str) -> None:
    with replacing(path.with_name(f"{path.name}_{what}.png")) as temporary:
        Image.fromarray(array).save(temporary)
