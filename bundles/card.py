"""`python -m bundles card`: the README of a packed bundle, in the model zoo's order, its numbers from an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.intervals import FEW_CASES, Mean, MeanOfClasses
from evaluation.results import SUMMARY_FILE, read_summary
from evaluation.scores import Protocol, Summary
from networks.training import Origin
from transforms import InputError

# The numbers of a report that are given, of each protocol.
SHOWN = {
    "per image": ("iou", "dice", "sensitivity", "specificity"),
    "pooled": ("iou", "dice"),
    "surface": ("hd95_px", "surface_dice"),
    "strict": ("dice", "hd95", "surface_dice"),
    "paper": ("dice", "hd95"),
}
TITLES = {
    "iou": "IoU %", "dice": "Dice %", "sensitivity": "sensitivity %", "specificity": "specificity %",
    "surface_dice": "surface Dice %", "hd95_px": "HD95 pixels",
}  # fmt: skip
KEYWORDS = {"US": "ultrasound", "CT": "computed tomography", "dermoscopy": "dermoscopy"}


@dataclass(frozen=True)
class Report:
    """An evaluation of the weights that a card is of, or none.

    Args:
        summary: what `evaluating` wrote.
        source: where it lies, or why there is none.
    """

    summary: Summary | None
    source: str

    def eval_metrics(self) -> dict[str, float]:
        """Its means over cases as one level of names, ratios as fractions; {} without an evaluation.

        Example:
            >>> Report(None, "none").eval_metrics()
            {}
        """
        if self.summary is None:
            return {}
        found: dict[str, float] = {"cases": self.summary.cases}
        for name, protocol in self.summary.protocols.items():
            for metric in (metric for metric in SHOWN.get(name, ()) if metric in protocol.mean):
                values = protocol.mean[metric]
                unit = f"_{protocol.distance_unit}" if metric == "hd95" else ""
                key = f"{name.replace(' ', '_')}_{metric}{unit}"
                numbers = {key: values.mean, f"{key}_low": values.low, f"{key}_high": values.high}
                found |= {key: value for key, value in numbers.items() if value is not None}
        return found


def read_report(folder: str | Path | None, weights: str | Path, bundle: Path) -> Report:
    """The report of an evaluation of these weights.

    Args:
        folder: where `evaluating` wrote it; "none" for none. Where it is not given, `eval` beside the weights, their
            own folder and the bundle's `eval` are looked into.
        weights: a checkpoint.
        bundle: the bundle's folder.

    Raises:
        InputError: when the report cannot be read, or is not of these weights.
    """
    if folder == "none":
        return Report(None, "none, as asked for")
    beside = Path(weights).resolve().parent
    places = [Path(folder)] if folder else [beside / "eval", beside, bundle / "eval"]
    place = next((place for place in places if folder or (place / SUMMARY_FILE).is_file()), None)
    if place is None:
        return Report(None, f"none: no {SUMMARY_FILE} in {', '.join(map(str, places))}; --report names a folder")
    summary = read_summary(place)
    file, remedy = place / SUMMARY_FILE, "run `evaluating` with these weights, or give --report none"
    if not summary.weights.get("sha256"):
        raise InputError("does not say which weights it is of", path=file, remedy=remedy)
    now = Origin(weights).weights
    if summary.weights["sha256"] != now["sha256"]:
        same = now["run"] and summary.weights.get("run") == now["run"]
        which = "other weights of the same run" if same else "other weights"
        raise InputError(f"is of {which} than {weights}", path=file, remedy=remedy)
    return Report(summary, str(file))


def front_matter(metadata: Mapping[str, Any]) -> str:
    """What Hugging Face reads at the head of a README.

    Example:
        >>> print(front_matter({"network_data_format": {"inputs": {"image": {"modality": "US"}}}}))
        ---
        license: apache-2.0
        library_name: monai
        pipeline_tag: image-segmentation
        tags:
        - monai
        - medical
        - ultrasound
        ---
        <BLANKLINE>
    """
    tags = "".join(f"- {tag}\n" for tag in ("monai", "medical", *_keywords(metadata)))
    head = "license: apache-2.0\nlibrary_name: monai\npipeline_tag: image-segmentation\n"
    return f"---\n{head}tags:\n{tags}---\n"


def card(
    metadata: Mapping[str, Any],
    about: Mapping[str, Any],
    report: Report,
    run: Mapping[str, Any],
    scans: bool = False,
) -> str:
    """The README of a pack.

    Args:
        metadata: of the bundle.
        about: what `bundles.description.describe` says of it.
        report: the evaluation.
        run: what `run.json` says of the weights; {} where it is not known.
        scans: the network has selective scans.
    """
    references: Sequence[str] = metadata.get("references") or ()
    sections = {
        f"# {metadata['name']}": "",
        "## Authors": metadata["authors"],
        "## Tags": ", ".join(["segmentation", *_keywords(metadata)]),
        "## Model Description": "\n".join(_model(metadata, about, run)),
        "## Data": "\n".join(_data(metadata, run)),
        "### Preprocessing": "\n".join(f"{number}. {step}" for number, step in enumerate(_steps(about["input"]), 1)),
        "## Performance": "\n".join(_performance(report)),
        "## Additional Usage Steps": _usage(about, scans),
        "## System Configuration": _system(metadata),
        "## Limitations": _limitations(metadata, about, report),
        "## Citation Info": f"{references[0]}\n" if references else "None is given.",
        "## References": "\n".join(f"{number}. {text}" for number, text in enumerate(references, 1)),
    }
    return "\n\n".join(f"{title}\n\n{text}".strip() for title, text in sections.items()) + "\n"


def _keywords(metadata: Mapping[str, Any]) -> list[str]:
    image: Mapping[str, Any] = next(iter(metadata["network_data_format"]["inputs"].values()))
    return [word for word in [KEYWORDS.get(image.get("modality", ""), "")] if word]


def _model(metadata: Mapping[str, Any], about: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[str]:
    output = about["output"]
    yield f"{metadata['task']}. {metadata['description']}\n"
    coding = "a logit, above 0 for" if output["coding"] == "sigmoid" else "logits, the highest of which is one of"
    channels, size = about["input"]["channels"], " × ".join(map(str, about["input"]["size"]))
    yield f"- Input: {channels} channel{'s' * (channels != 1)}, any height and width, trained at {size}."
    yield f"- Output: for each pixel {coding}: {', '.join(output['classes'][output['coding'] == 'sigmoid' :])}."
    stored = ", ".join(f"{number} {name}" for name, number in output["stored"].items())
    yield f"- Masks hold: {stored}."
    if run:
        yield f"- Weights: run {str(run['id'])[:8]} of {run['network']}, started {str(run['started'])[:10]}."
        yield f"- Selected by: {run['selection']}."
    else:
        yield "- Weights: of unknown origin, they name no run."


def _data(metadata: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[str]:
    yield f"The bundle is made for: {metadata['data_source']}."
    parts = {part: len(items) for part, items in (run.get("data") or {}).items()}
    if parts:
        listed = ", ".join(f"{count} {part}" for part, count in parts.items())
        yield f"The run of these weights had so many items: {listed}."
    if note := run.get("data_note"):
        yield f"**What they were trained on: {note}.**"
    yield "The data are not part of the bundle; `docs/data_license.txt` says where they come from."


def _steps(about: Mapping[str, Any]) -> Iterator[str]:
    for step in about["steps"]:
        more = [f"{name.replace('_', ' ')} {_text(value)}" for name, value in step.items() if name != "step"]
        yield f"{step['step']}{': ' if more else ''}{', '.join(more)}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, list) else str(value)


def _performance(report: Report) -> Iterator[str]:
    summary = report.summary
    if summary is None:
        yield "These weights have not been evaluated, or the evaluation was not given."
        return
    if summary.data:
        yield f"**The numbers are of demo data: {summary.data}. They say nothing of patients.**\n"
    cases = f"{summary.cases} case{'s' * (summary.cases != 1)}"
    yield f"Evaluated on {cases} of the test part. Model selected by: {summary.selection}."
    if summary.failures:
        yield f"{len(summary.failures)} more could not be scored."
    if summary.postprocess != "none":
        yield f"Post-processed: of each predicted class the {summary.postprocess} connected component."
    yield "In brackets the 95 % interval of the mean over the cases (BCa bootstrap, 10 000 resamples, fixed seed)."
    if summary.cases < FEW_CASES:
        yield f"With fewer than {FEW_CASES} cases such intervals are too narrow."
    for name, protocol in summary.protocols.items():
        metrics = [metric for metric in SHOWN.get(name, ()) if metric in protocol.mean]
        if metrics:
            yield from _table(name, protocol, metrics, summary.classes)


def _table(name: str, protocol: Protocol, metrics: Sequence[str], classes: Sequence[str]) -> Iterator[str]:
    yield f"\n**{name}**: {protocol.rules}.\n"
    titles = [TITLES.get(metric, f"HD95 {protocol.distance_unit}") for metric in metrics]
    yield f"| class | {' | '.join(titles)} |"
    yield f"|---|{'---|' * len(metrics)}"
    for structure in classes:
        cells = [_cell(protocol.classes[structure].metrics[metric], metric) for metric in metrics]
        yield f"| {structure} | {' | '.join(cells)} |"
    if len(classes) > 1:
        yield f"| mean of classes | {' | '.join(_cell(protocol.mean[metric], metric) for metric in metrics)} |"


def _cell(values: Mean | MeanOfClasses, metric: str) -> str:
    if values.mean is None:
        return "n/a"
    factor = 1 if metric.startswith("hd95") else 100
    ends = values.low is not None and values.high is not None
    interval = f" [{values.low * factor:.2f}, {values.high * factor:.2f}]" if ends else ""  # type: ignore[operator]
    count = f", N {values.n}" if isinstance(values, Mean) and values.n else ""
    return f"{values.mean * factor:.2f}{interval}{count}"


SCAN = """
- On a CPU the network's selective scan runs in plain PyTorch, many times slower than natively, until its kernel is
  built; a run says so: `cd scripts/pack_* && python setup.py build_ext --inplace`, with setuptools and gcc or clang.
  On an NVIDIA GPU it takes `mamba-ssm` where that is installed, or Triton."""


def _usage(about: Mapping[str, Any], scans: bool) -> str:
    kind = "picture" if any(step.get("kind") == "picture" for step in about["input"]["steps"]) else "volume"
    return f"""From any folder, with the packages below; BUNDLE is this folder.
