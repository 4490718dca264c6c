"""Rejection sampling with fine-tuning: of many outputs the right ones, or the best one a prompt, are trained on by
likelihood.

Yuan et al. 2023 (RFT, arXiv 2308.01825), Zelikman et al. 2022 (STaR, arXiv 2203.14465), Dong et al. 2023 (RAFT, arXiv
2304.06767); here the outputs are sampled anew from the model as it is. In the mean the gradient is that of a policy
gradient whose advantage is the reward itself, without a baseline, over the share of outputs that were kept.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.examples.rows import PromptStream
from sparse_update.objectives.objective import Given
from sparse_update.objectives.phase import Phase
from sparse_update.objectives.reinforcement.outputs import accepted
from sparse_update.objectives.reinforcement.settings import RejectionConfig
from sparse_update.objectives.sampled import Sampled
from sparse_update.objectives.settings import SampleConfig
from sparse_update.step.plan import View


class Rejection(Sampled):
    """Mean loss of the tokens of the outputs that are kept; where none is, nothing is updated."""

    def __init__(
        self, given: Given, examples: Examples, sample: SampleConfig, stream: PromptStream, cfg: RejectionConfig
    ) -> None:
        super().__init__(given, examples, sample, stream)
        self.cfg = cfg

    def advise(self, phase: Phase) -> Phase:
        texts = [
            row[start:end].numpy().tobytes()
            for row, start, end in zip(phase.tokens_RT1, phase.start_R, phase.end_R, strict=True)
        ]
        reward_R = phase.reward_R.numpy()
        kept = accepted(reward_R, phase.prompt_R.numpy(), self.cfg.threshold, self.cfg.keep, texts)
        advantage_R = np.zeros(len(reward_R))
        advantage_R[kept] = 1.0
        return phase.with_more(advantage_R=torch.from_numpy(advantage_R))

    def normaliser(self, phase: Phase, which_R: Tensor) -> float:
        kept_R = which_R[phase.more["advantage_R"][which_R] != 0]
        return float(phase.lengths_R[kept_R].sum())

    def token_weights(self, phase: Phase, which_M: Tensor, view: View) -> Tensor:
        return phase.mask_RT[which_M].float()
