"""From files to predictions with MONAI's evaluators: unreadable files among others, volumes slice by slice."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer
from monai.utils import ensure_tuple_rep
from torch import Tensor
from tqdm import tqdm

from transforms import InputError, error_chain, printable, spline_zoom

logger = logging.getLogger(__name__)

# So many files are named in one line.
NAMED = 10


def to_labels(logits: Tensor) -> Tensor:
    """Class of every pixel, (N, C, H, W) logits → (N, 1, H, W) uint8.

    Several channels: arg-max. One channel: 1 where its sigmoid exceeds 0.5.

    Example:
        >>> to_labels(torch.tensor([-3.0, 2.0]).reshape(1, 1, 1, 2)).tolist()
        [[[[0, 1]]]]
        >>> to_labels(torch.tensor([0.5, 2.0, 1.0]).reshape(1, 3, 1, 1)).item()
        1
    """
    # max, not argmax: the same indices, several times faster on a CPU.
    labels = logits > 0 if logits.shape[1] == 1 else logits.max(1, keepdim=True).indices
    return labels.to(torch.uint8)


class SliceToVolume(Inferer):
    """Segments a volume slice by slice: zoom to the network's size, network, arg-max, zoom back.

    Called with a volume (B, C, D, H, W) and a network for (N, C, H', W') → (N, K, H', W'), it returns the label map
    (B, 1, D, H, W), uint8, with the volume's meta data; with `output="logits"` it returns the logits (B, K, D, H', W')
    at the network's size; with `output="probabilities"` (B, 1 + C, D, H, W) in float16: the label map, and behind it
    the probabilities of the classes without the background, zoomed back linearly. `D` stands for the axis that is
    sliced. The label map equals the published loop over slices with `scipy.ndimage.zoom`, order 3 for the image and
    order 0 for the label (TransUNet's and VM-UNet's evaluation).

    Slices go to the network in batches and come back as labels: beside the volume itself only one batch is held in
    float32. Arg-max comes before the zoom back for the same reason: nine classes of a 150×512×512 volume are 1.4 GB.

    Args:
        spatial_size: (H', W') the network works at, or one number for both. Slices of that size are not zoomed; None
            never zooms.
        batch_size: slices per network call.
        spatial_dim: the axis of the volume that is sliced: 0, 1 or 2 of (D, H, W).
        output: "labels", "logits" or "probabilities".
        device: where zoom and network run; by default where the network's first parameter is. The result is on the
            volume's device.
        progress: show a bar over the slices.

    Raises:
        ValueError: when an argument is none of these.

    Example:
        >>> inferer = SliceToVolume(spatial_size=(8, 6), batch_size=2)
        >>> inferer(torch.rand(1, 1, 5, 12, 10), torch.nn.Conv2d(1, 3, 1)).shape
        torch.Size([1, 1, 5, 12, 10])
    """

    def __init__(
        self,
        spatial_size: Sequence[int] | int | None = (224, 224),
        batch_size: int = 16,
        spatial_dim: int = 0,
        output: str = "labels",
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        if output not in ("labels", "logits", "probabilities"):
            raise ValueError(f'output must be "labels", "logits" or "probabilities", not {output!r}')
        if spatial_dim not in (0, 1, 2):
            raise ValueError(f"spatial_dim must be 0, 1 or 2, not {spatial_dim}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.spatial_size = None if spatial_size is None else ensure_tuple_rep(spatial_size, 2)
        self.batch_size = batch_size
        self.spatial_dim = spatial_dim
        self.output = output
        self.device = device
        self.progress = progress

    @torch.no_grad()
    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The label map or the logits of a volume; further arguments go to the network.

        Raises:
            ValueError: when the input is no volume (B, C, D, H, W).
        """
        if inputs.ndim != 5 or inputs.numel() == 0:
            raise ValueError(f"SliceToVolume takes volumes (B, C, D, H, W), not shape {tuple(inputs.shape)}")
        axis = self.spatial_dim + 2
        volumes = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        stack = volumes.movedim(axis, 1)  # (B, D, C, H, W), a view
        size = stack.shape[-2:]
        device = self._compute_device(network, volumes)
        result, done = torch.empty(0), 0
        slices = stack.shape[0] * stack.shape[1]
        with tqdm(
            desc="Volume", total=slices, unit="slice", leave=False, disable=None if self.progress else True
        ) as bar:
            for batch in (part for volume in stack for part in volume.split(self.batch_size)):  # (n, C, H, W)
                zoomed = spline_zoom(batch.to(device, torch.float32), self.spatial_size or size, order=3)
                out = network(zoomed, *args, **kwargs)
                if self.output != "logits":
                    labels = torch.as_tensor(spline_zoom(to_labels(out), size, order=0))
                    out = _with_probabilities(labels, out) if self.output == "probabilities" else labels
                if not done:
                    # whole at once: joining batches at the end would take twice the memory
                    result = torch.empty((slices, *out.shape[1:]), dtype=out.dtype, device=volumes.device)
                result[done : done + len(out)] = out
                done += len(out)
                bar.update(len(batch))
        result = result.unflatten(0, stack.shape[:2]).movedim(1, axis)
        if self.output == "logits" or not isinstance(inputs, MetaTensor):
            return result
        return MetaTensor(result).copy_meta_from(inputs)

    def _compute_device(self, network: Callable[..., Tensor], volumes: Tensor) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        parameters = network.parameters() if isinstance(network, torch.nn.Module) else iter(())
        return next((parameter.device for parameter in parameters), volumes.device)


