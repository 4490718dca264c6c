"""Samples outputs of the Transformer: rows of a tile that are refilled as they end.

A prompt is read once for all of its outputs. An output takes a row of the tile until its stop token or its limit; then the
row goes to the next output. The random number of a token follows from (seed, prompt's number, sample, position) alone
(`counter.py`), so that an output is the same in any batch, order and process.

Two engines do it. The loops in C (`compiled/`; float32 on a CPU with a C compiler) sum every number of a row in an order of
its own and compute nothing that is not needed. Plain torch computes tiles, whose shapes keep to multiples at which the
products of a CPU's library give a row the same bits whatever else is computed (a test looks); where a library does not keep
to that, `GenerateConfig.fixed` makes every shape one of the settings' and the prompt's own length.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_update.clock.component import Component
from sparse_update.generation import uses
from sparse_update.generation.compiled import engine
from sparse_update.generation.counter import uniforms
from sparse_update.generation.counting import needed_flops
from sparse_update.generation.decoder import Kept, Weights, next_logits, packed, read_prompts
from sparse_update.generation.drawing import draw
from sparse_update.generation.found import Found
from sparse_update.generation.settings import GenerateConfig, GenerationError, Outputs
from sparse_update.tasks.encoding import PromptTooLong
from sparse_update.transformer import ModelConfig, Transformer

PROMPTS = 32
"""Prompts that are read at once, at most."""
LEAST_ROWS, PROMPT_STEP, CACHE_STEP, CACHE_LEAST = 8, 16, 32, 64
"""Rows of any product, at least; what prompts are padded to a multiple of; what caches are, and their least length. With
fewer rows or shorter sums, products of common libraries take other ways, with other roundings."""


class Sampler:
    """Samples from a model as it is at each call. `uses` and `components` put it on a run's clock (`RunClock.add`).

    Args:
        stop: token numbers that end an output.
    """

    def __init__(self, model: Transformer, cfg: GenerateConfig, stop: Iterable[int] = ()) -> None:
        self.model, self.cfg = model, cfg
        vocab = model.cfg.vocab_size
        self.stop_V = np.zeros(vocab, dtype=bool)
        for token in stop:
            if not 0 <= token < vocab:
                raise GenerationError(f"stop token {token}: the model has tokens 0 to {vocab - 1}")
            self.stop_V[token] = True
        self.uses: Counter[str] = Counter()
        """Tiles and readings of prompts that ran, by key of the table of component times."""
        self._step: Callable[..., Tensor] = next_logits
        if cfg.compiled:
            self._step = torch.compile(next_logits, fullgraph=True, dynamic=False)
        self._rooms: list[engine.Room] = []
        if cfg.engine == "c" and (why := engine.why_not(model)) is not None:
            raise GenerationError(f"generate.engine = c cannot sample from this model: {why}; take auto or torch")

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[np.ndarray | Sequence[int]], ids: Sequence[int] | None = None, first: int = 0
    ) -> Outputs:
        """`cfg.n` outputs of each prompt.

        Args:
            prompts: token numbers, at least one each.
            ids: the prompts' numbers, modulo 2^64, such as `Instance.id`. Without them a prompt's number is a hash of its
                tokens, so that a prompt that comes twice has the same outputs twice.
            first: number of the first sample: with 4, those that would come behind four others.

        Raises:
            PromptTooLong: a prompt with `cfg.new_tokens` behind it does not fit the model's context.
            GenerationError: no prompt, an empty one, tokens that the model has not, ids of another number, logits that are
                NaN.
        """
        rows, lengths = self._checked(prompts)
        cfg, count = self.cfg, len(prompts) * self.cfg.n
        if ids is not None and len(ids) != len(prompts):
            raise GenerationError(f"{len(ids)} ids for {len(prompts)} prompts: one each is needed")
        numbers = [_number(row) for row in rows] if ids is None else [int(number) % 2**64 for number in ids]
        prompt_R = np.repeat(np.array(numbers, dtype=np.uint64), cfg.n)
        sample_R = np.tile(first + np.arange(cfg.n), len(prompts))
        uniform_RN = np.full((count, cfg.new_tokens), 0.5)
        if cfg.temperature:
            uniform_RN = uniforms(cfg.seed, prompt_R, sample_R, cfg.new_tokens)
        found = Found(count, cfg.new_tokens, uniform_RN, self.stop_V)
        weights, ran = packed(self.model), Counter[str]()
        if self._by_rows and engine.why_not(self.model) is None:
            engine.sample(weights, self.shape, cfg, rows, found, self._rooms)
        else:
            _Run(self, weights, rows, found, ran).run()
        return self._outputs(found, lengths, ran)

    @property
    def shape(self) -> ModelConfig:
        """Of the model as it is: it may have grown."""
        return replace(self.model.cfg, layers=len(self.model.blocks))

    @property
    def _by_rows(self) -> bool:
        """Whether what is needed is computed, and charged, row by row. It follows from settings and weights alone, so that
        the clock is the same with a compiler and without."""
        like = self.model.embed.weight
        return (
            self.cfg.engine != "torch" and not self.cfg.fixed and like.device.type == "cpu" and like.dtype == torch.float32
        )

    def _checked(self, prompts: Sequence[np.ndarray | Sequence[int]]) -> tuple[list[np.ndarray], list[int]]:
        if not len(prompts):
            raise GenerationError("no prompt: at least one is needed")
        limit, vocab = self.model.cfg.context, self.model.cfg.vocab_size
        rows = [np.asarray(prompt, dtype=np.int64).reshape(-1) for prompt in prompts]
        for number, row in enumerate(rows):
            if not len(row):
                raise GenerationError(f"prompt {number} is empty: a model needs a token to go on from")
            if row.min() < 0 or row.max() >= vocab:
                bad = int(row[(row < 0) | (row >= vocab)][0])
                raise GenerationError(f"prompt {number} holds token {bad}: the model has tokens 0 to {vocab - 1}")
            if len(row) + self.cfg.new_tokens > limit:
                raise PromptTooLong(
                    f"prompt {number} has {len(row)} tokens, and {self.cfg.new_tokens} new ones do not fit a context of "
                    f"{limit}: cut the prompt, set generate.new_tokens = {max(0, limit - len(row))} or less, or take a "
                    "model with a longer context"
                )
        return rows, [len(row) for row in rows]

    def _outputs(self, found: Found, lengths: list[int], ran: Counter[str]) -> Outputs:
        cfg, n = self.shape, self.cfg.n
        made = [found.lengths_R[number * n : (number + 1) * n].tolist() for number in range(len(lengths))]
        needed = sum(needed_flops(cfg, length, each) for length, each in zip(lengths, made, strict=True))
        flops = sum(count * uses.flops_of(cfg, key) for key, count in ran.items()) if ran else needed
        self.uses.update(uses.by_rows(lengths, made) if self._by_rows else ran)
        logp_RN, drawn_RN, entropy_RN = found.values_3RN
        rest = found.stopped_R, n, flops, needed
        return Outputs(found.tokens_RN, found.lengths_R, logp_RN, drawn_RN, entropy_RN, *rest)

    # the clock

    def components(self) -> Mapping[str, Component]:
        """Everything that was used so far, by key, as a table of component times prices or measures it."""
        return {key: uses.component(self.shape, key, partial(self._probe, key)) for key in self.uses}

    def _probe(self, key: str) -> Callable[[], None]:
        """One use of a component, to be timed; of a row's, as many as `uses.component` says."""
        what, rows, size = uses.parsed(key)
        model, device = self.model, self.model.embed.weight.device
        if what in ("row", "read") and engine.why_not(model) is None:
            size = min(size, model.cfg.context)
            held = engine.Packed(packed(model), self.shape)
            return engine.probe(held, self.cfg, uses.TIMED_ROWS if what == "row" else 0, size)
        if what == "row":
            rows, size = uses.TIMED_ROWS, min(size, model.cfg.context)
        if what in ("prompts", "read"):
            tokens = torch.zeros(rows, size, dtype=torch.int64, device=device)
            lengths = torch.full((rows,), size, device=device)

            def read() -> None:
                with torch.no_grad():
                    read_prompts(model, tokens, lengths)

            return read
        kept, weights = Kept.empty(model, rows, size), packed(model)
        places = torch.full((rows,), size - 1, device=device)
        uniform = torch.full((rows,), 0.5, dtype=torch.float64, device=device)

        def step() -> None:
            with torch.no_grad():
                logits = self._step(weights, kept, places * 0, places, model.cfg.activation, model.cfg.norm_eps)
                draw(logits, uniform, self.cfg.temperature, self.cfg.top_p)

        return step

    def state_dict(self) -> dict[str, Any]:
        """What it has used; what it samples next depends on nothing that it holds."""
        return {"sampler_uses": dict(self.uses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.uses = Counter({str(key): int(value) for key, value in state["sampler_uses"].items()})


class _Run:
    """One call of `sample`: outputs wait in a queue, short prompts first, for rows of the tile.

    The tile is as small as what is left allows, and attends to as many positions as its longest row has; with static
    shapes it always has `tile_rows` rows and the context's positions.
    """

    def __init__(self, sampler: Sampler, weights: Weights, rows: list[np.ndarray], found: Found, ran: Counter[str]) -> None:
        self.sampler, self.weights, self.rows, self.found, self.ran = sampler, weights, rows, found, ran
        self.model, self.cfg = sampler.model, sampler.cfg
        self.device = self.model.embed.weight.device
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        self.unread = deque(order)
        self.queue = deque((number, number * self.cfg.n + sample) for number in order for sample in range(self.cfg.n))
        longest = max(map(len, rows))
        self.limit = (
            self.model.cfg.context
            if self.cfg.fixed
            else min(
                self.model.cfg.context,
                _up(max(_up(longest, PROMPT_STEP), longest + self.cfg.new_tokens), CACHE_STEP, CACHE_LEAST),
            )
        )
        self.size = self.cfg.tile_rows if self.cfg.fixed else tile_size(len(self.queue), self.cfg.tile_rows)
        self.kept = Kept.empty(self.model, self.size, self.limit)
        like = self.model.embed.weight
        self.logits_SV = torch.zeros(self.size, self.model.cfg.vocab_size, dtype=like.dtype, device=self.device)
        self.row_S = np.full(self.size, -1)  # the output that each row of the tile holds, -1 for none
        self.made_S, self.place_S, self.token_S = (np.zeros(self.size, dtype=np.int64) for _ in range(3))
        self.read: dict[int, tuple[int, Tensor, Kept]] = {}  # prompt -> its place among those read with it, what came of it

    def run(self) -> None:
        cfg = self.model.cfg
        while True:
            while self.queue and (free := np.flatnonzero(self.row_S < 0)).size:
                self._fill(free)
            live = np.flatnonzero(self.row_S >= 0)
            if not live.size:
                return
            if not self.cfg.fixed and 2 * live.size <= self.size and self.size > LEAST_ROWS:
                live = self._shrink(live)
            positions = (
                self.limit if self.cfg.fixed else min(self.limit, _up(self.place_S.max() + 1, CACHE_STEP, CACHE_LEAST))
            )
            token_S, place_S = torch.from_numpy(self.token_S), torch.from_numpy(self.place_S)
            self.logits_SV = self.sampler._step(
                self.weights, self.kept.first(positions), token_S.to(self.device), place_S.to(self.device), cfg.activation,
                cfg.norm_eps,
            )  # fmt: skip
            self.ran[uses.token_key(self.size, positions)] += 1
            self.place_S[live] += 1
            self._take(live)
            self.place_S[self.row_S < 0] = 0

    def _shrink(self, live: np.ndarray) -> np.ndarray:
        """Half the tile, as often as the live rows fit."""
        self.size = tile_size(live.size, self.size)
        keep = np.concatenate((live, np.flatnonzero(self.row_S < 0)))[: self.size]
        index = torch.from_numpy(keep).to(self.device)
        self.kept = Kept([k[index] for k in self.kept.keys], [v[index] for v in self.kept.values])
        self.row_S, self.made_S = self.row_S[keep], self.made_S[keep]
        self.place_S, self.token_S = self.place_S[keep], self.token_S[keep]
        return np.flatnonzero(self.row_S >= 0)

    def _fill(self, free: np.ndarray) -> None:
        """The next outputs into free rows, with their first token."""
        taken = [self.queue.popleft() for _ in range(min(len(self.queue), free.size))]
        slots = free[: len(taken)]
        groups: dict[int, list[tuple[int, int]]] = {}
        for (number, _), slot in zip(taken, slots, strict=True):
            while number not in self.read:
                self._read()
            groups.setdefault(id(self.read[number][2]), []).append((number, int(slot)))
        for group in groups.values():
            _, logits_PV, read = self.read[group[0][0]]
            source = torch.tensor([self.read[number][0] for number, _ in group], device=self.device)
            target = torch.tensor([slot for _, slot in group], device=self.device)
            self.logits_SV[target] = logits_PV[source]
            for to, from_ in zip((*self.kept.keys, *self.kept.values), (*read.keys, *read.values), strict=True):
                to[target, :, : from_.shape[2]] = from_[source]
        done = {number for number, _ in taken} - {self.queue[0][0] if self.queue else -1}
        for number in done:
            del self.read[number]  # the queue has no other output of it
        self.row_S[slots] = [row for _, row in taken]
        self.made_S[slots] = 0
        self.place_S[slots] = [len(self.rows[number]) for number, _ in taken]
        self._take(slots)
        self.place_S[self.row_S < 0] = 0

    def _read(self) -> None:
        """Read the next few prompts."""
        width = self._width(self.unread[0])
        numbers: list[int] = []
        while self.unread and len(numbers) < PROMPTS and not (self.cfg.fixed and self._width(self.unread[0]) != width):
            numbers.append(self.unread.popleft())
        width = self._width(numbers[-1])
        count = PROMPTS if self.cfg.fixed else _up(len(numbers), LEAST_ROWS)
        tokens_PT = np.zeros((count, width), dtype=np.int64)
        lengths_P = np.ones(count, dtype=np.int64)
        for place, number in enumerate(numbers):
            tokens_PT[place, : len(self.rows[number])] = self.rows[number]
            lengths_P[place] = len(self.rows[number])
        logits_PV, read = read_prompts(
            self.model, torch.from_numpy(tokens_PT).to(self.device), torch.from_numpy(lengths_P).to(self.device)
        )
        self.ran[uses.prompt_key(count, width)] += 1
        self.read |= {number: (place, logits_PV, read) for place, number in enumerate(numbers)}

    def _width(self, number: int) -> int:
        """A prompt's padded length."""
        return min(self.model.cfg.context, _up(len(self.rows[number]), PROMPT_STEP))

    def _take(self, slots: np.ndarray) -> None:
        """Draw a token for these rows of the tile; those that end are given free."""
        uniform_S = np.full(self.size, 0.5)
        uniform_S[slots] = self.found.uniform_RN[self.row_S[slots], self.made_S[slots]]
        token_R, values_3R = draw(
            self.logits_SV, torch.from_numpy(uniform_S).to(self.device), self.cfg.temperature, self.cfg.top_p
        )
        tokens, values = token_R.cpu().numpy()[slots], values_3R.cpu().numpy()[:, slots]
        ended = self.found.keep(self.row_S[slots], self.made_S[slots], tokens, values)
        self.token_S[slots] = np.where(ended, 0, tokens)
        self.made_S[slots] += 1
        self.row_S[slots[ended]] = -1


def _up(value: int, step: int, least: int = 0) -> int:
    """The next multiple of `step`, `least` at least."""
    return max(least, -(-int(value) // step) * step)


def tile_size(rows: int, most: int) -> int:
    """The smallest of 8, 16, 32, ... that holds so many rows; `most` where that is less."""
    size = LEAST_ROWS
    while size < rows:
        size *= 2
    return min(size, most)


def _number(tokens: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(tokens.astype("<i8").tobytes(), digest_size=8).digest(), "little")
