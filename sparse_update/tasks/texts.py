"""Questions about sequences of characters: sorting, brackets, edits of a word."""

from __future__ import annotations

from collections.abc import Callable

from sparse_update.tasks.arithmetic import whole
from sparse_update.tasks.base import Instance, Made, Task, register_task
from sparse_update.tasks.draw import Draw

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAIRS = {"(": ")", "[": "]", "{": "}"}


@register_task("sorting")
class Sorting(Task):
    """`level` + 2 numbers from 0 to 99, from the smallest to the largest; separated by spaces or commas."""

    levels = range(1, 11)
    wordings = (
        "Sort these numbers from the smallest to the largest: {}",
        "Put the numbers in ascending order: {}",
        "Order {} from low to high.",
    )

    def make(self, draw: Draw, level: int) -> Made:
        numbers = [draw.between(0, 99) for _ in range(level + 2)]
        ordered = sorted(numbers)
        listed = " ".join(map(str, numbers))
        key = f"sort {' '.join(map(str, ordered))}"
        return Made(listed, (" ".join(map(str, ordered)),), {"numbers": tuple(ordered)}, f"sort {listed}: ", key)

    def verify(self, instance: Instance, answer: str) -> float:
        found = tuple(whole(part) for part in answer.replace(",", " ").split())
        return float(found == instance.facts["numbers"])


@register_task("brackets")
class Brackets(Task):
    """Close what is open: brackets behind a given beginning that make it balanced.

    The shortest closing is the reference. Any other is right too, as long as it has at most twice as many brackets.
    `level` is the number of brackets that are open at the end.
    """

    levels = range(1, 11)
    wordings = (
        "Complete this sequence so that every bracket is closed: {}",
        "Which brackets must follow {} to balance it?",
        "Close the open brackets: {}",
    )

    def make(self, draw: Draw, level: int) -> Made:
        open_now: list[str] = []
        text = ""
        closed = draw.between(0, level + 1)  # pairs that come and go before the end
        while len(open_now) < level or closed:
            may_close = bool(open_now) and closed > 0
            may_open = len(open_now) < level + (closed > 0)
            if may_close and (not may_open or draw.between(0, 1)):
                text += PAIRS[open_now.pop()]
                closed -= 1
            else:
                open_now.append(draw.choice("([{"))
                text += open_now[-1]
        while len(open_now) > level:
            text += PAIRS[open_now.pop()]
        answer = "".join(PAIRS[bracket] for bracket in reversed(open_now))
        return Made(text, (answer,), {"beginning": text, "longest": 2 * len(answer)}, f"{text} -> ")

    def verify(self, instance: Instance, answer: str) -> float:
        text = "".join(answer.split())
        if not 0 < len(text) <= instance.facts["longest"]:
            return 0.0
        return float(balanced(instance.facts["beginning"] + text))


def balanced(text: str) -> bool:
    """Whether brackets of three kinds, and nothing else, are closed in their order."""
    open_now: list[str] = []
    for character in text:
        if character in PAIRS:
            open_now.append(PAIRS[character])
        elif not open_now or open_now.pop() != character:
            return False
    return not open_now


Edit = tuple[str, Callable[[str], str]]


def _edit(draw: Draw, word: str) -> Edit:
    """A request and what it makes of the word, which has at least three letters."""
    place = draw.between(1, len(word))
    letter, new = draw.choice(word), draw.choice(LETTERS)
    kinds: tuple[Edit, ...] = (
        ("reverse it", lambda text: text[::-1]),
        (f"delete letter {place}", lambda text: text[: place - 1] + text[place:]),
        (f"replace every {letter} by {new}", lambda text: text.replace(letter, new)),
        (f"put {new} in front", lambda text: new + text),
        (f"put {new} behind letter {place}", lambda text: text[:place] + new + text[place:]),
        ("double the last letter", lambda text: text + text[-1]),
        ("swap the first and the last letter", lambda text: text[-1] + text[1:-1] + text[0]),
        ("move the first letter to the end", lambda text: text[1:] + text[0]),
    )
    return draw.choice(kinds)


@register_task("edits")
class Edits(Task):
    """`level` edits of a word of random letters, one after the other; one right answer."""

    levels = range(1, 7)
    wordings = (
        "Take the word {}. Write the word that results.",
        "Start with {}. What is the result?",
        "Do this step by step and give only the final word: {}.",
    )

    def make(self, draw: Draw, level: int) -> Made:
        start = word = "".join(draw.choice(LETTERS) for _ in range(draw.between(4, 7)))
        steps = []
        for _ in range(level):
            said, apply = _edit(draw, word)
            while len(apply(word)) < 3:
                said, apply = _edit(draw, word)
            steps.append(said)
            word = apply(word)
        request = f"{start}: {', then '.join(steps)}"
        return Made(request, (word,), {"word": word}, f"{request} -> ")

    def verify(self, instance: Instance, answer: str) -> float:
        return float(answer.strip() == instance.facts["word"])
