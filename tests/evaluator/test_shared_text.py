"""What two texts share: found in every form, left out, and what counts."""

import json
import random
import time
import unicodedata

import pytest

from evaluator import shared_text, texts
from evaluator.texts import Document

WORDS = [a + b + c for a in ("ba", "ce", "di", "fo", "gu") for b in ("ka", "le", "mi", "no", "") for c in "nrs"]
LONG = "Nothing in a language model's weights says which of its layers could be spared without anyone noticing it."


def prose(seed, count=60):
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(count)) + "."


def passage(size):
    """A paragraph of so many characters, with single spaces."""
    return (prose(7, 100)[: size - 1] + ".").replace(" .", "x.")


def compare(first, second):
    first, second = ([Document("a", one)] if isinstance(one, str) else one for one in (first, second))
    shared = shared_text.compare(first, second)
    left = [document for document in shared.rest if document is not None]
    assert shared_text.compare(left, second).characters == 0
    return shared


def text_of(shared):
    return [None if document is None else document.text for document in shared.rest]


def wrapped(text, width):
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def test_texts_that_share_nothing_stay_as_they_are():
    first = [Document("a", prose(1)), Document("b", "  "), Document("c", f"{prose(2)}\n\n\n{prose(3)}\r\n")]
    shared = compare(first, [Document("d", prose(4)), Document("e", "")])
    assert shared.rest == tuple(first)
    assert (shared.characters, shared.share, shared.examples, shared.same) == (0, 0.0, (), "")
    assert compare([], first).share == compare(first, []).share == 0.0


def test_a_whole_document_in_both_is_shared_whatever_its_length():
    first = [Document("a", "One two."), Document("b", "Three.")]
    shared = compare(first, [Document("c", "four"), Document("d", "  one\nTWO. ")])
    assert shared.rest == (None, first[1])
    assert str(shared.examples[0]) == 'a and d both hold "One two."'
    assert shared.same == ""
    assert compare(first[:1], [Document("d", "one TWO.")]).same == 'a and d are the same: "one two."'


@pytest.mark.parametrize("size", [79, 80])
def test_a_paragraph_and_a_line_count_from_80_characters_on(size):
    held = passage(size)
    assert len(held) == size
    for first in (f"{prose(1)}\n\n{held}\n\n{prose(2)}", f"{prose(1)}\n{held}\n{prose(2)}"):
        shared = compare(first, f"{prose(3)}\n\n{held}")
        assert (shared.characters > 0) == (size == 80)
        assert (held in text_of(shared)[0]) == (size == 79)


@pytest.mark.parametrize("size", [299, 300])
def test_a_part_of_a_paragraph_counts_from_300_characters_without_white_space_on(size):
    held, length = [], 0
    for word in prose(5, 200).strip(".").split():
        held.append(word[: size - length])
        length += len(held[-1])
        if length == size:
            break
    first = f"{prose(1)} Qx {' '.join(held)} xQ {prose(2)}"
    shared = compare(first, f"{prose(3)} Zy {' '.join(held)} yZ {prose(4)}")
    assert shared.characters == (size if size == 300 else 0)
    if size == 300:
        assert text_of(shared) == [f"{prose(1)} Qx \n\n xQ {prose(2)}"]


HELD = f"{prose(10, 20)} Ça et là, ﬁnally, “Straße” 가각 ½ {prose(11, 20)}"


@pytest.mark.parametrize(
    "written",
    [
        HELD.upper(),
        HELD.replace(" ", "  \t"),
        HELD.replace(" ", "\u00a0"),
        wrapped(HELD, 30),
        wrapped(HELD, 30).replace("\n", "\r\n"),
        wrapped(HELD, 30).replace("\n", "\n    "),
        unicodedata.normalize("NFD", HELD),
        unicodedata.normalize("NFKC", HELD),
        unicodedata.normalize("NFKD", HELD),
        HELD.replace("an", "a\u00adn").replace(" ", " \u200b"),
        "\ufeff" + HELD,
        "".join(chr(ord(c) + 0xFEE0) if "a" <= c <= "z" else c for c in HELD),  # full width
    ],
)
def test_the_form_in_which_a_passage_is_written_makes_no_difference(written):
    for one, other in ((written, HELD), (HELD, written)):
        shared = compare(f"{prose(1)}\n \n{one}\n\n{prose(2)}", f"{prose(3)}\n\n{other}")
        assert text_of(shared) == [f"{prose(1)}\n\n{prose(2)}"]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("flat", [" ".join, "\n".join, "\n\n".join, "\r\n\r\n".join])
