"""Joules of layers on the cores of a chip: messages priced by where they go, static power over the modelled time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hardware.energy.account import Board, account
from hardware.energy.counts import Counts
from hardware.energy.extrapolate import extrapolate
from hardware.energy.measured_networks import load_networks
from hardware.energy.profile import Profile, load_profile
from hardware.energy.report import EnergyReport
from hardware.latency.estimate import Latency
from hardware.placement.report import Placement

ANCHOR, MIXTURE = "pilotnet_snn", "loihi1_davies2018"
"""The network that joules of Loihi 2 are scaled from, and the profile that mixes its kinds of work."""


@dataclass(frozen=True)
class Turns:
    """How tokens, or samples, follow each other in the time that static power is drawn.

    Attributes:
        pipelined: whether the next one starts before the last result of this one.
        said: the same in words, for the report; "{rates}" stands for the name of the rates.
    """

    pipelined: bool
    said: str


def of_chip(profile: Profile, placement: Placement | None) -> bool:
    """Whether a profile's figures are of the chip of the placement: the shipped ones carry its name in front."""
    return placement is not None and profile.costs == "spiking" and profile.name.split("_")[0] == placement.chip


def price(
    counts: Sequence[Counts], profile: Profile, placement: Placement | None, latencies: Sequence[Latency], turns: Turns
) -> EnergyReport:
    """Joules by a profile; one of the chip of the placement also prices hops, and static power where a time is modelled.

    Args:
        counts: one record per layer of the placement.
        profile: of a chip, or dense.
        placement: of the layers, None where there is none.
        latencies: by rates of the chip; those named like the profile are taken before the others.
        turns: of tokens.
    """
    if placement is None:
        return account(counts, profile)
    if not of_chip(profile, placement):
        elsewhere = f"the layers are placed on {placement.chip}, and this profile is of another chip"
        return account(counts, profile, unplaced=elsewhere)
    latency = next((one for one in latencies if one.rates == profile.name), next(iter(latencies), None))
    if latency is None:
        return account(counts, profile, placement=placement)
    time = latency.run(counts[0].tokens, pipelined=turns.pipelined)
    report = account(counts, profile, placement=placement, time=time, board=_board(placement))
    return _with_static(report, placement, latency, turns)


def extrapolated(
    counts: Sequence[Counts], placement: Placement | None, latencies: Sequence[Latency], turns: Turns
) -> EnergyReport:
    """Loihi 2: scaled from one measured network, with static power where a time is modelled. Arguments as of `price`."""
    anchor, mixture = load_networks()[ANCHOR], load_profile(MIXTURE)
    if placement is None or not latencies:
        return extrapolate(counts, anchor, mixture)
    time = latencies[0].run(counts[0].tokens, pipelined=turns.pipelined)
    report = extrapolate(counts, anchor, mixture, time=time, board=_board(placement))
    return _with_static(report, placement, latencies[0], turns)


def _board(placement: Placement) -> Board:
    """As many chips powered as the layers take."""
    return Board(placement.chips, placement.chips)


def _with_static(report: EnergyReport, placement: Placement, latency: Latency, turns: Turns) -> EnergyReport:
    many = f"{placement.chips} chip{'s' * (placement.chips > 1)}"
    said = turns.said.format(rates=latency.rates)
    return replace(report, labels=(*report.labels, f"includes static power of {many} over the modelled time {said}"))
