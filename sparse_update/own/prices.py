"""What counted work costs: reference seconds of a step of any module, from one table that all arms of a comparison share.

A table has one of two sources, and says which:

modelled   a shipped file of prices: picoseconds for an operation of a matrix product, a byte moved, an element that goes
           through a function, an operation started. Nothing is timed, and every machine gets the same seconds.
measured   the products of this very comparison, each shape timed on this machine, and the other prices too; scaled so that
           the dense step costs what it took, and every kind of gated step as much as it took, if that is more.

Either way a step costs what was counted in it, times the factor of its kind. A kind's factor is never below one, so that a
gated step looks dearer than it is where the prices err, and never cheaper.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from hardware.declared import made
from hardware.documents import json_of, read_json
from hardware.text import short
from sparse_update.clock.cost import ComponentTimesError
from sparse_update.clock.shipped import shipped_table
from sparse_update.own.arms import DENSE
from sparse_update.own.counting import PARTS, Count, Product

SCHEMA = 1
MODELLED, MEASURED = "modelled", "measured"
DEFAULT = "any_module_x86_1_thread"
FLOPS = {"backward_dx": "dx_flops", "backward_dw": "dw_flops"}
"""Part of a step -> price of its products, where it is not "forward_flops"."""


@dataclass(frozen=True)
class Prices:
    """Prices of counted work. `prices_ps`: picoseconds by count; `products_ps`: of one product, by `Product.key`, where
    they were timed; `factors`: by kind of step (`OwnArm.kind`); `signals_ps`: of scoring one sequence beside the steps,
    where that was timed; `about` and `check` say where all this comes from, and are no part of the clock."""

    source: str
    name: str
    prices_ps: Mapping[str, float]
    factors: Mapping[str, float]
    products_ps: Mapping[str, float] = field(default_factory=dict)
    signals_ps: Mapping[str, float] = field(default_factory=dict)
    scale: float = 1.0
    about: Mapping[str, Any] = field(default_factory=dict)
    check: Mapping[str, Any] = field(default_factory=dict)

    def step_s(self, work: Mapping[str, Count], kind: str) -> dict[str, float]:
        """Reference seconds of one step by part, and "step" for what every step costs whatever it does."""
        scale = 1e-12 * self.scale * self.factor(kind)
        found = {part: scale * self._part_ps(part, work[part]) for part in PARTS if part in work}
        return {**found, "step": scale * self.prices_ps["step"]}

    def total_s(self, work: Mapping[str, Count], kind: str) -> float:
        """Reference seconds of one step."""
        return math.fsum(self.step_s(work, kind).values())

    def factor(self, kind: str) -> float:
        """The factor of a kind of step. A kind without one has the product of its parts', the largest where they have
        none either: nothing is cheap by omission."""
        if kind in self.factors or kind == DENSE:
            return self.factors.get(kind, 1.0)
        largest = max(self.factors.values(), default=1.0)
        return math.prod(self.factors.get(part, largest) for part in kind.split("+"))

    def _part_ps(self, part: str, count: Count) -> float:
        price = self.prices_ps[FLOPS.get(part, "forward_flops")]
        products = math.fsum(times * self._product_ps(product, price) for product, times in count.products.items())
        rest = {"moved_bytes": count.moved_bytes, "hard_elements": count.hard_elements, "operations": count.operations}
        return products + math.fsum(self.prices_ps[name] * value for name, value in rest.items())

    def _product_ps(self, product: Product, price: float) -> float:
        """Of one product: as timed; at the pace of the timed one nearest in size; else by its operations."""
        if not self.products_ps:
            return price * product.flops
        if product.key in self.products_ps:
            return self.products_ps[product.key]
        flops = max(1, product.flops)
        near = min(self._timed, key=lambda other: (abs(math.log(other.flops / flops)), other.key))
        return self.products_ps[near.key] / near.flops * product.flops

    @functools.cached_property
    def _timed(self) -> list[Product]:
        return [product for product in map(Product.read, self.products_ps) if product.flops]

    def signal_s(self, key: str, flops: int, sequences: int) -> float | None:
        """Reference seconds of scoring so many sequences by a signal, beside the steps; None where no price is known.

        `flops`: what the signal counts for one sequence; the shipped table of the package's own runs prices by it.
        """
        if not key:
            return 0.0
        if key in self.signals_ps:
            return 1e-12 * self.signals_ps[key] * sequences
        price = shipped_table().components_ps.get(key)
        return None if price is None or not flops else 1e-12 * price * flops * sequences

    @property
    def sha256(self) -> str:
        """Of all that a second is made of."""
        content = {key: value for key, value in asdict(self).items() if key not in ("about", "check")}
        return hashlib.sha256(json.dumps({**content, "schema": SCHEMA}, sort_keys=True).encode()).hexdigest()

    @property
    def words(self) -> str:
        """Where the seconds come from, as a phrase."""
        if self.source == MODELLED:
            return f"modelled: counted work at the prices of the shipped table {self.name}"
        return "measured: counted work at prices timed on this machine"

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    @staticmethod
    def load(path: Path) -> Prices:
        """Raises ComponentTimesError for a missing file, or one that is no such table."""
        try:
            return _read(read_json(path, ComponentTimesError), path)
        except FileNotFoundError:
            raise ComponentTimesError(f"{path}: no such table of prices") from None


def _read(raw: Any, where: Any) -> Prices:
    what = f"{where}: no table of prices for a model of one's own"
    if not isinstance(raw, dict) or "schema" not in raw:
        raise ComponentTimesError(f"{what}, which has a schema")
    schema = raw.pop("schema")
    if schema != SCHEMA:
        raise ComponentTimesError(f"{where}: schema {short(str(schema))}, this version reads {SCHEMA}: measure it again")
    found = made(Prices, raw, what, ComponentTimesError)
    if "forward_flops" not in found.prices_ps:
        raise ComponentTimesError(f"{what}: it has no price of forward_flops")
    return found


@functools.cache
def shipped_prices(name: str = DEFAULT) -> Prices:
    """The shipped table of that name."""
    path = files("sparse_update.clock").joinpath("tables", "any_module", f"{name}.json")
    return _read(json_of(path.read_bytes(), str(path), ComponentTimesError), path)
