"""Pico models written to disk: small enough for any test, every dimension different so that no transpose can pass."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER and hasattr(os, "sched_setaffinity"):
    # A core for each test process and all that it starts: threads of two processes that share cores wait for each other
    # ten times longer than they compute. Before torch is imported, which counts the cores then.
    CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {CORES[int(WORKER.removeprefix("gw")) % len(CORES)]})
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from compressors.model import family as families
from evaluator import embedded_texts

VOCABULARY = 320
LONG = ("test_golden", "test_resume", "test_by_hand", "test_cli", "test_finalists", "test_stream")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take minutes, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


SHARED = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 5,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 24,  # 6 · 24 = 144 ≠ 96
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.15,  # far from uniform: a mistake shows in the logits
}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}},
    "exaone4": {"rope_parameters": LLAMA3, "sliding_window": None, "sliding_window_pattern": 0},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 2e5}},
    "smollm3": {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
    "gemma3_text": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
        "sliding_window": 11,
        "query_pre_attn_scalar": 40,
    },
}
# Whatever `pico` stands for: the families, and one once more with what its models may have and the others have not.
PICOS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in families.names()},
    "llama_untied": (
        "llama",
        {"rope_parameters": LLAMA3, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
}


def write_pico(path: Path, name: str, dtype: str = "bfloat16", **changes: Any) -> Path:
    """Write a model of PICOS with random weights and a byte-level tokenizer into `path`."""
    torch.manual_seed(7)
    family, own = PICOS[name]
    its = families.named(family)
    values = {**SHARED, "dtype": dtype, **FAMILIES[family], **own, **changes}
    layers = values["num_hidden_layers"]
    if its.with_head_dim is not None:  # its own head_dim is hidden_size / num_attention_heads
        values["hidden_size"] = values.pop("head_dim") * values["num_attention_heads"]
    if family == "exaone4":
        values.setdefault("layer_types", ["full_attention"] * layers)
    elif family == "smollm3":
        values.setdefault("no_rope_layers", [int(layer % 3 != 1) for layer in range(layers)])
    elif family == "gemma3_text":
        values.setdefault(
            "layer_types", ["full_attention" if layer % 3 == 1 else "sliding_attention" for layer in range(layers)]
        )
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # gains of 1 would hide one that is cut wrongly
                parameter.uniform_(0.5 - its.norm_offset, 1.5 - its.norm_offset)
            elif name.endswith(".bias"):  # and biases of 0
                parameter.uniform_(-0.5, 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


# EXAONE 3.5's names on the hub, and Llama's
EXAONE3_KEYS = {
    "num_layers": "num_hidden_layers",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}
EXAONE3_TENSORS = {
    "model.embed_tokens.": "transformer.wte.",
    "model.norm.": "transformer.ln_f.",
    "model.layers.": "transformer.h.",
    "input_layernorm.": "ln_1.",
    "post_attention_layernorm.": "ln_2.",
    "self_attn.o_proj.": "attn.attention.out_proj.",
    "self_attn.": "attn.attention.",
    "mlp.gate_proj.": "mlp.c_fc_0.",
    "mlp.up_proj.": "mlp.c_fc_1.",
    "mlp.down_proj.": "mlp.c_proj.",
}


def write_exaone3(path: Path, **changes: Any) -> Path:
    """A Llama of random weights under the names that EXAONE 3.5 has on the hub."""
    write_pico(path, "llama", **{"rope_parameters": LLAMA3, **changes})
    llama = json.loads((path / "config.json").read_text())
    config = {key: llama[key] for key in SHARED if key != "num_hidden_layers"}
    config |= {its: llama[key] for its, key in EXAONE3_KEYS.items()}
    rope = dict(llama["rope_parameters"])
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": llama["dtype"]}
    config |= {"model_type": "exaone", "architectures": ["ExaoneForCausalLM"], "embed_dropout": 0.0}
    config["auto_map"] = {
        "AutoConfig": "configuration_exaone.ExaoneConfig",
        "AutoModelForCausalLM": "modeling_exaone.ExaoneForCausalLM",
    }
    (path / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        for llamas, its in EXAONE3_TENSORS.items():
            name = name.replace(llamas, its)
        tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE trained on the embedded prose; real, and 320 tokens small."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["[BOS]", "[EOS]", "[PAD]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator((document.text for document in embedded_texts.documents()[:20]), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="[BOS]", eos_token="[EOS]", pad_token="[PAD]", model_max_length=512
    )


@pytest.fixture(scope="session")
def write_pico_model() -> Callable[..., Path]:
    return write_pico


@pytest.fixture(scope="session")
def write_pico_exaone3() -> Callable[..., Path]:
    return write_exaone3


@pytest.fixture(scope="session")
def pico_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pico(tmp_path_factory.mktemp("pico") / "llama", "llama")


@pytest.fixture(scope="session")
def pico_exaone4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pico(tmp_path_factory.mktemp("pico") / "exaone4", "exaone4")


@pytest.fixture(scope="session", params=PICOS)
def pico(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each family in turn: what a test says of it holds for all."""
    if request.param in ("llama", "exaone4"):
        path: Path = request.getfixturevalue(f"pico_{request.param}")
        return path
    return write_pico(tmp_path_factory.mktemp("pico") / request.param, request.param)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model, converted once and kept in the user's cache."""
    from search import files
    from search.setup import sources

    return sources.resolve(sources.EMBEDDED, files.CACHE)


@pytest.fixture(scope="session")
def exaone4_mini() -> Path:
    """A real EXAONE-4.0 checkpoint, where the environment names one."""
    path = os.environ.get("OPTUNA_SEARCH_EXAONE4")
    if path is None:
        pytest.skip("OPTUNA_SEARCH_EXAONE4 names no EXAONE-4.0 checkpoint")
    return Path(path)


class Damages:
    """What can happen to a cached file; iterating gives functions of its path."""

    def __init__(self, records: pytest.LogCaptureFixture) -> None:
        self._records = records

    def __iter__(self) -> Iterator[Callable[[Path], object]]:
        yield from (self.cut_off, self.flip, self.directory)
        for content in (b"", bytes(5000), b"{}", b"null", b"3", b"[" * 100_000, b'{"a": NaN}', b"\xff\xfe"):
            yield lambda path, content=content: path.write_bytes(content)

    @staticmethod
    def cut_off(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-7])

    @staticmethod
    def flip(path: Path) -> None:
        """Change a digit near the end."""
        data = bytearray(path.read_bytes())
        place = next(place for place in range(len(data) - 20, -1, -1) if chr(data[place]) in "0123456789" or place < 20)
        data[place] ^= 1
        path.write_bytes(data)

    @staticmethod
    def directory(path: Path) -> None:
        path.unlink()
        path.mkdir()
        (path / "somebody's").write_text("data")

    def told(self) -> list[Path]:
        """Return the files that were called damaged since the last call."""
        messages = [record.getMessage() for record in self._records.records if record.name == "compressors.cached"]
        self._records.clear()
        assert all("is made again" in message and "\n" not in message for message in messages)
        return [Path(message.partition(": is damaged")[0]) for message in messages]


@pytest.fixture
def damages(caplog: pytest.LogCaptureFixture) -> Damages:
    return Damages(caplog)
