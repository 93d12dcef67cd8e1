"""Passwords and tokens: masked in what is printed, logged, stored and sent, and put in nothing that is kept."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from search import secrets
from search.config import compose
from search.errors import StorageError
from search.study import storage

PW = "hunTER2sesame"

STUDY = """
defaults: [_base, _self_]
study_name: secret
description: "cut for ${{oc.env:CUSTOMER_SECRET}}"
trials: 2
outputs: {home}/outputs
storage: sqlite:///{home}/studies.db
model: {{source: "${{oc.env:MODEL_PLACE}}/model"}}
space: {{num_hidden_layers: {{low: 3, high: 5}}}}
text: {{window: 32, calibration_windows: 4, shards: 4, report: null}}
evaluation: {{backend: transformers, device: cpu, speed: predicted}}
"""


@pytest.fixture(autouse=True)
def forget():
    before = set(secrets._remembered)
    yield
    secrets._remembered.clear()
    secrets._remembered.update(before)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://u:PW@h/db",
        "can't reach postgresql+psycopg://u:PW@h:5432/db?sslmode=x, retrying",
        "https://PW@dagshub.com/u/r.mlflow",
        "https://user:a@b/PW@h/path",
        "https://user:a:#PW?x@h",
        "redis://:PW@h:6379/0",
        "postgresql:/u:PW@h/db",
        "u:PW@127.0.0.1/x",
        "postgresql://h/db?user=u&password=PW",
        "postgresql://h/db?sslpassword=PW&sslmode=require",
        "https://h/x?token=PW#part",
        "https://h/#access_token=PW&x=1",
        "s3://b/k?X-Amz-Signature=PW&X-Amz-Credential=PW",
        "https://a.blob/x?sv=1&sig=PW",
        "host=h user=u password=PW dbname=x",
        "password = 'PW sesame'",
        "{'user': 'u', 'password': 'PW'}",
        '{"api_key": "PW"}',
        "Authorization: Bearer PW",
        "authorization: Basic PW",
        "DefaultEndpointsProtocol=https;AccountName=x;AccountKey=PW==;y",
        "aws_secret_access_key=PW",
        "<https://u:PW@h/x> and (ftp://v:PW@k)",
        "https://pypi/simple?client_secret=PW",
    ],
)
def test_what_stands_where_a_secret_stands_is_masked(text):
    shown = secrets.masked_places(text.replace("PW", PW))
    assert PW not in shown
    assert "***" in shown


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:///outputs/studies.db",
        "sqlite:////home/me@corp/studies.db",
        "postgresql://USER@HOST/DATABASE",
        "tokens=2000000 batch_tokens=32768 pad_token=</s>",
        "text /x/a.txt:0 and b.txt:0 are the same",
        "hub:ORGANISATION/NAME",
        "see https://docs.example.org/page",
        "mail a@b.org",
        "Score 0.5 ± 0.1: 12 tokens per second",
        "model=exaone4-1.2b space.keep_16_bit=3",
    ],
)
def test_a_text_without_secrets_stays_as_it_is(text):
    assert secrets.masked(text) == text


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("MLFLOW_TRACKING_URI", f"https://user:{PW}@h/x", f"denied to {PW}"),
        ("MLFLOW_TRACKING_URI", f"user:{PW}@h/x", f"no such store: {PW}@h"),
        ("MLFLOW_TRACKING_PASSWORD", PW, f"401 for {PW}"),
        ("MLFLOW_TRACKING_USERNAME", "tok1234567", "401 for tok1234567"),
        ("MLFLOW_TRACKING_TOKEN", PW, f"token {PW} expired"),
        ("HF_TOKEN", f"hf_{PW}", f"hf_{PW} is not valid"),
        ("AWS_SECRET_ACCESS_KEY", "a/b+c" + PW, "signed with a%2Fb%2Bc" + PW),
        ("AWS_ACCESS_KEY_ID", "AKIA" + PW, "AKIA" + PW + " is unknown"),
        ("PGPASSWORD", "short", "wrong password short"),
        ("HTTPS_PROXY", f"http://me:{PW}@proxy:3128", f"proxy refuses {PW}"),
    ],
)
def test_what_the_environment_keeps_secret_is_masked_by_its_value(monkeypatch, name, value, told):
    monkeypatch.setenv(name, value)
    shown = secrets.masked(told)
    for secret in (PW, "tok1234567", "wrong password short"):
        assert secret not in shown
    assert "***" in shown


def test_a_short_password_is_masked_as_a_word_and_not_within_words(monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "optu")
    assert secrets.masked("optuna-search: denied: optu") == "optuna-search: denied: ***"


def test_a_long_error_is_masked_before_it_is_cut():
    error = RuntimeError("x" * 150 + f" https://user:{PW}{'y' * 80}@h/ failed")
    assert PW[:4] not in secrets.line_of(error, 200)


def test_log_records_and_tracebacks_are_masked(tmp_path):
    script = tmp_path / "fail.py"
    script.write_text(
        "import logging, warnings\nfrom search import secrets\nsecrets.install()\nlogging.basicConfig()\n"
        f"logging.getLogger('mlflow').error('at %s', 'https://u:{PW}@h')\nwarnings.warn('https://u:{PW}@h')\n"
        f"try:\n    raise OSError('postgresql://u:{PW}@h')\nexcept OSError:\n    logging.exception('x')\n"
        f"raise RuntimeError('postgresql://u:{PW}@h')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert ended.stderr.count("://***@h") >= 4
    assert PW not in ended.stderr


def test_the_masks_of_log_records_leave_other_records_alone(caplog):
    secrets.install()
    with caplog.at_level(logging.INFO):
        logging.getLogger("some.library").info("%d of %d", 1, 2)
    assert caplog.records[-1].args == (1, 2)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u:a@{PW}@127.0.0.1:9/x",
        f"postgresql://u:a@{PW}/b@127.0.0.1:9/x",
        f"postgresql://u:a@b:{PW}@127.0.0.1:9/x",
        f"postgresql://u:a@b?{PW}@127.0.0.1:9/x",
        f"postgresql://u/{PW}:a@127.0.0.1:9/x",
        f"postgresql://u:{PW}@127.0.0.1:port/x",
        f"postgresql://u:{PW}@127.0.0.1:9/x",
        f"postgresql://{PW}@127.0.0.1:9/x",
        f"postgresql://127.0.0.1:9/x?user=u&password={PW}",
        f"postgresql:/u:{PW}@h/x",
        f"nosuch://u:{PW}@h/x",
        f"u:{PW}@h/x",
    ],
)
def test_a_storage_that_can_not_be_opened_is_refused_without_its_password(url):
    with pytest.raises(StorageError) as caught:
        storage.open_storage(url)
    assert PW not in str(caught.value)
    assert "\n" not in str(caught.value)
    if url.count("@") > 1 or "u/" in url:
        assert "percent-encode" in str(caught.value)


def test_config_prints_references_as_they_are_written_and_masks_urls(tmp_path, monkeypatch, cli):
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "mine.yaml").write_text(
        "defaults: [_base, _self_]\nstudy_name: mine\nmodel: {source: x}\ndescription: ${storage}\n"
        "storage: ${oc.env:DATABASE_URL}\ntracking: {experiment: '${oc.env:NOT_SET,e}'}\n"
        "text: {search: '${oc.env:TEXTS}/a.txt'}\ntrials: ${oc.env:COUNT}\n"
    )
    for name, value in {"DATABASE_URL": f"postgresql://u:{PW}@h/x", "TEXTS": "/texts", "COUNT": "7"}.items():
        monkeypatch.setenv(name, value)
    ended = cli("config", "--study", "mine", f"text.report=[hub:a/b,https://u:{PW}@h]", cwd=tmp_path)
    assert PW not in ended.out + ended.err
    assert "storage: ${oc.env:DATABASE_URL}" in ended.out
    assert "description: ${oc.env:DATABASE_URL}" in ended.out
    assert "trials: 7\n" in ended.out
    (tmp_path / "studies" / "again.yaml").write_text(ended.out)
    assert compose.load("again", config_dir=tmp_path / "studies").text.search == ["/texts/a.txt"]


def test_a_literal_that_looks_like_a_reference_stays_one_when_it_is_stored(monkeypatch):
    monkeypatch.setenv("HOME_SECRET", PW)
    for text in ("${oc.env:HOME_SECRET}", "a\\${b}", "$x ${", "\\\\${oc.env:HOME_SECRET}"):
        file = compose.load("demo", options={"description": text})
        assert file.description == text
        assert compose.restored(file.stored(), "again").description == text


def test_a_reference_that_is_not_set_is_refused_by_its_name(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    with pytest.raises(compose.ConfigError, match=r"description: the environment variable NO_SUCH_VARIABLE is not set"):
        compose.load("demo", ["description=${oc.env:NO_SUCH_VARIABLE}"])


def test_the_words_of_an_evaluation_and_its_report_have_no_password():
    words = ["--study", "demo", f"storage=postgresql://u:a@{PW}@h/x", "--storage", f"postgresql://u:{PW}@h", "trials=3"]
    shown = secrets.masked_words(words)
    assert PW not in json.dumps(shown)
    assert shown[:2] + shown[-1:] == ["--study", "demo", "trials=3"]


@pytest.mark.slow
def test_no_file_of_a_study_holds_what_the_environment_keeps_secret(tmp_path, pico_llama, monkeypatch, cli):
    """A study, its export, an evaluation and a report, with MLflow in a database of its own."""
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "secret.yaml").write_text(STUDY.format(home=tmp_path))
    place = tmp_path / "place-of-models"
    place.mkdir()
    (place / "model").symlink_to(pico_llama)
    monkeypatch.setenv("CUSTOMER_SECRET", PW)
    monkeypatch.setenv("MODEL_PLACE", str(place))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    url = f"storage=postgresql://u:other{PW}@127.0.0.1:9/x"
    for words in (
        ["run", "--study", "secret"],
        ["export", "--study", "secret", "--to", "submit/model"],
        ["evaluate", "--study", "secret", "--model", "submit/model", url],
        ["report", "-e", "it", "-m", "submit/model"],
        ["config", "--study", "secret", url],
        ["status", "--study", "secret", "--json"],
    ):
        ended = cli(*words, cwd=tmp_path)
        assert ended.status == 0, ended.err
        assert PW not in ended.out + ended.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if PW.encode() in path.read_bytes()] == []
    result = json.loads((tmp_path / "submit" / "model" / "eval_result.json").read_text())
    assert result["settings"]["description"] == result["description"] == "cut for ${oc.env:CUSTOMER_SECRET}"
    assert result["model"]["source"] == "${oc.env:MODEL_PLACE}/model"
    assert "storage=postgresql://***@127.0.0.1:9/x" in result["words"]
    report = next((tmp_path / "outputs").rglob("*_report.md")).read_text()
    assert "cut for ${oc.env:CUSTOMER_SECRET}" in report
    assert "Weights, in MB" in report  # the base model is found again
    monkeypatch.setenv("MODEL_PLACE", str(tmp_path / "nowhere"))
    assert "nowhere/model: no such directory" in cli("export", "--study", "secret", "--to", "x", cwd=tmp_path).err


@pytest.mark.long
def test_mlflow_that_can_not_be_reached_is_told_without_user_and_token(tmp_path, monkeypatch):
    from search.config.study_file import Tracking
    from search.study import mlflow_runs

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    told = []
    mlflow_runs.log_by_hand(Tracking(), "before", {}, {}, 0.0, told.append)
    assert not told
    assert (tmp_path / "mlflow.db").is_file()  # which must not stay the place
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://ann9876:{PW}@127.0.0.1:9/x")
    mlflow_runs.log_by_hand(Tracking(), "one", {}, {}, 0.0, told.append)
    assert len(told) == 1
    assert "MLflow: one is not tracked" in told[0]
    assert PW not in told[0]
    assert "ann9876" not in told[0]
