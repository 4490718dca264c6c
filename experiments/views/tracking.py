"""The only TensorBoard writer: one run, one folder, with the same numbers as JSON lines beside the event file.

A resumed run continues without a double point: both files are cut where its checkpoint was written. Numbers that are not
finite are written as such and counted in `health/not_finite`. Where the event file cannot be written, the run goes on
without it, with one warning; the lines are kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from experiments.comparison.statistics import mean_curve
from experiments.runs.plain_json import dump_line
from experiments.views.hparam_rows import TableColumn, TableRow, arm_row, columns, deployed_row
from experiments.views.labels import plainly
from experiments.views.run_files import METRICS_FILE, Lines, before_others, cut, event_files, lines_at, not_finite, truncate
from hardware import markdown as markdown_text
from hardware.names import as_file_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.comparison.record import Comparison, DeployedGroup, Deployment, Stream

NOT_FINITE = "health/not_finite"

# Keys of a metrics.jsonl line and the TensorBoard tag each has; a key with a slash is a tag already.
TAGS = {
    "loss_nats": "train/loss_nats",
    "lr": "train/lr",
    "val_loss_nats": "val/loss_nats",
    "val_bits_per_byte": "val/bits_per_byte",
    "keep_fraction": "gate/keep_fraction",
    "gate_reference_s": "gate/reference_s",
    "flops": "cost/flops",
    "tokens": "cost/tokens",
    "reference_s": "cost/reference_s",
    "wall_s": "cost/wall_s",
    "tokens_per_s": "cost/tokens_per_s",
    "energy_j": "cost/energy_j",
}

Layout = dict[str, dict[str, list[Any]]]
RUN_LAYOUT: Layout = {
    "gate against dense": {
        "held-out loss, nats per token": ["Multiline", ["val/loss_nats"]],
        "training loss, nats per token": ["Multiline", ["train/loss_nats"]],
        "share of the work kept": ["Multiline", ["gate/keep_fraction"]],
        "counted FLOPs": ["Multiline", ["cost/flops"]],
        "reference seconds": ["Multiline", ["cost/reference_s"]],
        "tokens per second": ["Multiline", ["cost/tokens_per_s"]],
    },
    "what the gate saved": {
        "FLOPs, share of dense on the same text": ["Multiline", ["saved/flops_share"]],
        "reference seconds, share of dense on the same text": ["Multiline", ["saved/reference_s_share"]],
        "FLOPs saved so far": ["Multiline", ["saved/flops$"]],
        "reference seconds saved so far": ["Multiline", ["saved/reference_s$"]],
    },
}
ENERGY_TAGS = ["energy_nj_per_token/mid", "energy_nj_per_token/low", "energy_nj_per_token/high"]
CURVE_TAG = "val_loss_nats_by_reference_ms"

# Results in the hparams table. Without a comparison TensorBoard lists every scalar there, by name, and shows the first
# five: the capital letter puts these first.
RESULT = "Result/"
RESULTS = (
    "loss_nats",
    "energy_nj_per_token",
    "reference_s",
    "tflop",
    "energy_j",
    "bits_per_byte",
    "tokens",
    "wall_s",
    "peak_mb",
)

MOST_SELECTED = 40  # runs; of more, TensorBoard ticks none (its maxNamesToEnableByDefault), and all charts are empty


class Tracker:
    """Scalars, histograms, figures, text and hyperparameters of one run; use it in a `with` block.

    `resume_step` is the last step that the resumed checkpoint contains (0: none; it starts again from nothing, so earlier
    event files go too); None is a new run. `written` is what the checkpoint holds of `Tracker.written`, where it does.
    Raises FileExistsError for a new run in a folder that already holds one, ValueError for a negative `resume_step`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resume_step: int | None = None,
        written: Mapping[str, int] | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.last_step = 0 if resume_step is None else resume_step
        lines = self.folder / METRICS_FILE
        if resume_step is None and (lines.exists() or event_files(self.folder)):
            raise FileExistsError(f"{self.folder} already holds a run: resume it, or choose another folder")
        if resume_step is not None and resume_step < 0:
            raise ValueError(f"resume_step = {resume_step}: the last finished step, at least 0")
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume_step == 0:
            for points in event_files(self.folder):
                points.unlink()
        if resume_step is not None and written:
            cut(self.folder, written, resume_step)
        elif resume_step is not None:
            truncate(lines, resume_step)
        self.not_finite = not_finite(lines)
        self._tags_at_step = {
            _tag(key) for line in lines_at(lines, self.last_step) for key in line if line[key] is not None
        }
        self._writer = _Events(self.folder, None if resume_step is None else resume_step + 1)
        self._lines = Lines(lines)
        if not resume_step:
            self._writer.call("add_custom_scalars", RUN_LAYOUT if layout is None else layout)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except OSError:
            if error is None:
                raise

    def log(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """One line of metrics.jsonl and its scalars; None stands in the line only (nothing was measured at this step).

        Keys: see TAGS; a key with a slash is a tag of its own, any other goes under `other/`. Raises ValueError for a
        step before the last one logged. Logged twice at one step, a tag keeps its first point in TensorBoard.
        """
        if step < self.last_step:
            raise ValueError(f"step {step} after step {self.last_step}: steps only go forward (see resume_step)")
        if step > self.last_step:
            self._tags_at_step.clear()
        self.last_step = step
        self._lines.add(dump_line({"step": step, **values}))
        points = {_tag(key): float(value) for key, value in values.items() if value is not None}
        bad = sum(not math.isfinite(value) for value in points.values())
        if bad:
            self.not_finite += bad
            points[NOT_FINITE] = self.not_finite
        for tag, value in points.items():
            if tag not in self._tags_at_step:
                self._tags_at_step.add(tag)
                self._writer.call("add_scalar", tag, value, step)

    def histogram(self, tag: str, values: Any, step: int) -> None:
        """Distribution of `values` (array or tensor, any shape; only finite ones are drawn)."""
        import numpy as np

        numbers = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64).ravel()
        numbers = numbers[np.isfinite(numbers)]
        if numbers.size:
            self._writer.call("add_histogram", tag, numbers, step)

    def figure(self, tag: str, figure: Figure, step: int | None = None) -> None:
        """A matplotlib figure (closed afterwards), at the last logged step unless told otherwise."""
        self._writer.call("add_figure", tag, plainly(figure), self.last_step if step is None else step)

    def text(self, tag: str, markdown: str, step: int | None = None) -> None:
        """Markdown: the configuration, a compatibility table, where each joule comes from."""
        self._writer.call("add_text", tag, markdown, self.last_step if step is None else step)

    def hparams(self, row: TableRow, metrics: Mapping[str, float | int | None]) -> None:
        """This run's row in the hparams table, in this folder; None leaves a cell blank. Call once, at the end."""
        self._writer.do(lambda writer: write_hparams(writer, row, metrics, self.last_step))

    def written(self) -> dict[str, int]:
        """Bytes of each file so far, whole lines and events only: for a checkpoint, to cut them there on a resume.

        Raises OSError while lines wait for a disk that is full.
        """
        self._writer.call("flush")
        if self._lines.waiting:
            raise OSError(f"{self._lines.path} lacks lines that the disk did not take")
        found = {METRICS_FILE: self._lines.bytes}
        return found | {path.name: path.stat().st_size for path in event_files(self.folder)}

    def close(self) -> None:
        """Raises OSError where lines of metrics.jsonl could not be written."""
        self._writer.close()
        self._lines.close()


