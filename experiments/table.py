"""From the folders of finished cells to one table: frozen dataclasses, which `experiments.page` writes down.

Rows are networks by recipe; folds and seeds are averaged. What cannot be compared is refused: other data, other rules,
another selection. The order of the file's entries changes nothing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from bundles.configurations import SEPARATOR, leaves
from evaluation.compare import COMPARED, Difference, check_alike, difference, holm, values_of
from evaluation.intervals import FEW_CASES, Mean
from evaluation.results import read_results
from evaluation.scores import DISTANCES, METRICS, Results
from evaluation.tables import plus_minus
from experiments.cost import Cost, input_of, measured
from experiments.plan import Cell, External, Plan
from experiments.runner import history, is_trained, steps
from networks.training.provenance import FILE, PARTS, read_run
from transforms import InputError, shortened

# of each kind, the one that orders the rows first
SHOWN = {"images": ("iou", "dice", "hd95_px"), "volumes": ("dice", "hd95")}
# settings in which the cells of a row may differ
OWN = (
    "bundle_root", "dataset_dir", "ckpt_dir", "log_dir", "output_dir", "fold", "seed", "resume", "device",
    "num_workers", "check_data", "ckpt_interval", "ckpt_minutes", "on_save_error", "debug", "allow_unpaired",
)  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """One cell's results on one target; `run` is what its run.json says, {} for results from elsewhere."""

    row: str
    fold: int | None
    seed: int | None
    results: Results
    run: Mapping[str, Any]
    folder: Path

    @property
    def external(self) -> bool:
        """True for results that nothing here was trained for."""
        return not self.run


@dataclass(frozen=True)
class Number:
    """One metric of a row: over its cells, and against the baseline over the cases that both have."""

    over_cells: Mean
    against: Difference | None


@dataclass(frozen=True)
class Row:
    """One network by one recipe. `of` is how many cells there will be; None for what is not known."""

    name: str
    label: str
    external: bool
    cells: int
    of: int
    numbers: Mapping[str, Number]
    cost: Cost | None
    best_epoch: float | None
    epochs: int | None
    seconds: float | None


@dataclass(frozen=True)
class Published:
    """Ours and the published rows under the protocol of the paper, which need not be that of the other columns."""

    protocol: str
    heads: tuple[str, ...]
    lines: tuple[tuple[str, tuple[str, ...]], ...]
    verdicts: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """All rows on one data set: its own test parts (`target` is empty), or a zero-shot test."""

    data: str
    target: str
    kind: str
    unit: str
    baseline: str
    selection: str
    cases: int
    rows: tuple[Row, ...]
    rules: Mapping[str, str]
    published: Published | None

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is shown of it."""
        return SHOWN[self.kind]

    def header(self, metric: str) -> str:
        """What stands above a metric's column."""
        title = COMPARED[self.kind][metric][0]
        return f"{title} {self.unit}" if title == "HD95" else title


@dataclass(frozen=True)
class Table:
    """Everything that the renderers write."""

    title: str
    sections: tuple[Section, ...]
    machine: Mapping[str, Any]
    notes: tuple[str, ...]


def tabulate(plan: Plan, measure: bool = False) -> Table:
    """The table of what is finished.

    Args:
        plan: the file's.
        measure: latency and memory again, though they are known.

    Raises:
        InputError: when nothing is finished, or cells cannot be compared.
    """
    finished = [cell for cell in plan.cells if is_trained(cell)]
    if not finished and not plan.external:
        raise InputError("none of its cells is finished", path=plan.file, remedy="python -m experiments run it first")
    costs: dict[str, Cost] = {}
    machine: dict[str, Any] = {}
    if finished:
        costs, machine = measured({cell.row: input_of(cell) for cell in finished}, plan.output / "costs.json", measure)
    sections = []
    for data in sorted({cell.data for cell in plan.cells}):
        cells = [cell for cell in plan.cells if cell.data == data]
        own = _scored(cells, "")
        own += [one for external in plan.external if external.data == data for one in _external(external, cells)]
        for target in ("", *sorted({name for cell in cells for name in cell.zero_shot})):
            scored = own if not target else _scored(cells, target)
            if scored:
                sections.append(_section(plan, data, target, cells, scored, costs))
    if not sections:
        raise InputError("none of its cells is evaluated", path=plan.file, remedy="python -m experiments run it first")
    return Table(plan.file.stem, tuple(sections), machine, tuple(_notes(plan, sections, finished)))


