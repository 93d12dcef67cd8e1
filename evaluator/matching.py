"""Pure functions that compare a generated answer with the right ones: each gives a score from 0 to 1.

    exact      the two texts are equal
    contains   the right text occurs in the answer, not as a part of a longer Latin word or number
    numeric    the answer's last number equals the right number
    choice     the answer's first letter from A to J that stands alone is the right one
    f1         the harmonic mean of precision and recall of the answer's words, as SQuAD has it
    rouge_l    the same of the longest common subsequence of words (ROUGE-L, Lin 2004)

Of several right answers the one that fits best counts. What each match compares:

exact and contains: text in Unicode's NFKC form and without differences of case, white space as single spaces, without
white space at the ends. `exact` also leaves out `.`, `!`, `?` and `。` at the end. For `contains` a number is what
`numeric` reads: 7 occurs in "3-7" and "7, 8", but not in "7.5", "1,007" or "-7".

numeric: numbers are compared as decimals, so that 2.50 is 2.5. A comma followed by three digits is a thousands
separator. A full stop at a number's end ends the sentence, and so does one after a letter or another full stop: …42. A
hyphen or a minus sign directly before the first digit belongs to the number, except after a digit, a letter of any
script, a closing bracket, a percent or degree sign, or another hyphen: 3-5 ends with 5. With a space behind it, it is a
bullet, a dash or a difference, and belongs to the number only after an opening bracket or a sign such as = or <:
x = − 5. Digits directly after a Latin letter are a name, as in GPT4. Units, currencies and percent signs are left out.
An answer without a number is wrong.

choice: only capital letters count, except where the letter is the whole answer. I and A before a word in lower case are
the English words, except before `is`: "I think that A is right" chooses A.

f1: the normalization and the F1 of SQuAD's evaluate-v1.1.py (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250):
lower case, without ASCII punctuation and the articles a, an, the; words are what white space separates.

rouge_l: F-measure with beta 1 of the longest common subsequence over words (Lin 2004,
https://aclanthology.org/W04-1013/); words are runs of letters, digits and underscores in lower case, of any script.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

VERSION = 2  # raised when the same answer would be judged otherwise
MATCHES = ("exact", "contains", "numeric", "choice", "f1", "rouge_l")

_UNSIGNED = r"(?<![\w)\]%°-])"  # a hyphen behind one of these is no sign
_SIGN = rf"{_UNSIGNED}[-−]|(?:(?<=[=<>≤≥≈(\[])|(?<=[=<>≤≥≈(\[] ))[-−] "
_NUMBER = re.compile(
    rf"(?<![A-Za-z0-9_])(?:{_SIGN})?(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)?(?:(?<=\d)(?:\.\d+)?|(?<![\w.])\.\d+)"
)
_CHOICE = re.compile(r"(?<![A-Za-z0-9'’])([A-J])(?![A-Za-z0-9'’])")
_ENGLISH = re.compile(r"\s+(?!is\b)[a-z]")  # what follows the words I and A
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(r"\w+")


def score(match: str, answer: str, right: Sequence[str]) -> float:
    """Return how well an answer fits the best of the right ones, from 0 to 1.

    Args:
        match: One of MATCHES; the module's text says what each compares.
        answer: The generated text.
        right: The right answers, at least one; each passes `refusal`.
    """
    compare = _COMPARED[match]
    return max(compare(answer, one) for one in right)


def refusal(match: str, right: str) -> str | None:
    """Say why a right answer can't be compared by a match, in a few words; None where it can."""
    if match == "numeric" and last_number(right) is None:
        return "holds no number, which match: numeric compares"
    if match == "choice" and right.strip() not in tuple("ABCDEFGHIJ"):
        return "is no letter from A to J, which match: choice compares"
    if match == "f1" and not _squad(right):
        return "holds no word beside articles and punctuation, which match: f1 compares"
    if match == "rouge_l" and not _words(right):
        return "holds no word, which match: rouge_l compares"
    return None


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text; None where there is none."""
    found = [number for number in _NUMBER.findall(unicodedata.normalize("NFKC", text)) if number]
    if not found:
        return None
    return Decimal("".join(found[-1].replace("−", "-").replace(",", "").split()))


def first_choice(text: str) -> str | None:
    """Return the first letter from A to J that stands alone; None where there is none."""
    alone = text.strip(string.punctuation + string.whitespace)
    if len(alone) == 1 and alone.upper() in "ABCDEFGHIJ":
        return alone.upper()
    for found in _CHOICE.finditer(text):
        if found[1] not in "AI" or not _ENGLISH.match(text, found.end()):
            return found[1]
    return None


def _exact(answer: str, right: str) -> float:
    return float(_plain(answer).rstrip(".!?。 ") == _plain(right).rstrip(".!?。 "))


def _contains(answer: str, right: str) -> float:
    inner, text = _plain(right), _plain(answer)
    before = r"(?<![a-z0-9])" if re.match("[a-z0-9]", inner) else _UNSIGNED if re.match(r"[-−]\.?\d", inner) else ""
    after = r"(?![a-z0-9])" if re.search("[a-z0-9]$", inner) else ""
    after += r"(?!\.\d)" if re.search(r"\d$", inner) else ""  # GPT4 and 1.2 are not GPT4.5 and 1.2.3
    inside = {place for number in _NUMBER.finditer(text) for place in range(number.start() + 1, number.end())}
    starts = [found.start() for found in re.finditer(f"{before}(?={re.escape(inner)}{after})", text)]
    return float(any(start not in inside and start + len(inner) not in inside for start in starts))


def _numeric(answer: str, right: str) -> float:
    number = last_number(answer)
    return float(number is not None and number == last_number(right))


def _choice(answer: str, right: str) -> float:
    return float(first_choice(answer) == right.strip())


def _f1(answer: str, right: str) -> float:
    got, wanted = _squad(answer), _squad(right)
    shared = sum((Counter(got) & Counter(wanted)).values())
    return _harmonic(shared, len(got), len(wanted))


def _rouge_l(answer: str, right: str) -> float:
    got, wanted = _words(answer), _words(right)
    return _harmonic(_common(got, wanted), len(got), len(wanted))


def _harmonic(shared: int, got: int, wanted: int) -> float:
    """Return the F1 of `shared` words among `got` and `wanted`: 2PR / (P + R) = 2 · shared / (got + wanted)."""
    return 2 * shared / (got + wanted) if shared else 0.0


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for column, against in enumerate(other, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == against else max(above, row[column - 1])
            diagonal = above
    return row[-1]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _squad(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


_COMPARED: dict[str, Callable[[str, str], float]] = {
    "exact": _exact,
    "contains": _contains,
    "numeric": _numeric,
    "choice": _choice,
    "f1": _f1,
    "rouge_l": _rouge_l,
}
