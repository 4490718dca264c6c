"""Records as training and deployment write them, with made-up numbers."""

from __future__ import annotations

import math
from typing import Any


def arm_record(loss: float, **changes: Any) -> dict[str, Any]:
    return {
        "loss_nats": loss,
        "bits_per_byte": loss / math.log(2),
        "tokens": 1_000_000,
        "flops": 2.5e12,
        "reference_s": 20.0,
        "wall_s": 22.0,
        "peak_bytes": 500_000_000,
        "energy_j": None,
        "energy_reason": "not measured: no meter",
        "keep_fraction": 0.5,
        "source_keep": {"text": 0.6},
        "params": 200_000,
        "val_tokens": 65_536,
    } | changes


def deployed_record(**changes: Any) -> dict[str, Any]:
    common = {"kind": "modelled", "lower_bound": True, "unknown": ["static: no time model"], "tokens": 4096}
    chip = {"profile": "loihi1_sanafe", "low_j": 1e-6, "mid_j": 2e-6, "high_j": 3e-6, "source": "SANA-FE 2025"}
    digital = {
        "profile": "digital45_int8_sram",
        "low_j": 4e-7,
        "mid_j": 5e-7,
        "high_j": 6e-7,
        "source": "Horowitz 2014",
    }
    return {
        "arm": "surprise",
        "loss_float_nats": 1.70,
        "loss_quantised_nats": 1.71,
        "loss_simulated_nats": 1.72,
        "val_tokens": 65_536,
        "mapped_mac_share": 0.98,
        "events_per_token": 1200.0,
        "synops_per_token": 40_000.0,
        "macs_per_token": 100_000.0,
        "neuron_updates_per_token": 2000.0,
        "max_payload_bits": 14,
        "saturations": 0,
        "wraps": 0,
        "ran_on": "simulated (ours, lava)",
        "energy": [
            common | chip | {"labels": ["hypothetical: binary-spike constants applied to graded payloads"]},
            common | digital | {"labels": []},
        ],
    } | changes