def _tag(key: str) -> str:
    """The tag of a key of metrics.jsonl."""
    return TAGS.get(key, key if "/" in key else f"other/{key}")


class _Events:
    """The event file of a run; the first error ends it, with a warning."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        self.folder = folder
        self._writer: Any = None
        before = set(event_files(folder))
        try:
            self._writer = _writer(folder, purge_step)
        except OSError as error:
            self._give_up(error)
        for new in set(event_files(folder)) - before:
            before_others(folder, new)

    def call(self, name: str, *given: Any) -> None:
        self.do(lambda writer: getattr(writer, name)(*given))

    def do(self, work: Callable[[Any], None]) -> None:
        if self._writer is None:
            return
        try:
            work(self._writer)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        self.do(lambda writer: writer.close())

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        warnings.warn(
            f"TensorBoard's event file in {self.folder} cannot be written ({error.strerror or error}): the run goes on "
            f"without it; {METRICS_FILE} has the same numbers",
            stacklevel=2,
        )


def write_hparams(writer: Any, row: TableRow, metrics: Mapping[str, float | int | None], step: int = 0) -> None:
    """One row of the hparams table, written into the writer's own run rather than a run beside it.

    Metrics get the tag `Result/NAME`. Which columns there are is for `write_columns`, once for a whole comparison; without
    one, TensorBoard makes a column of every setting.
    """
    from torch.utils.tensorboard import summary

    found = {RESULT + key: float(value) for key, value in metrics.items() if value is not None}
    _, start, end = summary.hparams(row.settings, found)
    with _plugin_data(start) as content:
        content.session_start_info.group_name = row.name
    for part in (start, end):
        writer.file_writer.add_summary(part, step)
    for key, number in found.items():
        writer.add_scalar(key, number, step)


def write_columns(writer: Any, columns: Sequence[TableColumn]) -> None:
    """The columns of the hparams table; TensorBoard takes them from the one run below its folder that has them."""
    from torch.utils.tensorboard import summary

    blank = {column.key: 0.0 if column.numeric else "" for column in columns}
    experiment, _, _ = summary.hparams(blank, {RESULT + key: 0.0 for key in RESULTS})
    differs = {column.key: column.differs for column in columns}
    with _plugin_data(experiment) as content:
        for info in content.experiment.hparam_infos:
            info.differs = differs[info.name]
    writer.file_writer.add_summary(experiment, 0)


@contextmanager
def _plugin_data(written: Any) -> Iterator[Any]:
    """The hparams plugin's own record inside a summary, to change what torch has no argument for."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    inside = written.value[0].metadata.plugin_data
    content = plugin_data_pb2.HParamsPluginData.FromString(inside.content)
    yield content
    inside.content = content.SerializeToString()


