"""What a compatibility analysis found: one record per operation, shares, and the tables that show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from hardware import markdown
from hardware.text import quoted
from neuro.analysis.chains import Chain
from neuro.analysis.preparation import counted_kinds
from neuro.analysis.registry import VERDICTS

__all__ = ["VERDICTS", "CompatibilityReport", "MlpPair", "NothingToMap", "Operation"]

COLUMNS = ("operation", "count", "verdict", "runs on", "MAC/token", "parameters", "bytes", "error bound", "limit", "reason")


class NothingToMap(ValueError):
    """The module holds no operation that the route can move to the chip."""


@dataclass(frozen=True)
class Operation:
    """One row: `macs_per_token` dense multiply-accumulates per token; `parameters` and `bytes` are counted where first
    used.

    `bytes` are those held where the operation runs: 1 per weight on the chip (int8), the parameter's own size on the
    host. `error_bound`: of an approximate operation, a number; `bound_of` says of what and for which inputs. `limit`: the
    chip's resource that binds, `need` of it for the whole layer against `have` per core (or on the chip, for words that
    are not per core); `cores`: how many cores it takes, 0 where that was not asked.
    """

    name: str
    kind: str
    verdict: str
    runs_on: str
    reason: str
    remedy: str
    macs_per_token: float
    parameters: int
    bytes: int
    chip: str = ""
    error_bound: float | None = None
    bound_of: str = ""
    limit: str = ""
    need: int | None = None
    have: int | None = None
    cores: int = 0

    @property
    def bound_text(self) -> str:
        """The error bound in words, "-" where there is none."""
        return "-" if self.error_bound is None else f"{self.error_bound:.2g} ({self.bound_of})"

    @property
    def limit_text(self) -> str:
        """Need against have of the binding limit, "-" where none was looked at."""
        return f"{self.limit} {self.need:,} of {self.have:,}" if self.limit else "-"


@dataclass(frozen=True)
class MlpPair:
    """`fc2(activation(fc1(x)))` with nothing else between: one graph on the chip. `activation`: "relu" or "relu2".

    `threshold`: path of an EventThreshold between the activation and fc2, or "".
    """

    fc1: str
    fc2: str
    activation: str
    threshold: str = ""


@dataclass(frozen=True)
class Preparation:
    """What converting layers to nn.Linear gains; `convert` and `deploy` do it on a copy of the module.

    `layers`: path of each layer that is converted -> its kind; `report`: of the module with them converted. Where a
    converter failed, `layers` is empty, `report` is None and `failure` says why.
    """

    layers: Mapping[str, str]
    report: CompatibilityReport | None
    failure: str = ""


@dataclass(frozen=True)
class CompatibilityReport:
    """What `analyse` found. `tokens`: rows the example holds; all "per token" figures are divided by it.

    `mapped`: names of the nn.Linear, nn.Conv1d and nn.Conv2d modules that go to the chip, in calling order; `pairs`:
    those of them that form an MLP graph, `chains`: networks with convolutions that form one graph each, no layer in two
    of them. `traced=False`: only leaf modules were seen, and `note` says why; functional operations then stand in one row
    of `operations`, with their multiply-accumulates. `rows_per_token`: rows each mapped layer computes per token, above 1
    where a layer is shared by several places. `cores`: of the mapped layers, each on cores of its own, without the
    populations that only a conversion adds, such as the product neurons of a square. `preparation`: what could be mapped
    with more layers converted to nn.Linear; None where there are no such layers. `layer_by_layer`: of a report whose route
    "lif" nobody asked for, the one of the route that leaves the neurons on the host, which `neuro.convert` then takes.
    """

    chip: str
    traced: bool
    note: str
    tokens: int
    operations: tuple[Operation, ...]
    mapped: tuple[str, ...]
    pairs: tuple[MlpPair, ...]
    rows_per_token: tuple[tuple[str, float], ...]
    unused_parameters: tuple[str, ...]
    tied: tuple[str, ...]
    total_parameters: int
    crossings_per_token: float
    crossing_bytes_per_token: float
    route: str = "graded"
    cores: int = 0
    cores_per_chip: int = 0
    preparation: Preparation | None = None
    chains: tuple[Chain, ...] = ()
    layer_by_layer: CompatibilityReport | None = None

    @property
    def macs_per_token(self) -> float:
        """Dense multiply-accumulates per token over all operations."""
        return sum(op.macs_per_token for op in self.operations)

    def share(self, what: str) -> float:
        """Share on the chip, 0..1, of "macs", "parameters" or "bytes". Raises ValueError for another word."""
        if what not in ("macs", "parameters", "bytes"):
            raise ValueError(f"share of {quoted(what)} is not kept; ask for 'macs', 'parameters' or 'bytes'")
        key = "macs_per_token" if what == "macs" else what
        total = sum(getattr(op, key) for op in self.operations)
        return sum(getattr(op, key) for op in self.operations if op.runs_on == "chip") / total if total else 0.0

    @property
    def mac_share(self) -> float:
        """Share of dense multiply-accumulates on the chip, 0..1."""
        return self.share("macs")

    @property
    def parameter_share(self) -> float:
        """Share of parameters on the chip, 0..1."""
        return self.share("parameters")

    def rows(self) -> list[tuple[str, ...]]:
        """Cells under `COLUMNS`: operations of one kind, verdict, place and reason share a row.

        The limit is that of the layer with the largest need against have.
        """
        groups: dict[tuple[str, ...], list[Operation]] = {}
        for op in self.operations:
            groups.setdefault((op.kind, op.verdict, op.runs_on, op.reason, op.bound_text, op.limit), []).append(op)
        rows: list[tuple[str, ...]] = []
        for (kind, verdict, place, reason, bound, _), ops in groups.items():
            totals = (
                sum(op.macs_per_token for op in ops),
                sum(op.parameters for op in ops),
                sum(op.bytes for op in ops),
            )
            tightest = max(ops, key=lambda op: (op.need or 0) / (op.have or 1))
            numbers = (f"{totals[0]:,.0f}", f"{totals[1]:,}", f"{totals[2]:,}")
            rows.append((kind, str(len(ops)), verdict, place, *numbers, bound, tightest.limit_text, reason))
        return rows

    def shown(self) -> list[tuple[str, ...]]:
        """`COLUMNS` and the rows under them, without bound and limit where no row has one."""
        rows = self.rows()
        kept = [i for i in range(len(COLUMNS)) if i < 7 or i == len(COLUMNS) - 1 or any(row[i] != "-" for row in rows)]
        return [tuple(row[i] for i in kept) for row in (COLUMNS, *rows)]

    def notes(self) -> list[str]:
        """What stands below the table: shares, ties, unused parameters, remedies, what was not traced."""
        lines = [
            f"on {self.chip}, {self.route} route: {self.share('macs'):.1%} of {self.macs_per_token:,.0f} MAC/token, "
            f"{self.share('parameters'):.1%} of {self.total_parameters:,} parameters, "
            f"{self.share('bytes'):.1%} of bytes; "
            f"{self.crossings_per_token:g} host crossings per token, {self.crossing_bytes_per_token:,.0f} bytes"
        ]
        if self.cores:
            chips = -(-self.cores // self.cores_per_chip)
            lines.append(
                f"{self.cores:,} cores, {chips:,} chip{'s' * (chips > 1)} (each layer on cores of its own; "
                "`spikegate place` counts what a conversion adds, squares for instance)"
            )
        if self.tied:
            lines.append("tied weights (the host keeps the original, the chip a copy): " + ", ".join(self.tied))
        if self.unused_parameters:
            lines.append("parameters no operation reads: " + ", ".join(self.unused_parameters))
        unknown = [op.kind for op in self.operations if op.kind.startswith("unknown: ") and not op.macs_per_token]
        if unknown:
            names = ", ".join(kind.removeprefix("unknown: ") for kind in dict.fromkeys(unknown))
            lines.append(f"no rule for {names}: the host runs them, multiply-accumulates inside them are in no figure here")
        lines += [f"remedy: {text}" for text in dict.fromkeys(op.remedy for op in self.operations if op.remedy)]
        if not self.traced:
            lines.append(
                f"NOT TRACED: {self.note}. Only leaf modules were seen; functional operations (attention scores, "
                "softmax, residual adds, ...) have no rows of their own above; their multiply-accumulates, as torch's "
                "counter found them, stand in the row 'not attributed'."
            )
        return lines

    def first_line(self) -> str:
        """What preparing the module gains, in a sentence; "" where there is nothing to prepare."""
        found = self.preparation
        if found is None:
            return ""
        if found.report is None:
            return f"Preparing failed, so these layers stay on the host: {found.failure}"
        before, after = self.crossings_per_token, found.report.crossings_per_token
        fewer = f", with {after:g} host crossings per token instead of {before:g}" if after < before else ""
        return (
            f"Preparing gains: with {counted_kinds(found.layers)} as nn.Linear, {found.report.mac_share:.1%} of "
            "the MACs run on "
            f"the chip instead of {self.mac_share:.1%}{fewer}. neuro.convert and neuro.deploy do this by themselves, on a "
            "copy."
        )

    def table(self) -> str:
        """The report as text with aligned columns; bound and limit only where a row has one.

        The first line says what preparing the module would gain, where it would gain something.
        """
        rows = self.shown()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
            for row in rows
        ]
        return "\n".join([*filter(None, [self.first_line()]), *lines, *self.notes()])

    def markdown(self) -> str:
        """The report as a Markdown table, and the notes as a list."""
        lines = [markdown.row(cells) for cells in (COLUMNS, *self.rows())]
        lines.insert(1, "|---" * len(COLUMNS) + "|")
        above = [self.first_line(), ""] if self.preparation else []
        return "\n".join([*above, *lines, "", *(f"- {markdown.line(note)}" for note in self.notes())])

    def to_dict(self) -> dict[str, Any]:
        """JSON form: every field, the shares and every operation."""
        found = self.preparation
        fields = asdict(replace(self, preparation=None, layer_by_layer=None))
        del fields["layer_by_layer"]
        return {
            **fields,
            "preparation": None
            if found is None
            else {
                "layers": dict(found.layers),
                "failure": found.failure,
                "mapped": [] if found.report is None else list(found.report.mapped),
                "macs_share": None if found.report is None else found.report.mac_share,
            },
            "macs_per_token": self.macs_per_token,
            **{f"{what}_share": self.share(what) for what in ("macs", "parameters", "bytes")},
        }
