"""Write two sets of questions for tasks of kind `generation`: arithmetic, and reading of the embedded text.

    python benchmarks/questions.py DIRECTORY [--arithmetic 200] [--reading 100] [--seed 0]

DIRECTORY gets arithmetic.jsonl and reading.jsonl. A prompt begins with solved examples, so that base models know what
is asked; it is plain text, and the answer is one line. In a study file:

    perf:
      - {metric: generation, files: [arithmetic.jsonl], template: false, stop: ["\\n"], max_tokens: 96}
      - {metric: generation, files: [reading.jsonl], template: false, stop: ["\\n"], max_tokens: 24}

Arithmetic asks for one to three steps with numbers of one to three digits; the last number of the line is compared.
Reading shows a passage of `pydoc_data.topics` and asks for a word of it: how a quotation goes on, which small models
find, or which word is missing in one, which they don't. Its passages come from the part of the embedded text that
no calibration reads. The same seed gives the same arithmetic everywhere, and the same reading
wherever Python ships the same text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import random
import re
from collections.abc import Callable, Iterator

from evaluator import embedded_texts, texts

NAMES = ("Ada", "Ben", "Carla", "Dev", "Emma", "Farid", "Grace", "Hugo", "Irma", "Jonas", "Kira", "Leo", "Mina", "Noor")
THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "tickets")
SIZES = (0, 2, 0, 1, 0)  # of the numbers, in turn: of one digit, of two, of three
SHOTS = (0, 1, 0)  # sizes of the solved examples before a question of arithmetic
PASSAGE = (45, 110)  # words
BEFORE, AFTER = 5, 4  # words of the sentence that are quoted around the word that is asked for
WORD = re.compile(r"[a-z]{5,}")
NOT_ASKED = {  # words that a grammar gives away, or that the question itself holds
    *("about", "after", "again", "before", "between", "could", "every", "first", "other", "should", "their", "there"),
    *("these", "those", "through", "under", "until", "where", "which", "while", "within", "without", "would"),
    "missing",
}
EXAMPLES = (  # of reading: a passage, words before the one that is asked for, the word, and words after it
    (
        "The lighthouse on Grey Point was built in 1871 after three ships had struck the reef in one winter. Its "
        "keeper lit the lamp every evening for thirty-one years. When the lamp became electric, she stayed on as the "
        "postmistress of the island.",
        ("three ships had struck the", "reef", "in one winter."),
    ),
    (
        "The museum closes on Mondays. On Thursdays it stays open until nine in the evening. The room of clocks is on "
        "the second floor, and the café moved from the cellar to the courtyard last spring.",
        ("moved from the cellar to the", "courtyard", "last spring."),
    ),
)
Place = tuple[str, str, str]  # words, the word that is asked for, words


@dataclasses.dataclass(frozen=True)
class Sum:
    """A question of arithmetic, the steps to its answer, and the answer, which is the last number of the steps."""

    question: str
    steps: str
    answer: int

    def solved(self) -> str:
        return f"Question: {self.question}\nAnswer: {self.steps}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--arithmetic", type=int, default=200, help="questions")
    parser.add_argument("--reading", type=int, default=100, help="questions")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for path in write(arguments.directory, arguments.arithmetic, arguments.reading, arguments.seed):
        print(path)


def write(directory: pathlib.Path, sums: int = 200, readings: int = 100, seed: int = 0) -> list[pathlib.Path]:
    """Write both files, and return their paths; a file of no question is empty."""
    directory.mkdir(parents=True, exist_ok=True)
    found = {"arithmetic": arithmetic(sums, seed), "reading": reading(readings, seed)}
    paths = []
    for name, lines in found.items():
        paths.append(directory / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return paths


# -- arithmetic ----------------------------------------------------------------------------------------------


def arithmetic(count: int, seed: int) -> list[dict[str, object]]:
    """Return questions of all kinds in turn, none twice, each after solved examples of its own kind and another."""
    drawn = random.Random(f"arithmetic {seed}")
    shots = [[kind(drawn, size) for size in SHOTS] for kind in KINDS]
    before = [[shots[number - 1][0], *own] for number, own in enumerate(shots)]
    seen = {one.question for own in shots for one in own}
    lines: list[dict[str, object]] = []
    while len(lines) < count:
        number = len(lines) % len(KINDS)
        asked = KINDS[number](drawn, SIZES[len(lines) // len(KINDS) % len(SIZES)])
        if asked.question in seen:
            continue
        seen.add(asked.question)
        prompt = "".join(f"{one.solved()}\n" for one in before[number]) + f"Question: {asked.question}\nAnswer:"
        lines.append(
            {"id": f"arithmetic-{len(lines) + 1}", "prompt": prompt, "answer": asked.answer, "match": "numeric"}
        )
    return lines


def _number(drawn: random.Random, size: int) -> int:
    return drawn.randint(*((2, 9), (11, 60), (110, 900))[size])


def _factor(drawn: random.Random, size: int) -> int:
    return drawn.randint(*((2, 5), (3, 9), (12, 40))[size])


def _more(drawn: random.Random, size: int) -> Sum:
    name, thing, (a, b) = drawn.choice(NAMES), drawn.choice(THINGS), (_number(drawn, size), _number(drawn, size))
    return Sum(f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
               f"{a} + {b} = {a + b}", a + b)  # fmt: skip


def _left(drawn: random.Random, size: int) -> Sum:
    name, thing, b = drawn.choice(NAMES), drawn.choice(THINGS), _number(drawn, size)
    a = b + _number(drawn, size)
    return Sum(f"{name} has {a} {thing} and gives {b} of them away. How many {thing} are left?",
               f"{a} - {b} = {a - b}", a - b)  # fmt: skip


def _boxes(drawn: random.Random, size: int) -> Sum:
    thing, (a, b) = drawn.choice(THINGS), (_factor(drawn, size), _number(drawn, size))
    return Sum(f"There are {a} boxes with {b} {thing} each. How many {thing} are there in all?",
               f"{a} * {b} = {a * b}", a * b)  # fmt: skip


def _shared(drawn: random.Random, size: int) -> Sum:
    thing, (a, b) = drawn.choice(THINGS), (_factor(drawn, size), _number(drawn, size))
    return Sum(f"{a * b} {thing} are shared equally among {a} children. How many {thing} does each child get?",
               f"{a * b} / {a} = {b}", b)  # fmt: skip


def _gives_and_buys(drawn: random.Random, size: int) -> Sum:
    name, thing, (b, c) = drawn.choice(NAMES), drawn.choice(THINGS), (_number(drawn, size), _number(drawn, size))
    a = b + _number(drawn, size)
    return Sum(f"{name} has {a} {thing}, gives {b} to a friend and then buys {c}. How many {thing} does {name} have "
               f"now?", f"{a} - {b} = {a - b}, {a - b} + {c} = {a - b + c}", a - b + c)  # fmt: skip


def _sold(drawn: random.Random, size: int) -> Sum:
    thing, a, b = drawn.choice(THINGS), _factor(drawn, size), _number(drawn, size)
    c = drawn.randint(1, a * b - 1)
    return Sum(f"A shop has {a} boxes with {b} {thing} each and sells {c} {thing}. How many {thing} are left?",
               f"{a} * {b} = {a * b}, {a * b} - {c} = {a * b - c}", a * b - c)  # fmt: skip


def _fence(drawn: random.Random, size: int) -> Sum:
    a, b = _number(drawn, size), _number(drawn, size)
    return Sum(f"A garden is {a} metres long and {b} metres wide. How many metres of fence go around it?",
               f"{a} + {b} = {a + b}, 2 * {a + b} = {2 * (a + b)}", 2 * (a + b))  # fmt: skip


def _sale(drawn: random.Random, size: int) -> Sum:
    price, percent = 20 * drawn.randint(*((1, 5), (6, 20), (30, 200))[size]), drawn.choice((5, 10, 20, 25, 50))
    off = price * percent // 100
    return Sum(f"A coat costs {price} euros. In the sale it is {percent} percent cheaper. How many euros does it cost "
               f"in the sale?", f"{percent} percent of {price} is {off}, {price} - {off} = {price - off}",
               price - off)  # fmt: skip


def _wages(drawn: random.Random, size: int) -> Sum:
    name, a, b, c = drawn.choice(NAMES), _factor(drawn, min(size, 1)), drawn.randint(2, 6), _number(drawn, size)
    return Sum(f"{name} works {a} hours on each of {b} days and earns {c} euros an hour. How many euros does {name} "
               f"earn?", f"{a} * {b} = {a * b}, {a * b} * {c} = {a * b * c}", a * b * c)  # fmt: skip


def _together(drawn: random.Random, size: int) -> Sum:
    one, other = drawn.sample(NAMES, 2)
    thing, a, b = drawn.choice(THINGS), _number(drawn, size), _number(drawn, size)
    return Sum(f"{one} has {a} {thing}. {other} has {b} more than {one}. How many {thing} do they have together?",
               f"{a} + {b} = {a + b}, {a} + {a + b} = {2 * a + b}", 2 * a + b)  # fmt: skip


KINDS: tuple[Callable[[random.Random, int], Sum], ...] = (
    *(_more, _left, _boxes, _shared, _gives_and_buys),
    *(_sold, _fence, _sale, _wages, _together),
)


# -- reading -------------------------------------------------------------------------------------------------


def reading(count: int, seed: int) -> list[dict[str, object]]:
    """Return questions on passages of the embedded text, at most two on one.

    Raises:
        ValueError: The text has fewer passages.
    """
    drawn = random.Random(f"reading {seed}")
    places = []
    for passage in _passages():
        cuts = _cuts(passage)
        places += [(passage, cut) for cut in drawn.sample(cuts, min(2, len(cuts)))]
    if len(places) < count:
        raise ValueError(f"reading: {count} questions are asked for, and the embedded text has {len(places)}")
    lines: list[dict[str, object]] = []
    for passage, cut in drawn.sample(places, count):
        ask = ASKED[len(lines) % len(ASKED)]
        before = "".join(f"{ask(*example)} {example[1][1]}\n\n" for example in EXAMPLES)
        prompt = before + ask(passage, cut)
        lines.append({"id": f"reading-{len(lines) + 1}", "prompt": prompt, "answer": cut[1], "match": "contains"})
    return lines


def _goes_on(passage: str, cut: Place) -> str:
    return f"Text: {passage}\nThe text says: {cut[0]}"


def _is_missing(passage: str, cut: Place) -> str:
    return f"Text: {passage}\nWhich word of the text is missing here: {cut[0]} ___ {cut[2]}\nAnswer:"


ASKED = (_goes_on, _is_missing)  # in turn


def _passages() -> Iterator[str]:
    """Yield passages of prose: neighbouring paragraphs of one document, until they are long enough."""
    for document in texts.split(embedded_texts.documents())[1]:
        words: list[str] = []
        for paragraph in document.text.split("\n\n"):
            new = paragraph.split()
            if not _is_prose(paragraph) or len(words) + len(new) > PASSAGE[1]:
                words = []
            if _is_prose(paragraph) and len(words) + len(new) <= PASSAGE[1]:
                words += new
                if len(words) >= PASSAGE[0]:
                    yield " ".join(words)
                    words = []


def _is_prose(paragraph: str) -> bool:
    flat = " ".join(paragraph.split())
    letters = sum(each.isalpha() or each == " " for each in flat)
    return flat[:1].isupper() and flat[-1:] == "." and letters >= 0.9 * len(flat)


def _cuts(passage: str) -> list[Place]:
    """Return each word that the passage holds once, with the words around it, within a sentence."""
    words = passage.split()
    found = []
    for place in range(BEFORE, len(words) - AFTER):
        word, before, after = words[place], words[place - BEFORE : place], words[place + 1 : place + 1 + AFTER]
        if any(each[-1] in ".:;" for each in (*before, *after[:-1])) or word in NOT_ASKED:
            continue
        if WORD.fullmatch(word) and len(re.findall(rf"\b{word}", passage, re.IGNORECASE)) == 1:
            found.append((" ".join(before), word, " ".join(after)))
    return found


if __name__ == "__main__":
    main()
