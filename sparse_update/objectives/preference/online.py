"""Direct preference optimisation on outputs of the model as it is: the best and the worst output of a prompt are a pair.

The loss of a pair is that of `dpo.dpo_loss` (Rafailov et al. 2023, arXiv 2305.18290). That the pairs are sampled anew from
the policy in training, and judged as they come, is Guo et al. 2024 (arXiv 2402.04792).

Shape letters: P prompts, R outputs, M outputs at once, T predicted tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.examples.rows import PromptStream
from sparse_update.objectives.objective import Given
from sparse_update.objectives.phase import Phase
from sparse_update.objectives.preference.errors import PreferenceError
from sparse_update.objectives.preference.settings import DpoConfig
from sparse_update.objectives.scored import Scored
from sparse_update.objectives.settings import SampleConfig
from sparse_update.step.plan import View


class OnlineDpo(Scored):
    """Mean loss of the pairs of a batch, nats a pair; a prompt whose outputs are equally good makes none, and a batch
    without pairs updates nothing.

    The reference is the model that the run started from. Its forwards are on the clock.

    Raises:
        PreferenceError: for one output a prompt, or outputs that go through the model in odd numbers.
        ObjectiveError: for a model that grows.
    """

    def __init__(
        self, given: Given, examples: Examples, sample: SampleConfig, stream: PromptStream, cfg: DpoConfig
    ) -> None:
        super().__init__(given, examples, sample, stream)
        if sample.n < 2:
            raise PreferenceError(f"objective.sample.n = {sample.n} with objective=dpo: a pair is two outputs of a prompt")
        if sample.micro_rows % 2:
            raise PreferenceError(
                f"objective.sample.micro_rows = {sample.micro_rows} with objective=dpo: both outputs of a pair go through "
                "the model together; choose an even number, or 0"
            )
        self.cfg = cfg
        self.refer("objective=dpo")

    def advise(self, phase: Phase) -> Phase:
        reward_PN = phase.by_prompt(phase.reward_R)
        best_P = reward_PN.nan_to_num(nan=-float("inf")).argmax(1)
        worst_P = reward_PN.nan_to_num(nan=float("inf")).argmin(1)
        first_P = torch.searchsorted(phase.prompt_R, torch.arange(len(phase)))
        differ_P = reward_PN.gather(1, best_P[:, None])[:, 0] > reward_PN.gather(1, worst_P[:, None])[:, 0]
        side_R = torch.zeros_like(phase.reward_R)
        side_R[(first_P + best_P)[differ_P]] = 1.0
        side_R[(first_P + worst_P)[differ_P]] = -1.0
        return phase.with_more(advantage_R=side_R, reference_RT=self.reference_logp(phase))

    def normaliser(self, phase: Phase, which_R: Tensor) -> float:
        """Pairs."""
        return float((phase.more["advantage_R"][which_R] > 0).sum())

    def token_weights(self, phase: Phase, which_M: Tensor, view: View) -> Tensor:
        """-+ beta sigmoid(-beta x margin) for the tokens of chosen and rejected outputs: the slope of their pair's loss
        by a token's loss."""
        mask_MT, side_M = phase.mask_RT[which_M], phase.more["advantage_R"][which_M].double()
        ratio_MT = (-view.loss_BT.cpu().double() - phase.more["reference_RT"][which_M].double()) * mask_MT
        margin_P = side_M.new_zeros(len(phase)).index_add(0, phase.prompt_R[which_M], side_M * ratio_MT.sum(1))
        slope_M = self.cfg.beta * torch.sigmoid(-self.cfg.beta * margin_P[phase.prompt_R[which_M]])
        return ((side_M * slope_M)[:, None] * mask_MT).float()