def _with_probabilities(labels: Tensor, logits: Tensor) -> Tensor:
    """(N, 1 + C, H, W) float16: labels and, at their size, the probabilities of all classes but the background."""
    logits = logits.float()
    probabilities = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)[:, 1:]
    zoomed = torch.as_tensor(spline_zoom(probabilities, labels.shape[-2:], order=1))
    return torch.cat([labels, zoomed.clamp(0, 1)], dim=1).to(torch.float16)


class ItemOrReason:
    """A transform of one item or, where the item's file is at fault, the reason: {"failure": line, "file": file}.

    `FileEvaluator` expects such items. The DataLoader must have a batch size of 1.

    Args:
        transform: what reads the item.

    Example:
        >>> def read(item):
        ...     raise InputError("no such file", path=item["image"])
        >>> ItemOrReason(read)({"image": "a.png"})
        {'failure': 'a.png: no such file', 'file': 'a.png'}
    """

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, item: Any) -> Any:
        try:
            return self.transform(item)
        except Exception as error:
            if reason := _of_file(error, item):
                return {"failure": reason, "file": file_of(item) or "a file"}
            raise


class FileEvaluator(SupervisedEvaluator):
    """MONAI's `SupervisedEvaluator` for files: one that cannot be read or scored does not stop the rest.

    Handlers see no output for such a file, `[]`; MONAI's own metrics cannot take that. `failures` says of each why. At
    the end `run` raises, naming them; what handlers have written by then stays.

    Example:
        >>> loader = torch.utils.data.DataLoader([{"failure": "a.png: no such file", "file": "a.png"}])
        >>> FileEvaluator("cpu", loader, torch.nn.Identity()).run()
        Traceback (most recent call last):
        transforms.files.InputError: a.png: no such file
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.failures: dict[str, str] = {}

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Predicts all files.

        Raises:
            InputError: when some failed, naming them.
        """
        self.failures.clear()
        super().run(global_epoch)
        files = self.state.iteration
        if idist.get_world_size() > 1:
            gathered: Any = idist.all_gather((self.failures, files))
            # rank 0 speaks for all
            self.failures = {file: why for one, _ in gathered for file, why in one.items() if idist.get_rank() == 0}
            files = sum(count for _, count in gathered)
        if not self.failures:
            return
        count = f"{len(self.failures)} of {files} files failed"
        reasons = list(self.failures.values())
        if len(reasons) == 1:
            raise InputError(reasons[0] if files == 1 else f"{count}: {reasons[0]}")
        for reason in reasons:
            logger.error(reason)
        names = [printable(Path(file).name) for file in self.failures]
        rest = ", …" if len(names) > NAMED else ""
        raise InputError(f"{count}: {', '.join(names[:NAMED])}{rest}", remedy="the lines above say why")

    def refuse(self, error: Exception, item: Any) -> bool:
        """True, and noted, where an error is the fault of the item's file."""
        reason = _of_file(error, item)
        if reason:
            self.failures[file_of(item) or reason] = reason
        return bool(reason)

    def _iteration(self, engine: Any, batchdata: Any) -> Any:
        if "failure" in batchdata:
            self.failures.update(zip(batchdata["file"], batchdata["failure"], strict=True))
            return []
        try:
            return super()._iteration(engine, batchdata)
        except Exception as error:
            if self.refuse(error, batchdata):
                return []
            raise


def file_of(item: Mapping[str, Any]) -> str | None:
    """The file that an image, label or prediction came from, or is yet to be read from, of the first that knows it.

    Example:
        >>> file_of({"label": MetaTensor(torch.zeros(1), meta={"filename_or_obj": "case1.png"})})
        'case1.png'
        >>> file_of({"image": "case1.png"})
        'case1.png'
    """
    for key in ("image", "label", "pred"):
        value = item.get(key)
        file = value.meta.get("filename_or_obj") if isinstance(value, MetaTensor) else value
        # a batch has several, and so has a series
        file = file[0] if isinstance(file, list) and file else file
        if isinstance(file, str | os.PathLike) and str(file):
            return str(file)
    return None


def _of_file(error: BaseException | None, item: Any) -> str:
    """What to say where the error is one of the item's file: the `InputError` behind it, or that memory is too small.

    Empty where it is a fault of the program.
    """
    for one in error_chain(error):
        if isinstance(one, InputError):
            return str(one)
        # PyTorch says so by a RuntimeError
        if isinstance(one, MemoryError) or re.search(r"out of memory|can't allocate memory", str(one)):
            name = file_of(item) or "a file"
            return str(InputError("there is not enough memory for it", path=name, remedy="give a smaller --image_size"))
    return ""
