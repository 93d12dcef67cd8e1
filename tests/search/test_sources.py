import importlib.metadata
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressors.errors import CheckpointError
from evaluator import embedded_texts, quality
from search.setup import sources


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def model(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


def test_the_embedded_model_has_smollm2s_own_tokenizer(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("In 2026")["input_ids"]) == ["In", "Ġ", "2", "0", "2", "6"]
    text = "def f(x):\n\treturn x ** 2  # naïve 한국어"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "<|im_start|>user\nhi<|im_end|>" in chat


@pytest.mark.long
def test_the_embedded_model_has_a_low_perplexity_on_english(model, tokenizer):
    """The perplexity is about 15; with transformers' own conversion of the tokenizer it is 20."""
    prose = "\n\n".join(document.text for document in embedded_texts.documents()[:20])
    ids = tokenizer(prose)["input_ids"]
    nll = torch.cat([quality.window_nll(model, ids[start : start + 1024]) for start in (0, 1024, 2048)])
    assert 12 < math.exp(nll.mean()) < 17
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0])


def test_a_model_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="name the directory in full"):
        sources.resolve("~nobody-of-that-name/model", tmp_path)
    for source in ("/no/such", "not a model", "nosuchname"):
        with pytest.raises(CheckpointError, match="no such directory"):
            sources.resolve(source, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        sources.resolve(str(tmp_path / "file"), tmp_path)


def test_an_unreachable_hub_is_reported_in_one_line(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        sources.resolve("LGAI-EXAONE/EXAONE-4.0-1.2B", tmp_path)
    assert "can't be downloaded from the hub" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_exaone_3_is_converted_to_llama_once(tmp_path, write_pico_exaone3):
    path, cache, said = write_pico_exaone3(tmp_path / "EXAONE-3.5"), tmp_path / "cache", []
    place = sources.resolve(str(path), cache, say=said.append)
    assert place.parent == cache / "models"
    assert place.name.startswith("EXAONE-3.5-as-llama-")
    assert said == [f"model EXAONE-3.5: converting to Llama in {place}"]
    model = AutoModelForCausalLM.from_pretrained(place)
    assert model.config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(place)("a b")["input_ids"]
    times = {file: file.stat().st_mtime_ns for file in place.iterdir()}
    assert sources.resolve(str(path), cache, say=said.append) == place
    assert {file: file.stat().st_mtime_ns for file in place.iterdir()} == times
    assert len(said) == 1
    (path / "chat_template.jinja").write_text("{{ messages }}")
    other = sources.resolve(str(path), cache)
    assert (other / "chat_template.jinja").read_text() == "{{ messages }}"
    write_pico_exaone3(path, num_hidden_layers=4)  # another model in its place
    assert sources.resolve(str(path), cache) not in (place, other)


def test_a_damaged_demo_package_is_reported_in_one_line_and_leaves_no_files(tmp_path, monkeypatch):
    whole = sources._gguf_file()
    monkeypatch.setattr(sources, "_gguf_file", lambda: tmp_path / "damaged.gguf")
    for data in (b"", b"GGUF" + bytes(50), whole.open("rb").read(200_000)):
        (tmp_path / "damaged.gguf").write_bytes(data)
        with pytest.raises(CheckpointError, match="can't be converted") as caught:
            sources.resolve(sources.EMBEDDED, tmp_path / "cache")
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "cache" / "models").iterdir())


def test_no_other_distribution_installs_our_package_names():
    owners = importlib.metadata.packages_distributions()
    for name in ("search", "compressors", "evaluator", "studies"):
        assert set(owners.get(name, ["optuna-search"])) == {"optuna-search"}
