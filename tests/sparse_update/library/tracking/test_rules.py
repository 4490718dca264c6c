"""What an operation does to labels, against numbers: a tensor of its own labels is moved by the operation itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_update.library.tracking.labels import NONE
from sparse_update.library.tracking.trace import Trace

B, T, D = 3, 4, 4


class _Gives(nn.Module):
    """A model that is one function of its input; a parameter lets its outputs have gradients."""

    def __init__(self, function):
        super().__init__()
        self.function, self.one = function, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.function(x * self.one)


def watched(function, x):
    """The result and its labels as the trace has them, NONE where it has none."""
    model, trace = _Gives(function), Trace(whole=False)
    trace.arm([model])
    out = model(x)
    found = trace.labels[0].get(out)
    return out, torch.full(out.shape, NONE) if found is None else found.long()


MOVES = {
    "transpose": lambda h: h.transpose(0, 1),
    "view": lambda h: h.reshape(B * T, D),
    "heads": lambda h: h.view(B, T, 2, D // 2).transpose(1, 2),
    "flip": lambda h: h.flip(1),
    "roll": lambda h: h.roll(1, 1),
    "slice": lambda h: h[:, 1:],
    "every second": lambda h: h[:, ::2],
    "select": lambda h: h[:, 2],
    "repeat": lambda h: h.repeat(2, 1, 1),
    "repeat_interleave": lambda h: h.repeat_interleave(2, dim=1),
    "stack": lambda h: torch.stack((h, h.flip(0)), 1),
    "unbind": lambda h: torch.stack(h.unbind(1)[::-1], 1),
    "chunk": lambda h: torch.cat(h.chunk(2, 1)[::-1], 1),
    "index": lambda h: h[:, torch.arange(T - 1, -1, -1)],
    "gather": lambda h: h.gather(1, torch.arange(T - 1, -1, -1)[None, :, None].expand(B, T, D)),
    "index_select": lambda h: h.index_select(0, torch.arange(B - 1, -1, -1)),
    "movedim": lambda h: h.movedim(2, 0),
    "unfold": lambda h: h.unfold(1, 2, 1),
    "expand": lambda h: h[:, None].expand(B, 2, T, D),
    "pad": lambda h: F.pad(h, (0, 0, 2, 1), value=NONE),
    "clone": lambda h: h.clone().contiguous(),
    "einsum": lambda h: torch.einsum("btd->tbd", h),
    "diagonal": lambda h: h.diagonal(dim1=1, dim2=2),
    "written slices": lambda h: _written(h),
    "index_put": lambda h: h.clone().index_put((torch.arange(0, 3, 2),), h[:2].flip(0)),
    "index_add": lambda h: torch.zeros_like(h).index_add(1, torch.arange(T - 1, -1, -1), h),
}


def _written(h):
    out = torch.full_like(h, NONE)
    out[:, 1:] = h[:, :-1]
    out[:, 0] = h[:, 3]
    return out


@pytest.mark.parametrize("name", MOVES)
def test_labels_move_as_the_elements_do(name):
    own = torch.arange(B * T).view(B, T, 1).expand(B, T, D).double()
    out, label = watched(MOVES[name], own.clone())
    expected = out.detach().long()
    assert torch.equal(label, expected)


KEEPS = {
    "norm": lambda h: F.layer_norm(h, (D,)),
    "rms": lambda h: h * h.pow(2).mean(-1, keepdim=True).rsqrt(),
    "softmax": lambda h: h.softmax(-1),
    "linear": lambda h: F.linear(h, torch.ones(D, D)),
    "matmul": lambda h: h @ torch.ones(D, D),
    "gate": lambda h: F.silu(h) * h.sigmoid(),
    "attention": lambda h: F.scaled_dot_product_attention(h, h, h),
    "by hand": lambda h: (h @ h.transpose(1, 2)).softmax(-1) @ h,
    "causal conv": lambda h: F.conv1d(F.pad(h.transpose(1, 2), (2, 0)), torch.ones(D, 1, 3), groups=D).transpose(1, 2),
    "cumsum": lambda h: h.cumsum(1),
    "residual": lambda h: h + F.pad(h, (0, 0, 1, -1)),
    "complex": lambda h: torch.view_as_real(torch.view_as_complex(h.view(B, T, D // 2, 2)) * 1j).flatten(2),
    "masked": lambda h: h.masked_fill(torch.ones(T, 1, dtype=torch.bool).tril(), 0.0),
    "recurrent": lambda h: nn.LSTM(D, D, batch_first=True)(h)[0],
    "dropout": lambda h: F.dropout(h, 0.5),
}


@pytest.mark.parametrize("name", KEEPS)
def test_rows_stay_rows(name):
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))
    _, label = watched(KEEPS[name], x)
    assert torch.equal(label, torch.arange(B * T).view(B, T, 1).expand(B, T, D))


MIXES = {
    "mean": lambda h: h.mean(1),
    "columns": lambda h: h.transpose(1, 2) @ torch.ones(T, 2),
    "mirror": lambda h: (h + h.flip(1))[:, :1],
    "fft": lambda h: torch.fft.fft(h, dim=1).real,
    "strided conv": lambda h: F.avg_pool1d(h.transpose(1, 2), 2),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_rows_is_no_row(name):
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))
    assert bool((watched(MIXES[name], x)[1] < 0).all())


DEPENDS = {
    "sort": lambda h: h[:, h[0, :, 0].argsort()],
    "mask": lambda h: h[h[..., 0] > -99],
    "topk": lambda h: h.index_select(1, h[0, :, 0].topk(T).indices),
    "gather": lambda h: h.gather(1, h.argsort(1)),
    "drawn": lambda h: h[:, torch.randperm(T)],
    "a list": lambda h: h[:, [3, 1, 2, 0]],
    "put back": lambda h: torch.zeros_like(h).index_copy(1, h[0, :, 0].argsort(), h),
}


def test_a_place_keeps_its_row_where_the_inputs_say_what_is_written_there():
    x = torch.arange(B * T * D).view(B, T, D).double()
    own = torch.arange(B * T).view(B, T, 1).expand(B, T, D)
    for write in (lambda h: h.masked_scatter(h > 9, h.flip(1)), lambda h: h.index_copy(1, h[0, :2, 0].argsort(), h[:, 2:])):
        assert torch.equal(watched(write, x)[1], own)


@pytest.mark.parametrize("name", DEPENDS)
def test_an_order_that_comes_from_the_inputs_is_marked(name):
    x = torch.arange(B * T * D).view(B, T, D).double()
    _, label = watched(DEPENDS[name], x)
    assert bool((label >= 1 << 30).all())