def comparison_layout(streams: Sequence[str]) -> Layout:
    """Custom-scalar pages of a comparison: each stream's arms over reference time, and energy with its margin."""
    curves = {
        f"{name}: held-out nats per token, by reference ms": ["Multiline", [f"{CURVE_TAG}/{name}"]] for name in streams
    }
    return {
        "gate against dense": curves,
        "energy": {"nJ per token and profile (step = row of the table under Text)": ["Margin", ENERGY_TAGS]},
    }


def write_comparison(
    folder: str | Path,
    comparison: Comparison,
    figures: Mapping[str, Figure],
    texts: Mapping[str, str],
    *,
    beside: int = 0,
) -> Path:
    """The comparison's own TensorBoard folder, replaced if it is there: return it.

    The folder itself holds figures, text and the custom-scalar layout; `STREAM/ARM` below it holds that arm's mean
    curve (steps are reference milliseconds) and its hparams row, `STREAM/deployed ARM` the energies (steps: profiles).
    Where these and the `beside` other runs are more than `MOST_SELECTED`, an arm of one seed has none: its run says it all.
    """
    folder = Path(folder)
    for old in sorted(folder.rglob("events.out.tfevents.*")):
        old.unlink()
    main = _writer(folder)
    main.add_custom_scalars(comparison_layout(list(comparison.streams)))
    for tag, figure in figures.items():
        main.add_figure(tag, plainly(figure), 0, close=False)
    for tag, markdown in texts.items():
        main.add_text(tag, markdown, 0)
    ours = 1 + sum(len(stream.arms) + len(stream.deployments) for stream in comparison.streams.values())
    rows = []
    for stream in comparison.streams.values():
        for arm in stream.arms.values():
            rows.append(arm_row(stream, arm, str(folder.parent)))
            if beside and beside + ours > MOST_SELECTED and len(arm.runs) == 1:
                continue
            writer = _writer(folder / as_file_name(stream.name) / as_file_name(arm.name))
            for seconds, loss in mean_curve([run.curve for run in arm.runs]):
                writer.add_scalar(f"{CURVE_TAG}/{stream.name}", loss, round(1000 * seconds))
            write_hparams(writer, rows[-1], hparam_metrics(arm.record()))
            writer.close()
        names: list[str] = []
        for group in stream.deployed:
            for deployed in group.items:
                name = f"deployed {deployed.arm}"
                names.append(name)
                place = name if names.count(name) == 1 else f"{name} {names.count(name)}"
                rows.append(
                    _write_deployment(folder / as_file_name(stream.name) / as_file_name(place), stream, group, deployed)
                )
    write_columns(main, columns(comparison, rows))
    main.close()
    return folder


