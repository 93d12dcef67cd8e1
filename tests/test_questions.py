"""The questions of benchmarks/questions.py: the same for a seed, right, and judged by what their lines say."""

import hashlib
import json
import random
import re

import pytest

from benchmarks import questions
from evaluator import embedded_texts, matching, texts


def asked(lines):
    return [line["prompt"].rsplit("\n\n", 1)[1] for line in lines]


def test_a_seed_gives_the_same_arithmetic_on_every_python():
    lines = questions.arithmetic(200, 0)
    written = "".join(json.dumps(line) for line in lines)
    assert hashlib.sha256(written.encode()).hexdigest()[:16] == "550d3689857b7460"
    assert len(set(asked(lines))) == 200
    assert asked(questions.arithmetic(200, 1)) != asked(lines)


@pytest.mark.parametrize("kind", questions.KINDS)
def test_the_steps_of_a_sum_are_right_and_end_with_its_answer(kind):
    for size in set(questions.SIZES):
        one = kind(random.Random(size), size)
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", one.steps)
        assert steps
        for left, sign, right, result in steps:
            assert eval(f"{left} {sign} {right}") == int(result)
        assert int(steps[-1][3]) == one.answer
        told = one.solved().splitlines()[1].removeprefix("Answer:")
        assert matching.score("numeric", told, [str(one.answer)]) == 1.0
        assert matching.score("numeric", told, [str(one.answer + 1)]) == 0.0


def test_a_word_that_is_asked_for_stands_once_in_a_passage_that_no_calibration_reads():
    calibration, _ = texts.split(embedded_texts.documents())
    read = " ".join(" ".join(document.text.split()) for document in calibration)
    lines = questions.reading(100, 0)
    assert len(set(asked(lines))) == 100
    for line, question in zip(lines, asked(lines), strict=True):
        passage, quoted = question.removesuffix("\nAnswer:").split("\n")
        assert passage.removeprefix("Text: ") not in read
        words = quoted.partition("here: ")[2].replace("___", line["answer"])
        if not words:
            words = f"{quoted.partition('says: ')[2]} {line['answer']}"
        assert words in passage
        assert matching.score("contains", passage, [line["answer"]]) == 1.0
        assert matching.score("contains", quoted, [line["answer"]]) == 0.0
    assert lines == questions.reading(100, 0)
    assert asked(lines) != asked(questions.reading(100, 1))


def test_more_readings_than_the_text_has_are_refused():
    with pytest.raises(ValueError, match="100000 questions are asked for, and the embedded text has"):
        questions.reading(100_000, 0)
