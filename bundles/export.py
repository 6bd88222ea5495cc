"""From a run's trained network to files for others."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

from monai.bundle import ConfigParser
from monai.data import save_net_with_metadata
from monai.networks import convert_to_torchscript
from torch import nn

from bundles.run import running_workflow
from transforms import InputError, check_output, replacing

logger = logging.getLogger(__name__)


def export_torchscript(network: nn.Module, filepath: str | Path) -> None:
    """Writes the network of the run with its weights as TorchScript, with the configuration and metadata.json in it.

    Unlike MONAI's `ckpt_export` it takes a network whose weights have been checked, and the overrides of the run are in
    the configuration that it stores. `monai.data.load_net_with_metadata` reads all three.

    Args:
        network: the bare network.
        filepath: ends in `.ts`; the folder is made if need be.

    Raises:
        InputError: when it ends in something else, a checkpoint's name for instance, or cannot be written.
    """
    workflow = running_workflow()
    config = dict(workflow.parser.get()) if workflow else {}
    metadata = config.pop(ConfigParser.meta_key, {})
    # where the bundle lies is known to a run only; the file may be opened anywhere
    config["bundle_root"] = "."
    path = Path(filepath)
    if path.suffix != ".ts" or path.is_dir():
        raise InputError("a TorchScript program is called NAME.ts", path=path, remedy="give such a --filepath")
    check_output(path.parent)
    # in memory first: PyTorch's writer aborts the process on a full disk
    content = io.BytesIO()
    save_net_with_metadata(
        convert_to_torchscript(network),
        content,
        meta_values=metadata,
        more_extra_files={"inference.json": json.dumps(config).encode()},
    )
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())
    logger.info(f"exported to {path.resolve()}")