def _scored(cells: Iterable[Cell], target: str) -> list[Scored]:
    found = []
    for cell in cells:
        folder = cell.targets().get(target)
        if folder is not None and is_trained(cell) and (folder / "summary.json").is_file():
            run = read_run(cell.folder / FILE)
            found.append(Scored(cell.row, cell.fold, cell.seed, read_results(folder), run, cell.folder))
    return found


def _external(external: External, cells: Sequence[Cell]) -> list[Scored]:
    """Results from elsewhere; those of no fold belong to the only one there is."""
    folds = sorted({cell.fold for cell in cells}, key=str)
    found = []
    for fold, folder in external.folders.items():
        if fold not in folds and not (fold is None and len(folds) == 1):
            listed = ", ".join(map(str, folds))
            fact = f"is of fold {fold}" if fold is not None else "names no fold"
            raise InputError(fact, path=folder, remedy=f"say results: {{FOLD: FOLDER}}; the folds are {listed}")
        fold = folds[0] if fold is None else fold
        found.append(Scored(external.name, fold, None, read_results(folder), {}, folder))
    return found


# What cannot be compared


def check_comparable(scored: Sequence[Scored]) -> None:
    """Refuses results of other data, by other rules, or of models that were selected in another way.

    Raises:
        InputError: naming the first difference.
    """
    ordered = sorted(scored, key=lambda one: (one.external, str(one.fold), str(one.seed), one.row))
    first = ordered[0]
    by_row: dict[str, Scored] = {}
    by_fold: dict[Any, Scored] = {}
    for one in ordered:
        if one.results.summary.kind != first.results.summary.kind:
            _refuse(one, first, f"an evaluation of {one.results.summary.kind}, another kind")
        if one.results.summary.classes != first.results.summary.classes:
            _refuse(one, first, f"classes {', '.join(one.results.summary.classes)}, others")
        if not one.external and one.run["selection"] != first.run.get("selection", one.run["selection"]):
            _refuse(one, first, f"selected by {one.run['selection']!r}, otherwise (by {first.run['selection']!r})")
        _check_settings(by_row.setdefault(one.row, one), one)
        # where the split is drawn by the seed, another seed has other cases
        same = by_fold.setdefault((one.fold, one.seed), one)
        if one.external:
            same = next((other for other in ordered if other.fold == one.fold), one)
        if one is not same:
            check_alike(same.results, one.results)
            _check_data(same, one)


def _refuse(one: Scored, other: Scored, what: str) -> None:
    raise InputError(f"{what} than {other.folder}", path=one.folder, remedy="compare like with like, or remove one")


def _check_settings(first: Scored, other: Scored) -> None:
    """The cells of a row are of one recipe and one network."""
    mine, its = ({place: value for place, value in leaves(one.run.get("configuration", {}))
                  if place.partition(SEPARATOR)[0] not in OWN} for one in (other, first))  # fmt: skip
    for place in sorted({*mine, *its}):
        if mine.get(place) != its.get(place):
            values = [shortened(str(one.get(place, "none"))) for one in (mine, its)]
            name = place.replace(SEPARATOR, "#")
            _refuse(other, first, f"{name} {values[0]}, other (there {values[1]})")


