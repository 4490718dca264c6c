"""The base of objectives on tasks: judged by the loss of reference answers and by the share of questions that are solved.

Shape letters: N rows, T predicted tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.examples.rows import Rows
from sparse_update.objectives.objective import Given
from sparse_update.objectives.tokens import TokenObjective, row_losses
from sparse_update.transformer import Transformer
from sparse_update.weights.lowrank import adapt


class TaskObjective(TokenObjective):
    """A subclass gives `gradients`.

    Answers are sampled from whole matrices. Where a process has a part of each only, it keeps a whole copy beside it,
    without gradients and optimizer state, which `read` fills.
    """

    def __init__(self, given: Given, examples: Examples) -> None:
        super().__init__(given)
        self.examples = examples
        self._reader = self.copy_of_shape() if given.mesh.splits_weights else given.model

    def copy_of_shape(self) -> Transformer:
        """A whole model of the same shape that takes no gradient, with weights of its own."""
        given, like = self.given, self.model.embed.weight
        model = Transformer(self.model.cfg)
        if given.adapted:
            adapt(model, given.subset.cfg, given.seed)
        return model.to(like.device, like.dtype).requires_grad_(False).eval()

    def read(self) -> Transformer:
        """The model as it is, with whole matrices, to be read and sampled from. Every process asks at the same point."""
        if self._reader is not self.model:
            self._reader.load_state_dict(self.given.mesh.weights(self.model))
        return self._reader

    def held_out(self, windows_NT1: Tensor) -> float:
        """Mean loss per token of the reference answers of one of `examples.held_out`, nats.

        Raises ValueError for other windows: which of their tokens are an answer is not known.
        """
        rows = next((rows for rows in self.examples.held_out.values() if rows.tokens_NT1 is windows_NT1), None)
        if rows is None:
            raise ValueError("an objective on tasks judges the rows of Examples.held_out: these windows are others")
        return answer_loss(self.read(), rows)

    def judge(self) -> Mapping[str, float]:
        return {f"task/{name}": value for name, value in self.examples.accuracy(self.read()).items()}


def answer_loss(model: torch.nn.Module, rows: Rows) -> float:
    """Mean loss per token that counts, nats, of rows with one text each."""
    x_NT, y_NT = rows.tokens_NT1[:, :-1], rows.tokens_NT1[:, 1:]
    total = 0.0
    for which, loss_MT in row_losses(model, x_NT, y_NT):
        total += float((loss_MT.double().cpu() * rows.weight_NT[which]).sum())
    return total / float(rows.weight_NT.sum())
