"""Every input that the entrances are tried with: one change to one world, and what must come of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.broken import arrays, nifti, pictures, texts, weights
from tests.broken.changes import (
    ANY,
    EITHER,
    FAILS,
    REFUSED,
    SAID,
    SAME,
    Change,
    Expected,
    any_file,
    damage,
    expecting,
    without,
)
from tests.broken.worlds import BENIGN, WORLDS, World


@dataclass(frozen=True)
class Input:
    """One broken input.

    Args:
        world: the good files, and the command that reads them.
        name: what is changed.
        edit: changes the world's folder.
        expected: what must come of it.
        named: words of which the line must hold one.
        words: the command line.
        kind: what the change is of, such as "png"; a sample takes some of each.
        others: how the results of the other files are called, such as "a_mask.png" and "metrics.csv a".
        unprivileged: must not run as root.
        renamed: {part of a name in the good result: the same part in this one}.
    """

    world: World
    name: str
    edit: Callable[[Path], None]
    expected: Expected
    named: tuple[str, ...]
    words: tuple[str, ...]
    kind: str
    others: tuple[str, ...] = ()
    unprivileged: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.world.name} / {self.name}"


def of_file(
    world: str, path: str, case: str, kind: str, made: Iterable[Change], others: Sequence[str] = (), partner: str = ""
) -> Iterator[Input]:
    """One input for each change of the file at `path`.

    Args:
        world: name of the world.
        path: of the file in it.
        case: what a line may name where the file itself is gone.
        kind: see `Input`.
        made: the changes.
        others: see `Input`; where the file is gone, the command does not begin.
        partner: a file's name; where two do not fit each other, a line may name either.
    """
    for change in made:

        def edit(place: Path, change: Change = change) -> None:
            change.edit(place / path)

        folder = Path(path).parent.as_posix()
        named = (Path(path).name, *change.also, *((case, folder) if change.gone and len(folder) > 3 else ()))
        named += (partner,) if partner else ()
        # what is only counted is called by its case
        named += (case,) if change.expected is SAID else ()
        yield Input(
            WORLDS[world], f"{path}: {change.name}", edit, change.expected, named, WORLDS[world].words, kind,
            tuple(others) if change.unprivileged or not change.gone else (), change.unprivileged,
        )  # fmt: skip


def _replaced(words: Sequence[str], option: str, values: Sequence[str]) -> tuple[str, ...]:
    """The command line with another value of an option, or with one option more."""
    flag = f"--{option}"
    if flag not in words:
        return (*words, flag, *values)
    start = words.index(flag) + 1
    end = next((index for index in range(start, len(words)) if words[index].startswith("--")), len(words))
    return (*words[:start], *values, *words[end:])


def of_options(world: str, options: Iterable[tuple[str, str | Sequence[str], Expected]]) -> Iterator[Input]:
    """One input for each (option, value or values, expectation)."""
    for option, value, expected in options:
        values = [value] if isinstance(value, str) else list(value)
        words = _replaced(WORLDS[world].words, option, values)
        # a nested key by its last part, a file by its name, a class or a setting by its word, an empty path as a dot
        parts = {word for value in values for word in re.findall(r"[\w.]+", value) if len(word) > 3}
        parts |= {Path(folder).name for value in values for folder in (value, Path(value).parent)}
        named = (
            option,
            option.rpartition("#")[2],
            option.replace("-", "_"),
            *(value for value in values if len(value) > 3),
            *([] if all(values) else ["."]),
            *filter(None, parts),
        )
        name = f"--{option} {' '.join(values)}".strip()
        yield Input(WORLDS[world], name, lambda folder: None, expected, named, words, "option")  # fmt: skip


def of_words(
    world: str,
    name: str,
    words: Sequence[str],
    named: Sequence[str],
    edit: Callable[[Path], None] = lambda folder: None,
    expected: Expected = REFUSED,
) -> Iterator[Input]:
    """One input with another command line."""
    yield Input(WORLDS[world], name, edit, expected, tuple(named), tuple(words), "option")


# What shells, patterns, MONAI's configurations and matplotlib's formulas stumble over.
NAMES = (
    "2018", "a b", "a#1", "100%", "%a", "@home", "a@b", "cost $5$", "$x_$", "Läsion ö", "a'b", 'a"b', "a,b;c", "[a]",
    "{a}", "a:b", "-a", "--a", "=", "~", "*", "a\\b", "a\nb", "None", "true", "1e5", "a.b",
)  # fmt: skip


def of_names(world: str, files: Mapping[str, str], parts: Sequence[str]) -> Iterator[Input]:
    """One input for each odd name, which must not change a result.

    Args:
        world: name of the world.
        files: {path: the same path with `{}` for the name}.
        parts: what stands for the name in the good result.
    """
    for name in NAMES:

        def edit(folder: Path, name: str = name) -> None:
            for old, new in files.items():
                (folder / old).rename(folder / new.replace("{}", name))

        renamed = dict.fromkeys(parts, name)
        words = WORLDS[world].words
        yield Input(
            WORLDS[world],
            f"a file called {name!r}",
            edit,
            EITHER,
            (name, repr(name)[1:-1]),
            words,
            "name",
            (),
            False,
            renamed,
        )


def of_folders(world: str, option: str, folder: str) -> Iterator[Input]:
    """One input for each odd name of a folder that is typed as an option."""
    for name in NAMES:

        def edit(place: Path, name: str = name) -> None:
            (place / folder).rename(place / name)

        flag = WORLDS[world].words.index(f"--{option}")
        words = list(WORLDS[world].words)
        words[flag + 1] = words[flag + 1].replace(folder, name, 1)
        # what fire takes for an option of its own never reaches us
        if not name.startswith("-"):
            named = (name, repr(name)[1:-1], option)
            # a macro of MONAI's
            expected = FAILS if name.startswith("%") and not world.startswith("prepare") else EITHER
            yield Input(WORLDS[world], f"--{option} {name!r}", edit, expected, named, tuple(words), "name")


def _prepare() -> Iterator[Input]:
    image, mask = (f"raw/benign/{BENIGN}{suffix}.png" for suffix in ("", "_mask"))
    yield from of_file("prepare busi", image, BENIGN, "png", [*pictures.png(), *pictures.size_of_a_pair()],
                       partner=f"{BENIGN}_mask.png")  # fmt: skip
    drawn = [*pictures.png(), *pictures.size_of_a_pair(), *pictures.masks()]
    yield from of_file("prepare busi", mask, BENIGN, "mask", drawn)
    second = "benign (2)"
    yield from of_file("prepare busi: lists", "lists/busi_train1.txt", "busi_train1", "list", texts.lists(second, SAID))
    photo, partner = "raw/ISIC-2017_Training_Data/ISIC_0000001.jpg", "ISIC_0000001_segmentation.png"
    yield from of_file("prepare isic", photo, "ISIC_0000001", "jpg", pictures.jpg(), partner=partner)
    yield from of_file("prepare isic: resized", photo, "ISIC_0000001", "jpg", pictures.jpg(), partner=partner)
    truth = "raw/ISIC-2017_Training_Part1_GroundTruth/ISIC_0000001_segmentation.png"
    yield from of_file("prepare isic", truth, "ISIC_0000001", "mask", drawn)
    volume = [*nifti.nifti_gz(), *nifti.ct_values(), *nifti.pair_geometry()]
    yield from of_file(
        "prepare synapse", "raw/img/img0005.nii.gz", "0005", "nii.gz", volume, partner="label0005.nii.gz"
    )
    label = [*nifti.nifti_gz(), *nifti.pair_geometry(), *nifti.label_values(13)]
    # colours are refused, and no number of a label can be outside of 16 bits
    yield from of_file("prepare synapse", "raw/label/label0005.nii.gz", "0005", "nii.gz", label)
    yield from of_file("prepare synapse: nii", "raw/img/img0001.nii", "0001", "nii", nifti.nifti_plain())
    yield from of_file("prepare synapse: nii", "raw/label/label0001.nii", "0001", "nii", nifti.nifti_plain())


def _train_and_evaluate() -> Iterator[Input]:
    pair = pictures.size_of_a_pair()
    # of the four training images one is held out
    for entrance, name in (("training", BENIGN), ("training", "benign (4)"), ("evaluating", "benign (5)")):
        world = f"{entrance} cmunext_busi"
        others = ["metrics.csv benign (6) ", "metrics.csv benign (7) "] if entrance == "evaluating" else []
        image, mask = (f"data/{folder}/{name}.png" for folder in ("images", "masks/0"))
        chosen = [*pictures.png(), *pair] if name == BENIGN else [*any_file(), *damage(), *pair]
        yield from of_file(world, image, name, "png", chosen, others)
        drawn = [*any_file(), *damage(), *pair, *pictures.masks()]
        # a test case may have no lesion
        drawn = expecting(drawn, {"no foreground": SAID if entrance == "training" else ANY})
        yield from of_file(world, mask, name, "mask", drawn, others)
    for entrance, part, number in (("training", "train", 1), ("training", "train", 0), ("evaluating", "val", 4)):
        name = f"ISIC_000000{number}"
        world = f"{entrance} vmunet_isic"
        others = ["metrics.csv ISIC_0000005 ", "metrics.csv ISIC_0000006 "] if entrance == "evaluating" else []
        chosen = damage() if number == 0 else pictures.jpg()
        if number == 0:
            chosen = expecting(damage(flips=ANY, blocks=ANY), {"first byte flipped": REFUSED})
        yield from of_file(world, f"data/{part}/images/{name}.jpg", name, "jpg", chosen, others, f"{name}.png")
        drawn = expecting([*pair, *pictures.masks()], {"no foreground": SAID if entrance == "training" else ANY})
        yield from of_file(world, f"data/{part}/masks/{name}.png", name, "mask", drawn, others, f"{name}.jpg")
    train, test = (f"data/lists/lists_Synapse/{name}.txt" for name in ("train", "test_vol"))
    yield from of_file(
        "training vmunet_synapse", "data/train_npz/case0005_slice001.npz", "case0005_slice001", "npz", arrays.slices()
    )
    held_out = [change for change in arrays.slices() if change.name not in {"a pipe", "a folder", "a dangling link"}]
    yield from of_file(
        "training vmunet_synapse", "data/train_npz/case0006_slice001.npz", "case0006_slice001", "npz", held_out
    )
    volume = [*arrays.h5_image(), *arrays.h5_label()]
    yield from of_file("evaluating vmunet_synapse", "data/test_vol_h5/case0001.npy.h5", "case0001", "h5", volume)

    yield from of_file(
        "training cmunext_busi", "data/busi_train1.txt", "busi_train1", "list", texts.lists("benign (5)")
    )
    yield from of_file("training cmunext_busi", "data/busi_val1.txt", "busi_val1", "list", texts.lists(BENIGN))
    yield from of_file("evaluating cmunext_busi", "data/busi_val1.txt", "busi_val1", "list", texts.lists(BENIGN))
    yield from of_file("training vmunet_synapse", train, "train.txt", "list", texts.lists("case0001_slice000"))
    other = texts.lists("case0005")
    yield from of_file("evaluating vmunet_synapse", test, "test_vol.txt", "list", other)
    yield from of_file("training vmunet_synapse", test, "test_vol.txt", "list", other)

    for suffix, made in ((".pt", weights.checkpoints()), (".safetensors", weights.safe_tensors())):
        world = f"training cmunext_busi: from {suffix}"
        if suffix == ".pt":
            made = without(made, "a sparse tensor")
        yield from of_file(world, f"weights/model{suffix}", "model", suffix[1:], made)
    yield from of_file("training cmunext_busi: resumed", "out/last.pt", "last.pt", "last.pt", weights.states())
    for bundle in ("cmunext_busi", "vmunet_synapse"):
        yield from of_file(f"evaluating {bundle}", "weights/model.pt", "model.pt", "pt", weights.checkpoints())
    yield from of_file("training cmunext_busi: copied", "bundle/configs/train.yaml", "train.yaml", "yaml", texts.yaml())


def _check() -> Iterator[Input]:
    world, pair = "prepare check: busi", pictures.size_of_a_pair()
    image, mask = (f"data/{folder}/{BENIGN}.png" for folder in ("images", "masks/0"))
    yield from of_file(world, image, BENIGN, "png", [*pictures.png(), *pair])
    yield from of_file(world, mask, BENIGN, "mask", [*pictures.png(), *pair, *pictures.masks()])
    yield from of_file(world, "data/busi_train1.txt", "busi_train1", "list", texts.lists("benign (5)"))
    quick = [*any_file(), *damage(), *pair]
    yield from of_file("prepare check: quick", image, BENIGN, "png", quick)
    photo = pictures.jpg()
    name = "ISIC_0000001"
    yield from of_file(
        "prepare check: isic", f"data/train/images/{name}.jpg", name, "jpg", photo, partner=f"{name}.png"
    )
    name = "case0005_slice001"
    yield from of_file("prepare check: synapse", f"data/train_npz/{name}.npz", name, "npz", arrays.slices())
    volume = [*arrays.h5_image(), *arrays.h5_label()]
    yield from of_file("prepare check: synapse", "data/test_vol_h5/case0001.npy.h5", "case0001", "h5", volume)


def _infer() -> Iterator[Input]:
    yield from of_file("inferring cmunext_busi", "in/lesion0.png", "lesion0", "png", pictures.png())
    yield from of_file("inferring vmunet_isic", "in/lesion0.jpg", "lesion0", "jpg", pictures.jpg())
    yield from of_file("inferring cmunext_busi: tif", "in/lesion0.tif", "lesion0", "tif", pictures.tif())
    # one slice
    volume = expecting([*nifti.nifti_gz(), *nifti.ct_values()], {"two axes": ANY})
    yield from of_file("inferring vmunet_synapse", "in/img0001.nii.gz", "img0001", "nii.gz", volume)
    yield from of_file("inferring vmunet_synapse: nii", "in/img0001.nii", "img0001", "nii", nifti.nifti_plain())
    yield from of_file("inferring vmunet_synapse: h5", "in/case0001.npy.h5", "case0001", "h5", arrays.h5_image())
    yield from of_file("inferring vmunet_isic", "weights/model.pt", "model.pt", "pt", weights.checkpoints())
    yield from of_file(
        "inferring cmunext_busi: safetensors",
        "weights/model.safetensors",
        "model",
        "safetensors",
        weights.safe_tensors(),
    )

    # the second of three, the others of which must be predicted; what is no file is passed over
    gone = {"missing", "a folder", "a dangling link", "a link to itself", "a pipe", "a link to the file"}
    for suffix, bundle, made in (
        (".png", "cmunext_busi", pictures.png()), (".jpg", "vmunet_isic", pictures.jpg()),
    ):  # fmt: skip
        chosen = [change for change in made if change.name not in gone]
        others = (f"lesion{number}_mask.png" for number in (0, 2))
        yield from of_file(
            f"inferring {bundle}: folder", f"in/lesion1{suffix}", "lesion1", suffix[1:], chosen, [*others]
        )
    chosen = [change for change in volume if change.name not in gone]
    others = (f"img{number:04d}_pred.nii.gz" for number in (1, 3))
    yield from of_file("inferring vmunet_synapse: folder", "in/img0002.nii.gz", "img0002", "nii.gz", chosen, [*others])


def _score() -> Iterator[Input]:
    unknown = {"no orientation": SAID}
    label = [*nifti.nifti_gz(), *nifti.pair_geometry(), *nifti.label_values(8)]
    label = expecting(label, unknown)
    yield from of_file("evaluation", "true/label0001.nii.gz", "0001", "nii.gz", label)
    yield from of_file("evaluation", "pred/img0001_pred.nii.gz", "0001", "nii.gz", label, partner="label0001.nii.gz")
    mask = [*pictures.png(), *pictures.size_of_a_pair(), *pictures.masks()]
    # a case may have neither lesion nor prediction
    mask = expecting(mask, {"no foreground": ANY})
    yield from of_file("evaluation: pictures", "true/a0_segmentation.png", "a0", "mask", mask)
    yield from of_file("evaluation: pictures", "pred/a0_mask.png", "a0", "mask", mask, partner="a0_segmentation.png")
    gone = {"missing", "a folder", "a dangling link", "a link to itself", "a pipe", "a link to the file"}
    chosen = [change for change in label if change.name not in gone]
    others = (f"metrics.csv label{case:04d} " for case in (1, 3))
    yield from of_file("evaluation: folder", "true/label0002.nii.gz", "0002", "nii.gz", chosen, [*others])
    # beside masks of 0 and 255 another number may be another class
    other = ("0 and 1", "0 and 100", "0 and 1 in 16 bits", "0 and 1 in 32 bits", "dark red by palette")
    mask = expecting(mask, dict.fromkeys((*other, "in the alpha channel"), EITHER))
    drawn = [change for change in mask if change.name not in gone]
    others = (f"metrics.csv a{number}_segmentation " for number in (0, 2))
    yield from of_file(
        "evaluation: folder of pictures", "pred/a1_mask.png", "a1", "mask", drawn, [*others], "a1_segmentation.png"
    )


def _counts(*names: str) -> list[tuple[str, str, Expected]]:
    """What is no count of one or more."""
    return [(name, value, REFUSED) for name in names for value in ("0", "-1", "2.5", "abc")]


def _switches(*names: str) -> list[tuple[str, str, Expected]]:
    return [(name, value, REFUSED) for name in names for value in ("maybe", "2")]


def _options() -> Iterator[Input]:
    sizes = [*_counts("image_size"), ("image_size", "[32,32,32]", REFUSED), ("image_size", "[]", REFUSED)]
    sizes += [("image_size", "[32,0]", REFUSED), ("image_size", "true", REFUSED), ("image_size", "10000000", REFUSED)]
    devices = [("device", "cpu", SAME), ("device", "gpu7", REFUSED), ("device", "3.5", REFUSED)]
    speed = [("amp_dtype", "float8", REFUSED), *_switches("channels_last", "compile")]
    mistyped = [("batchsize", "4", REFUSED), ("max_epoch", "5", REFUSED), ("imagesize", "32", REFUSED)]
    networks = [
        ("network_def", "{'_target_': 'networks.CMUNext'}", REFUSED), ("network_def", "cmunext", REFUSED),
        ("network_def", "{'_target_': 'networks.CMUNeXt', 'channels': 3}", REFUSED), ("network_def", "[1, 2]", REFUSED),
        ("network_def", "{'_target_': 'networks.CMUNeXt', 'in_channels': 4}", REFUSED),
        ("network_def", "{'_target_': 'networks.CMUNeXt', 'out_channels': 3}", REFUSED),
    ]  # fmt: skip
    classes = [
        ("classes", "['a','a']", REFUSED), ("classes", "[]", REFUSED), ("classes", "3", REFUSED),
        ("label_map", "{0: 0, 255: 2}", REFUSED), ("label_map", "{0: 0, 255: 'a'}", REFUSED),
        ("label_map", "[0, 255]", REFUSED), ("label_map", "{'0': 0, '255': 1}", REFUSED),
    ]  # fmt: skip
    places = [("dataset_dir", "nowhere", REFUSED), ("dataset_dir", "data/busi_train1.txt", REFUSED)]
    rates = [("learning_rate", value, REFUSED) for value in ("nan", "inf", "-0.1", "abc", "1e9")]
    draws = [("val_fraction", value, REFUSED) for value in ("0", "1", "2", "nan", "abc", "-0.5")]
    folds = [("fold", value, REFUSED) for value in ("*", "0", "9", "abc", "[1,2]", "1.5")]
    yield from of_options("training cmunext_busi", [
        *sizes, *devices, *speed, *mistyped, *networks, *classes, *places, *rates, *draws, *folds,
        *_counts("batch_size", "max_epochs", "val_interval"), *_switches("resume", "new_head"),
        ("early_stop", "x", REFUSED), ("early_stop", "-1", REFUSED), ("num_workers", "-1", REFUSED),
        ("num_workers", "x", REFUSED), ("seed", "x", REFUSED), ("seed", "-1", ANY),
        ("selection", "best", REFUSED), ("pretrained", "nowhere.pt", REFUSED), ("resume", "true", REFUSED),
        ("train#dataloadr#drop_last", "true", FAILS), ("train#dataloader#drop_lst", "true", REFUSED),
        ("train#dataloader#drop_last", "maybe", REFUSED), ("optimizer#momentm", "0.5", REFUSED),
        ("ckpt_dir", "data/busi_train1.txt", REFUSED), ("ckpt_dir", "data/busi_train1.txt/models", REFUSED),
        ("log_dir", "data/busi_train1.txt", REFUSED), ("config_file", "nowhere.yaml", FAILS),
        ("config_file", "data/busi_train1.txt", FAILS), ("config_file", "data", FAILS),
    ])  # fmt: skip
    yield from of_options("training vmunet_isic", [("early_stop", "x", REFUSED), ("selection", "", REFUSED), *mistyped])
    cases = [("val_cases", value, REFUSED) for value in ("0", "2", "99", "x", "['case0099']", "[]", "1.5", "-1")]
    yield from of_options("training vmunet_synapse", [*cases, *mistyped, ("classes", "['a']", REFUSED)])
    for bundle in ("cmunext_busi", "vmunet_isic", "vmunet_synapse"):
        files = [("ckpt_path", value, REFUSED) for value in ("nowhere.pt", "weights", "", "data")]
        other = [("output_dir", "weights/model.pt", REFUSED), ("dataset_dir", "nowhere", REFUSED), mistyped[2]]
        yield from of_options(f"evaluating {bundle}", [*files, *other])
    yield from of_options("evaluating vmunet_isic", [("year", "2019", REFUSED), ("year", "x", REFUSED)])
    yield from of_options(
        "evaluating cmunext_busi", [*sizes, *classes, *folds, *devices, ("classes", "['a','b']", REFUSED)]
    )
    for bundle in ("cmunext_busi", "vmunet_isic", "vmunet_synapse"):
        chosen = [("input", value, REFUSED) for value in ("nowhere", "weights", "")]
        chosen += [("ckpt_path", value, REFUSED) for value in ("nowhere.pt", "weights", "in")]
        chosen += [("output_dir", "weights/model.pt", REFUSED), ("output_dir", "weights/model.pt/out", REFUSED)]
        chosen += [
            *sizes,
            *devices,
            *speed,
            ("load_pretrain", "maybe", REFUSED),
            *mistyped[2:],
            ("inputs", "in", REFUSED),
        ]
        if bundle != "vmunet_synapse":
            chosen += [*classes, ("probabilities", "maybe", REFUSED)]
        yield from of_options(f"inferring {bundle}", chosen)
    yield from of_options("inferring cmunext_busi", networks)

    words = WORLDS["training cmunext_busi"].words
    world = "training cmunext_busi"
    yield from of_words(world, "run trainin", ("run", "trainin", *words[2:]), ["trainin"])
    yield from of_words(world, "run without --config_file", (*words[:2], *words[4:]), [""], expected=FAILS)
    yield from of_words(world, "--batch_size without a value", _replaced(words, "batch_size", []), ["batch_size"])
    yield from of_words(world, "a word too many", (*words[:2], "data", *words[2:]), ["data"])
    yield from of_words(world, "--image_size=", (*words, "--image_size="), ["image_size"])
    predicting = WORLDS["inferring cmunext_busi: folder"].words
    two = _replaced(predicting, "input", ["in/lesion0.png", "in/lesion1.png"])
    yield from of_words("inferring cmunext_busi: folder", "--input *.png", two, ["lesion1.png", "input"])
    empty = _replaced(predicting, "input", ["empty"])
    make = lambda folder: (folder / "empty").mkdir()  # noqa: E731
    yield from of_words("inferring cmunext_busi: folder", "an empty folder", empty, ["empty"], make)

    busi = [("splits", value, REFUSED) for value in ("0", "-1", "x")] + [("seed", "x", REFUSED), ("seed", "-1", ANY)]
    busi += [("workers", "0", EITHER), ("workers", "-1", EITHER), ("workers", "x", REFUSED)]
    busi += [("raw", "nowhere", REFUSED), ("raw", f"raw/benign/{BENIGN}.png", REFUSED), ("raw", "lists", REFUSED)]
    busi += [("split-files", "nowhere", REFUSED), ("split-files", "raw", REFUSED), ("out", "lists", REFUSED)]
    busi += [("out", f"raw/benign/{BENIGN}.png", REFUSED), ("out", f"raw/benign/{BENIGN}.png/out", REFUSED)]
    busi += [("split-file", "x", REFUSED), ("out", "raw", REFUSED), ("out", "raw/benign", REFUSED)]
    yield from of_options("prepare busi", busi)
    isic = [("year", value, REFUSED) for value in ("2019", "x")] + [("split", "8:2", REFUSED)]
    isic += [
        ("size", size, REFUSED) for size in (["0", "20"], ["-1", "20"], ["x", "20"], ["20"], ["10000000", "10000000"])
    ]
    isic += [("raw", "nowhere", REFUSED), ("raw", "raw/ISIC-2017_Training_Data", REFUSED)]
    yield from of_options("prepare isic: resized", isic)
    check = [("fold", value, REFUSED) for value in ("0", "-1", "9", "x")] + [("classes", ["a", "a"], REFUSED)]
    check += [("label-map", value, REFUSED) for value in ("0", "a:b", "0:0:1", "0:7")] + [("folds", "1", REFUSED)]
    yield from of_options("prepare check: busi", check)
    for folder in ("nowhere", "weights", f"data/images/{BENIGN}.png", "~"):
        yield from of_words("prepare check: busi", f"check {folder}", ("check", folder), [folder, "/root"])
    synapse = [("train-cases", value, REFUSED) for value in ("99", "x", "-1")]
    synapse += [("raw", value, REFUSED) for value in ("nowhere", "raw/img")]
    yield from of_options("prepare synapse", synapse)

    volumes = [
        ("spacing", value, REFUSED) for value in (["nan", "1", "1"], ["0", "1", "1"], ["-1", "1", "1"], ["x", "1", "1"])
    ]
    volumes += [("spacing", ["1", "1"], REFUSED), ("label-ids", "0", REFUSED), ("label-ids", ["1", "1"], REFUSED)]
    volumes += [("label-ids", "x", REFUSED), ("label-ids", "btcvv", REFUSED), ("label-ids", ["1", "2"], REFUSED)]
    volumes += [("classes", ["a", "a"], REFUSED), ("classes", ["a", "b"], REFUSED), ("class", "a", REFUSED)]
    volumes += [("output", "true/label0001.nii.gz", REFUSED), ("output", "true/label0001.nii.gz/out", REFUSED)]
    yield from of_options("evaluation", volumes)
    drawn = [("spacing", ["1", "1", "1"], REFUSED), ("label-ids", "btcv", REFUSED), ("classes", ["a", "a"], REFUSED)]
    yield from of_options("evaluation: pictures", drawn)
    for name, arguments in (("nowhere", ("nowhere", "true")), ("an empty folder", ("empty", "true"))):
        yield from of_words("evaluation", name, (*arguments, *WORLDS["evaluation"].words[2:]), [arguments[0]],
                            make)  # fmt: skip


def _names() -> Iterator[Input]:
    picture, volume = {"in/lesion1.png": "in/{}.png"}, {"in/img0002.nii.gz": "in/{}.nii.gz"}
    yield from of_names("inferring cmunext_busi: folder", picture, ["lesion1"])
    yield from of_names("inferring vmunet_synapse: folder", volume, ["img0002"])
    case = {f"data/val/{kind}": f"data/val/{kind.replace('ISIC_0000004', '{}')}"
            for kind in ("images/ISIC_0000004.jpg", "masks/ISIC_0000004.png")}  # fmt: skip
    yield from of_names("evaluating vmunet_isic", case, ["ISIC_0000004"])
    scored = {"pred/img0002_pred.nii.gz": "pred/{}_pred.nii.gz", "true/label0002.nii.gz": "true/{}.nii.gz"}
    yield from of_names("evaluation: folder", scored, ["label0002"])
    for bundle in ("cmunext_busi", "vmunet_isic", "vmunet_synapse"):
        yield from of_folders(f"training {bundle}", "dataset_dir", "data")
        yield from of_folders(f"evaluating {bundle}", "ckpt_path", "weights")
        yield from of_folders(f"inferring {bundle}: folder", "input", "in")
    yield from of_folders("inferring cmunext_busi", "input", "in")
    yield from of_folders("prepare busi", "raw", "raw")


def all_inputs() -> dict[str, Input]:
    """{key: input} of every entrance, in order."""
    found: dict[str, Input] = {}
    for one in (*_prepare(), *_check(), *_train_and_evaluate(), *_infer(), *_score(), *_options(), *_names()):
        if one.key in found:
            raise ValueError(f"two inputs are called {one.key}")
        found[one.key] = one
    return found


INPUTS = all_inputs()