def _check_data(first: Scored, other: Scored) -> None:
    if first.external or other.external or first.run["settings"].get("data") == other.run["settings"].get("data"):
        return
    for part in PARTS:
        known, found = (
            {tuple(entry[1] for entry in item.values()): item["image"][0] for item in one.run["data"].get(part, [])}
            for one in (first, other)
        )
        for mine, theirs, what in ((found, known, "has"), (known, found, "lacks")):
            if strange := sorted(str(mine[key]) for key in mine.keys() - theirs.keys()):
                _refuse(other, first, f"its {part} part {what} {Path(strange[0]).name}, and so are other data")
    _refuse(other, first, "the data are in another order")


# Numbers


def _section(
    plan: Plan, data: str, target: str, cells: Sequence[Cell], scored: Sequence[Scored], costs: Mapping[str, Cost]
) -> Section:
    check_comparable(scored)
    summary = scored[0].results.summary
    kind = summary.kind
    names = sorted({one.row for one in scored})
    several = len({cell.bundle for cell in cells}) > 1
    of_row = {name: sorted((one for one in scored if one.row == name), key=_place) for name in names}
    baseline = plan.baselines.get(data, "")
    base = of_row.get(baseline, [])
    numbers: dict[str, dict[str, Number]] = {name: {} for name in names}
    for metric in SHOWN[kind]:
        factor_of = {name: _against(metric, kind, of_row[name], base) for name in names if name != baseline}
        tested = {name: found for name, found in factor_of.items() if found is not None}
        ranked = sorted(name for name in tested if tested[name].p is not None)
        corrected = dict(zip(ranked, holm([tested[name].p or 0.0 for name in ranked]), strict=True))
        for name in names:
            found = tested.get(name)
            if found is not None:
                found = replace(found, p_holm=corrected.get(name))
            numbers[name][metric] = Number(over_cells(_means(metric, of_row[name])), found)
    rows = [
        Row(
            name,
            name if several or name not in costs else name.partition("/")[2],
            of_row[name][0].external,
            len(of_row[name]),
            sum(cell.row == name for cell in cells) or len({cell.fold for cell in cells}),
            numbers[name],
            costs.get(name),
            *_training(of_row[name]),
        )
        for name in names
    ]
    first, (_, _, more) = SHOWN[kind][0], COMPARED[kind][SHOWN[kind][0]]
    rows.sort(key=lambda row: (-_mean(row, first) if more else _mean(row, first), row.name))
    strict = summary.protocols.get("strict") or next(iter(summary.protocols.values()))
    cases = len({case for one in scored for case in one.results.summary.labels})
    selections = {str(one.run["selection"]) for one in scored if not one.external}
    return Section(
        data, target, kind, strict.distance_unit, baseline if base else "", next(iter(selections), "not stated"),
        cases, tuple(rows), {name: protocol.rules for name, protocol in summary.protocols.items()},
        None if target else _published(plan, data, {row.name: row.label for row in rows}, of_row),
    )  # fmt: skip


def _place(one: Scored) -> tuple[str, str]:
    return str(one.fold), str(one.seed)


def _mean(row: Row, metric: str) -> float:
    mean = row.numbers[metric].over_cells.mean
    return -math.inf if mean is None else mean


def over_cells(values: Iterable[float | None]) -> Mean:
    """Mean, deviation and N over folds and seeds, with Student's 95 % interval, which holds for few values too.

    Example:
        >>> found = over_cells([0.7, 0.8, 0.9])
        >>> round(found.mean, 2), round(found.sd, 2), found.n, round(found.low, 3), round(found.high, 3)
        (0.8, 0.1, 3, 0.552, 1.048)
    """
    known = sorted(value for value in values if value is not None and not math.isnan(value))
    if not known:
        return Mean(None, None, 0)
    mean = statistics.fmean(known)
    if len(known) == 1:
        return Mean(mean, None, 1)
    sd = statistics.stdev(known)
    half = float(stats.t.ppf(0.975, len(known) - 1)) * sd / math.sqrt(len(known))
    return Mean(mean, sd, len(known), mean - half, mean + half)


