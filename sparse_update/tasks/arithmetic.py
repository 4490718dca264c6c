"""Sums that carry, and arithmetic of remainders."""

from __future__ import annotations

import re

from sparse_update.tasks.base import Instance, Made, Task, TaskError, register_task
from sparse_update.tasks.draw import Draw

WHOLE = re.compile(r"\s*([+-]?[0-9]{1,64})\s*")


def whole(text: str) -> int | None:
    """The whole number that a text consists of, None where it is anything else. ASCII digits, 64 of them at most."""
    found = WHOLE.fullmatch(text)
    return None if found is None else int(found[1])


def carries(a: int, b: int) -> int:
    """How often adding two numbers, in the decimal system, carries."""
    count = carry = 0
    while a or b:
        carry = int(a % 10 + b % 10 + carry > 9)
        count += carry
        a, b = a // 10, b // 10
    return count


@register_task("sums")
class Sums(Task):
    """The sum of two numbers of `level` digits that carries at least once. Answers are compared as numbers.

    "17+25" and "25+17" are one key, so no sum is held out whose twin is trained on.
    """

    levels = range(1, 13)
    wordings = (
        "What is {}?",
        "Add the two numbers: {}. Reply with the sum only.",
        "Compute {} and give the result.",
        "Please work out the sum {}.",
    )

    def make(self, draw: Draw, level: int) -> Made:
        low, high = 10 ** (level - 1) if level > 1 else 0, 10**level - 1
        a, b = draw.between(low, high), draw.between(low, high)
        while not carries(a, b):
            a, b = draw.between(low, high), draw.between(low, high)
        first, second = sorted((a, b))
        return Made(f"{a} + {b}", (str(a + b),), {"sum": a + b}, f"{a}+{b}=", f"{first} + {second}")

    def verify(self, instance: Instance, answer: str) -> float:
        return float(whole(answer) == instance.facts["sum"])


@register_task("modular")
class Modular(Task):
    """(a x b + c) mod m with factors of up to `level` digits and a modulus from 2 to `largest`; the remainder from 0 to
    m - 1 is the one right answer.

    Args:
        largest: modulus, at most.
    """

    levels = range(1, 5)
    wordings = (
        "What is {}?",
        "Find the remainder: {}.",
        "Compute {}. Answer with a number from 0 to one less than the modulus.",
    )

    def __init__(self, largest: int = 19) -> None:
        if largest < 2:
            raise TaskError(f"task modular: largest = {largest}; a modulus is at least 2")
        self.largest = largest

    def make(self, draw: Draw, level: int) -> Made:
        a, b, c = (draw.between(0, 10**level - 1) for _ in range(3))
        modulus = draw.between(2, self.largest)
        value = (a * b + c) % modulus
        question = f"({a} * {b} + {c}) mod {modulus}"
        return Made(question, (str(value),), {"value": value}, f"({a}*{b}+{c})%{modulus}=")

    def verify(self, instance: Instance, answer: str) -> float:
        return float(whole(answer) == instance.facts["value"])
