import subprocess
import sys

import pytest

from evaluator import backends
from evaluator.backends import EngineSettings
from evaluator.errors import BackendUnavailable


def test_a_backend_is_a_file():
    assert {"transformers", "vllm"} <= set(backends.names())


@pytest.mark.parametrize("name", backends.names())
def test_every_backend_file_holds_what_is_asked_of_it(name):
    module = backends.module_of(name)
    assert isinstance(module.ENVIRONMENT, dict)
    assert callable(module.preload)
    reason = module.unavailable()
    assert reason is None or (reason and "\n" not in reason)
    assert isinstance(module.Engine.survives_errors, bool)
    for method in ("nll", "decode_steps", "logits_sha256", "facts"):
        assert callable(getattr(module.Engine, method))


def test_asking_what_is_available_imports_no_engine():
    program = (
        "import sys; from evaluator import backends\n"
        "for name in backends.names(): backends.module_of(name)\n"
        "print([m for m in ('vllm', 'transformers', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_backend_is_named():
    with pytest.raises(BackendUnavailable, match="'nope' is not one of transformers, vllm"):
        backends.choose("nope")


def test_auto_is_transformers_without_a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "cuda", lambda: False)
    assert backends.choose("auto") == "transformers"


def test_a_missing_engine_says_what_to_install(monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda package: package != "vllm")
    with pytest.raises(BackendUnavailable, match="pip install"):
        backends.choose("vllm")


def test_settings_survive_json():
    settings = EngineSettings(batch_sizes=(1, 8), threads=2)
    assert EngineSettings.from_dict({**settings.to_dict(), "batch_sizes": [1, 8]}) == settings
