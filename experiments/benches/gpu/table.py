"""The document of `bench gpu` for people, 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def lines(document: dict[str, Any]) -> Iterator[str]:
    """One block for each part, with what it found."""
    header = document["header"]
    size = "toy sizes: these times say nothing" if header["toy"] else "GPT-2 small's size"
    yield f"{header['device']}, torch {header['torch']}, commit {header['commit']}; {size}"
    for name, record in document["parts"].items():
        yield f"{name}: {record['status']}" + (f": {record['error']}" if "error" in record else "")
        found = record.get("found") or {}
        if name == "steps":
            yield from _steps(found)
        elif name == "attention":
            yield from (f"  {call:<12}{ms:>10.3f} ms" for call, ms in found.get("ms", {}).items())
        elif name == "graphs" and found:
            said = found["reason"] or "captured"
            yield f"  {said}; gradients of other tokens equal bit for bit: {'yes' if found['equal_bits'] else 'no'}"
            if "ms" in found:
                yield f"  eager {found['ms']['eager']:.2f} ms, replayed {found['ms']['replayed']:.2f} ms"
        elif name == "memory":
            for arm, peak in found.get("bytes", {}).items():
                mib, promised = peak["measured"] / 2**20, peak["promised"] / 2**20
                yield f"  {arm:<16}{mib:>10,.0f} MiB at the peak, promised {promised:,.0f}"
        elif name == "simulator":
            for size, row in found.get("sizes", {}).items():
                speed = f"{row['synops_per_s']:.3g} synaptic operations/s" if "synops_per_s" in row else ""
                yield f"  {size:<26}{sum(row['different'].values())} values differ from the CPU's; {speed}"
        elif name == "generation":
            for batch, row in found.get("batches", {}).items():
                speed = row["tokens_per_s"]
                yield f"  batch {batch}: float {speed['float']:,.0f} tokens/s, deployed {speed['deployed']:,.0f}"


def _steps(found: dict[str, Any]) -> Iterator[str]:
    rows = found.get("rows", {})
    if rows:
        yield f"  {'step':<36}{'ms':>9}{'time':>8}{'FLOPs':>8}{'MFU':>7}{'J/step':>8}"
    for name, row in rows.items():
        ratio = row.get("time", {}).get("median")
        joules = row.get("energy", {}).get("joules_per_step")
        yield (
            f"  {name:<36}{row['ms']:>9.2f}{_shown(ratio, 8, 3)}{_shown(row.get('flop_ratio'), 8, 3)}"
            f"{_shown(row['mfu'], 7, 2)}{_shown(joules, 8, 2)}"
        )
    if found.get("left_out"):
        yield f"  no time for: {', '.join(found['left_out'])}"


def _shown(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"