def test_a_text_is_known_again_in_another_file_format(tmp_path, flat, turned):
    paragraphs = [prose(seed, 70) for seed in range(20)]
    (tmp_path / "a.txt").write_bytes(
        "\r\n\r\n".join(wrapped(one, 60).replace("\n", "\r\n") for one in paragraphs).encode("utf-8")
    )
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": prose(99)}) + "\n" + json.dumps({"text": flat(paragraphs)}))
    first, second = (texts.read_documents([tmp_path / name]) for name in ("a.txt", "b.jsonl"))
    if turned:
        first, second = second, first
    shared = compare(first, second)
    assert shared.share > (0.9 if turned else 0.999)
    assert {str(example).split('"')[0] for example in shared.examples} & {
        "a.txt:1 and b.jsonl:2 both hold ",
        "b.jsonl:2 and a.txt:1 both hold ",
    }


def test_examples_quote_shortly_and_name_files_and_lines(tmp_path):
    (tmp_path / "a.txt").write_text(f"{prose(1)}\n\n\n\nOne\n{LONG}\nTwo\n")
    (tmp_path / "b.txt").write_text(f"\n{LONG}\n")
    first, second = (texts.read_documents([tmp_path / name]) for name in ("a.txt", "b.txt"))
    assert list(map(str, compare(first, second).examples)) == [f'a.txt:6 and b.txt:2 both hold "{LONG[:59]}…"']
    many = [Document(str(i), f"{prose(i)}\n\n{i} {LONG}") for i in range(20)]
    assert len(compare(many, [Document("c", "\n\n".join(f"{i} {LONG}" for i in range(20)))]).examples) == 3


def test_a_passage_that_recurs_counts_once_and_is_left_out_everywhere():
    files = [Document(str(i), f"{LONG}\n\n{prose(i, 200)}") for i in range(50)]
    shared = compare(files, [Document("other", f"{LONG}\n\n{prose(99)}")])
    assert text_of(shared) == [prose(i, 200) for i in range(50)]
    assert shared.characters == len(LONG.replace(" ", ""))
    assert shared.share == pytest.approx(shared.characters / (shared.characters + sum(
        len(prose(i, 200).replace(" ", "")) for i in range(50))))  # fmt: skip
    assert compare(files, [Document("apart", prose(99))]).characters == 0  # recurring in one text alone is no matter


def test_what_is_left_shares_nothing_even_where_it_closes_up():
    middle = f"{prose(3)}\n{LONG}\n{prose(4)}"
    second = f"{LONG}\n\n{prose(3)}\n\nyes\n\n{prose(8)}"
    assert text_of(compare([Document("a", middle)], [Document("b", second)])) == [prose(4)]
    assert text_of(compare(f"{LONG}\n\nyes", [Document("b", LONG), Document("c", "yes")])) == [None]


def test_rulers_and_tables_are_no_runs():
    first, second = (f"{prose(seed)} {'-' * 400} {'0x00, ' * 100} {prose(seed + 1)}" for seed in (1, 5))
    assert compare(first, second).characters == 0


def code(seed, size):
    """About `size` characters that look like a code base: short lines, blank ones, and words that recur."""
    words = iter(random.Random(seed).choices(WORDS, k=size))
    lines, total = [], 0
    while total < size:
        lines += [f"def {next(words)}_{next(words)}():", f"    return {' + '.join(next(words) for _ in range(6))}", ""]
        total += sum(map(len, lines[-3:])) + 3
    return "\n".join(lines)


def shared_of(first, second):
    """Return (what two texts share, the processor's seconds that it took to find)."""
    started = time.process_time()
    shared = shared_text.compare(first, second)
    return shared, time.process_time() - started


def files_of(text):
    return [Document(str(place), text[place : place + 20_000]) for place in range(0, len(text), 20_000)]


@pytest.mark.parametrize("documents", [files_of, lambda text: [Document("a", text)]])
def test_the_time_of_a_comparison_grows_with_the_texts_and_not_with_their_product(documents):
    pairs = []
    for size in (80_000, 1_600_000):
        both = (f"{text[:1000]}\n\n{LONG}\n\n{text[1000:]}" for text in (code(0, size), code(1_000_000, size)))
        pairs.append([documents(text) for text in both])
    seconds = [[], []]
    for _ in range(3):  # in turn, so that what else the machine does slows both
        for pair, its_seconds in zip(pairs, seconds, strict=True):
            shared, taken = shared_of(*pair)
            assert shared.characters == len(LONG.replace(" ", ""))
            its_seconds.append(taken)
    assert min(seconds[1]) < 120 * min(seconds[0])  # 20 to 35 times as long, and 400 times if it were the product


def test_a_text_that_is_one_long_line_takes_no_longer():
    one = code(0, 600_000)
    second = [Document("b", f"{prose(1)}\n{one}")]
    lines, as_lines = shared_of([Document("a", one)], second)
    flat, as_one_line = shared_of([Document("a", " ".join(one.split()))], second)
    assert min(lines.share, flat.share) > 0.99
    assert as_one_line < 10 * as_lines  # hundreds of times if each run were looked for in the whole line
