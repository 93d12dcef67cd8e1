"""Every choice that exists: in the configuration, on the command line, in names, tables and reports.

These tests run over `compressors.plan.CHOICES`, so that a choice that is added is held to them without a change here.
"""

import dataclasses
import itertools
import shlex

import pytest

from compressors.choices import PRECISIONS
from compressors.plan import (
    CHOICES,
    DIMENSIONS,
    CompressionPlan,
    canonical,
    name_of,
    short,
    why_choices_clash,
)
from search.by_hand import compress
from search.config import compose, compression, study_file

BASE = CompressionPlan(30, 32, 8, 2048, 4096, "bfloat16")
CUT = dataclasses.replace(
    BASE, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=6, hidden_size=1536, intermediate_size=3584
)
NOW = "export.for_transformers=null"  # an older one reads no 8-bit lm_head
VALUES = [(name, value) for name, record in CHOICES.items() for value in record.values or (0, 1, 3)]
DIFFERENT = [(name, value) for name, value in VALUES if value != CHOICES[name].default]


def with_choice(name, value):
    """A plan in which this value makes a difference."""
    precision = (CHOICES[name].schemes or ("W8A8",))[-1]
    return dataclasses.replace(CUT, precision=precision, **{name: value})


@pytest.mark.parametrize(("name", "value"), DIFFERENT)
def test_a_value_that_differs_has_a_name_and_a_table_cell_of_its_own(name, value):
    plan = with_choice(name, value)
    assert canonical(plan, BASE) == plan
    others = [with_choice(name, other) for other in CHOICES[name].values or (0, 1, 3) if other != value]
    for shown in (lambda one: name_of(one, BASE), short, lambda one: one.digest("base")):
        assert shown(plan) not in {shown(other) for other in others}


def test_tables_tell_any_two_plans_apart():
    plans = [with_choice(name, value) for name, value in DIFFERENT]
    assert len({short(plan) for plan in plans}) == len(set(plans))


@pytest.mark.parametrize(("name", "value"), DIFFERENT)
def test_a_value_says_nothing_where_it_makes_no_difference(name, value):
    plan = dataclasses.replace(BASE, **{name: value})
    assert canonical(plan, BASE) == (plan if CHOICES[name].applies(plan, BASE) else BASE)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_choice_that_does_not_go_with_a_precision_is_refused_with_what_to_do(name, precision):
    record = CHOICES[name]
    for value in (record.values or (0, 1, 3))[1:]:
        refusal = why_choices_clash(dataclasses.replace(CUT, precision=precision, **{name: value}))
        if record.schemes and precision not in record.schemes:
            assert refusal.startswith(f"{name}: {value} ")
            assert "choose" in refusal
        else:
            assert refusal is None


@pytest.mark.parametrize("name", [name for name, record in CHOICES.items() if not record.is_number])
def test_an_unknown_value_is_refused_with_those_that_exist(name):
    refusal = why_choices_clash(dataclasses.replace(CUT, precision="W8A8", **{name: "nonsense"}))
    assert refusal.startswith(f"{name}: 'nonsense' is not one of {', '.join(map(str, CHOICES[name].values))}")


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_the_study_file_takes_every_value_in_space_and_compression(name, value):
    searched = f"space.{name}={value}" if CHOICES[name].is_number else f"space.{name}=[{value}]"
    file = compose.load("demo", [searched, f"compression.{name}={value}", NOW])
    assert getattr(file.space, name) == (value if CHOICES[name].is_number else [value])
    assert getattr(file.compression, name) == value


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_that_no_study_file_names_has_its_default(name):
    file = study_file.StudyFile(study_name="unnamed", model={"source": "base"})
    default = CHOICES[name].default
    assert getattr(file.space, name) == (default if CHOICES[name].is_number else [default])
    assert getattr(file.compression, name) in (None, default)


@pytest.mark.parametrize("method", compression.METHODS)
def test_compress_has_an_option_for_each_choice_of_a_method(method):
    from search.cli.compress import compress_group

    command = compress_group.commands[method.replace("_", "-")]
    options = {option: parameter for parameter in command.params for option in parameter.opts}
    for name, record in CHOICES.items():
        option = f"--{name.replace('_', '-')}"
        assert (option in options) == (method in record.methods), option
        if option in options:
            assert str(record.default) in options[option].help
            for value in record.values:
                assert str(value) in options[option].metavar


@pytest.mark.parametrize(("name", "value"), [*DIFFERENT, ("drop_from", "3,7")])
@pytest.mark.parametrize("base", [BASE, dataclasses.replace(BASE, precision="float16")])
def test_the_words_for_a_plan_make_this_plan_again(name, value, base):
    plan = canonical(with_choice(name, value), base)
    words = compress.overrides_of(plan, base)
    file = compose.load("demo", [*shlex.split(shlex.join(words)), NOW])
    assert compress.plan_of(file.compression, base) == plan


PAIRS = [pair for pair in itertools.combinations(DIMENSIONS, 2) if "num_key_value_heads" not in pair]
PAIRS.append(("num_attention_heads", "num_key_value_heads"))  # without fewer query heads, fewer groups can't share them


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "W4A16"])
def test_the_words_for_cut_sizes_make_this_plan_again(names, precision):
    plan = canonical(
        dataclasses.replace(BASE, precision=precision, **{name: getattr(CUT, name) for name in names}), BASE
    )
    file = compose.load("demo", [*compress.overrides_of(plan, BASE), NOW])
    assert compress.plan_of(file.compression, BASE) == plan
