"""Settings of which weights are updated."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_update.weights.places import POLICIES

KINDS = ("all", "layers", "blocks", "block_columns", "lora")
SIGNS = ("sign", "sign8")
INACTIVE = ("frozen", *SIGNS)


@dataclass
class SubsetConfig:
    """Choice of active weights. Raises ValueError for a fraction outside (0, 1], an unknown kind or policy."""

    name: str = "all"
    kind: str = "all"
    """"all" | "layers": whole blocks of the Transformer | "blocks": row strips of every matrix | "block_columns" | "lora":
    low-rank factors beside frozen matrices (lowrank.py), by autograd and without gates that look into the model."""
    active_fraction: float = 1.0
    active_layers: int = 0
    """Kind "layers": how many; 0 takes `active_fraction` of them, at least one."""
    policy: str = "rotate"
    """"rotate" | "random" | "energy": mean squared gradient when last active | "fisher": its running mean | "surprise": its
    mean weighted by how surprising the batches were; or a name given to `register_subset_policy`."""
    explore: float = 0.25
    """Share of the choices of scored policies that go to what was inactive for longest; at 0 they may never move on."""
    change_every_steps: int = 100
    """How long a choice stays."""
    until: float = 1.0
    """Share of the budget after which everything is active."""
    block_rows: int = 16
    """Granularity of strips, in rows or columns; 128 suits a GPU."""
    strips: int = 1
    """Strips for each matrix, of equal length."""
    inactive: str = "frozen"
    """"frozen" | "sign": moved by the sign of their gradient, which is then formed everywhere, without moments (FRUGAL)
    | "sign8": the same moves, but once a matrix's gradient is formed only its signs are kept, a byte each. Scored policies
    see nothing of them, and clipping does not count them."""
    look_every_turns: int = 0
    """Every so many turns the gradient of inactive strips is formed too, read and thrown away, so that scored policies know
    them; 0 never does. It costs what it costs: the step's shape says so to the clock."""
    look_steps: int = 4
    """Steps over which one look is spread: each forms as large a share of the inactive gradient."""
    train_embeddings: bool = True
    """Embedding, head and final norm stay active; with kind "layers" the backward then runs to the bottom."""
    embedding_strips: bool = False
    """Embedding and head are active in strips of their width, with kinds "blocks" and "block_columns"."""
    rank: int = 8
    """Width of LoRA's factors, with kind "lora"."""
    rank_scale: float = 2.0
    """Factor on the product of LoRA's factors: alpha / rank."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"subset.kind = {self.kind!r}: one of {', '.join(KINDS)}")
        if self.policy not in POLICIES:
            raise ValueError(f"subset.policy = {self.policy!r}: one of {', '.join(sorted(POLICIES))}")
        if self.inactive not in INACTIVE:
            raise ValueError(f"subset.inactive = {self.inactive!r}: one of {', '.join(INACTIVE)}")
        if not 0 < self.active_fraction <= 1:
            raise ValueError(f"subset.active_fraction = {self.active_fraction}: must lie in (0, 1]")
        for field in ("explore", "until"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"subset.{field} = {getattr(self, field)}: must lie in [0, 1]")
        for field in ("change_every_steps", "block_rows", "strips", "look_steps"):
            if getattr(self, field) < 1:
                raise ValueError(f"subset.{field} = {getattr(self, field)}: must be at least 1")
        if self.active_layers < 0 or self.look_every_turns < 0:
            raise ValueError("subset.active_layers and subset.look_every_turns must not be negative")
        if self.rank < 1 or self.rank_scale <= 0:
            raise ValueError(f"subset.rank = {self.rank}, rank_scale = {self.rank_scale}: at least 1, and above 0")
        if self.kind in ("all", "lora") and self.active_fraction != 1.0:
            raise ValueError("subset.active_fraction below 1 needs subset.kind = layers, blocks or block_columns")
        if self.active_layers and self.kind != "layers":
            raise ValueError(f"subset.active_layers = {self.active_layers} needs subset.kind = layers, not {self.kind}")
        if self.look_every_turns and self.look_steps >= self.change_every_steps:
            raise ValueError(
                f"subset.look_steps = {self.look_steps} must be below subset.change_every_steps = {self.change_every_steps}"
            )

    @property
    def scored(self) -> bool:
        """Whether `Subset.observe` has a use."""
        return self.kind not in ("all", "lora") and self.policy not in ("rotate", "random")