def _means(metric: str, scored: Sequence[Scored]) -> list[float | None]:
    """Each cell's mean over its cases, under the first protocol that has the metric."""
    of = [[protocol.mean[metric].mean for protocol in one.results.summary.protocols.values() if metric in protocol.mean]
          for one in scored]  # fmt: skip
    return [found[0] for found in of]


def _against(metric: str, kind: str, own: Sequence[Scored], base: Sequence[Scored]) -> Difference | None:
    """The differences to the baseline case by case, each the mean over the cells that both have; None without any."""
    changes: dict[str, list[float]] = {}
    for one in own:
        for other in base:
            if one.fold == other.fold and (one.seed == other.seed or one.external or other.external):
                before, after = _by_case(other.results, metric), _by_case(one.results, metric)
                for case in sorted(before.keys() & after.keys()):
                    changes.setdefault(case, []).append(after[case] - before[case])
    if not changes:
        return None
    change = np.array([statistics.fmean(sorted(changes[case])) for case in sorted(changes)])
    return difference(metric, "mean of classes", change, COMPARED[kind][metric][2])


def _by_case(results: Results, metric: str) -> dict[str, float]:
    """Each case's mean over the classes that have a value; cases without any are left out."""
    found: dict[str, list[float]] = {}
    for structure in results.summary.classes:
        for case, value in values_of(results, metric, structure).items():
            if not math.isnan(value):
                found.setdefault(case, []).append(value)
    return {case: statistics.fmean(values) for case, values in found.items()}


def _training(scored: Sequence[Scored]) -> tuple[float | None, int | None, float | None]:
    """Mean epoch of the best network, epochs, and mean seconds of a training."""
    runs = [one.run for one in scored if not one.external]
    best = [run["best"]["epoch"] for run in runs if run.get("best")]
    epochs = max((int(run.get("epochs") or 0) for run in runs), default=None)
    seconds = [sum(row["seconds"] for row in history(one.folder)) for one in scored if not one.external]
    return statistics.fmean(best) if best else None, epochs, statistics.fmean(seconds) if seconds else None


# The published rows


def _published(
    plan: Plan, data: str, labels: Mapping[str, str], rows: Mapping[str, Sequence[Scored]]
) -> Published | None:
    """Our rows and the published ones, and what the first of them and its repetition say of each other."""
    verdicts = []
    for one in (one for row in rows.values() for one in row if plan.expected and not one.external):
        low, high = plan.expected["score"]
        score = (one.run.get("best") or {}).get("score", math.nan)
        inside = "inside" if low <= round(score, 4) <= high else "outside"
        verdicts.append(f"{one.row}: {score:.4f} is {inside} what is expected, {low} … {high}: {plan.expected['of']}")
    said = plan.published.get(data)
    if said is None:
        return Published("", (), (), tuple(verdicts)) if verdicts else None
    protocol = said["protocol"]
    metrics = list(dict.fromkeys(key.removesuffix("_sd") for values in said["rows"].values() for key in values))
    titles = {metric: METRICS.get(metric, "HD95 voxels" if metric == "hd95" else metric) for metric in metrics}
    ours = {
        name: {metric: _under(metric, protocol, scored) for metric in metrics} for name, scored in sorted(rows.items())
    }
    lines = [(labels[name], tuple(plus_minus(found[metric].mean, found[metric].sd) for metric in metrics))
             for name, found in ours.items()]  # fmt: skip
    lines += [
        (name, tuple(plus_minus(values.get(m), values.get(f"{m}_sd")) if m in values else "" for m in metrics))
        for name, values in said["rows"].items()
    ]
    row = next((name for name in ours if said["row"] in (name, name.partition("/")[2])), None)
    values = next(iter(said["rows"].values()))
    if drawn := _drawn_splits(Path(data)):
        verdicts.append(f"the splits were drawn here ({drawn}) as the published were, and are not those lists")
    if plan.scale:
        verdicts.append(f"no verdict: the scale {plan.scale!r} is not the published recipe")
    elif row is None:
        verdicts.append(f"no verdict: {said['row']} is not finished")
    else:
        verdicts += [f"{titles[metric]}: {verdict(ours[row][metric], values[metric], values.get(f'{metric}_sd'))}"
                     for metric in metrics if metric in values]  # fmt: skip
    return Published(protocol, tuple(titles.values()), tuple(lines), tuple(verdicts))


