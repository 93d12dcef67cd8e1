"""Test what transformers 4.57.3 reads in an exported checkpoint, by asking that version in a process of its own."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from compressors import build
from compressors.errors import CheckpointError
from compressors.model import family, transformers_version
from compressors.model.checkpoint import Checkpoint
from compressors.plan import CompressionPlan
from compressors.statistics import activations
from search import files

F32 = torch.float32
TARGET = transformers_version.DEFAULT
REQUIREMENTS = [  # the rest (torch, numpy, safetensors, …) is lent by the running environment
    f"transformers=={TARGET}",
    "huggingface-hub>=0.34,<1",
    "tokenizers>=0.22,<0.23.1",
    "compressed-tensors==0.13.0",  # as vLLM 0.14.1 pins it
    "accelerate>=1.10,<2",
]
THERE = """
import json, sys, torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
assert transformers.__version__ == "4.57.3", transformers.__version__
job = json.loads(open(sys.argv[1]).read())
tensors, ids, dtypes = {}, {}, {}
for name, path in job["models"].items():
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, info)
    with torch.inference_mode():
        tensors[name] = model.eval()(torch.tensor(job["windows"]), use_cache=False).logits.contiguous()
for name, path in job["tokenizers"].items():
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = tokenizer.encode(job["text"])
    ids[name] = [type(tokenizer).__name__, found, tokenizer.decode(found)]
    dtypes[name] = str(transformers.AutoConfig.from_pretrained(path).dtype)
for name, config in job["ropes"].items():
    rope = LlamaRotaryEmbedding(LlamaConfig(**config))
    tensors["rope " + name] = torch.cat([rope.inv_freq, torch.tensor([rope.attention_scaling])])
save_file(tensors, sys.argv[2])
print(json.dumps({"ids": ids, "dtypes": dtypes}))
"""
TEXT = "The quick brown fox — 12,345 times — jumps; über <|x|>the lazy dog.\n\n  And again[EOS]"
PLANS = {
    "identity": {},
    "depth": {"num_hidden_layers": 3},
    "heads": {"num_key_value_heads": 2, "num_attention_heads": 4},
    "ffn": {"intermediate_size": 96},
    "hidden": {"hidden_size": 72},
}
QUANTIZED = {  # which an engine of that version reads with compressed-tensors 0.13
    "W8A8": {"precision": "W8A8"},
    "FP8_DYNAMIC": {"precision": "FP8_DYNAMIC"},
    "W4A16": {"precision": "W4A16", "num_key_value_heads": 2, "num_attention_heads": 4},
}
BUILT = {
    "exaone4": [*PLANS, "W8A8", "W4A16"],
    "llama": ["identity", "heads", "hidden", "FP8_DYNAMIC"],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES = {
    "none": None,
    "default": {"rope_type": "default", "rope_theta": 5e3},
    "whole": {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 1.0},
    "linear": {"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 2e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 2e4, "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn of its own": {
        "rope_type": "yarn",
        "rope_theta": 2e4,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.25,
    },
    "llama3": LLAMA3,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Pico models are slower on several threads, and much slower where other processes have the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def environment():
    """The directory of transformers 4.57.3 for PYTHONPATH; installed once and kept in the user's cache."""
    wanted = hashlib.sha256("\n".join(REQUIREMENTS).encode()).hexdigest()[:8]
    place = files.CACHE / "targets" / f"transformers-{TARGET}-{wanted}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            made = Path(scratch, "site")
            words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", made, *REQUIREMENTS]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"transformers {TARGET} can't be installed here: {done.stderr.strip()[-200:]}")
            try:
                made.replace(place)
            except OSError:
                if not place.is_dir():  # else another process was faster
                    raise
    return place


