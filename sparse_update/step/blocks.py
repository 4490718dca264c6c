"""One block of the Transformer, forward and backward written out: pure functions of tensors, each fit for torch.compile.

Products run in the dtype of the weights that are passed; the residual stream and its gradient keep their own, wider one. A
backward function takes saved activations of all B sequences and T tokens and gathers what it needs inside, so that the
gather fuses with what follows it. `g` is a gradient at the kept sequences and rows. Weight gradients are not formed here: a
backward
returns their two factors.

Shape letters: B batch, T token, S kept sequence, R kept row, D width, H head, K head width, F hidden width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_update.transformer import rotate


def take(x_BTN: Tensor, sequences_S: Tensor | None, rows_SR: Tensor | None) -> Tensor:
    """Sequences S and their rows R of (B, T, N) -> (S, R, N); None keeps all. Copies whole rows, in one pass."""
    if rows_SR is None:
        return x_BTN if sequences_S is None else x_BTN.index_select(0, sequences_S)
    batch, length, width = x_BTN.shape
    count, kept = rows_SR.shape
    if sequences_S is None:
        sequences_S = torch.arange(batch, device=rows_SR.device)
    flat = (rows_SR + length * sequences_S[:, None]).flatten()
    return x_BTN.reshape(batch * length, width).index_select(0, flat).view(count, kept, width)


def take_heads(x_BHTN: Tensor, sequences_S: Tensor | None, rows_SR: Tensor | None) -> Tensor:
    """The same along the token axis of every head: (B, H, T, N) -> (S, H, R, N)."""
    if rows_SR is None:
        return x_BHTN if sequences_S is None else x_BHTN.index_select(0, sequences_S)
    batch, heads, length, width = x_BHTN.shape
    count, kept = rows_SR.shape
    if x_BHTN.transpose(1, 2).is_contiguous():  # a token's heads side by side: one copy for them all
        return take(x_BHTN.transpose(1, 2).flatten(2), sequences_S, rows_SR).view(count, kept, heads, width).transpose(1, 2)
    if sequences_S is None:
        sequences_S = torch.arange(batch, device=rows_SR.device)
    head = sequences_S[:, None] * heads + torch.arange(heads, device=rows_SR.device)
    flat = (head[:, :, None] * length + rows_SR[:, None, :]).flatten()
    return x_BHTN.reshape(batch * heads * length, width).index_select(0, flat).view(count, heads, kept, width)


def put_rows(x_STD: Tensor, rows_SR: Tensor, value_SRD: Tensor) -> Tensor:
    """A copy of x with its rows R replaced."""
    return x_STD.scatter(1, rows_SR[..., None].expand(-1, -1, x_STD.shape[-1]), value_SRD.to(x_STD.dtype))


def add_rows(x_STD: Tensor, rows_SR: Tensor, value_SRD: Tensor) -> Tensor:
    """A copy of x with something added to its rows R."""
    return x_STD.scatter_add(1, rows_SR[..., None].expand(-1, -1, x_STD.shape[-1]), value_SRD.to(x_STD.dtype))


# root mean square norm


def normalise(x: Tensor, gain_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / rms(x) * gain in `dtype`, and 1 / rms(x)."""
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (x * rstd * gain_D).to(dtype), rstd


def normalise_backward(dn: Tensor, x: Tensor, rstd: Tensor, gain_D: Tensor) -> tuple[Tensor, Tensor]:
    """dx = rstd (g' - xhat mean(g' xhat)) with g' = dn gain, xhat = x rstd; and the gain's gradient, (D,)."""
    dn, xhat = dn.to(x.dtype), x * rstd
    product = dn * xhat
    scaled = dn * gain_D
    dx = rstd * (scaled - xhat * (product * gain_D).mean(-1, keepdim=True))
    return dx, product.flatten(0, 1).sum(0)


# attention


