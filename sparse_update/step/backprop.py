"""The backward of a sparse step: a gradient at the kept sequences and rows travels down, block by block.

Shape letters: B batch, T token, S kept sequence, R kept row, P token that goes through, D width, H head, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_update.step import blocks as b
from sparse_update.step.draw import draw
from sparse_update.step.forward import Forward, Kept, Saved, Weights, fused, positions
from sparse_update.step.gradients import Gradients
from sparse_update.step.plan import Chosen, StepPlan
from sparse_update.transformer import Packing


class Backward:
    """The backward of one step: `g` at the kept sequences and rows travels down, `gradients` collects."""

    def __init__(
        self,
        forward: Forward,
        kept: Kept,
        plan: StepPlan,
        chosen: Chosen,
        gradients: Gradients,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        bypass_BR: Tensor | None,
        skip: frozenset[tuple[int, str]],
        weight_B: Tensor | None,
        generator: torch.Generator | None,
        packing: Packing | None = None,
    ) -> None:
        self.model, self.run, self.forward = forward.model, forward.run, forward
        self.kept, self.plan, self.gradients = kept, plan, gradients
        self.tokens_BT, self.targets_BT, self.bypass_BR = tokens_BT, targets_BT, bypass_BR
        self.skip, self.weight_B, self.generator, self.weight = skip, weight_B, generator, chosen.weight
        self.sequences_S, self.rows_SR = chosen.sequences_S, chosen.rows_SR
        self.heads, self.eps, self.square = forward.shape
        self.cos, self.sin = forward.tables(tokens_BT.shape[1], packing)
        self.packing = packing
        self.segment_BT: Tensor | None = None
        """Of the positions that went through the block at hand: which text they are of; None for one text each."""
        self.norms_LS: Tensor | None = None
        """Filled on the way down, see `SparseStep`."""
        self.others: tuple[Tensor, Tensor] | None = None
        """The kept rows and, beside them, the positions that are not kept."""
        self.place_S: Tensor | None = None
        """Where the sequences that are left stand among those that `choose` kept; None before the first draw."""

    def go(self) -> None:
        model, active, hold = self.model, self.gradients.active, self.forward.hold
        g = self._head()
        middle = self.plan.middle(len(model.blocks))
        counts = self.plan.kept_sequences(len(self.tokens_BT))
        if self.plan.sample or "block_norms" in self.plan.want:
            self.norms_LS = g.new_zeros(len(model.blocks), len(g))
        for index in range(len(model.blocks) - 1, active.lowest_block - 1, -1):
            if self.norms_LS is not None:
                g = self._draw(g, index, counts[index] if self.plan.sample else len(g))
            saved = self.kept.saved[index]
            assert saved is not None
            if hold is not None:
                self.kept.weights[index] = self.forward.gathered(model.blocks[index])  # type: ignore[arg-type]
            at = positions(self.bypass_BR, middle, index)
            if self.packing is not None:
                whole = self.packing.segment_BT
                self.segment_BT = whole if at is None or self.plan.bypass_keys else whole.gather(1, at)
            if at is not None and self.sequences_S is not None:
                at = at[self.sequences_S]
            if at is not None:
                g = (self._passed_keys if self.plan.bypass_keys else self._passed)(index, g, saved, at)
            elif self.rows_SR is not None and self.plan.rows_exact:
                g = self._exact(index, g, saved)
            else:
                g = self._block(index, g, saved, self.rows_SR, None, None)
            self.kept.saved[index] = None
            if hold is not None:
                self.kept.weights[index] = None
                hold.leave(model.blocks[index])
        if self.gradients.wants("embed.weight"):
            tokens = b.take(self.tokens_BT[..., None], self.sequences_S, self.rows_SR)
            self.gradients.embedding(g, tokens, tuple(model.embed.weight.shape))  # type: ignore[arg-type]
        if hold is not None:
            hold.leave(model)

    def _weights(self, index: int) -> Weights:
        found = self.kept.weights[index]
        assert found is not None
        return found

    def _head(self) -> Tensor:
        f, model, gradients = self.kept, self.model, self.gradients
        g, dlogits, final, dgain = self.run(
            b.head_backward, f.x, f.rstd, f.final, f.logits, f.lse, self.targets_BT, self._scale(), model.norm.weight,
            f.head, self.sequences_S, self.rows_SR,
        )  # fmt: skip
        gradients.weight("head.weight", dlogits, final)
        gradients.vector("norm.weight", dgain)
        return g

    def _scale(self) -> Tensor:
        """What each kept token's loss is multiplied with: () or (S, R or 1, 1)."""
        tokens, weight = self.tokens_BT, self.weight
        count = len(tokens) if self.sequences_S is None else len(self.sequences_S)
        length = tokens.shape[1] if self.rows_SR is None else self.rows_SR.shape[1]
        wide = self.kept.lse.dtype
        if weight is None and self.weight_B is None:
            return torch.full((), 1 / (count * length), dtype=wide, device=tokens.device)
        scale = torch.full((count, 1), 1 / tokens.numel(), dtype=wide, device=tokens.device)
        if weight is not None:
            scale = scale * (weight if weight.dim() == 2 else weight[:, None]).to(wide)
        if self.weight_B is not None:
            mine = self.weight_B if self.sequences_S is None else self.weight_B[self.sequences_S]
            scale = scale * mine[:, None].to(wide)
        return scale[..., None]

    def _draw(self, g: Tensor, index: int, count: int) -> Tensor:
        """Keep `count` sequences of g, scaled by 1/p: its expectation stays."""
        assert self.norms_LS is not None
        norm_S = torch.linalg.vector_norm(g.flatten(1), dim=1)
        if self.place_S is None:
            self.norms_LS[index] = norm_S
        else:
            self.norms_LS[index, self.place_S] = norm_S
        if count >= len(g):
            return g
        kept, inverse = draw(norm_S, count, self.generator)
        self.place_S = kept if self.place_S is None else self.place_S[kept]
        self.sequences_S = kept if self.sequences_S is None else self.sequences_S[kept]
        if self.rows_SR is not None:
            self.rows_SR = self.rows_SR[kept]
        return g[kept] * inverse.to(g.dtype)[:, None, None]

    # one block

    def _block(
        self, index: int, g: Tensor, s: Saved, rows_SR: Tensor | None, at: Tensor | None, valid_SR: Tensor | None
    ) -> Tensor:
        """`rows_SR`: rows of what the forward of this block saw; `at`: these tokens' positions where not all went
        through."""
        g = self._mlp(index, g, s, rows_SR)
        if (index, "attn") in self.skip:
            return g
        place = rows_SR if at is None else at
        cos, sin = (b.table_at(table, self.sequences_S, place) for table in (self.cos, self.sin))
        w, sequences, name = self._weights(index), self.sequences_S, f"blocks.{index}."
        matrices = [f"{name}attn.{m}.weight" for m in "qkvo"]
        factors = self.gradients.wants(*matrices, name + "norm1.weight")
        if s.weights_BHTT is None:
            g_below, mixed, dqkv, n, dgain = self._fused(g, s, w, cos, sin, rows_SR, valid_SR, factors)
        else:
            g_below, mixed, dqkv, n, dgain = self.run(
                b.attention_backward, g, s.x_BTD, s.rstd1_BT1, s.q_BHTK, s.k_BHTK, s.v_BHTK, s.weights_BHTT, s.mixed_BTD,
                w.gain1, w.qkv, w.o, cos, sin, sequences, rows_SR, valid_SR, factors,
            )  # fmt: skip
        if not factors:
            return g_below
        sampled = self.gradients.sample(g) if self.gradients.wants(*matrices) else None
        self.gradients.weight(name + "attn.o.weight", g, mixed, sampled)
        self.gradients.joined(matrices[:3], dqkv, n, sampled)
        self.gradients.vector(name + "norm1.weight", dgain)
        return g_below

    def _mlp(self, index: int, g: Tensor, s: Saved, rows_SR: Tensor | None) -> Tensor:
        if (index, "mlp") in self.skip:
            return g
        w, name = self._weights(index), f"blocks.{index}.mlp."
        factors = self.gradients.wants(name + "fc1.weight", name + "fc2.weight", f"blocks.{index}.norm2.weight")
        g_below, act, dpre, n, dgain = self.run(
            b.mlp_backward, g, s.middle_BTD, s.rstd2_BT1, s.pre_BTF, w.gain2, w.fc1, w.fc2, self.sequences_S, rows_SR,
            self.square, factors,
        )  # fmt: skip
        if not factors:
            return g_below
        sampled = self.gradients.sample(g) if self.gradients.wants(name + "fc1.weight", name + "fc2.weight") else None
        self.gradients.weight(name + "fc2.weight", g, act, sampled)
        self.gradients.weight(name + "fc1.weight", dpre, n, sampled)
        self.gradients.vector(f"blocks.{index}.norm2.weight", dgain)
        return g_below

    def _fused(
        self,
        g: Tensor,
        s: Saved,
        w: Weights,
        cos: Tensor,
        sin: Tensor,
        rows_SR: Tensor | None,
        valid_SR: Tensor | None,
        factors: bool,
    ) -> tuple[Tensor, ...]:
        """Attention backward after SDPA: its own backward for whole sequences, weights formed anew for kept rows."""
        sequences, lse = self.sequences_S, s.lse_BHT
        dmixed = self.run(b.out_backward, g, w.o, self.heads)
        heads = (s.q_BHTK.detach(), s.k_BHTK.detach(), s.v_BHTK.detach())
        if rows_SR is None:
            dq, dk, dv = _sdpa_backward(dmixed, heads, s, sequences, self._segment())
        elif lse is not None and valid_SR is None:
            others = self._others(rows_SR, heads[1].shape[2])
            dq, dk, dv = self._rows(dmixed, heads, s.mixed_BTD, lse, rows_SR, others)
        else:
            q = b.take_heads(heads[0], sequences, rows_SR)
            k, v = (b.take_heads(t, sequences, None) for t in heads[1:])
            weights = self.run(b.scores_to_weights, q, k, b.reach(rows_SR, k.shape[2], self._segment()))
            dq, dk, dv = self.run(b.mix_backward, dmixed, q, k, v, weights, rows_SR)
        below = self.run(
            b.in_backward,
            g,
            dq,
            dk,
            dv,
            s.x_BTD,
            s.rstd1_BT1,
            w.gain1,
            w.qkv,
            cos,
            sin,
            sequences,
            rows_SR,
            valid_SR,
            factors,
        )
        return below[0], b.take(s.mixed_BTD, sequences, rows_SR) if factors else None, *below[1:]

    def _segment(self) -> Tensor | None:
        """The same, of the sequences that are left."""
        return self.segment_BT if self.segment_BT is None or self.sequences_S is None else self.segment_BT[self.sequences_S]

    def _rows(
        self,
        dmixed: Tensor,
        heads: tuple[Tensor, Tensor, Tensor],
        mixed_BTD: Tensor,
        lse_BHT: Tensor,
        rows_SR: Tensor,
        others_SP: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`rows_backward`, on a CPU for a few sequences at a time: what it writes between products stays in the cache."""
        count, sequences = len(rows_SR), self.sequences_S
        scores = dmixed.shape[1] * dmixed.shape[2] * heads[1].shape[2]
        size = together(count, scores) if dmixed.device.type == "cpu" else count
        found = []
        for start in range(0, count, size):
            here = slice(start, start + size)
            saved: tuple[Tensor, ...] = (*heads, mixed_BTD, lse_BHT)
            if sequences is None and size < count:
                saved = tuple(t[here] for t in saved)
            mine, segment = (None, None) if sequences is None else (sequences[here], self.segment_BT)
            if sequences is None and self.segment_BT is not None:
                segment = self.segment_BT[here]
            found.append(self.run(b.rows_backward, dmixed[here], *saved, mine, rows_SR[here], others_SP[here], segment))
        if len(found) == 1:
            return tuple(found[0])
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]

    def _others(self, rows_SR: Tensor, length: int) -> Tensor:
        """The positions that are not among the rows, (S, T - R), ascending; the same tensor for all blocks."""
        if self.others is None or self.others[0] is not rows_SR:
            left = torch.ones(len(rows_SR), length, dtype=torch.int8, device=rows_SR.device).scatter_(1, rows_SR, 0)
            order = left.argsort(dim=1, descending=True, stable=True)
            self.others = rows_SR, order[:, : length - rows_SR.shape[1]].contiguous()
        return self.others[1]

    # tokens that passed the block by

    def _passed(self, index: int, g: Tensor, s: Saved, at_SP: Tensor) -> Tensor:
        """A block that only the tokens `at` went through; the gradient of the others stays what it is."""
        if self.rows_SR is None or self.plan.rows_exact:
            return b.put_rows(g, at_SP, self._block(index, b.take(g, None, at_SP), s, None, at_SP, None))
        # rows that are kept and went through, in front: a static number of slots, some of which may hold none
        place = torch.searchsorted(at_SP, self.rows_SR).clamp_(max=at_SP.shape[1] - 1)
        through = at_SP.gather(1, place) == self.rows_SR
        slots = through.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : min(at_SP.shape[1], g.shape[1])]
        valid, local = through.gather(1, slots), place.gather(1, slots)
        mine = b.take(g, None, slots) * valid[..., None]
        below = self._block(index, mine, s, local, self.rows_SR.gather(1, slots), valid)
        return b.put_rows(g, slots, torch.where(valid[..., None], below, b.take(g, None, slots)))

    def _passed_keys(self, index: int, g: Tensor, s: Saved, at_SP: Tensor) -> Tensor:
        mine = self._mlp(index, b.take(g, None, at_SP), s, None)
        return self._keys(index, mine, g, s, at_SP, s.q_BHTK, s.weights_BHTT, s.mixed_BTD)

    def _exact(self, index: int, g: Tensor, s: Saved) -> Tensor:
        """The last block under `rows_exact`: from here on all rows carry a gradient."""
        rows_SR, self_rows = self.rows_SR, self.sequences_S
        assert rows_SR is not None
        g = self._mlp(index, g, s, rows_SR)
        self.rows_SR = None
        base = g.new_zeros(len(g), self.tokens_BT.shape[1], g.shape[-1])
        q = b.take_heads(s.q_BHTK.detach(), None, None)
        weights = s.weights_BHTT
        if weights is None:
            q_rows = b.take_heads(q, self_rows, rows_SR)
            k = b.take_heads(s.k_BHTK.detach(), self_rows, None)
            weights = self.run(b.scores_to_weights, q_rows, k, b.reach(rows_SR, k.shape[2], self._segment()))
        else:
            q_rows, weights = b.take_heads(q, self_rows, rows_SR), b.take_heads(weights, self_rows, rows_SR)
        mixed = b.take(s.mixed_BTD, self_rows, rows_SR)
        return self._keys(index, g, base, s, rows_SR, q_rows, weights, mixed, gathered=True)

    def _keys(
        self,
        index: int,
        g: Tensor,
        base: Tensor,
        s: Saved,
        at_SP: Tensor,
        q: Tensor,
        weights: Tensor | None,
        mixed: Tensor,
        gathered: bool = False,
    ) -> Tensor:
        """Attention whose queries stand at some rows and whose keys and values stand everywhere."""
        assert weights is not None
        if (index, "attn") in self.skip:
            return b.put_rows(base, at_SP, g)
        sequences = self.sequences_S
        if not gathered:
            q, weights = b.take_heads(q, sequences, None), b.take_heads(weights, sequences, None)
            mixed = b.take(mixed, sequences, None)
        w, name = self._weights(index), f"blocks.{index}.attn."
        g_below, dq, n_rows, dkv, n, dgain = self.run(
            b.keys_backward, g, base, b.take(s.x_BTD, sequences, None), b.take(s.rstd1_BT1, sequences, None), q,
            b.take_heads(s.k_BHTK.detach(), sequences, None), b.take_heads(s.v_BHTK.detach(), sequences, None), weights,
            w.gain1, w.qkv, w.o, *(b.table_at(table, sequences, None) for table in (self.cos, self.sin)), at_SP,
        )  # fmt: skip
        gradients = self.gradients
        sampled = gradients.sample(g) if gradients.wants(name + "q.weight", name + "o.weight") else None
        gradients.weight(name + "o.weight", g, mixed, sampled)
        gradients.weight(name + "q.weight", dq, n_rows, sampled)
        sampled = gradients.sample(dkv) if gradients.wants(name + "k.weight", name + "v.weight") else None
        gradients.joined([name + "k.weight", name + "v.weight"], dkv, n, sampled)
        gradients.vector(f"blocks.{index}.norm1.weight", dgain)
        return g_below


CACHED = 1 << 19
"""Entries of a tensor of scores that stay in a core's second-level cache between two products: 2 MiB of float32."""


def together(count: int, entries: int) -> int:
    """How many of so many sequences are worked on at a time, each with so many scores: a divisor, so that all parts have
    one shape."""
    return max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * entries <= CACHED))


def _sdpa_backward(
    dmixed: Tensor,
    heads: tuple[Tensor, Tensor, Tensor],
    s: Saved,
    sequences_S: Tensor | None,
    segment_ST: Tensor | None,
) -> tuple[Tensor, ...]:
    if sequences_S is None:
        assert s.graph is not None
        return torch.autograd.grad(s.graph, (s.q_BHTK, s.k_BHTK, s.v_BHTK), dmixed)
    q, k, v = (_sequences(t, sequences_S) for t in heads)
    lse, graph = s.lse_BHT, s.graph
    if lse is not None and graph is not None and segment_ST is None:
        out = _sequences(graph.detach(), sequences_S)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return tuple(backward(dmixed, q, k, v, out, lse[sequences_S], 0.0, True))
    with torch.enable_grad():
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        out = fused(q, k, v, segment_ST)
    return torch.autograd.grad(out, (q, k, v), dmixed)


def _sequences(x_BHTK: Tensor, sequences_S: Tensor) -> Tensor:
    """Sequences of a tensor laid out as (B, T, H, K), in the same layout."""
    return x_BHTK.transpose(1, 2).index_select(0, sequences_S).transpose(1, 2)
