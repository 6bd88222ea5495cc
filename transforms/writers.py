"""From probabilities to pictures."""

import os
from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from PIL import Image

__all__ = ["SaveMasks", "SaveMasksd"]


class SaveMasks(Transform):
    """Writes the mask of a picture as `NAME_mask.png`, NAME being the picture's without suffix.

    Args:
        output_dir: folder of the masks, made if need be.
        label_map: {stored number: class} of the data set, in whose numbers masks are written (the first one listed for
            a class). None writes one class as 0 and 255 and several as their indices.
        probabilities: also write `NAME_probability.png`, 0 … 255, or one for each class but the background.
    """

    def __init__(
        self, output_dir: str | Path, label_map: Mapping[int, int] | None = None, probabilities: bool = False
    ) -> None:
        self.output_dir = Path(output_dir)
        self.numbers = {index: number for number, index in reversed(dict(label_map or {}).items())}
        self.probabilities = probabilities

    def __call__(self, img: MetaTensor) -> MetaTensor:
        """Saves the probabilities (K, H, W) of a picture: one channel is cut at 0.5, of several the largest wins."""
        stem = Path(str(img.meta["filename_or_obj"])).stem
        values = img.as_tensor().cpu().numpy()
        indices = (values[0] > 0.5).astype(int) if len(values) == 1 else values.argmax(0)
        numbers = self.numbers or ({1: 255} if len(values) == 1 else {})
        stored = [numbers.get(index, index) for index in range(max(len(values), 2))]
        self._save(np.array(stored, np.min_scalar_type(max(stored)))[indices], f"{stem}_mask.png")
        if self.probabilities:
            foreground = values if len(values) == 1 else values[1:]
            for index, channel in enumerate(foreground, 1):
                number = f"_{index}" if len(foreground) > 1 else ""
                self._save((255 * channel).round().astype(np.uint8), f"{stem}_probability{number}.png")
        return img

    def _save(self, array: np.ndarray, name: str) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        temporary = self.output_dir / f".{name}.{os.getpid()}"
        try:
            Image.fromarray(array).save(temporary, format="PNG")
            os.replace(temporary, self.output_dir / name)
        finally:
            temporary.unlink(missing_ok=True)


class SaveMasksd(MapTransform):
    """Dictionary version of `SaveMasks`."""

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | Path,
        label_map: Mapping[int, int] | None = None,
        probabilities: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.save = SaveMasks(output_dir, label_map, probabilities)

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.save(result[key])
        return result
