"""Models of torch's own parts."""

from __future__ import annotations

from torch import Tensor, nn

from tests.sparse_update.library.models import Encoder, ours
from tests.sparse_update.library.zoo.entry import Entry, V, noise, time_first, tokens


class Recurrent(nn.Module):
    """An LSTM or GRU language model."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool) -> None:
        super().__init__()
        self.embed, self.batch_first = nn.Embedding(V, 16), batch_first
        self.into = nn.Linear(16, 16)
        self.body = kind(16, 16, num_layers=2, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, V)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(self.embed(x if self.batch_first else x.t()))
        h, _ = self.body(h)
        h = self.head(h + self.mlp(h))
        return h if self.batch_first else h.transpose(0, 1)


class Convolved(nn.Module):
    """Images: convolutions, then linear layers. `norm`: batch statistics mix the samples below them."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.patch = nn.Linear(3, 8)
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.AdaptiveAvgPool2d(2),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x.movedim(1, -1)).movedim(-1, 1)
        return self.head(self.body(h))


def _call(model: nn.Module, batch: int, length: int) -> Tensor:
    return model(tokens(batch, length))


def _image(model: nn.Module, batch: int, length: int) -> Tensor:
    kind = next(model.parameters()).dtype
    return model(noise(batch, 3, 8, 8).to(kind))


PLAIN: dict[str, Entry] = {
    "ours": Entry("our own transformer", lambda a: ours(), _call),
    "tied": Entry("our own transformer, head tied to the embedding", lambda a: ours(tie=True), _call),
    "encoder": Entry("nn.TransformerEncoder", lambda a: Encoder(), _call, ("sequence",), attentions=("sdpa",)),
    "encoder_time_first": Entry(
        "nn.TransformerEncoder, time first", lambda a: Encoder(False), _call, ("sequence",), attentions=("sdpa",)
    ),
    "lstm": Entry("LSTM", lambda a: Recurrent(nn.LSTM, True), _call, attentions=("",)),
    "gru": Entry("GRU, time first", lambda a: Recurrent(nn.GRU, False), _call, attentions=("",), rows={"*": time_first}),
    "conv": Entry("convolutions, classes of images", lambda a: Convolved(False), _image, ("sequence",), attentions=("",)),
    "conv_norm": Entry(
        "convolutions with batch normalisation",
        lambda a: Convolved(True),
        _image,
        ("sequence",),
        dense={"sequence": ("patch",)},
        why="mixes samples",
        attentions=("",),
    ),
}
