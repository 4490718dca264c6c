"""The base of objectives that learn from outputs which the model itself sampled.

A step asks the gate for prompts, so whatever it leaves out is never generated. Then a *phase* begins: outputs are sampled
for all prompts, on the clock, and judged. One or several updates follow, each by a part of the prompts; then the gate is
asked again. Between two updates a checkpoint holds the phase, so that a run goes on in the middle of it.

Several processes share the sampling and put the phase together, so that each holds all of it. What is sampled follows from
the seed, the phase, the prompt, the sample and the position alone.

Shape letters: P prompts, R outputs, M outputs at once, T predicted tokens.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_update.clock.component import Component
from sparse_update.clock.cost import Step
from sparse_update.gates.config import GateConfig
from sparse_update.gates.gate import GatedBatch
from sparse_update.generation.sampler import Sampler
from sparse_update.generation.settings import GenerateConfig, Outputs
from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.examples.rows import PromptStream
from sparse_update.objectives.objective import Given, ObjectiveError
from sparse_update.objectives.phase import Phase, cut, outputs_as_rows
from sparse_update.objectives.questions import TaskObjective
from sparse_update.objectives.settings import SampleConfig
from sparse_update.parallel.mesh import Mesh, MeshError
from sparse_update.step.plan import PLAIN, Chosen, SparseStep, StepPlan, View
from sparse_update.tasks.base import Instance
from sparse_update.tasks.draw import number_of

V = TypeVar("V")
UNITS = ("none", "sequence", "repeats", "dw_rows", "subblock")
"""Units of a gate that outputs can be trained with: of prompts, of gradients."""


class RewardError(RuntimeError):
    """A reward that is no number, or a judge that could not give one."""


class Sampled(TaskObjective):
    """A subclass gives `advise` and `token_weights`; what else it may change has a default.

    Args:
        stream: the prompts that the gate is offered, for what lies beside their tokens.
    """

    def __init__(self, given: Given, examples: Examples, sample: SampleConfig, stream: PromptStream) -> None:
        super().__init__(given, examples)
        check_gate(given.gate.cfg)
        self.sample, self.stream = sample, stream
        self.shares = sample.shares or given.mesh.shards
        if self.shares % given.mesh.shards:
            raise MeshError(
                f"objective.sample.shares = {sample.shares} with {given.mesh.shards} processes: choose a multiple of "
                f"{given.mesh.shards}"
            )
        self.sampler = Sampler(
            self._reader,
            GenerateConfig(sample.new_tokens, sample.n, sample.temperature, sample.top_p, given.seed, sample.tile_rows),
            examples.stop,
        )
        self.uses: Counter[str] = Counter()
        """Of generation, all processes together; the clock adds them."""
        self.phase: Phase | None = None
        self.phases = 0
        self._sampling_s = self._update_s = 0.0
        self._priced: Step | None = None

    # what a subclass says

    @abstractmethod
    def advise(self, phase: Phase) -> Phase:
        """Called once when a phase is complete, on every process alike: `phase.with_more(advantage_R=...)`, and whatever
        else the updates need, such as a reference's log-probabilities. "advantage_R" (R,) must be among it: outputs whose
        advantage is 0 are left out of the updates, and where all of a batch are, nothing is updated."""

    @abstractmethod
    def token_weights(self, phase: Phase, which_M: Tensor, view: View) -> Tensor:
        """Weights (M, T) of the token losses of some outputs, whose losses now are `view.loss_BT`: the slope of what is
        minimised. They are divided by `normaliser`."""

    def normaliser(self, phase: Phase, which_R: Tensor) -> float:
        """What the weights of a batch are divided by; `which_R`: all its outputs, those without an advantage too. The
        number of sampled tokens here."""
        return float(phase.lengths_R[which_R].sum())

    def outputs_of(self, batch: GatedBatch, progress: float) -> Sequence[int]:
        """How many outputs each prompt gets, (P,)."""
        return [self.sample.n] * len(batch.tokens)

    def rewards(self, instances: Sequence[Instance], texts: Sequence[str], stopped: Sequence[bool]) -> list[float]:
        """The reward of each output: the verifier's score, 0 for one that was cut off."""
        return self.scores(instances, texts, stopped)

    def scores(self, instances: Sequence[Instance], texts: Sequence[str], stopped: Sequence[bool]) -> list[float]:
        """The verifier's score of each output, 0 for one that was cut off."""
        return [
            self.examples.score(instance, text) if ended else 0.0
            for instance, text, ended in zip(instances, texts, stopped, strict=True)
        ]

    def plan_of(self, phase: Phase) -> StepPlan:
        """What an update leaves out of the outputs' rows; `choose_rows` then says which."""
        return PLAIN

    def choose_rows(self, phase: Phase, which_M: Tensor, view: View, plan: StepPlan) -> Chosen:
        """The token rows that the backward keeps, where the plan keeps some; losses are 0 where nothing counts."""
        raise NotImplementedError(f"{type(self).__name__}.plan_of keeps rows: it must choose them")

    # a step

    def held(self) -> GatedBatch | None:
        return None if self._spent else self._part()

    @property
    def _spent(self) -> bool:
        return self.phase is None or self.phase.taken >= self.sample.batches * self.sample.epochs

    def _slice(self) -> slice:
        assert self.phase is not None
        each, rest = divmod(len(self.phase), self.sample.batches)
        if rest:
            raise ObjectiveError(
                f"trainer.batch_windows = {len(self.phase)} prompts are not cut into objective.sample.batches = "
                f"{self.sample.batches} equal parts: choose a multiple of it"
            )
        number = self.phase.taken % self.sample.batches
        return slice(number * each, (number + 1) * each)

    def _part(self) -> GatedBatch:
        assert self.phase is not None
        return self.phase.prompts(self._slice())

    def prepare(self, batch: GatedBatch, step: Step, progress: float) -> GatedBatch:
        if self._spent:
            before = self.given.clock.times.seconds(self._known(self.uses))
            self.phase = self.advise(self._sample(batch, progress))
            self.phases += 1
            self.given.clock.require([], self.components())
            self._sampling_s = self.given.clock.times.seconds(self.uses) - before
        return super().prepare(self._part(), step, progress)

    def _known(self, uses: Counter[str]) -> Counter[str]:
        times = self.given.clock.times
        return Counter({key: count for key, count in uses.items() if times.has(key)})

    def gradients(self, batch: GatedBatch, step: Step) -> SparseStep:
        phase, mesh = self.phase, self.given.mesh
        assert phase is not None
        prompts = self._slice()
        whole_R = phase.of_prompts(prompts)
        mine = mesh.mine(prompts.stop - prompts.start)
        if len(batch.tokens) != mine.stop - mine.start:
            raise ObjectiveError(
                "trainer.accumulate with an objective that samples: objective.sample.micro_rows in its place"
            )
        here = slice(prompts.start + mine.start, prompts.start + mine.stop)
        which_R = phase.of_prompts(here)
        advantage_R = phase.more["advantage_R"]
        learnt = int((advantage_R[whole_R] != 0).sum())
        reward_PN = phase.by_prompt(phase.reward_R)[here].float()
        plan = replace(self.plan_of(phase), dw_rows=step.plan.dw_rows, skip_rate=step.plan.skip_rate)
        length = phase.tokens_RT1.shape[1] - 1
        self._priced = self.given.clock.step(plan, max(1, learnt), length)
        if not learnt:
            self._priced = None
            nothing = torch.zeros(len(batch.tokens), 1)
            return SparseStep(nothing, {}, Chosen(), View(nothing, {"reward": reward_PN}), empty=True)
        kept_R = which_R[advantage_R[which_R] != 0]
        count = len(kept_R)
        rows = int(mesh.largest(max(1, count))) if mesh.splits_weights else max(1, count)
        # others may learn from more outputs, and wait for this process's part of the matrices: it goes on with weights of 0
        kept_R = torch.cat((kept_R, which_R[:1].expand(rows - count)))
        factor = self.share(batch) / self.normaliser(phase, whole_R)
        device = self.given.device
        tokens_RT1 = phase.tokens_RT1[kept_R].to(device)
        total_M: list[Tensor] = []

        def weigh(view: View, rows: slice) -> Tensor:
            weight_MT = torch.zeros_like(view.loss_BT)
            if (real := min(rows.stop, count) - rows.start) > 0:
                found_MT = self.token_weights(phase, kept_R[rows][:real], first_rows(view, real))
                weight_MT = weight_MT.to(found_MT.dtype)
                weight_MT[:real] = found_MT.to(device) * factor
            total_M.append((weight_MT * view.loss_BT).sum(1).cpu())
            return weight_MT

        def choose(view: View, rows: slice) -> Chosen:
            return self.choose_rows(phase, kept_R[rows], view, plan)

        found = self.weighted_step(
            tokens_RT1[:, :-1], tokens_RT1[:, 1:], weigh, plan, choose=choose, micro_rows=self.sample.micro_rows
        )
        each_P1 = torch.zeros(len(batch.tokens), 1)
        each_P1[:, 0] = each_P1[:, 0].index_add(0, phase.prompt_R[kept_R] - here.start, torch.cat(total_M).float())
        each_P1 *= len(batch.tokens)  # their mean is what is minimised
        return replace(found, loss_BT=each_P1, chosen=Chosen(), view=View(each_P1, {"reward": reward_PN}))

    def done(self, step: Step) -> None:
        assert self.phase is not None
        self.phase = replace(self.phase, taken=self.phase.taken + 1)

    def priced(self, step: Step) -> Step:
        """Outputs that were learnt from, as long as their rows; a step that learnt nothing is priced as one of one
        output."""
        found = self._priced or replace(step, batch=1, length=self.phase.tokens_RT1.shape[1] - 1)  # type: ignore[union-attr]
        self._update_s = self.given.clock.seconds(found)
        return found

    def expected_s(self, step: Step) -> float | None:
        if not self._update_s:
            return None
        return self._update_s + (self._sampling_s if self._spent else 0.0)

    # sampling

    def _sample(self, batch: GatedBatch, progress: float) -> Phase:
        mesh, context = self.given.mesh, self.model.cfg.context
        self.read()
        rows = self.stream.rows(batch.window)
        counts = list(self.outputs_of(batch, progress))
        each, rest = divmod(len(batch.tokens), self.shares)
        if rest:
            raise MeshError(
                f"trainer.batch_windows = {len(batch.tokens)} prompts cannot be sampled in {self.shares} equal shares "
                "(objective.sample.shares, or the number of processes): choose a multiple"
            )
        used: Counter[str] = Counter()

        def mine() -> dict[str, Tensor]:
            parts = []
            per_shard = self.shares // mesh.shards
            for share in range(mesh.shard * per_shard, (mesh.shard + 1) * per_shard):
                where = range(share * each, (share + 1) * each)
                parts.append(self._share(rows, batch, counts, where, used))
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

        found = {name: gather_rows(mesh, value) for name, value in together_or_none(mesh, mine).items()}
        told = json.dumps([mesh.shard, used])
        of_shards = dict(json.loads(one) for one in (mesh.said_by_all(told) if mesh.size > 1 else [told]))
        for share in of_shards.values():  # processes of one shard sample the same, and count once
            self.uses.update(share)
        self.sampler.uses = Counter(self.uses)
        tensors: dict[str, Any] = cut(found, context)
        return Phase(batch=batch, **tensors)

    def _share(
        self, rows: Any, batch: GatedBatch, counts: Sequence[int], where: range, used: Counter[str]
    ) -> dict[str, Tensor]:
        """The outputs of some prompts with their rewards; those of one number of outputs are sampled together."""
        prompts = {p: rows.tokens_NT1[p, : int(rows.lengths_N[p])].numpy() for p in where}
        instances = {p: rows.instances[p][0] for p in where}
        pieces: list[tuple[list[int], Outputs]] = []
        seed = number_of("phase", self.given.seed, self.phases) >> 1
        for n in sorted({counts[p] for p in where}):
            group = [p for p in where if counts[p] == n]
            self.sampler.cfg = replace(self.sampler.cfg, n=n, seed=seed)
            before = Counter(self.sampler.uses)
            ids = [number_of(instances[p].id, int(batch.window[p])) for p in group]
            pieces.append((group, self.sampler.sample([prompts[p] for p in group], ids)))
            used.update(self.sampler.uses - before)
        order = [p for group, _ in pieces for p in group]
        found = outputs_as_rows([outputs for _, outputs in pieces], [prompts[p] for p in order], 0, self.model.cfg.context)
        texts = [self.examples.text(row) for _, outputs in pieces for row in outputs]
        asked = [instances[order[int(p)]] for p in found["prompt_R"]]
        stopped = found["stopped_R"].tolist()
        true = self.scores(asked, texts, stopped)
        reward = self.rewards(asked, texts, stopped) if self._judged_otherwise else true
        if bad := [value for value in reward if not -float("inf") < value < float("inf")]:
            raise RewardError(
                f"{type(self).__name__}: {len(bad)} of {len(reward)} rewards are no finite numbers ({bad[0]}): a "
                "reward must be "
                "one for every text"
            )
        found |= {"reward_R": torch.tensor(reward, dtype=torch.float64), "true_R": torch.tensor(true, dtype=torch.float64)}
        found["prompt_R"] = torch.tensor([order[int(p)] for p in found["prompt_R"]])
        by_prompt = found["prompt_R"].argsort(stable=True)
        return {name: value[by_prompt] for name, value in found.items()}

    @property
    def _judged_otherwise(self) -> bool:
        return type(self).rewards is not Sampled.rewards

    def components(self) -> Mapping[str, Component]:
        return self.sampler.components()

    def notes(self) -> Mapping[str, float]:
        """Of the last phase: mean reward, mean verifier's score, length, share of outputs that ended by themselves, and
        share of prompts whose outputs were all equally good."""
        phase = self.phase
        if phase is None:
            return {}
        reward_PN = phase.by_prompt(phase.reward_R)
        alike_P = reward_PN.nan_to_num(nan=-float("inf")).amax(1) == reward_PN.nan_to_num(nan=float("inf")).amin(1)
        mask_RT = phase.mask_RT
        return {
            "rl/reward": float(phase.reward_R.mean()),
            "rl/true_reward": float(phase.true_R.mean()),
            "rl/length": float(phase.lengths_R.double().mean()),
            "rl/stopped": float(phase.stopped_R.double().mean()),
            "rl/entropy_nats": float(phase.entropy_RT[mask_RT].double().mean()),
            "rl/prompts_alike": float(alike_P.double().mean()),
            "rl/phases": float(self.phases),
        }

    def state_dict(self) -> dict[str, Any]:
        own = {
            "phases": self.phases,
            "uses": dict(self.uses),
            "sampling_s": self._sampling_s,
            "update_s": self._update_s,
            "phase": {} if self.phase is None else self.phase.state(),
        }
        return {**super().state_dict(), "sampled": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        own = state["sampled"]
        self.phases = int(own["phases"])
        self.uses = Counter({str(key): int(count) for key, count in own["uses"].items()})
        self.sampler.uses = Counter(self.uses)
        self._sampling_s, self._update_s = float(own["sampling_s"]), float(own["update_s"])
        self.phase = Phase.of_state(own["phase"]) if own["phase"] else None


def check_gate(cfg: GateConfig) -> None:
    """Raise ObjectiveError for a gate that looks for rows of its windows: those are prompts here, and what is trained on is
    sampled later."""
    if cfg.unit not in UNITS or cfg.policy == "importance":
        named = "gate.policy = importance" if cfg.unit in UNITS else f"gate.unit = {cfg.unit}"
        raise ObjectiveError(
            f"{named} with an objective that samples: its windows are prompts, and no rows of them are trained on. Use "
            f"gate.unit = {', '.join(UNITS)}; objective.rl.tokens chooses among the tokens of outputs"
        )


def first_rows(view: View, count: int) -> View:
    """The view of the first rows alone."""
    signals = {name: value.narrow(value.dim() - 2, 0, count) for name, value in view.signals.items()}
    return View(view.loss_BT[:count], signals)


def gather_rows(mesh: Mesh, value: Tensor) -> Tensor:
    """The rows of all shards one after the other, which may have different numbers of them."""
    if mesh.shards == 1:
        return value
    count_S = mesh.gather(torch.tensor([len(value)]))
    most = int(count_S.max())
    padded = torch.cat((value, value.new_zeros(most - len(value), *value.shape[1:])))
    parts = mesh.gather(padded).split(most)
    return torch.cat([part[: int(count)] for part, count in zip(parts, count_S, strict=True)])


def together_or_none(mesh: Mesh, work: Callable[[], V]) -> V:
    """What `work` gives on this process, once it is done on all of them.

    Raises its error; where another process could not do it, RewardError on this one, so that nobody waits.
    """
    error: Exception | None = None
    found: V | None = None
    try:
        found = work()
    except Exception as caught:
        error = caught
    if mesh.size > 1:
        told = [one for one in mesh.said_by_all(str(error or "")) if one]
        if told and error is None:
            raise RewardError(f"another process: {told[0]}")
    if error is not None:
        raise error
    assert found is not None
    return found
