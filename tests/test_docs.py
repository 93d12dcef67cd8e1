"""The documentation: generated pages are fresh, links lead somewhere, and what is shown can be typed."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from compressors.model import family
from search.cli import main as optuna_search
from search.cli.main import ENVIRONMENT
from search.cli.options import ALL_GROUPS
from search.config import compose

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)


def blocks(language):
    """(the page, the text) of each fenced block in that language."""
    found = [(page, match) for page in PAGES for match in FENCE.findall(page.read_text(encoding="utf-8"))]
    return [(page, text) for page, (name, text) in found if name == language]


def commands():
    """(the page's name, a command line) of each `sh` block, without comments and prompts."""
    for page, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield pytest.param(words, id=f"{page.stem}: {' '.join(words)}")


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory):
    """The study files that pages show, under the names in their first lines."""
    directory = tmp_path_factory.mktemp("studies")
    for _, text in blocks("yaml"):
        name = re.match(r"# studies/(\S+\.yaml)\n", text)
        if name:
            (directory / name[1]).parent.mkdir(exist_ok=True)
            (directory / name[1]).write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def generated():
    """Return the pages as a process of its own makes them: click keeps a command's help option from its first use."""
    program = "import json, generate; print(json.dumps({str(path): text for path, text in generate.pages().items()}))"
    places = os.pathsep.join([str(DOCS), str(ROOT)])
    made = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": places}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return {Path(path): text for path, text in json.loads(made.stdout).items()}


@pytest.mark.parametrize(
    "name", ["docs/reference/command-line.md", "docs/reference/study-file.md", "studies/_base.yaml"]
)
def test_a_generated_file_is_what_the_code_says(generated, name):
    path = ROOT / name
    assert path.read_text(encoding="utf-8") == generated[path], "run `python docs/generate.py`"


def test_every_key_of_the_study_file_is_explained(generated):
    rows = [line for line in generated[DOCS / "reference" / "study-file.md"].splitlines() if re.match(r"\| `\w+", line)]
    keys = [row for row in rows if row.count(" | ") == 3]
    assert len(keys) > 80
    assert not [row for row in keys if row.endswith("|  |")]


def test_the_page_of_the_work_by_hand_names_all_config_groups():
    text = (DOCS / "by-hand.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"The config groups are (.*?), as in", text, re.DOTALL)
    assert re.findall(r"`(\w+)`", listed) == list(ALL_GROUPS)


@pytest.mark.parametrize("words", commands())
def test_a_command_that_is_shown_can_be_typed(words, config_dir):
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert targets
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)
    elif words[0].endswith("optuna-search"):
        _require_valid(words[1:], config_dir)
    elif words[0] == "export":
        name, _, study = words[1].partition("=")
        assert name in dict(ENVIRONMENT)
        compose.load(study, [], config_dir)
    else:
        assert words[0].removeprefix(".venv/bin/") in ("cp", "mlflow", "python", "./create_submit.sh", ".ci/run", "pip")


def _require_valid(words, config_dir):
    """Parse the options of a command, and compose the study file with its overrides."""
    command, name, *rest = optuna_search.commands[words[0]], *words
    if name == "compress":
        known = rest[0] in command.commands
        name, rest = (rest[0], rest[1:]) if known else ("by-config", rest)
        command = command.commands[name]
    context = command.make_context(name, list(rest))
    study, overrides = context.params.get("study"), list(context.params.get("overrides") or ())
    if study is not None:
        sweeps = context.params.get("multirun")
        for one in compose.sweep(overrides, config_dir) if sweeps else [overrides]:
            compose.load(study, one, config_dir)


def test_links_lead_to_files_and_headings_that_exist():
    broken = []
    for page in PAGES:
        for target in ("".join(pair) for pair in LINK.findall(page.read_text(encoding="utf-8"))):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in _anchors(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def _anchors(page):
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_site_holds_every_page_once():
    def pages(entry):
        return [entry] if isinstance(entry, str) else [one for value in entry.values() for one in _flat(value)]

    def _flat(value):
        return [value] if isinstance(value, str) else [one for entry in value for one in pages(entry)]

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = [page for entry in site["nav"] for page in pages(entry)]
    assert sorted(named) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_the_site_fetches_nothing_when_it_is_read():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert site["theme"]["font"] is False
    assert site["plugins"] == ["search"]
    assert not {"extra_javascript", "extra_css"} & set(site)
    assert "analytics" not in site["extra"]


def test_every_file_and_json_key_is_in_the_reference():
    text = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    files = json.loads((ROOT / "tests" / "golden" / "values.json").read_text(encoding="utf-8"))["files"]
    missing = set()
    for file, keys in files.items():
        name = file.rpartition("/")[2]
        missing |= {file} - ({file} if f"{name}`" in text else set())
        if name == "config.json":  # its keys are Hugging Face's
            continue
        for key in {_documented(key) for key in keys if not any(other.startswith(f"{key}.") for other in keys)}:
            missing |= {key} - ({key} if re.search(rf"[`.]{key}`", text) else set())
    assert not missing


def _documented(key):
    """`measurement.workload.seed` → `seed`; `settings` has the study file's keys, and a task's name is anyone's."""
    parts = key.split(".")
    if "settings" in parts:
        return "settings"
    return "tasks" if parts[-1] == "quiz" else parts[-1]


@pytest.mark.parametrize("page", ["README.md", "docs/faq.md"])
def test_every_family_is_named(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [name for name in family.names() if f"`{name}`" not in text] == []


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
