"""Studies that judge by generated answers, end to end; also of models that are made to ramble or to say nothing."""

import json
import shutil

import optuna
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from evaluator.backends import EngineSettings
from evaluator.backends.transformers import Engine
from evaluator.generation import Limits
from evaluator.score import Formula, score_of
from evaluator.tasks import generation
from search.by_hand import report_answers
from search.by_hand.evaluation import Evaluation

ENDS = list(range(3, 60))  # so many ids end an answer that a random model's answers are short

STUDY = """
defaults: [_base, _self_]
study_name: answers
trials: 4
model: {{source: {model}}}
space: {{num_hidden_layers: {{low: 2, high: 5}}}}
text: {{window: 32, calibration_windows: 4, shards: 4}}
evaluation:
  backend: transformers
  device: cpu
  speed: predicted
  perf:
    - {{metric: perplexity}}
    - {{metric: generation, name: quiz, files: [{quiz}], match: exact, max_tokens: 40}}
pruner: {{name: none}}
confirm: {{top: 1, pairs: 1}}
tracking: {{mlflow: false}}
"""


def answers_of(model, prompts, max_tokens=40):
    """What a model writes, and how many tokens, by the engine in this process."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    engine = Engine(str(model), EngineSettings(device="cpu", threads=1, max_model_len=512))
    ids = [tokenizer.encode(prompt, verbose=False) for prompt in prompts]
    return engine.generate(ids, Limits(max_tokens))


def changed_head(path, to, change):
    """A copy of a model with another lm_head: [V, hidden]."""
    shutil.copytree(path, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors["lm_head.weight"])
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.fixture(scope="module")
def model(tmp_path_factory, write_pico_model):
    path = write_pico_model(tmp_path_factory.mktemp("model") / "base", "llama_untied", dtype="float32")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**values, "eos_token_id": ENDS}))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory, model):
    """A home with a quiz that the base model answers right: the answers are its own."""
    home = tmp_path_factory.mktemp("home")
    words = ["statement", "class", "module", "value", "object", "function", "string", "name", "list", "number"]
    prompts = [f"The {one} of a {other} is" for one in words[:6] for other in words]
    found = [(prompt, answer) for prompt, answer in zip(prompts, answers_of(model, prompts), strict=True)]
    usable = [(prompt, answer.text) for prompt, answer in found if answer.text.strip() and len(answer.tokens) < 40]
    assert len(usable) >= 24
    lines = [{"prompt": prompt, "answer": text} for prompt, text in usable[:24]]
    (home / "quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "studies").mkdir()
    (home / "studies" / "answers.yaml").write_text(STUDY.format(model=model, quiz=home / "quiz.jsonl"))
    return home


def evaluated(cli, home, path, *words):
    done = cli("evaluate", "--study", "answers", "--model", path, "--run-name", path.name, *words, cwd=home)
    assert done.status == 0, done.err
    return json.loads((path / "eval_result.json").read_text()), done


def _silence(head):
    head[ENDS] *= 30.0


def _ramble(head):
    head[ENDS] = 0.0


@pytest.fixture(scope="module")
def rambling(tmp_path_factory, model):
    """Never ends an answer: no logit of an end-of-sequence id is ever the largest."""
    return changed_head(model, tmp_path_factory.mktemp("rambling") / "rambling", _ramble)


@pytest.fixture(scope="module")
def silent(tmp_path_factory, model):
    """Ends every answer at once."""
    return changed_head(model, tmp_path_factory.mktemp("silent") / "silent", _silence)


@pytest.mark.long
def test_a_model_that_rambles_is_flagged_and_slower_where_length_counts(cli, home, rambling):
    found, done = evaluated(cli, home, rambling)
    task, base = found["measurement"]["tasks"]["quiz"], found["baseline"]["tasks"]["quiz"]
    assert base["value"] == 1.0
    assert task["answers"]["cut"] == 1.0
    assert set(task["answers"]["tokens"]) == {40}
    ratio = found["measurement"]["length_ratio"]
    assert ratio == pytest.approx(40 / (sum(base["answers"]["tokens"]) / 24))
    assert ratio > 1.5
    assert found["baseline"]["length_ratio"] == 1.0
    assert f"{ratio:.2f} ± " in done.err  # a warning
    assert "times the base model's tokens, 100% cut off" in done.err
    base_row, row = cli("report", "--model", rambling, "--json", cwd=home).json
    assert (base_row["length_ratio"], row["length_ratio"]) == (1.0, ratio)
    assert "lengths of answers differ" in row["remark"]
    assert "length" in cli("report", "--model", rambling, cwd=home).out.splitlines()[0]

    _, silenced = evaluated(cli, home, rambling, "score.length=ignore")
    assert "lengths of answers differ" not in silenced.err
    assert "remark" not in cli("report", "--model", rambling, "--json", cwd=home).json[1]

    slower, _ = evaluated(cli, home, rambling, "score.length=penalise")
    assert slower["formula"]["penalise_length"] is True
    assert "penalise_length" not in found["formula"]
    assert slower["speed_norm"] == pytest.approx(1 - found["measurement"]["time_ratio"] * ratio)
    assert slower["score"] < found["score"]


@pytest.mark.long
def test_a_model_that_says_nothing_does_not_win(cli, home, silent):
    for how in ("flag", "penalise"):
        found, done = evaluated(cli, home, silent, f"score.length={how}")
        task = found["measurement"]["tasks"]["quiz"]
        assert (task["value"], task["answers"]["empty"]) == (0.0, 1.0)
        assert found["measurement"]["length_ratio"] == 0.0
        assert found["speed_norm"] == pytest.approx(0.0, abs=1e-6)  # as fast as the base model, and no faster
        assert found["score"] < 0.5
        assert "100% empty" in done.err


@pytest.mark.long
def test_a_study_asks_flags_and_confirms(cli, home):
    done = cli("run", "--study", "answers", cwd=home)
    assert done.status == 0, done.err
    study = optuna.load_study(storage=f"sqlite:///{home}/outputs/studies.db", study_name="answers")
    base, *others = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert base.user_attrs["length_ratio"] == 1.0
    assert base.user_attrs["perf_norm"] == 1.0
    assert "length_flag" not in base.user_attrs
    cut = next(trial for trial in others if trial.user_attrs["plan"]["num_hidden_layers"] < 5)
    assert {"tokens_per_answer", "length_ratio"} <= cut.user_attrs.keys()
    flagged = [trial for trial in others if "length_flag" in trial.user_attrs]
    assert flagged  # a random model with fewer layers is another one
    status = cli("status", "--study", "answers", cwd=home)
    attributes = study._storage.get_study_system_attrs(study._study_id)
    notes = " ".join(str(value) for name, value in attributes.items() if "note" in name)
    for trial in flagged:
        assert trial.user_attrs["length_flag"] in notes
    shown = json.loads(cli("status", "--study", "answers", "--json", cwd=home).out)
    by_number = {one["trial"]: one for one in shown["pareto"]}
    for trial in flagged:
        if trial.number in by_number:
            assert by_number[trial.number]["length_flag"] == trial.user_attrs["length_flag"]
            assert f"trial {trial.number}: lengths of answers differ" in " ".join(status.out.split())
    exported = cli("export", "--study", "answers", "--trial", cut.number, "--to", "submit/cut", "--json", cwd=home)
    assert exported.status == 0, exported.err
    assert exported.json.get("length_flag") == cut.user_attrs.get("length_flag")


def test_a_study_without_such_a_task_shows_nothing_of_it(cli, home):
    words = ("evaluation.perf=[{metric: perplexity}]", "--study-name", "plain", "outputs=plain")
    done = cli("run", "--study", "answers", *words, "--trials", 2, cwd=home)
    assert done.status == 0, done.err
    study = optuna.load_study(storage=f"sqlite:///{home}/outputs/studies.db", study_name="plain")
    for trial in study.trials:
        assert not {"length_ratio", "tokens_per_answer", "seconds_per_answer", "length_flag"} & trial.user_attrs.keys()
    assert "length" not in str(study.user_attrs["definition"])
    assert not {"length_ratio", "tokens_per_answer", "seconds_per_answer"} & study.user_attrs["baseline"].keys()
    status = cli("status", "--study", "answers", "--study-name", "plain", cwd=home)
    assert "length" not in status.out


def test_a_report_shows_answers_side_by_side_and_escapes_them(cli, home, rambling):
    found, _ = evaluated(cli, home, rambling)
    evil = "<script>alert(1)</script> | ![x](http://e.vil/p) **b**\n# head \x1b[31m"
    for whose in ("measurement", "baseline"):
        for shown in found[whose]["tasks"]["quiz"]["answers"]["shown"]:
            shown["text"] = evil
    text = "\n\n".join(report_answers.parts(Evaluation.from_dict(found)))
    assert "### quiz: the first 10 answers" in text
    rows = [line for line in text.splitlines() if "alert" in line]
    assert len(rows) == 10
    assert "<script" not in text
    assert (
        "&lt;script&gt;alert(1)&lt;/script&gt; \\| \\!\\[x\\](http://e.vil/p) \\*\\*b\\*\\*<br># head �\\[31m"
        in rows[0]
    )
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)
    assert "| quiz | model | 40.0 | 40.0 | 40.0 | 40.0 |" in text
    assert "lengths of answers differ" in text
    written = cli("report", "-e", "x", "--model", rambling, "--print-only", cwd=home)
    assert "## Generated answers" in written.out


def test_the_example_is_refused_where_the_model_answers_none_of_it(refused, home):
    perf = "evaluation.perf=[{metric: generation,files: [example],max_tokens: 480}]"
    line = refused("run", "--study", "answers", perf, "--study-name", "long", cwd=home)
    assert "task example: a prompt and its answer have up to" in line
    assert "at most 512" in line


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"prompt": "q", "answer": "a"}\n{"prompts": "q", "answer": "a"}\n', "line 2: 'prompts' is no key"),
        (b'{"prompt": "q", "messages": [], "answer": "a"}\n', "line 1: has both prompt and messages"),
        (b'{"prompt": "q", "answers": []}\n', "line 1: answers is []"),
        (b'{"prompt": "\xe9", "answer": "a"}\n', "not UTF-8"),
    ],
)
def test_a_bad_file_is_one_line(refused, home, tmp_path, content, says):
    (tmp_path / "bad.jsonl").write_bytes(content)
    perf = f"evaluation.perf=[{{metric: generation,files: [{tmp_path / 'bad.jsonl'}]}}]"
    line = refused("run", "--study", "answers", perf, "--study-name", "bad", cwd=home)
    assert says in line
    assert "bad.jsonl" in line


@pytest.mark.long
def test_a_plan_that_can_not_answer_any_more_ends_after_sixteen_questions(cli, home):
    """A random model without one of its layers answers nothing as the base model does."""
    words = [
        "space.num_hidden_layers=2..5",
        "--study-name",
        "short",
        "outputs=short",
        "pruner={name: wilcoxon, p_threshold: 0.0001}",
    ]
    words += ["score.weight_perf=0.9", "score.weight_speed=0.1", "--trials", 3, "confirm.top=0"]
    done = cli("run", "--study", "answers", *words, cwd=home)
    assert done.status in (0, 1), done.err
    study = optuna.load_study(storage=f"sqlite:///{home}/outputs/studies.db", study_name="short")
    ended = [trial for trial in study.trials if trial.user_attrs.get("stage") == "measure"]
    assert ended
    for trial in ended:
        assert trial.state.name == "PRUNED"
        reason = trial.user_attrs["reason"]
        assert reason.startswith("answers: task quiz: 0 of the first 16 answers are right and the base model's 16")
        assert "exact McNemar, p = 3.1e-05" in reason
        assert "at best, Score" in reason
        assert "trial 0's 0.900" in reason
        assert "perf_norm" not in trial.user_attrs
        assert not (home / "short" / "checkpoints" / trial.user_attrs["checkpoint"]).exists()


@pytest.mark.slow
def test_a_real_model_that_rambles_ranks_below_itself(cli, tmp_path, smollm2):
    """SmolLM2-135M answers eight questions of the example; its copy never writes the end of an answer."""
    rambling = tmp_path / "rambling"
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2)
    head = model.get_input_embeddings().weight.detach().clone()
    head[model.generation_config.eos_token_id] = 0.0
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(rambling)
    transformers.AutoTokenizer.from_pretrained(smollm2).save_pretrained(rambling)

    lines = generation.EXAMPLE_FILE.read_text().splitlines()[15:23]
    (tmp_path / "reading.jsonl").write_text("\n".join(lines))
    (tmp_path / "studies").mkdir()
    study = STUDY.format(model=smollm2, quiz=tmp_path / "reading.jsonl").replace("match: exact", "match: contains")
    (tmp_path / "studies" / "answers.yaml").write_text(study)
    found, done = evaluated(cli, tmp_path, rambling, "text.report=null", "score.length=penalise")
    base, task = found["baseline"]["tasks"]["quiz"], found["measurement"]["tasks"]["quiz"]
    assert base["value"] >= 0.5
    assert base["answers"]["cut"] < 0.5
    assert task["answers"]["cut"] == 1.0
    assert task["value"] >= 0.5  # it answers as the base model does, and then goes on
    assert "lengths of answers differ" in done.err
    evaluation = Evaluation.from_dict(found)
    flagged = score_of(evaluation.measurement, evaluation.baseline, Formula(perf=evaluation.formula.perf))
    assert found["measurement"]["length_ratio"] > 1.3
    assert found["score"] < flagged.score - 0.1
    assert found["score"] < 0.5  # the base model's
