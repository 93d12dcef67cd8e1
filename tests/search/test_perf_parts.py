"""The keys of `evaluation.perf` come from the files of evaluator/tasks."""

import subprocess
import sys
import textwrap

import pytest
from pydantic import ValidationError

from evaluator import tasks
from search.config.evaluation_section import PerfPart


def test_a_part_has_the_keys_of_every_kind():
    expected = {"metric", *(name for kind in tasks.names() for name in tasks.module_of(kind).Section.model_fields)}
    assert set(PerfPart.model_fields) == expected
    assert PerfPart().model_dump() == {
        "metric": "perplexity",
        "weight": 1.0,
        "name": None,
        "limit": None,
        "files": [],
        "match": "contains",
        "max_tokens": 256,
        "stop": [],
        "template": {},
        "task": None,
        "include_path": None,
    }


def test_the_perplexity_has_no_section_and_a_task_has_its_own():
    assert PerfPart().task_section() is None
    part = PerfPart(metric="multiple_choice", files=["a.jsonl"], limit=3, weight=2, task="of another kind")
    assert part.task_section() == tasks.module_of("multiple_choice").Section(files=["a.jsonl"], limit=3, weight=2)


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("lm_eval", "lm_eval needs task: a task's name"),
        ("multiple_choice", "needs files: JSONL"),
        ("generation", "needs files: JSONL with prompt or messages"),
    ],
)
def test_a_part_that_lacks_what_its_kind_needs_is_refused(metric, says):
    with pytest.raises(ValidationError, match=says):
        PerfPart(metric=metric)


def test_a_new_kind_is_one_file(tmp_path):
    (tmp_path / "trivia.py").write_text(
        textwrap.dedent("""
            from evaluator import tasks

            class Section(tasks.Section):
                rounds: int = 3

            def load(section, tokenizer):
                return section.rounds, tokenizer
        """)
    )
    program = textwrap.dedent(f"""
        from evaluator import tasks
        tasks.__path__.append({str(tmp_path)!r})
        from search.config.evaluation_section import PerfPart
        part = PerfPart(metric="trivia", rounds=5)
        print(tasks.load(part.metric, part.task_section(), "tokenizer"), PerfPart().rounds)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(5, 'tokenizer') 3"


def test_a_study_file_is_read_without_heavy_imports():
    program = (
        "import sys, search.config.study_file\n"
        "print([m for m in ('torch', 'lm_eval', 'transformers', 'datasets', 'optuna') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
