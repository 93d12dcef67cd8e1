"""A Llama of 2 layers with random weights on disk, every dimension different; and engines on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from evaluator.backends import EngineSettings
from evaluator.process import EngineProcess

VOCABULARY = 160


def write_tiny(path: Path, *, seed: int = 0, layers: int = 2) -> Path:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,  # far from uniform: a mistake shows in the loss
        dtype="float32",
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def write_tiny_model() -> Callable[..., Path]:
    return write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_model(tiny: Path) -> transformers.PreTrainedModel:
    torch.set_num_threads(1)  # a model this small only waits for its second thread
    return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def shards() -> list[list[list[int]]]:
    """4 shards of 2 windows of 24 ids."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(VOCABULARY, (4, 2, 24), generator=generator).tolist()


@pytest.fixture
def start(tiny: Path, tmp_path: Path) -> Iterator[Callable[..., EngineProcess]]:
    """Start engines that are closed at the test's end."""
    started: list[EngineProcess] = []

    def start_one(path: Path = tiny, backend: str = "transformers", **settings: object) -> EngineProcess:
        asked = EngineSettings(**{"device": "cpu", "threads": 1, "max_model_len": 256, **settings})
        started.append(EngineProcess(backend, path, asked, tmp_path / "logs" / f"{len(started)}.log"))
        return started[-1]

    yield start_one
    for engine in started:
        engine.close()


@pytest.fixture(scope="session")
def engine(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    settings = EngineSettings(device="cpu", threads=1, max_model_len=256)
    with EngineProcess("transformers", tiny, settings, tmp_path_factory.mktemp("log") / "engine.log") as started:
        yield started