def boards(folder: Path, without: Path | None = None) -> set[Path]:
    """Folders with an event file, at any depth: TensorBoard's runs; those below `without` not counted."""
    found = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    return {path for path in found if without is None or not path.is_relative_to(without)}


def _write_deployment(folder: Path, stream: Stream, group: DeployedGroup, deployed: Deployment) -> TableRow:
    writer = _writer(folder)
    metrics = {"loss_nats": deployed.record["loss_simulated_nats"]}
    profile = None
    for i, energy in enumerate(deployed.energies()):
        for tag, key in zip(ENERGY_TAGS, ("mid_j", "low_j", "high_j"), strict=True):
            if energy.get(key) is not None:
                writer.add_scalar(tag, 1e9 * energy[key], i)
        if energy.get("mid_j") is not None and profile is None:
            profile, metrics["energy_nj_per_token"] = str(energy["profile"]), 1e9 * energy["mid_j"]
    row = deployed_row(stream, group, deployed, profile)
    write_hparams(writer, row, metrics)
    writer.close()
    return row


def training_energy_markdown(result: Mapping[str, Any]) -> str:
    """What meters saw of a training run, or why they saw nothing, as Markdown."""
    joules, known = result.get("energy_j"), result.get("energy_known_j")
    if joules is not None:
        said = f"Training energy: {joules:.4g} J, measured over the whole run, idle power of the devices included."
    else:
        said = f"Training energy: {markdown_text.line(str(result.get('energy_reason') or 'not measured'))}"
        said += "" if known is None else f"\n\nWhat was measured: at least {known:.4g} J."
    readings = [reading for reading in result.get("energy_readings") or () if reading["joules"] is not None]
    head = ("meter", "J", "J above idle", "seconds", "resolution, J")
    rows = [markdown_text.row(head), markdown_text.row(["---"] * len(head))] if readings else []
    for r in readings:
        above = "not measured" if r["above_idle_j"] is None else f"{r['above_idle_j']:.4g}"
        rows.append(
            markdown_text.row(
                (r["source"], f"{r['joules']:.4g}", above, f"{r['window_s']:.4g}", f"{r['resolution_j']:.2g}")
            )
        )
    lines = [f"- {markdown_text.line(said)}" for said in result.get("energy_check") or ()]
    return "\n\n".join(part for part in (said, "\n".join(rows), "\n".join(lines)) if part)


def hparam_metrics(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics columns of one ARM record, in the units their names give."""

    def scaled(key: str, factor: float = 1.0) -> float | None:
        return None if result.get(key) is None else factor * float(result[key])

    return {
        "loss_nats": scaled("loss_nats"),
        "bits_per_byte": scaled("bits_per_byte"),
        "tokens": scaled("tokens"),
        "tflop": scaled("flops", 1e-12),
        "reference_s": scaled("reference_s"),
        "wall_s": scaled("wall_s"),
        "peak_mb": scaled("peak_bytes", 1e-6),
        "energy_j": scaled("energy_j"),
    }


def _writer(folder: Path, purge_step: int | None = None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir=str(folder), purge_step=purge_step, flush_secs=10)
