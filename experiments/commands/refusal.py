"""How a command says that a network does not fit the chips there are."""

from __future__ import annotations

import sys

from experiments.runs.output import finish
from hardware.placement import DoesNotFit


def refuse(command: str, failure: DoesNotFit) -> int:
    """Print the refusal as an error, as a table with its remedies and as the JSON document; return the exit code, 1.

    The document: `fits` is false, `what` does not fit, `limit` is the resource that binds with what is needed and what
    there is, `remedies` say what would make it fit.
    """
    print(f"{command}: {failure}", file=sys.stderr)
    print(failure)
    limit = {"resource": failure.binding.resource, "need": failure.binding.used, "have": failure.binding.limit}
    document = {"fits": False, "what": failure.what, "limit": limit, "remedies": list(failure.remedies)}
    finish(document, command)
    return 1
