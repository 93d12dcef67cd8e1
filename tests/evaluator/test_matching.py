from decimal import Decimal

import pytest

from evaluator import matching


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        ("Paris", "Paris", 1),
        ("  paris.\n", "Paris", 1),
        ("PARIS!", "Paris", 1),
        ("It is Paris", "Paris", 0),
        ("New  York", "new york", 1),
        ("Ｐａｒｉｓ", "Paris", 1),  # full-width letters
        ("서울입니다。", "서울입니다", 1),
        ("", "Paris", 0),
        ("Straße", "STRASSE", 1),
    ],
)
def test_exact(answer, right, score):
    assert matching.score("exact", answer, [right]) == score


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        ("The capital is Paris.", "paris", 1),
        ("It lies in Parisland", "Paris", 0),
        ("unparis", "Paris", 0),
        ("42 and more", "42", 1),
        ("1423", "42", 0),
        ("서울입니다", "서울", 1),  # a particle follows without a space
        ("a (red) rose", "(red)", 1),
        ("a red\n  rose", "red rose", 1),
        ("", "rose", 0),
        ("1,700", "700", 0),
        ("1,700", "1", 0),
        ("1,700,000", "1,700", 0),
        ("1,700,000", "700", 0),
        ("1,700.50", "1,700", 0),
        ("7.5", "7", 0),
        ("3.14", "14", 0),
        ("about .14", "14", 0),
        ("-7", "7", 0),
        ("x = − 7", "7", 0),
        ("3-7", "-7", 0),
        ("3.5 %", "5 %", 0),
        ("1.2.3", "1.2", 0),
        ("GPT4.5", "GPT4", 0),
        ("7.5, or rather 7", "7", 1),  # one occurrence suffices
        ("7 7 7.5", "7 7", 1),
        ("7.7 7 7", "7 7", 1),
        ("42,43", "42", 1),
        ("42,43", "43", 1),
        ("42, 43", "43", 1),
        ("42.", "42", 1),
        ("(42)", "42", 1),
        ("_42_", "42", 1),
        ("in 2024,700 of them", "700", 1),
        ("3-7", "7", 1),
        ("covid-19", "19", 1),
        ("코로나-19", "19", 1),
        ("Answer - 7", "7", 1),
        ("- 7", "7", 1),
        ("it is…42", "42", 1),
        ("on 14.3.2020", "2020", 1),
        ("x = -7", "-7", 1),
        ("it costs 1,700 €", "1,700", 1),
        ("GPT4.", "GPT4", 1),
    ],
)
def test_contains(answer, right, score):
    assert matching.score("contains", answer, [right]) == score


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        ("The answer is 42.", "42"),
        ("so 1,234,567.50 dollars", "1234567.50"),
        ("$1,234.", "1234"),
        ("first 3, then 7", "7"),
        ("between 10,20", "20"),  # a comma before two digits separates two numbers
        ("3-5", "5"),
        ("x = -5", "-5"),
        ("x = − 5", "-5"),
        ("(-0.25)", "-0.25"),
        ("about .5 l", "0.5"),
        ("50%", "50"),
        ("답은 12개입니다", "12"),
        ("답은12개", "12"),
        ("GPT4 says 7 cm", "7"),
        ("GPT4", None),
        ("12,3456", "3456"),
        ("１２", "12"),
        ("#### 18", "18"),
        ("none", None),
        ("...", None),
        ("", None),
        ("1/2", "2"),
        ("10 - 3 = 7.0", "7.0"),
        ("10-3", "3"),
        ("$-3", "-3"),
        ("-42", "-42"),
        ("−42", "-42"),
        ("It is -42.", "-42"),
        ("(- 42)", "-42"),
        ("x < - 4", "-4"),
        ("- 42", "42"),
        ("The answer is:\n- 42", "42"),
        ("x =\n- 42", "42"),
        ("Answer - 42", "42"),
        ("Answer: − 42", "42"),
        ("Total: 10 - 3", "3"),
        ("(10) - 3", "3"),
        ("(10)-3", "3"),
        ("50%-60%", "60"),
        ("10°-20°", "20"),
        ("pages 3--5", "5"),
        ("Answer--42", "42"),
        ("코로나-19", "19"),
        ("The answer is…42", "42"),  # NFKC makes it three full stops
        ("정답이다.42", "42"),
    ],
)
def test_the_last_number(text, number):
    assert matching.last_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_decimals_and_not_floats():
    assert matching.score("numeric", "2.50", ["2.5"]) == 1
    assert matching.score("numeric", "0.30000000000000004", ["0.3"]) == 0
    assert matching.score("numeric", "12345678901234567891", ["12345678901234567890"]) == 0
    assert matching.score("numeric", "no idea", ["3"]) == 0
    assert matching.score("numeric", "it is 1,000", ["5", "1000"]) == 1


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(c)", "C"),
        ("**D**", "D"),
        ("The answer is (C).", "C"),
        ("Answer: J", "J"),
        ("I think that A is right", "A"),
        ("A good one is C", "C"),
        ("I'm sure: B", "B"),
        ("정답은 D입니다", "D"),
        ("CAB", None),
        ("K", None),
        ("B2 or E", "E"),
        ("b is right", None),
        ("A\n\nbecause it is", None),  # an article as far as this rule sees
        ("A. because", "A"),
        ("", None),
    ],
)
def test_the_first_choice(text, letter):
    assert matching.first_choice(text) == letter


@pytest.mark.parametrize(
    ("answer", "right", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("the big Eiffel Tower", "Eiffel Tower", 0.8),  # P = 2/3, R = 1
        ("the the the", "rose", 0.0),
        ("a b b", "b b c", 0.8),  # the article a is no word: 2 shared of 2 and 3
        ("", "rose", 0.0),
    ],
)
def test_f1(answer, right, f1):
    assert matching.score("f1", answer, [right]) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "right", "value"),
    [
        ("police killed the gunman", "police killed the gunman", 1.0),
        ("police kill the gunman", "police killed the gunman", 0.75),  # the examples of Lin (2004), section 3.1
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("gunman the", "police killed the gunman", 2 * 1 / 6),
        ("", "rose", 0.0),
        ("개와 고양이", "고양이 개와", 0.5),
    ],
)
def test_rouge_l(answer, right, value):
    assert matching.score("rouge_l", answer, [right]) == pytest.approx(value)


def test_the_best_of_several_right_answers_counts():
    assert matching.score("f1", "red rose", ["blue", "red rose", "rose"]) == 1.0
    assert matching.score("choice", "C", ["A", "C"]) == 1.0


@pytest.mark.parametrize(
    ("match", "right", "says"),
    [
        ("numeric", "many", "holds no number"),
        ("choice", "K", "is no letter from A to J"),
        ("choice", "b", "is no letter from A to J"),
        ("f1", "the", "holds no word"),
        ("rouge_l", "!", "holds no word"),
    ],
)
def test_a_right_answer_that_can_never_match_is_refused(match, right, says):
    assert says in matching.refusal(match, right)


@pytest.mark.parametrize(
    ("match", "right"),
    [("exact", "x"), ("contains", "x"), ("numeric", "1,000"), ("choice", "B"), ("f1", "x"), ("rouge_l", "x")],
)
def test_a_right_answer_matches_itself(match, right):
    assert matching.refusal(match, right) is None
    assert matching.score(match, right, [right]) == 1.0
