"""A hook on every optimizer's step whose owner is collected at the worst time."""

from __future__ import annotations

import gc

import torch
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sparse_update.library.hooks import on_every_step


class Owner:
    """Something that counts the steps it hears of, and is in a cycle, as gates are."""

    def __init__(self) -> None:
        self.heard, self.me = [], self

    def hear(self, optimizer: torch.optim.Optimizer) -> None:
        self.heard.append(optimizer)


def test_an_owner_may_be_collected_while_torch_goes_through_its_hooks():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook):
        owners = [Owner()]

        def collect(*_: object, owners: list[Owner] = owners) -> None:
            owners.clear()
            gc.collect()

        handle = register(collect)
        on_every_step(register, owners[0], Owner.hear)
        try:
            optimizer.step()
            optimizer.step()
        finally:
            handle.remove()


def test_it_is_heard_until_it_is_ended_and_what_is_gone_is_taken_out_later():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    owner, gone = Owner(), Owner()
    end = on_every_step(register_optimizer_step_post_hook, owner, Owner.hear)
    on_every_step(register_optimizer_step_post_hook, gone, Owner.hear)
    before = len(_global_optimizer_post_hooks)
    del gone
    gc.collect()
    optimizer.step()
    assert owner.heard == [optimizer]
    on_every_step(register_optimizer_step_post_hook, owner, Owner.hear)  # the one that is gone leaves, this one comes
    assert len(_global_optimizer_post_hooks) <= before
    end()
    end()
    optimizer.step()
    assert owner.heard == [optimizer] * 2