def attention_in(
    x_BTD: Tensor, gain_D: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float, tokens_first: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm, the three projections in one product with `qkv` (3 D, D), rotation -> 1 / rms, q, k, v (B, H, T, K).

    `tokens_first`: laid out in memory as (B, T, H, K), as fused attention takes and gives it; batched products want
    (B, H, T, K).
    """
    batch, length, width = x_BTD.shape
    n, rstd = normalise(x_BTD, gain_D, eps, qkv.dtype)
    q, k, v = F.linear(n, qkv).view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    parts = (rotate(q, cos, sin), rotate(k, cos, sin), v)
    if tokens_first:
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in parts)
    else:
        q, k, v = (t.contiguous() for t in parts)
    return rstd, q, k, v


def table_at(table: Tensor, sequences_S: Tensor | None, rows_SR: Tensor | None) -> Tensor:
    """Entries of a table of rotations at sequences S and rows R, to be broadcast with (S, H, R, K). The table is (T, N) for
    all sequences, or (B, 1, T, N)."""
    if table.dim() == 2:
        return table if rows_SR is None else table[rows_SR][:, None]
    return take_heads(table, sequences_S, rows_SR)


def reach(queries: Tensor, keys: int, segment_ST: Tensor | None = None) -> Tensor:
    """What a query may not see: True where the key's position lies behind its own, or in another text; positions (T,) or
    (S, R), `segment_ST`: number of the text of each position."""
    behind = torch.arange(keys, device=queries.device) > queries[..., None]
    if queries.dim() == 1:
        return behind if segment_ST is None else behind | others(segment_ST, segment_ST)
    return behind[:, None] if segment_ST is None else behind[:, None] | others(segment_ST.gather(1, queries), segment_ST)


def others(of_queries_SR: Tensor, of_keys_ST: Tensor) -> Tensor:
    """bool (S, 1, R, T): where a query and a key belong to different texts."""
    return (of_queries_SR[:, :, None] != of_keys_ST[:, None, :])[:, None]


def scores_to_weights(q_BHRK: Tensor, k_BHTK: Tensor, hidden: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) with the `hidden` entries left out, (B, H, R, T)."""
    scores = (q_BHRK * q_BHRK.shape[-1] ** -0.5) @ k_BHTK.transpose(-2, -1)
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)


