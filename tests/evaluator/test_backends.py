import subprocess
import sys
import textwrap

import pytest

from evaluator import backends
from evaluator.backends import EngineSettings, vllm
from evaluator.errors import BackendUnavailable

CAPABILITIES = [None, (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
SCHEMES = ["float32", "float16", "bfloat16", "W8A8", "FP8_DYNAMIC", "W4A16"]


def test_a_backend_is_a_file():
    assert {"transformers", "vllm"} <= set(backends.names())


# -- what every backend's file has to offer ------------------------------------------------------------------


@pytest.mark.parametrize("name", backends.names())
def test_every_backend_can_be_started_by_the_warm_process(name):
    module = backends.module_of(name)
    assert all(isinstance(each, str) for pair in module.ENVIRONMENT.items() for each in pair)
    assert callable(module.preload)
    reason = module.unavailable()
    assert reason is None or (reason and "\n" not in reason)
    assert isinstance(module.Engine.survives_errors, bool)
    for method in ("nll", "decode_steps", "generate", "logits_sha256", "facts"):
        assert callable(getattr(module.Engine, method))


@pytest.mark.parametrize("name", backends.names())
def test_every_backend_names_the_packages_that_it_runs_on(name):
    packages = backends.packages(name)
    assert "torch" in packages
    assert len(set(packages)) == len(packages) > 1


@pytest.mark.parametrize("name", backends.names())
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_every_backends_kernels_want_multiples_of_known_schemes(name, device):
    wanted = backends.kernels(name, device)
    if wanted is not None:
        assert wanted.engine
        assert wanted.head_dim >= 1
        assert set(wanted.schemes) <= set(SCHEMES)
        assert all(kernel.name and kernel.rows >= 1 and kernel.columns >= 1 for kernel in wanted.schemes.values())


@pytest.mark.parametrize("name", backends.names())
def test_every_backend_serves_at_most_the_stored_bytes_and_16_bits_unchanged(name):
    assert backends.served_bytes(name, 1000, "float32") in (1000, 500)
    for dtype in SCHEMES[1:]:
        assert backends.served_bytes(name, 1000, dtype) == 1000


@pytest.mark.parametrize("name", backends.names())
def test_every_backend_limits_a_step_to_a_positive_number_of_tokens_or_not_at_all(name):
    tokens = backends.batched_tokens(name)
    assert tokens is None or tokens > 0


@pytest.mark.parametrize("name", backends.names())
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_backend_starts_16_bits_everywhere_and_gives_its_reasons_in_one_line(name, capability):
    started = ("float32", "float16") if capability and capability < (8, 0) else SCHEMES[:3]
    assert [backends.cannot_start(name, dtype, capability) for dtype in started] == [None] * len(started)
    for scheme in SCHEMES[len(started) :]:
        reason = backends.cannot_start(name, scheme, capability)
        assert reason is None or (reason.startswith(f"{scheme}: ") and "\n" not in reason)


def test_stating_facts_imports_no_engine():
    program = (
        "import sys; from evaluator import backends\n"
        "for name in backends.names():\n"
        "    backends.packages(name), backends.kernels(name, 'cuda'), backends.cannot_start(name, 'W8A8', (9, 0))\n"
        "print([m for m in ('vllm', 'transformers', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_new_backend_is_one_file(tmp_path):
    (tmp_path / "abacus.py").write_text(
        textwrap.dedent("""
            from evaluator.backends import Facts, Kernel, Kernels, Refusal

            FACTS = Facts(
                packages=("abacus", "torch"),
                kernels={"cuda": Kernels("Abacus", 16, {"W8A8": Kernel("beads", 10, 5)})},
                batched_tokens=10,
                casts={"float32": "float16"},
                refusals=(Refusal("W4A16", (9, 0), "its beads are too small; choose W8A8"),),
            )

            def unavailable():
                return None
        """)
    )
    program = textwrap.dedent(f"""
        from evaluator import backends
        backends.__path__.append({str(tmp_path)!r})
        print(backends.names(), backends.choose("abacus"), backends.packages("abacus"))
        print(backends.kernels("abacus", "cuda").schemes["W8A8"].rows, backends.kernels("abacus", "mps"))
        print(backends.batched_tokens("abacus"), backends.served_bytes("abacus", 8, "float32"))
        print(backends.cannot_start("abacus", "W4A16", (9, 0)))
        print(backends.cannot_start("abacus", "W4A16", (8, 9)), backends.cannot_start("abacus", "W8A8", (9, 0)))
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "['abacus', 'transformers', 'vllm'] abacus ('abacus', 'torch')",
        "10 None",
        "10 4",
        "W4A16: its beads are too small; choose W8A8 (this GPU has compute capability 9.0)",
        "None None",
    ]


# -- what these backends say ---------------------------------------------------------------------------------


def test_transformers_takes_every_size_and_serves_what_is_stored():
    assert [backends.kernels("transformers", device) for device in ("cpu", "cuda", "mps")] == [None] * 3
    assert backends.served_bytes("transformers", 1000, "float32") == 1000
    assert backends.batched_tokens("transformers") is None
    assert backends.cannot_start("transformers", "W8A8", (12, 0)) is None


def test_vllm_wants_multiples_on_a_gpu_alone():
    assert backends.kernels("vllm", "cpu") is None
    wanted = backends.kernels("vllm", "cuda")
    assert (wanted.engine, wanted.head_dim) == ("vLLM", 8)
    found = {scheme: (kernel.name, kernel.rows, kernel.columns) for scheme, kernel in wanted.schemes.items()}
    assert found == {
        "W4A16": ("Marlin", 64, 128),
        "W8A8": ("CUTLASS", 16, 16),
        "FP8_DYNAMIC": ("CUTLASS", 16, 16),
    }


def test_vllm_serves_float32_in_16_bits():
    assert backends.served_bytes("vllm", 1001, "float32") == 500


@pytest.mark.parametrize("capability", [(10, 0), (12, 0)])
def test_vllm_cannot_start_int8_on_blackwell(capability):
    assert "choose FP8_DYNAMIC" in backends.cannot_start("vllm", "W8A8", capability)
    assert backends.cannot_start("vllm", "FP8_DYNAMIC", capability) is None


@pytest.mark.parametrize("capability", [None, (8, 9), (9, 0)])
def test_vllm_starts_int8_on_older_gpus_and_on_a_cpu(capability):
    assert backends.cannot_start("vllm", "W8A8", capability) is None


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_vllm_starts_no_bfloat16_before_ampere(capability):
    assert "choose float16" in backends.cannot_start("vllm", "bfloat16", capability, "a T4")
    assert "(a T4 has compute capability" in backends.cannot_start("vllm", "bfloat16", capability, "a T4")
    assert backends.cannot_start("vllm", "float16", capability) is None
    assert backends.cannot_start("vllm", "bfloat16", (8, 0)) is None


# -- choosing one --------------------------------------------------------------------------------------------


def test_an_unknown_backend_is_named():
    with pytest.raises(BackendUnavailable, match="'nope' is not one of transformers, vllm"):
        backends.choose("nope")
    with pytest.raises(BackendUnavailable, match="'nope'"):
        backends.packages("nope")


def test_auto_is_transformers_without_a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "cuda", lambda: False)
    assert backends.choose("auto") == "transformers"


def test_a_missing_engine_says_what_to_install(monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda package: package != "vllm")
    with pytest.raises(BackendUnavailable, match="pip install"):
        backends.choose("vllm")


def test_settings_survive_json():
    settings = EngineSettings(batch_sizes=(1, 8), threads=2, max_num_seqs=16, kv_tokens=5000)
    assert EngineSettings.from_dict({**settings.to_dict(), "batch_sizes": [1, 8]}) == settings


@pytest.mark.parametrize(
    ("together", "on_cpu", "expected"), [(None, False, 2048), (256, False, None), (256, True, 2048), (4096, True, 4096)]
)
def test_vllm_reads_prompts_in_its_own_steps_where_it_generates_on_a_gpu(together, on_cpu, expected):
    """None is vLLM's own default; scored text stays in steps of 2,048 tokens."""
    settings = EngineSettings(max_num_seqs=together)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    config = {**sizes, "hidden_size": 128, "dtype": "bfloat16"}
    assert vllm._arguments(config, settings, on_cpu=on_cpu)["max_num_batched_tokens"] == expected
