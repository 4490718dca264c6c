"""What general compressors reach on a text: no law's irreducible loss can lie above it.

The entropy of a source is at most what any compressor needs for each byte of a long text of it. So a fit whose irreducible
loss lies above that has not found it.
"""

from __future__ import annotations

import bz2
import lzma
import math
from pathlib import Path


def compressed_nats(path: Path) -> dict[str, float]:
    """Nats a byte that bz2 and xz (preset 9, extreme) need for the file. Raises ValueError for an empty one."""
    text = path.read_bytes()
    if not text:
        raise ValueError(f"{path} is empty: nothing can be compressed")
    sizes = {"bz2": len(bz2.compress(text, 9)), "xz": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * math.log(2) * size / len(text) for name, size in sizes.items()}