def mix(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, segment_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Causal attention by explicit products, inside each text -> weights (B, H, T, T) and mixed values (B, T, D)."""
    length = q_BHTK.shape[2]
    weights = scores_to_weights(q_BHTK, k_BHTK, reach(torch.arange(length, device=q_BHTK.device), length, segment_BT))
    return weights, (weights @ v_BHTK).transpose(1, 2).flatten(2)


def block_rest(
    x_BTD: Tensor, mixed_BTD: Tensor, o: Tensor, gain_D: Tensor, fc1: Tensor, fc2: Tensor, eps: float, square: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output projection, residual, MLP -> residual between the two, its 1 / rms, fc1's output (B, T, F), block's output."""
    middle = x_BTD + F.linear(mixed_BTD, o)
    n, rstd = normalise(middle, gain_D, eps, fc1.dtype)
    pre = F.linear(n, fc1)
    hidden = F.relu(pre)
    return middle, rstd, pre, middle + F.linear(hidden * hidden if square else hidden, fc2)


def block_forward(
    x_BTD: Tensor,
    gain1_D: Tensor,
    qkv: Tensor,
    o: Tensor,
    gain2_D: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    square: bool,
    segment_BT: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """A whole block -> rstd1, q, k, v, weights, mixed, middle, rstd2, pre, out."""
    rstd1, q, k, v = attention_in(x_BTD, gain1_D, qkv, cos, sin, heads, eps)
    weights, mixed = mix(q, k, v, segment_BT)
    return rstd1, q, k, v, weights, mixed, *block_rest(x_BTD, mixed, o, gain2_D, fc1, fc2, eps, square)


def mlp_backward(
    g_SRD: Tensor,
    middle_BTD: Tensor,
    rstd_BT1: Tensor,
    pre_BTF: Tensor,
    gain_D: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    sequences_S: Tensor | None,
    rows_SR: Tensor | None,
    square: bool,
    factors: bool = True,
) -> tuple[Tensor | None, ...]:
    """-> g below the MLP; factors act (S, R, F) of fc2's gradient, dpre (S, R, F) and n (S, R, D) of fc1's; gain's
    gradient. Without `factors`, for frozen weights: g and Nones."""
    hidden = F.relu(take(pre_BTF, sequences_S, rows_SR))
    dact = g_SRD.to(fc2.dtype) @ fc2
    dpre = dact * (2 * hidden) if square else dact * (hidden > 0)
    middle, rstd = take(middle_BTD, sequences_S, rows_SR), take(rstd_BT1, sequences_S, rows_SR)
    dx, dgain = normalise_backward(dpre @ fc1, middle, rstd, gain_D)
    if not factors:
        return g_SRD + dx, None, None, None, None
    n = (middle * rstd * gain_D).to(fc1.dtype)
    return g_SRD + dx, hidden * hidden if square else hidden, dpre, n, dgain


def out_backward(g_SRD: Tensor, o: Tensor, heads: int) -> Tensor:
    """Gradient of the mixed values per head, (S, H, R, K)."""
    count, kept, width = g_SRD.shape
    return (g_SRD.to(o.dtype) @ o).view(count, kept, heads, width // heads).transpose(1, 2)


def mix_backward(
    dmixed_SHRK: Tensor, q_SHRK: Tensor, k_SHTK: Tensor, v_SHTK: Tensor, weights_SHRT: Tensor, rows_SR: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq (S, H, R, K), dk and dv: (S, H, T, K), or at the rows R alone where `rows_SR` is given."""
    scale = q_SHRK.shape[-1] ** -0.5
    weights = weights_SHRT
    slope = weights * (dmixed_SHRK @ v_SHTK.transpose(-2, -1))
    slope = (slope - weights * slope.sum(-1, keepdim=True)) * scale
    dq = slope @ k_SHTK
    if rows_SR is not None:
        columns = rows_SR[:, None, None, :].expand(-1, weights.shape[1], weights.shape[2], -1)
        weights, slope = weights.gather(3, columns), slope.gather(3, columns)
    return dq, slope.transpose(-2, -1) @ q_SHRK, weights.transpose(-2, -1) @ dmixed_SHRK


def rows_backward(
    dmixed_SHRK: Tensor,
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    mixed_BTD: Tensor,
    lse_BHT: Tensor,
    sequences_S: Tensor | None,
    rows_SR: Tensor,
    others_SP: Tensor,
    segment_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv at the rows R (S, H, R, K), from the logsumexp of the scores; `others_SP`: the positions not in R.

    Keys stand in the order R, then the others: what R's keys receive is then a slice of the weights, and no gather.
    """
    kept, scale = rows_SR.shape[1], q_BHTK.shape[-1] ** -0.5
    order_ST = torch.cat([rows_SR, others_SP], 1)
    q = take_heads(q_BHTK, sequences_S, rows_SR).contiguous()
    k = take_heads(k_BHTK, sequences_S, order_ST).contiguous()
    v = take_heads(v_BHTK, sequences_S, order_ST).contiguous()
    mixed = take(mixed_BTD, sequences_S, rows_SR).view(*q.transpose(1, 2).shape).transpose(1, 2)
    lse = take_heads(lse_BHT[..., None], sequences_S, rows_SR)
    dmixed = dmixed_SHRK.contiguous()
    moved = (dmixed.to(lse.dtype) * mixed).sum(-1, keepdim=True)  # the slope's mean under the weights
    hidden = order_ST[:, None, None, :] > rows_SR[:, None, :, None]
    if segment_BT is not None:
        segment_ST = segment_BT if sequences_S is None else segment_BT[sequences_S]
        hidden = hidden | others(segment_ST.gather(1, rows_SR), segment_ST.gather(1, order_ST))
    scores = (q * scale) @ k.transpose(-2, -1)
    weights = torch.where(hidden, 0.0, torch.exp(scores.to(lse.dtype) - lse))
    slope = (weights * ((dmixed @ v.transpose(-2, -1)).to(lse.dtype) - moved) * scale).to(q.dtype)
    weights = weights[..., :kept].to(q.dtype)
    return slope @ k, slope[..., :kept].transpose(-2, -1) @ q, weights.transpose(-2, -1) @ dmixed


def in_backward(
    g_SRD: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    x_BTD: Tensor,
    rstd_BT1: Tensor,
    gain_D: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    sequences_S: Tensor | None,
    rows_SR: Tensor | None,
    valid_SR: Tensor | None,
    factors: bool = True,
) -> tuple[Tensor | None, ...]:
    """-> g below the block; factors dqkv (S, R, 3 D) and n (S, R, D) of the projections' gradient; gain's gradient.

    Without `factors`, for frozen weights: g and Nones.
    """
    dqkv = torch.stack([rotate(dq, cos, -sin), rotate(dk, cos, -sin), dv])  # rotation transposed: angle negated
    dqkv = dqkv.permute(1, 3, 0, 2, 4).flatten(2)
    if valid_SR is not None:
        dqkv = dqkv * valid_SR[..., None]
    x, rstd = take(x_BTD, sequences_S, rows_SR), take(rstd_BT1, sequences_S, rows_SR)
    dx, dgain = normalise_backward(dqkv @ qkv, x, rstd, gain_D)
    if not factors:
        return g_SRD + dx, None, None, None
    return g_SRD + dx, dqkv, (x * rstd * gain_D).to(qkv.dtype), dgain


def attention_backward(
    g_SRD: Tensor,
    x_BTD: Tensor,
    rstd_BT1: Tensor,
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    weights_BHTT: Tensor,
    mixed_BTD: Tensor,
    gain_D: Tensor,
    qkv: Tensor,
    o: Tensor,
    cos: Tensor,
    sin: Tensor,
    sequences_S: Tensor | None,
    rows_SR: Tensor | None,
    valid_SR: Tensor | None,
    factors: bool = True,
) -> tuple[Tensor | None, ...]:
    """Attention with explicit weights -> g below the block, mixed values (S, R, D), dqkv, n, gain's gradient."""
    dmixed = out_backward(g_SRD, o, q_BHTK.shape[1])
    dq, dk, dv = mix_backward(
        dmixed,
        take_heads(q_BHTK, sequences_S, rows_SR),
        take_heads(k_BHTK, sequences_S, None),
        take_heads(v_BHTK, sequences_S, None),
        take_heads(weights_BHTT, sequences_S, rows_SR),
        rows_SR,
    )
    below = in_backward(g_SRD, dq, dk, dv, x_BTD, rstd_BT1, gain_D, qkv, cos, sin, sequences_S, rows_SR, valid_SR, factors)
    return below[0], take(mixed_BTD, sequences_S, rows_SR) if factors else None, *below[1:]


# queries at some rows, keys and values everywhere: tokens that pass by but give keys; the last block under exact rows


def keys_forward(
    x_BTD: Tensor,
    gain_D: Tensor,
    qkv: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    positions_BR: Tensor,
    heads: int,
    eps: float,
    segment_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> rstd (B, T, 1), q (B, H, R, K), k and v (B, H, T, K), weights (B, H, R, T), mixed values (B, R, D)."""
    batch, length, width = x_BTD.shape
    n, rstd = normalise(x_BTD, gain_D, eps, qkv.dtype)
    q = F.linear(take(n, None, positions_BR), qkv[:width]).view(batch, -1, heads, width // heads).transpose(1, 2)
    k, v = F.linear(n, qkv[width:]).view(batch, length, 2, heads, width // heads).permute(2, 0, 3, 1, 4)
    q = rotate(q, table_at(cos_TK, None, positions_BR), table_at(sin_TK, None, positions_BR))
    k, v = rotate(k, cos_TK, sin_TK).contiguous(), v.contiguous()
    weights = scores_to_weights(q, k, reach(positions_BR, length, segment_BT))
    return rstd, q, k, v, weights, (weights @ v).transpose(1, 2).flatten(2)


def keys_backward(
    g_SRD: Tensor,
    base_STD: Tensor,
    x_STD: Tensor,
    rstd_ST1: Tensor,
    q_SHRK: Tensor,
    k_SHTK: Tensor,
    v_SHTK: Tensor,
    weights_SHRT: Tensor,
    gain_D: Tensor,
    qkv: Tensor,
    o: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    positions_SR: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> g (S, T, D): `base` with g put at the rows, plus the block's; dq (S, R, D), n at the rows, dkv (S, T, 2 D), n,
    dgain."""
    width = x_STD.shape[-1]
    dq, dk, dv = mix_backward(out_backward(g_SRD, o, q_SHRK.shape[1]), q_SHRK, k_SHTK, v_SHTK, weights_SHRT, None)
    cos_SRK, sin_SRK = table_at(cos_TK, None, positions_SR), table_at(sin_TK, None, positions_SR)
    dq = rotate(dq, cos_SRK, -sin_SRK).transpose(1, 2).flatten(2)
    dkv = torch.stack([rotate(dk, cos_TK, -sin_TK), dv]).permute(1, 3, 0, 2, 4).flatten(2)
    dn = add_rows(dkv @ qkv[width:], positions_SR, dq @ qkv[:width])
    dx, dgain = normalise_backward(dn, x_STD, rstd_ST1, gain_D)
    n = (x_STD * rstd_ST1 * gain_D).to(qkv.dtype)
    return put_rows(base_STD, positions_SR, g_SRD) + dx, dq, take(n, None, positions_SR), dkv, n, dgain


# head


def head_forward(x_BTD: Tensor, gain_D: Tensor, head: Tensor, targets_BT: Tensor, eps: float) -> tuple[Tensor, ...]:
    """-> 1 / rms, normalised stream (B, T, D), logits (B, T, V), logsumexp (B, T, 1) and token losses, float32 or wider."""
    final, rstd = normalise(x_BTD, gain_D, eps, head.dtype)
    logits = F.linear(final, head)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    lse = torch.logsumexp(wide, -1, keepdim=True)
    loss = (lse - wide.gather(-1, targets_BT[..., None])).squeeze(-1)
    return rstd, final, logits, lse, loss


def head_signals(final_BTD: Tensor, logits_BTV: Tensor, lse_BT1: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of the prediction in nats, and |softmax - onehot| |h|: the norm of the head's gradient of each token; (B,
    T)."""
    wide = logits_BTV.to(lse_BT1.dtype)
    p = torch.exp(wide - lse_BT1)
    entropy = lse_BT1.squeeze(-1) - (p * wide).sum(-1)
    target = p.gather(-1, targets_BT[..., None]).squeeze(-1)
    error = (p.pow(2).sum(-1) - target.pow(2) + (1 - target).pow(2)).sqrt()
    return entropy, error * final_BTD.to(wide.dtype).norm(dim=-1)


def head_backward(
    x_BTD: Tensor,
    rstd_BT1: Tensor,
    final_BTD: Tensor,
    logits_BTV: Tensor,
    lse_BT1: Tensor,
    targets_BT: Tensor,
    scale: Tensor,
    gain_D: Tensor,
    head: Tensor,
    sequences_S: Tensor | None,
    rows_SR: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`scale`, () or (S, R, 1) or (S, 1, 1): what each token's loss is multiplied with.

    -> g (S, R, D); factors dlogits (S, R, V) and final (S, R, D) of the head's gradient; gain's gradient.
    """
    lse = take(lse_BT1, sequences_S, rows_SR)
    logits = take(logits_BTV, sequences_S, rows_SR)
    targets = take(targets_BT[..., None], sequences_S, rows_SR)
    p = torch.exp(logits.to(lse.dtype) - lse)
    hit = torch.arange(p.shape[-1], device=p.device) == targets
    dlogits = ((p - hit.to(p.dtype)) * scale).to(head.dtype)
    x, rstd = take(x_BTD, sequences_S, rows_SR), take(rstd_BT1, sequences_S, rows_SR)
    dx, dgain = normalise_backward(dlogits @ head, x, rstd, gain_D)
    return dx, dlogits, take(final_BTD, sequences_S, rows_SR), dgain
