"""The smallest objective that learns from its own outputs: policy gradient with the mean reward as baseline."""

from __future__ import annotations

from sparse_update.objectives.sampled import Sampled
from sparse_update.objectives.settings import SampleConfig
from tests.sparse_update.objectives.house import build, examples_of

SMALL = {"n": 4, "new_tokens": 4, "micro_rows": 8}


class Reinforced(Sampled):
    """Weights are advantages of the outputs of a prompt over their mean."""

    def advise(self, phase):
        reward_PN = phase.by_prompt(phase.reward_R)
        return phase.with_more(advantage_R=phase.reward_R - reward_PN.nanmean(1)[phase.prompt_R])

    def token_weights(self, phase, which_M, view):
        return phase.more["advantage_R"][which_M, None].float() * phase.mask_RT[which_M]


class Lengths(Reinforced):
    """Rewards a low first byte, so that an untrained model's outputs differ in it."""

    def rewards(self, instances, texts, stopped):
        return [float(len(text) and ord(text[0]) < 100) for text in texts]


def reinforced(folder, kind=Lengths, sample=None, examples=None, **more):
    examples = examples or examples_of()
    cfg = SampleConfig(**{**SMALL, **(sample or {})})
    stream = examples.prompts(cfg.new_tokens)
    return build(lambda given: kind(given, examples, cfg, stream), stream, examples, folder, **more)