def _drawn_splits(data: Path) -> str:
    """How `python -m prepare` drew the splits of a folder; nothing where they were given, or it does not say."""
    try:
        splits = json.loads((data / "dataset.json").read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"seed {splits.get('seed')}" if isinstance(splits, dict) else ""


def _under(metric: str, protocol: str, scored: Sequence[Scored]) -> Mean:
    """One metric of a row under one protocol over its cells, in per cent or voxels.

    Raises:
        InputError: when the protocol has no such metric.
    """
    values = []
    for one in scored:
        protocols = one.results.summary.protocols
        if protocol not in protocols or metric not in protocols[protocol].mean:
            raise InputError(f"published: no {metric} under {protocol!r}", remedy=f"there are {', '.join(protocols)}")
        mean = protocols[protocol].mean[metric].mean
        values.append(None if mean is None else mean * (1 if metric in DISTANCES else 100))
    return over_cells(values)


def verdict(ours: Mean, published: float, published_sd: float | None) -> str:
    """Whether our mean lies within the published mean ± sd, and the published one within ours.

    Example:
        >>> verdict(Mean(70.0, 1.0, 3), 71.56, 2.43)
        'ours 70.00 ± 1.00 (3 runs) is inside the published 71.56 ± 2.43; the published mean is outside ours'
    """
    if ours.mean is None:
        return "we have no number"
    runs = f"{ours.n} run{'s' * (ours.n != 1)}"
    spread = "" if ours.sd is None else f" ± {ours.sd:.2f}"
    difference_in_words = f"{ours.mean - published:+.2f}".replace("-", "−")

    def inside(value: float, mean: float, sd: float) -> str:
        return "inside" if abs(value - mean) <= sd else "outside"

    line = f"ours {ours.mean:.2f}{spread} ({runs})"
    if published_sd is None:
        line += f", published {published:.2f} without sd, {difference_in_words}"
    else:
        line += f" is {inside(ours.mean, published, published_sd)} the published {published:.2f} ± {published_sd:.2f}"
    if ours.sd is None:
        return f"{line}; one run has no sd"
    return f"{line}; the published mean is {inside(published, ours.mean, ours.sd)} ours"


# Words


def _notes(plan: Plan, sections: Sequence[Section], finished: Sequence[Cell]) -> list[str]:
    notes = []
    if unfinished := sum(bool(steps(cell)) for cell in plan.cells):
        notes.append(
            f"{unfinished} of {len(plan.cells)} cells are not finished: rows that lack some are means over other folds"
            " or seeds than the others; differences are over the cells that both have"
        )
    if missing := sorted({section.data for section in sections if not section.baseline}):
        notes.append(
            f"no differences on {', '.join(missing)}: no cell of the baseline is finished, or none has its name"
        )
    few = [section.cases for section in sections if section.cases < FEW_CASES]
    if few:
        notes.append(f"with fewer than {FEW_CASES} cases ({min(few)} here) intervals over cases are too narrow")
    runs = [read_run(cell.folder / FILE) for cell in finished]
    for what, found in (
        ("commits of the code", {str((run.get("git") or {}).get("commit", "unknown"))[:10] for run in runs}),
        ("versions of torch", {str(run.get("versions", {}).get("torch")) for run in runs}),
        ("devices", {str(run.get("device")) for run in runs}),
    ):
        if len(found) > 1:
            notes.append(f"the cells were trained with {len(found)} {what}: {', '.join(sorted(found))}")
    return notes