def ask(environment, tmp_path, windows, models=(), tokenizers=(), ropes=()):
    """Return logits, token ids and rotary frequencies of transformers 4.57.3, all from one process."""
    (tmp_path / "there.py").write_text(THERE)
    job = {"windows": windows, "text": TEXT, "ropes": dict(ropes)}
    job |= {"models": {name: str(path) for name, path in dict(models).items()}}
    job |= {"tokenizers": {name: str(path) for name, path in dict(tokenizers).items()}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, tmp_path / "there.py", tmp_path / "job.json", tmp_path / "found.safetensors"],
        env={**os.environ, "PYTHONPATH": str(environment), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(tmp_path / "found.safetensors"), json.loads(done.stdout)


def logits(path, windows):
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=F32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        return model.eval()(torch.tensor(windows), use_cache=False).logits


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0 + i / 8 for i in range(12)], "long_factor": [3.0] * 12}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SLIDING = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "layer_types": None}
LOCAL = {"rope_type": "default", "rope_theta": 3e4}
VARIANTS = {  # a family, and keys of its config.json that change what is computed; None leaves a key out
    **{
        f"llama {name}": ("llama", {"rope_parameters": {"rope_theta": 2e4, **parameters}})
        for name, parameters in {
            "linear": {"rope_type": "linear", "factor": 4.0},
            "dynamic": {"rope_type": "dynamic", "factor": 4.0},
            "yarn": YARN,
            "yarn of another ratio": {**YARN, "factor": 3.0, "mscale": 1.0, "mscale_all_dim": 0.5},
            "yarn without a factor": {**YARN, "factor": None},
            "yarn without a length": {"rope_type": "yarn", "factor": 4.0},
            "llama3": LLAMA3,
            "llama3 without a length": {k: v for k, v in LLAMA3.items() if not k.startswith("original")},
            "longrope": {**LONGROPE, "original_max_position_embeddings": 32},
            "longrope of another ratio": {**LONGROPE, "original_max_position_embeddings": 32, "factor": 3.0},
            "longrope in its length": {**LONGROPE, "factor": 2.0},
            "proportional": {"rope_type": "proportional", "factor": 3.0},
        }.items()
    },
    "llama length outside": ("llama", {"rope_parameters": LLAMA3, "original_max_position_embeddings": 64}),
    "llama dynamic beyond": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 2e4}, "max_position_embeddings": 32},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2 sliding": ("qwen2", SLIDING),
    "qwen2 yarn": ("qwen2", {"rope_parameters": {**YARN, "rope_theta": 1e6}}),
    "qwen3": ("qwen3", {}),
    "qwen3 sliding": ("qwen3", SLIDING),
    "qwen3 longrope": ("qwen3", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 32}}),
    "exaone4 window": ("exaone4", {"sliding_window": 7, "sliding_window_pattern": 2, "layer_types": None}),
    "exaone4 layer types": (
        "exaone4",
        {"sliding_window": 7, "layer_types": ["full_attention"] + ["sliding_attention"] * 4},
    ),
    "exaone4 without rope": ("exaone4", {"rope_parameters": None}),
    "smollm3": ("smollm3", {}),
    "smollm3 interval": ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2, "rope_parameters": None}),
    "smollm3 sliding": ("smollm3", {"use_sliding_window": True, "sliding_window": 7, "layer_types": None}),
    "smollm3 llama3": ("smollm3", {"rope_parameters": LLAMA3}),
    "gemma3_text": ("gemma3_text", {}),
    "gemma3_text pattern": (
        "gemma3_text",
        {"layer_types": None, "_sliding_window_pattern": None, "sliding_window_pattern": 2},
    ),
    "gemma3_text one base": ("gemma3_text", {"rope_parameters": {"full_attention": LOCAL}}),
    "gemma3_text local": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {**YARN, "rope_theta": 5e5}, "sliding_attention": LOCAL}},
    ),
    "gemma3_text longrope": ("gemma3_text", {"rope_parameters": {"full_attention": LONGROPE | {"factor": 2.0}}}),
    "gemma3_text without rope": ("gemma3_text", {"rope_parameters": None}),
    "gemma3_text old": (
        "gemma3_text",
        {
            "rope_parameters": None,
            "rope_theta": 3e5,
            "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
}
QUICK = (  # the others take a minute
    "llama yarn of another ratio",
    "llama longrope of another ratio",
    "llama length outside",
    "qwen2 sliding",
    "qwen3",
    "exaone4 window",
    "smollm3 interval",
    "gemma3_text",
    "gemma3_text local",
)


@pytest.fixture(scope="module")
def pico_gemma3(write_pico_model, tmp_path_factory):
    return write_pico_model(tmp_path_factory.mktemp("gemma3") / "m", "gemma3_text")


@pytest.fixture(scope="module")
def quick(environment, write_pico_model, tmp_path_factory):
    return compare_variants(QUICK, environment, write_pico_model, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def others(environment, write_pico_model, tmp_path_factory):
    return compare_variants(
        VARIANTS.keys() - set(QUICK), environment, write_pico_model, tmp_path_factory.mktemp("more")
    )


def compare_variants(names, environment, write_pico_model, home):
    """Return the logits of variants here, of the same checkpoints after `retarget` here, and there, by name."""
    windows = torch.randint(3, 320, (2, 60), generator=torch.Generator().manual_seed(3)).tolist()
    models = {VARIANTS[name][0] for name in names}
    models = {model_type: write_pico_model(home / f"{model_type}-plain", model_type) for model_type in models}
    here, again, retargeted = {}, {}, {}
    for name in names:
        model_type, changes = VARIANTS[name]
        path = home / name.replace(" ", "-")
        shutil.copytree(models[model_type], path)
        config = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(
            json.dumps({k: v for k, v in config.items() if v is not None or k not in changes})
        )
        here[name], retargeted[name] = logits(path, windows), path
    for name, path in retargeted.items():
        transformers_version.retarget(path, TARGET)
        again[name] = logits(path, windows)
    return here, again, ask(environment, home, windows, retargeted)[0]


@dataclasses.dataclass
class Exports:
    windows: list
    here: dict  # logits of the checkpoints as they were built
    retargeted: dict  # directories
    there: dict  # logits and frequencies of 4.57.3
    said: dict


def export(base_path, plans, windows, to):
    """Return (logits before retargeting, directory after it) of every plan by name."""
    base = Checkpoint.read(base_path)
    its_family = family.family_of(base)
    statistics = activations.calibrate(base, windows)
    here, directories = {}, {}
    for name, changes in plans.items():
        plan = dataclasses.replace(CompressionPlan.identity(base.config), **changes)
        build.apply(plan, base, its_family, statistics).write(to / name)
        here[name], directories[name] = logits(to / name, windows), to / name
        transformers_version.retarget(to / name, TARGET)
    return here, directories


@pytest.fixture(scope="module")
def exports(environment, pico_exaone4, pico_llama, tmp_path_factory):
    home = tmp_path_factory.mktemp("target")
    windows = torch.randint(3, 320, (3, 60), generator=torch.Generator().manual_seed(1)).tolist()
    here, retargeted, naive = {}, {}, {}
    for name, path in (("exaone4", pico_exaone4), ("llama", pico_llama)):
        plans = {plan: (PLANS | QUANTIZED)[plan] for plan in BUILT[name]}
        found, made = export(path, plans, windows, home / name)
        here |= {f"{name} {plan}": value for plan, value in found.items()}
        retargeted |= {f"{name} {plan}": value for plan, value in made.items()}
        AutoModelForCausalLM.from_pretrained(path).save_pretrained(home / f"naive {name}")
        naive[f"naive {name}"] = home / f"naive {name}"
        here[f"naive {name}"] = here[f"{name} identity"]
    tokenizer = AutoTokenizer.from_pretrained(pico_exaone4)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    tokenizer.save_pretrained(home / "more tokens")
    shutil.copy(pico_exaone4 / "config.json", home / "more tokens")
    transformers_version.retarget(home / "more tokens", TARGET)
    ropes = {
        name: transformers_version.config_for(rope_config(parameters), TARGET) for name, parameters in ROPES.items()
    }
    there, said = ask(
        environment,
        home,
        windows,
        {**retargeted, **naive},
        {"exaone4 identity": retargeted["exaone4 identity"], "more tokens": home / "more tokens"},
        ropes,
    )
    return Exports(windows, here, retargeted, there, said)


def rope_config(parameters):
    config = LlamaConfig(hidden_size=96, num_attention_heads=6, head_dim=24, max_position_embeddings=512)
    given = {**config.to_dict(), "rope_parameters": parameters}
    return {key: value for key, value in given.items() if value is not None}


@pytest.mark.parametrize("plan", [f"{name} {plan}" for name in BUILT for plan in BUILT[name] if plan in PLANS])
def test_the_target_computes_the_logits_that_were_measured(exports, plan):
    assert (exports.there[plan] - exports.here[plan]).abs().max() < 1e-4
    assert exports.here[plan].std() > 0.1, "a model that says nothing would agree with anything"


@pytest.mark.parametrize("plan", [f"{name} {plan}" for name in BUILT for plan in BUILT[name] if plan in QUANTIZED])
def test_the_target_reads_quantized_checkpoints(exports, plan):
    torch.testing.assert_close(exports.there[plan], exports.here[plan], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["exaone4", "llama"])
def test_the_target_misreads_what_transformers_5_writes_by_itself(exports, name):
    """Otherwise the tests above would prove nothing."""
    assert (exports.there[f"naive {name}"] - exports.here[f"naive {name}"]).abs().max() > 0.1


@pytest.mark.parametrize("name", QUICK)
def test_the_target_computes_the_same_for_each_rotary_embedding_and_window(quick, name):
    same_logits(quick, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - set(QUICK)))
def test_the_target_computes_the_same_for_every_other_rotary_embedding_and_window(others, name):
    same_logits(others, name)


def same_logits(compared, name):
    here, again, there = compared
    assert torch.equal(again[name], here[name]), "the running version reads the exported form as the one before"
    assert (there[name] - here[name]).abs().max() < 1e-4
    different = [other for other in here if VARIANTS[other][0] == VARIANTS[name][0] and other != name]
    for other in different:
        assert (here[other] - here[name]).abs().max() > 1e-3, f"a setting that changes nothing proves nothing: {other}"


def test_the_running_transformers_still_reads_the_same(exports):
    for name, path in exports.retargeted.items():
        assert torch.equal(logits(path, exports.windows), exports.here[name]), name


@pytest.mark.parametrize("name", ["exaone4 identity", "more tokens"])
def test_the_target_reads_the_same_tokens(exports, name, pico_exaone4):
    tokenizer = AutoTokenizer.from_pretrained(pico_exaone4)
    if name == "more tokens":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    ids = tokenizer.encode(TEXT)
    assert exports.said["ids"][name] == ["PreTrainedTokenizerFast", ids, tokenizer.decode(ids)]
    assert exports.said["dtypes"][name] == "torch.bfloat16"


@pytest.mark.parametrize("name", ROPES)
def test_the_target_rotates_by_the_same_angles(exports, name):
    rope = LlamaRotaryEmbedding(LlamaConfig(**rope_config(ROPES[name])))
    expected = torch.cat([rope.inv_freq, torch.tensor([rope.attention_scaling])])
    torch.testing.assert_close(exports.there[f"rope {name}"], expected, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_the_target_computes_the_logits_of_a_real_exaone4(environment, exaone4_mini, tmp_path):
    own = CompressionPlan.identity(json.loads((exaone4_mini / "config.json").read_text()))
    plans = {
        "identity": {},
        "depth": {"num_hidden_layers": own.num_hidden_layers - 2},
        "heads": {"num_attention_heads": own.num_attention_heads // 2},
        "kv heads": {
            "num_attention_heads": own.num_attention_heads // 2,
            "num_key_value_heads": own.num_key_value_heads // 2,
        },
        "ffn": {"intermediate_size": own.intermediate_size * 3 // 4},
        "hidden": {"hidden_size": own.hidden_size * 7 // 8},
    }
    windows = torch.randint(3, 8000, (2, 128), generator=torch.Generator().manual_seed(2)).tolist()
    here, retargeted = export(exaone4_mini, plans, windows, tmp_path)
    AutoModelForCausalLM.from_pretrained(exaone4_mini).save_pretrained(tmp_path / "naive")
    told = {"identity": retargeted["identity"]}
    there, said = ask(environment, tmp_path, windows, {**retargeted, "naive": tmp_path / "naive"}, told)
    for name in plans:
        difference = float((there[name] - here[name]).abs().max())
        print(f"{name}: max abs difference {difference:.2e} of logits with standard deviation {here[name].std():.2f}")
        assert difference < 1e-4, name
    naive = float((there["naive"] - here["identity"]).abs().max())
    print(f"as save_pretrained of transformers {transformers.__version__} writes it: {naive:.2e}")
    assert naive > 0.1
    assert said["ids"]["identity"][1] == AutoTokenizer.from_pretrained(exaone4_mini).encode(TEXT)


# -- the form alone ------------------------------------------------------------------------------------------


@pytest.fixture
def config(pico_exaone4):
    return json.loads((pico_exaone4 / "config.json").read_text())


def test_a_config_is_written_in_the_form_of_4_57(config):
    made = transformers_version.config_for(config, TARGET)
    assert made["rope_theta"] == 1e6
    assert made["rope_scaling"] == {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    assert made["torch_dtype"] == "bfloat16"
    assert made["transformers_version"] == TARGET
    assert not {"dtype", "rope_parameters"} & made.keys()
    rest = config.keys() - {"dtype", "rope_parameters", "transformers_version"}
    assert {key: made[key] for key in rest} == {key: config[key] for key in rest}
    assert made.keys() - rest == {"torch_dtype", "rope_theta", "rope_scaling", "transformers_version"}
    assert config["rope_parameters"]["rope_theta"] == 1e6, "the argument is not changed"


def test_config_for_is_idempotent_and_takes_the_old_form(config):
    made = transformers_version.config_for(config, TARGET)
    assert transformers_version.config_for(made, TARGET) == made
    old = {**made, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert transformers_version.config_for(old, TARGET)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    both = {**made, "rope_parameters": config["rope_parameters"], "dtype": config["dtype"]}
    assert transformers_version.config_for(both, TARGET) == made
    inside = {**made, "rope_scaling": {**made["rope_scaling"], "rope_theta": 1e6}}  # as transformers 5 leaves it
    assert transformers_version.config_for(inside, TARGET) == made


def test_head_dim_is_always_written(config):
    del config["head_dim"]
    assert transformers_version.config_for(config, TARGET)["head_dim"] == 96 // 6


@pytest.mark.parametrize("version", ["5.16", "5.16.2", transformers.__version__, "5.99.1"])
def test_a_config_is_not_changed_for_the_running_major_version(config, version):
    assert transformers_version.config_for(config, version) == {**config, "transformers_version": version}
    tokenizer = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}
    assert transformers_version.tokenizer_config_for(tokenizer, version, tokenizer_json=True) == tokenizer


@pytest.mark.parametrize("version", ["4.54.1", "4.58.0", "5.0.0", "5.15.9", "6.0", "latest", ""])
def test_unknown_targets_are_refused(config, version, tmp_path):
    with pytest.raises(CheckpointError, match=r"4\.55 to 4\.57 and 5\.16 to 5\.x"):
        transformers_version.config_for(config, version)
    with pytest.raises(CheckpointError, match=r"4\.55 to 4\.57"):
        transformers_version.retarget(tmp_path, version)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}}, "'proportional' can't be"),
        (
            {"rope_parameters": {**LLAMA3, "rope_type": "longrope"}},
            "has no long_factor, short_factor and has high_freq",
        ),
        ({"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "has partial_rotary_factor"),
        ({"rope_parameters": {**LLAMA3, "factor": None}}, "has no factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "factor": 4.0}}, "has factor"),
        ({"rope_parameters": {"full_attention": LLAMA3}}, "differ by the type of layer"),
        ({"rope_theta": 10000.0}, "rope_parameters.rope_theta: 1000000.0, rope_theta: 10000.0"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "config.json contradicts itself (rope_parameters: {",
        ),
        ({"torch_dtype": "float16"}, "dtype: bfloat16 and torch_dtype: float16"),
        ({"model_type": "gemma9"}, "model_type 'gemma9' is not known"),
        ({"per_layer_config": {"1": {"intermediate_size": 8}}}, "per_layer_config"),
    ],
)
def test_what_the_target_can_not_express_is_refused(config, changes, said):
    with pytest.raises(CheckpointError) as caught:
        transformers_version.config_for({**config, **changes}, TARGET)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sliding_attention": {"rope_type": "linear", "factor": 2.0}}, "sliding_attention has rope_type: linear"),
        ({"chunked_attention": {"rope_type": "default"}}, "differ by the type of layer"),
        ({"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25}}, "'proportional' can't be"),
    ],
)
def test_what_only_transformers_5_can_express_names_the_way_out(pico_gemma3, changes, said):
    config = json.loads((pico_gemma3 / "config.json").read_text())
    config["rope_parameters"] = {**config["rope_parameters"], **changes}
    with pytest.raises(CheckpointError) as caught:
        transformers_version.config_for(config, TARGET)
    assert said in str(caught.value)
    way_out = f"choose --for-transformers {transformers.__version__}, or export.for_transformers=null"
    assert str(caught.value).endswith(way_out)
    assert transformers_version.config_for(config, transformers.__version__)["rope_parameters"]


@pytest.mark.parametrize(("written", "wanted"), [("torch.bfloat16", "bfloat16"), ("bf16", "bfloat16"), ("auto", None)])
def test_a_dtype_is_written_as_4_57_reads_it(config, written, wanted):
    del config["dtype"]
    made = transformers_version.config_for({**config, "torch_dtype": written}, TARGET)
    assert made.get("torch_dtype") == wanted
    assert "dtype" not in made


def test_gemmas_two_rotary_bases_are_written_in_the_form_of_4_57(pico_gemma3):
    config = json.loads((pico_gemma3 / "config.json").read_text())
    config["rope_parameters"]["sliding_attention"]["rope_theta"] = 2e4
    made = transformers_version.config_for(config, TARGET)
    assert made["rope_theta"] == 1e6
    assert made["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert made["rope_local_base_freq"] == 2e4
    assert transformers_version.config_for(made, TARGET) == made


def test_null_keys_of_newer_compressed_tensors_are_dropped_and_others_refused(config):
    args = {"num_bits": 8, "type": "int", "scale_dtype": None, "newer": None}
    scheme = {"targets": ["Linear"], "weights": args, "input_activations": None, "newer": None, "format": "dense"}
    given = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": scheme}}
    made = transformers_version.config_for({**config, "quantization_config": given}, TARGET)["quantization_config"]
    assert made["config_groups"]["group_0"] == {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "scale_dtype": None},
        "input_activations": None,
        "format": "dense",
    }
    args["newer"] = 3
    with pytest.raises(CheckpointError, match="newer: 3"):
        transformers_version.config_for({**config, "quantization_config": given}, TARGET)
    args["newer"], given["format"] = None, "mxfp8-quantized"
    with pytest.raises(CheckpointError, match="format mxfp8-quantized"):
        transformers_version.config_for({**config, "quantization_config": given}, TARGET)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])  # in the layers' group, and in one of its own
def test_an_8_bit_lm_head_is_refused_where_vllm_does_not_read_it(pico_exaone4, scheme):
    base = Checkpoint.read(pico_exaone4)
    its = family.family_of(base)
    plan = dataclasses.replace(
        CompressionPlan.identity(base.config), precision=scheme, lm_head="8-bit", hidden_size=64, intermediate_size=128,
        num_attention_heads=4, num_key_value_heads=2
    )  # fmt: skip
    made = build.apply(plan, base, its, None).config
    with pytest.raises(CheckpointError, match=r"reads no 8-bit lm_head before 0\.20"):
        transformers_version.config_for(made, TARGET)
    assert transformers_version.config_for(made, "5.17.0")["quantization_config"] == made["quantization_config"]


def test_a_tokenizer_without_tokenizer_json_is_refused():
    with pytest.raises(CheckpointError, match="SentencePieceBackend"):
        transformers_version.tokenizer_config_for(
            {"tokenizer_class": "SentencePieceBackend"}, TARGET, tokenizer_json=False
        )


def test_retarget_returns_its_changes_and_changes_nothing_twice(pico_exaone4, tmp_path):
    model = tmp_path / "m"
    shutil.copytree(pico_exaone4, model)
    weights = (model / "model.safetensors").stat()
    version = transformers.__version__
    assert transformers_version.retarget(model, TARGET) == [
        "config.json: rope_parameters → rope_theta, rope_scaling",
        "config.json: dtype → torch_dtype",
        f"config.json: transformers_version {version} → {TARGET}",
        f"generation_config.json: transformers_version {version} → {TARGET}",
        "tokenizer_config.json: backend dropped",
        "tokenizer_config.json: tokenizer_class TokenizersBackend → PreTrainedTokenizerFast",
    ]
    assert sorted(path.name for path in model.iterdir()) == sorted(path.name for path in pico_exaone4.iterdir())
    assert (model / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
    assert (model / "config.json").stat().st_mode & 0o777 == 0o644
    stamps = {path: path.stat().st_mtime_ns for path in model.iterdir()}
    assert transformers_version.retarget(model, TARGET) == []
    assert {path: path.stat().st_mtime_ns for path in model.iterdir()} == stamps


def test_a_directory_that_can_not_be_retargeted_is_not_changed(pico_exaone4, tmp_path):
    model = tmp_path / "m"
    shutil.copytree(pico_exaone4, model)
    (model / "tokenizer_config.json").write_text("{")  # the last of the three to be read
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json can't be read"):
        transformers_version.retarget(model, TARGET)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        transformers_version.retarget(tmp_path, TARGET)


@pytest.mark.parametrize(("model_type", "theta"), [("llama", 1e4), ("smollm3", 2e6), ("gemma3_text", 1e6)])
def test_a_missing_rope_theta_is_the_familys_default(model_type, theta):
    config = {"model_type": model_type, "rope_scaling": None, "head_dim": 64, "torch_dtype": "bfloat16"}
    assert transformers_version.config_for(config, "4.57.3")["rope_theta"] == theta