```
python -m monai.bundle run inferring --config_file BUNDLE/configs/inference.json --input PATH --output_dir DIR
python -m monai.bundle run evaluating --dataset_dir DATA \\
    --config_file "['BUNDLE/configs/train.json','BUNDLE/configs/evaluate.json']"
python -m monai.bundle run training --config_file BUNDLE/configs/train.json --dataset_dir DATA
torchrun --standalone --nproc_per_node=2 -m monai.bundle run training --dataset_dir DATA \\
    --config_file "['BUNDLE/configs/train.json','BUNDLE/configs/multi_gpu_train.json']"
```
PATH is a {kind} or a folder of them. `evaluating` refuses images that the weights were trained on, and asks for
`--force true` for others than their run had meant to be tested on. `training` moves the weights of before aside, into
`models/earlier-1`; `--ckpt_dir` and `--output_dir` name other folders.

- `models/model.pt`, `model.safetensors`: the state_dict of `network_def`.
- `models/model.ts`, `model.onnx`: programs with open batch, height and width, which need nothing of this folder; they
  hold `description.json`, what a program must know to use them.
- `monai.bundle.load("NAME_OF_THE_FOLDER", bundle_dir="…")` gives the network, `sha256sum -c SHA256SUMS` checks the
  files.
- MONAI Label and MONAI Deploy take the folder: `network_def` and `network` load `model.pt`; where they leave saving
  out, the result of the postprocessing is the class of every {"pixel" if kind == "picture" else "voxel"}. To train, use
  the command above: the parts of the data come from `--dataset_dir`.
- DICOM takes three more packages: `pip install highdicom pylibjpeg pylibjpeg-openjpeg`.{SCAN if scans else ""}"""


def _system(metadata: Mapping[str, Any]) -> str:
    versions = {"monai": metadata["monai_version"], "torch": metadata["pytorch_version"]}
    versions |= {"numpy": metadata["numpy_version"], **metadata["required_packages_version"]}
    listed = " ".join(f"{name}=={version}" for name, version in versions.items())
    return f"Python 3.11 or newer, on a CPU or an NVIDIA GPU.\n```\npip install {listed}\n```"


def _limitations(metadata: Mapping[str, Any], about: Mapping[str, Any], report: Report) -> str:
    lines = [f"{metadata['intended_use']}. It is no medical device."]
    if report.summary is None:
        lines.append("Nothing is known of how well these weights do.")
    elif report.summary.data:
        lines.append("What is known of these weights is from demo data alone.")
    lines.append("Images of other devices, populations and findings than it was trained on may be segmented badly.")
    return "\n".join(lines)
