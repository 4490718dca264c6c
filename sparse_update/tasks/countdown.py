"""Reach a number with given numbers and the four operations: many answers are right, and only a verifier can tell."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from sparse_update.tasks.base import Instance, Made, Task, TaskError, register_task
from sparse_update.tasks.draw import Draw

TOKENS = re.compile(r"\s*(?:([0-9]{1,9})|([-+*/()]))")
LONGEST = 400
"""Characters of an expression that are read at most."""
DEEPEST = 40
"""Brackets within each other that are read at most."""


class Expression:
    """Reads +, -, *, / and brackets over whole numbers of up to nine digits, exactly; the usual precedence, left to right.

    Raises ValueError for anything else, a division by zero among it.
    """

    def __init__(self, text: str) -> None:
        text = text.strip()
        if len(text) > LONGEST:
            raise ValueError(f"an expression of {len(text)} characters: at most {LONGEST} are read")
        self.tokens: list[str] = []
        place = 0
        while place < len(text):
            found = TOKENS.match(text, place)
            if found is None:
                raise ValueError(f"character {text[place]!r}")
            self.tokens.append(found[1] or found[2])
            place = found.end()
        self.numbers = [int(token) for token in self.tokens if token.isdigit()]
        self._next = self._depth = 0
        self.value = self._sum()
        if self._next < len(self.tokens):
            raise ValueError(f"{self.tokens[self._next]!r} behind the end")

    def _at(self, *wanted: str) -> str | None:
        if self._next < len(self.tokens) and self.tokens[self._next] in wanted:
            self._next += 1
            return self.tokens[self._next - 1]
        return None

    def _sum(self) -> Fraction:
        value = self._product()
        while sign := self._at("+", "-"):
            other = self._product()
            value = value + other if sign == "+" else value - other
        return value

    def _product(self) -> Fraction:
        value = self._number()
        while sign := self._at("*", "/"):
            other = self._number()
            if sign == "/" and not other:
                raise ValueError("division by zero")
            value = value * other if sign == "*" else value / other
        return value

    def _number(self) -> Fraction:
        if self._at("("):
            self._depth += 1
            if self._depth > DEEPEST:
                raise ValueError(f"more than {DEEPEST} brackets within each other")
            value = self._sum()
            if not self._at(")"):
                raise ValueError("a bracket is open")
            self._depth -= 1
            return value
        if self._next < len(self.tokens) and self.tokens[self._next].isdigit():
            self._next += 1
            return Fraction(int(self.tokens[self._next - 1]))
        raise ValueError("a number is missing")


@register_task("countdown")
class Countdown(Task):
    """An expression over `level` + 1 given numbers, each used at most as often as it is given, that has a given value.

    Args:
        least: score of an expression that uses only given numbers and has another value; 0 for none.
    """

    levels = range(1, 6)
    wordings = (
        "Using {}. Use each number at most once, with + - * / and brackets. Write the expression only.",
        "Find an expression with {}. Every number may be used once; +, -, *, / and brackets are allowed.",
    )

    def __init__(self, least: float = 0.0) -> None:
        if not 0 <= least < 1:
            raise TaskError(f"task countdown: least = {least}; a score from 0 up to, and not including, 1")
        self.least = least

    def make(self, draw: Draw, level: int) -> Made:
        while True:
            numbers = [draw.between(1, 25) for _ in range(level + 1)]
            text, value, atom = str(numbers[0]), Fraction(numbers[0]), True
            for number in numbers[1:]:
                signs = [sign for sign in "+-*/" if _whole(value, sign, number)]
                sign = draw.choice(signs)
                left = text if atom or sign in "+-" else f"({text})"
                text, value, atom = f"{left}{sign}{number}", _apply(value, sign, number), False
            if 1 <= value <= 999:
                break
        target = int(value)
        given = draw.shuffled(numbers)
        listed = ", ".join(map(str, given))
        short = f"{' '.join(map(str, given))} -> {target}: "
        key = f"countdown {sorted(given)} {target}"
        question = f"the numbers {listed}, reach {target}"
        return Made(question, (text,), {"numbers": tuple(given), "target": target}, short, key)

    def verify(self, instance: Instance, answer: str) -> float:
        try:
            found = Expression(answer)
        except ValueError:
            return 0.0
        if Counter(found.numbers) - Counter(instance.facts["numbers"]):
            return 0.0
        return 1.0 if found.value == instance.facts["target"] else self.least


def _apply(value: Fraction, sign: str, number: int) -> Fraction:
    if sign == "/":
        return value / number
    return value * number if sign == "*" else value + number if sign == "+" else value - number


def _whole(value: Fraction, sign: str, number: int) -> bool:
    """Whether an operation keeps the value a whole number from 0 to 9999."""
    found = _apply(value, sign, number)
    return found.denominator == 1 and 0 <= found <= 9999
