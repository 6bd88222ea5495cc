"""A bundle's inference in a program: from a file or an array to labels on the same grid.

Every step is the one of the bundle's `inference` configuration; what is left out is writing files.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import ImageReader, MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose, LoadImaged, SaveImaged

from bundles.description import describe
from bundles.export import trained
from bundles.run import one_line
from evaluation.predictions import class_indices
from transforms import InputError, PictureReader, VolumeReader, expanded, find_files, printable
from transforms.dicom import split_frame

# Settings of the command: files to read and to write. The weights and the image are arguments here.
OF_FILES = (
    *("ckpt_path", "ckpt_dir", "load_pretrain", "dataset_dir", "input", "output_dir", "filepath"),
    *("overlay", "seg_type", "probabilities", "run"),
)
# What a configuration must define.
NEEDED = ("prepared_network", "device", "inferer", "preprocessing", "postprocessing", "dataset::data")

Image = str | os.PathLike | np.ndarray


def load(
    bundle: str | Path, weights: str | Path | Sequence[str | Path], overrides: Mapping[str, Any] | None = None
) -> Predictor:
    """A bundle with trained weights, ready to predict.

    Where the weights' run is known, the settings that decide on the network's input and output are the run's, unless
    they are given. Every tensor must fit. A bundle's configuration is executed: load only those that you trust.

    Args:
        bundle: its name, its folder, or an inference configuration.
        weights: a checkpoint; of several the logits are averaged.
        overrides: settings by name, as on the command line: {"tta": "flips", "device": "cpu"}.

    Raises:
        InputError: when there is no such bundle, setting or file, or the weights do not fit.

    Example:
        >>> import tempfile, networks
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(networks.cmunext().state_dict(), f"{folder}/best.pt")
        ...     predictor = load("cmunext_busi", weights=f"{folder}/best.pt", overrides={"image_size": 32})
        >>> labels = predictor(np.zeros((48, 64), np.uint8))
        >>> labels.shape, labels.dtype, predictor.classes
        ((48, 64), dtype('uint8'), ['background', 'lesion'])
        >>> predictor.probabilities(np.zeros((48, 64, 3), np.uint8)).shape
        (1, 48, 64)
    """
    given = dict(overrides or {})
    if useless := [name for name in given if name in OF_FILES]:
        remedy = "give weights and image as arguments; writing files is the command's"
        raise InputError(f"{useless[0]}: no setting of a predictor", remedy=remedy)
    several = [weights] if isinstance(weights, str | Path) else [*weights]
    files = [expanded(str(file)) for file in several]
    if not files:
        raise InputError("no weights are given", remedy="name a checkpoint, or several")
    with _one_line():
        network, parser = trained(bundle, files if len(files) > 1 else files[0], given)
        return Predictor(network, parser)


class Predictor:
    """Labels and probabilities of one image at a time, as the bundle's `inferring` gives them; made by `load`.

    An image is a path or an array. What lies at the path is one image that `inferring` takes: a file, or the folder of
    a DICOM series. Arrays are pictures in uint8, (H, W) or (H, W, 3) in the order red, green, blue; or volumes
    (X, Y, Z) in Hounsfield units with their affine, as nibabel gives both.

    Threads may share a predictor: their calls are served one after the other.

    Attributes:
        classes: names, the background first; labels are their indices.

    Example:
        See `load`.
    """

    def __init__(self, network: torch.nn.Module, parser: ConfigParser) -> None:
        """From the network with its weights, and the configuration that it comes from."""
        if lacking := [name for name in NEEDED if name not in parser]:
            raise InputError(f"the bundle's inference defines no {lacking[0].replace('::', '#')}")
        self.classes: list[str] = describe(parser)["output"]["classes"]
        # the configuration would load weights by itself
        for name in ("network_def", "trained_network"):
            if name in parser:
                parser[name] = network
        if "inferer::progress" in parser:
            parser["inferer::progress"] = False
        parser["probabilities"] = False
        self._inferer = parser.get_parsed_content("inferer")
        # postprocessing leaves probabilities then, which hold the labels too
        parser["probabilities"] = True
        self._with_probabilities = parser.get_parsed_content("inferer")
        self._network = parser.get_parsed_content("prepared_network").eval()
        self._device = torch.device(parser.get_parsed_content("device"))
        self._files = {name: parser.get_parsed_content(f"dataset::data::{name}") for name in ("suffixes", "dicom")}
        steps = parser.get_parsed_content("preprocessing").transforms
        if not isinstance(steps[0], LoadImaged):
            raise InputError(f"its preprocessing begins with {type(steps[0]).__name__}, expected LoadImaged")
        self._loader, self._preprocessing = steps[0], Compose(steps[1:])
        self._reader = parser.get_parsed_content("preprocessing::transforms::0::reader")
        steps = parser.get_parsed_content("postprocessing").transforms
        self._postprocessing = Compose([step for step in steps if not isinstance(step, SaveImaged)])
        self._lock = threading.Lock()

    def __call__(self, image: Image, affine: np.ndarray | None = None) -> np.ndarray:
        """The class of every pixel or voxel, 0 … C: indices of `classes`.

        Mask files of pictures hold other numbers where there is one class (255) or a `label_map`.

        Args:
            image: a path or an array, see above.
            affine: (4, 4), array index → RAS mm, of an array that is a volume.

        Returns:
            uint8, on the image's own grid: (H, W) as viewers show a picture, (X, Y, Z) as the file stores a volume.

        Raises:
            InputError: when it is no image of this bundle's kind.
        """
        return class_indices(self._predict(image, affine, self._inferer)).numpy(force=True)

    def probabilities(self, image: Image, affine: np.ndarray | None = None) -> np.ndarray:
        """The probability of each class but the background; [0] is that of `classes[1]`.

        Args:
            image: a path or an array, see above.
            affine: (4, 4), array index → RAS mm, of an array that is a volume.

        Returns:
            (C, H, W) float32, or of volumes (C, X, Y, Z) float16, on the image's own grid.

        Raises:
            InputError: when it is no image of this bundle's kind.
        """
        found = self._predict(image, affine, self._with_probabilities)
        # of a volume labels come first, of several classes the background
        return (found if len(found) == 1 else found[1:]).numpy(force=True)

    @torch.no_grad()
    def _predict(self, image: Image, affine: np.ndarray | None, inferer: Any) -> torch.Tensor:
        with self._lock, _one_line():
            item = self._loader(*self._source(image, affine))
            batch = list_data_collate([self._preprocessing(item)])
            batch["pred"] = inferer(batch["image"].to(self._device), self._network)
            (item,) = decollate_batch(batch)
            found = self._postprocessing(item)["pred"]
        return found.as_tensor() if isinstance(found, MetaTensor) else found

    def _source(self, image: Image, affine: np.ndarray | None) -> tuple[dict[str, Any], ImageReader | None]:
        """The item to load, and of an array what reads it."""
        if isinstance(image, np.ndarray):
            return {"image": "array"}, _Array(self._of_array(image, affine))
        if not isinstance(image, str | os.PathLike):
            raise InputError(f"expected a path or a NumPy array, got {type(image).__name__}")
        if affine is not None:
            raise InputError("an affine is given beside a path", path=image, remedy="the file's own is taken")
        path = Path(expanded(os.fspath(image)))
        if not path.exists():
            if split_frame(path)[0].is_file():
                return {"image": str(path)}, None
            raise InputError("no such file", path=path)
        items = find_files(path, **self._files)
        if len(items) > 1:
            first = items[0]["image"]
            remedy = f"give one at a time, {printable(first)} for instance" if isinstance(first, str) else "give one"
            raise InputError(f"holds {len(items)} images", path=path, remedy=remedy)
        return {"image": items[0]["image"]}, None

    def _of_array(self, array: np.ndarray, affine: np.ndarray | None) -> tuple[np.ndarray, dict]:
        if isinstance(self._reader, VolumeReader):
            if affine is None:
                raise InputError("a volume without its affine", remedy="give it: predictor(array, affine)")
            return self._reader.of_array(array, affine)
        if not isinstance(self._reader, PictureReader):
            raise InputError(f"arrays cannot be read by {type(self._reader).__name__}", remedy="give a path")
        if affine is not None:
            raise InputError("a picture has no affine", remedy="give the array alone")
        return self._reader.of_array(array)


class _Array(ImageReader):
    """Gives `LoadImaged` an array and its metadata."""

    def __init__(self, content: tuple[np.ndarray, dict]) -> None:
        super().__init__()
        self.content = content

    def verify_suffix(self, filename: Any) -> bool:
        return True

    def read(self, data: Any, **kwargs: Any) -> tuple[np.ndarray, dict]:
        return self.content

    def get_data(self, img: tuple[np.ndarray, dict]) -> tuple[np.ndarray, dict]:
        return img


@contextmanager
def _one_line() -> Iterator[None]:
    """What a user can mend is an `InputError`, however deep in MONAI it arose."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if line := one_line(error):
            raise InputError(printable(line)) from error
        raise
