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
from sparse_update.parallel.mesh import MeshError


class TaskObjective(TokenObjective):
    """A subclass gives `gradients`.

    Raises MeshError for processes that hold a part of the matrices only: sampling takes whole ones.
    """

    def __init__(self, given: Given, examples: Examples) -> None:
        super().__init__(given)
        if given.mesh.splits_weights:
            raise MeshError(
                f"an objective on tasks with mesh={given.mesh.kind}: answers are sampled from whole matrices. Use mesh=ddp"
            )
        self.examples = examples

    def held_out(self, windows_NT1: Tensor) -> float:
        """Mean loss per token of the reference answers of one of `examples.held_out`, nats.

        Raises ValueError for other windows: which of their tokens are an answer is not known.
        """
        rows = next((rows for rows in self.examples.held_out.values() if rows.tokens_NT1 is windows_NT1), None)
        if rows is None:
            raise ValueError("an objective on tasks judges the rows of Examples.held_out: these windows are others")
        return answer_loss(self.model, rows)

    def judge(self) -> Mapping[str, float]:
        return {f"task/{name}": value for name, value in self.examples.accuracy(self.model).items()}


def answer_loss(model: torch.nn.Module, rows: Rows) -> float:
    """Mean loss per token that counts, nats, of rows with one text each."""
    x_NT, y_NT = rows.tokens_NT1[:, :-1], rows.tokens_NT1[:, 1:]
    total = 0.0
    for which, loss_MT in row_losses(model, x_NT, y_NT):
        total += float((loss_MT.double().cpu() * rows.weight_NT[which]).sum())
    return total / float(rows.weight_NT.sum())
