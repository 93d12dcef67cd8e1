"""Test the structure of a model against its checkpoint, and the savings of cuts against checkpoints that were cut."""

import dataclasses
import json
import math
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressors import build, possible_cuts
from compressors.errors import CheckpointError
from compressors.model import structure
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import family_of
from compressors.plan import CompressionPlan
from evaluator import backends


@pytest.fixture(scope="module")
def base(pico):
    return Checkpoint.read(pico)


@pytest.fixture(scope="module")
def its_family(base):
    return family_of(base)


@pytest.fixture
def copy(pico_llama, tmp_path):
    shutil.copytree(pico_llama, tmp_path / "model")
    return tmp_path / "model"


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def rewrite(path, rename):
    """Rename the weights."""
    tensors = load_file(path / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, path / "model.safetensors")


def agrees(found, checkpoint):
    """Check every sum, from the model down to the weights of the layers."""
    assert (found.parameters, found.bytes) == (checkpoint.total_parameters, checkpoint.size_bytes)
    assert found.decode_bytes == checkpoint.decode_bytes
    for part in found.parts:
        assert part.parameters == sum(inner.parameters for inner in part.parts)
        assert part.bytes == sum(inner.bytes for inner in part.parts)
    in_layers = [layer.total for layer in found.layers]
    outside = [inner for part in found.parts for inner in part.parts if inner.name.startswith(("model.", "lm_head"))]
    for what in ("parameters", "bytes"):
        assert sum(getattr(part, what) for part in in_layers + outside) == getattr(found, what)


def test_sums_equal_those_of_the_checkpoint(base, its_family):
    agrees(structure.describe(base, its_family), base)


def test_shapes_of_a_model_whose_dimensions_all_differ(base, its_family):
    found = structure.describe(base, its_family)
    E = base.config["hidden_size"]  # 96, Qwen2's 144
    biases = {name: tensor.shape[0] for name, tensor in base.tensors.items() if name.endswith(".bias")}
    in_attention = sum(size for name, size in biases.items() if "self_attn" in name)
    tied = base.config["tie_word_embeddings"]
    # 6 query and 3 key/value heads of head_dim 24, FFN 160, vocabulary 320, 5 layers
    shapes = {part.name: part.shape for part in (*found.layers[3].attention.parts, *found.layers[3].mlp.parts)}
    assert list(shapes.items()) == [
        ("self_attn.q_proj", (144, E)),
        ("self_attn.k_proj", (72, E)),
        ("self_attn.v_proj", (72, E)),
        ("self_attn.o_proj", (E, 144)),
        ("mlp.gate_proj", (160, E)),
        ("mlp.up_proj", (160, E)),
        ("mlp.down_proj", (E, 160)),
    ]
    assert found.attention.parameters == 5 * (2 * 144 * E + 2 * 72 * E) + in_attention
    assert found.mlp.parameters == 5 * 3 * 160 * E + sum(biases.values()) - in_attention
    norms, per_head = len(its_family.block_norms), len(its_family.head_norms)
    assert found.norms.parameters == 5 * (norms * E + per_head * 24) + E
    assert (found.embedding.parameters, found.embedding.bytes) == (320 * E, 2 * 320 * E)
    assert (found.lm_head.parameters, found.tied, found.other.count) == (0 if tied else 320 * E, tied, 0)
    assert [layer.index for layer in found.layers] == [0, 1, 2, 3, 4]
    assert found.layers[4].total.parameters == (found.parameters - (1 if tied else 2) * 320 * E - E) // 5
    assert (found.num_attention_heads, found.num_key_value_heads, found.heads_per_group) == (6, 3, 2)
    assert (found.head_dim, found.hidden_size, found.intermediate_size, found.vocab_size) == (24, E, 160, 320)
    assert (found.dtype, found.quantization, found.uncuttable) == ("bfloat16", None, None)
    assert all(layer.like(found.layers[0]) for layer in found.layers)


def test_an_untied_head_counts_and_its_embedding_is_not_read_by_a_step(write_pico_model, tmp_path):
    base = Checkpoint.read(write_pico_model(tmp_path / "untied", "llama", tie_word_embeddings=False))
    found = structure.describe(base, family_of(base))
    agrees(found, base)
    assert found.lm_head.parameters == 320 * 96
    assert not found.tied
    assert found.decode_bytes == found.bytes - found.embedding.bytes


def test_describing_a_known_family_reads_no_weights(base, its_family):
    def fails():
        raise AssertionError("a weight was read")

    blind = dataclasses.replace(
        base, tensors={name: dataclasses.replace(tensor, load=fails) for name, tensor in base.tensors.items()}
    )
    assert structure.describe(blind, its_family) == structure.describe(base, its_family)
    assert possible_cuts.cuts(blind, its_family) == possible_cuts.cuts(base, its_family)


# -- cuts ----------------------------------------------------------------------------------------------------


def test_the_savings_of_a_cut_equal_the_difference_of_the_written_files(base, its_family, tmp_path):
    """The expected plans are listed, and each saves what its written file does."""
    hidden_size = base.config["hidden_size"]
    changes = {
        "layers 5 → 4": {"num_hidden_layers": 4},
        "layers 5 → 3": {"num_hidden_layers": 3},
        "key/value groups 3 → 2 (query heads 6 → 4)": {"num_key_value_heads": 2, "num_attention_heads": 4},
        "query heads per group 2 → 1 (6 → 3)": {"num_attention_heads": 3},
        "FFN width 160 → 140": {"intermediate_size": 140},
        f"hidden size {hidden_size} → {hidden_size * 7 // 8}": {"hidden_size": hidden_size * 7 // 8},
        "bfloat16 → float16": {"precision": "float16"},
        "bfloat16 → W8A8": {"precision": "W8A8"},
        "bfloat16 → FP8_DYNAMIC": {"precision": "FP8_DYNAMIC"},
        "bfloat16 → W4A16": {"precision": "W4A16"},
    }
    found = {cut.what: cut for cut in possible_cuts.cuts(base, its_family)}
    assert list(found) == list(changes)
    own = CompressionPlan.identity(base.config)
    for what, change in changes.items():
        cut = found[what]
        assert cut.plan == dataclasses.replace(own, **change)
        if cut.bytes_saved is None:  # no group size of W4A16 divides head_dim 24's widths
            assert cut.infeasible.startswith("W4A16: no group size")
            continue
        made = build.apply(cut.plan, base, its_family, None)
        made.write(tmp_path / "made")
        stored = load_file(tmp_path / "made" / "model.safetensors")
        assert cut.infeasible is None
        assert cut.bytes_saved == base.size_bytes - sum(tensor.nbytes for tensor in stored.values())
        assert cut.parameters_saved == base.total_parameters - made.total_parameters
        assert cut.decode_bytes_saved == base.decode_bytes - made.decode_bytes
        assert cut.share == cut.bytes_saved / base.size_bytes
    assert found["layers 5 → 3"].bytes_saved == 2 * found["layers 5 → 4"].bytes_saved > 0
    assert found["bfloat16 → W8A8"].parameters_saved == 0


def test_a_wide_ffn_is_cut_by_128_channels(write_pico_model, tmp_path):
    base = Checkpoint.read(write_pico_model(tmp_path / "wide", "llama", intermediate_size=1024, num_hidden_layers=2))
    widths = {cut.plan.intermediate_size for cut in possible_cuts.cuts(base, family_of(base))}
    assert widths == {1024, 896}


def test_an_infeasible_cut_says_why(write_pico_model, tmp_path):
    base = Checkpoint.read(
        write_pico_model(tmp_path / "one", "llama", num_hidden_layers=1, num_key_value_heads=1, num_attention_heads=2)
    )
    found = possible_cuts.cuts(base, family_of(base))
    one, two, groups = found[:3]
    assert one.infeasible == "num_hidden_layers: 0 must be from 1 to the model's 1"
    assert two.infeasible == "num_hidden_layers: -1 must be from 1 to the model's 1"
    assert groups.infeasible == "heads: 0 key/value heads can't be kept of 1; choose from 1 to 1"
    assert (one.bytes_saved, one.parameters_saved, one.share) == (None, None, None)


def test_kernel_alignment_is_asked_for_or_not(write_pico_model, tmp_path):
    base = Checkpoint.read(write_pico_model(tmp_path / "wide", "llama", head_dim=16, num_hidden_layers=1))
    known = family_of(base)
    anywhere = {cut.what: cut for cut in possible_cuts.cuts(base, known)}
    on_gpu = {cut.what: cut for cut in possible_cuts.cuts(base, known, kernels=backends.kernels("vllm", "cuda"))}
    assert anywhere["bfloat16 → W4A16"].infeasible is None
    assert "Marlin kernel wants multiples of 64 × 128" in on_gpu["bfloat16 → W4A16"].infeasible
    assert on_gpu["bfloat16 → W4A16"].bytes_saved == anywhere["bfloat16 → W4A16"].bytes_saved > 0


def test_cuts_of_thirty_layers_take_well_under_a_second(smollm2):
    base = Checkpoint.read(smollm2)
    known = family_of(base)
    possible_cuts.cuts(base, known)  # imports
    seconds = []
    for _ in range(3):
        start = time.process_time()
        found = possible_cuts.cuts(base, known, kernels=backends.kernels("vllm", "cuda"))
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5
    assert found[0].bytes_saved == 7_080_192
    agrees(structure.describe_any(smollm2), base)


# -- what is quantized or unknown ----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "W4A16"])
def test_a_quantized_checkpoint_is_described_with_its_original_parameters(scheme, write_pico_model, tmp_path):
    base = Checkpoint.read(write_pico_model(tmp_path / "base", "exaone4", head_dim=16, num_hidden_layers=2))
    known = family_of(base)
    plan = dataclasses.replace(CompressionPlan.identity(base.config), precision=scheme)
    made = build.apply(plan, base, known, None)
    made.write(tmp_path / "made")
    found = structure.describe_any(tmp_path / "made")
    agrees(found, made)
    assert found.parameters == base.total_parameters
    assert "start from the unquantized model" in found.uncuttable
    assert found.quantization.startswith("compressed-tensors ")
    plain = structure.describe(base, known)
    assert [(part.name, part.shape) for part in found.attention.parts] == [
        (part.name, part.shape) for part in plain.attention.parts
    ]
    assert found.embedding == plain.embedding
    assert found.mlp.bytes < plain.mlp.bytes
    assert found.layers[1].norms == plain.layers[1].norms


def test_a_packed_weight_that_contradicts_its_own_shape_is_refused(write_pico_model, tmp_path):
    base = Checkpoint.read(write_pico_model(tmp_path / "base", "llama", head_dim=16, num_hidden_layers=1))
    plan = dataclasses.replace(CompressionPlan.identity(base.config), precision="W4A16")
    build.apply(plan, base, family_of(base), None).write(tmp_path / "made")
    tensors = load_file(tmp_path / "made" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_shape"] = torch.tensor([10**9, 10**9])
    save_file(tensors, tmp_path / "made" / "model.safetensors")
    with pytest.raises(CheckpointError, match="its weight_shape is 1000000000 × 1000000000"):
        structure.describe_any(tmp_path / "made")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_other_packings_are_unpacked_by_their_bits(method, bits, copy):
    """GPTQ packs along the inputs, AWQ along the outputs; both store [in, out]."""
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    packed = (96 * bits // 32, 160) if method == "gptq" else (96, 160 * bits // 32)
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(packed, dtype=torch.int32)
    tensors["model.layers.0.mlp.up_proj.scales"] = torch.zeros(3, 160, dtype=torch.float16)
    tensors["model.layers.0.mlp.up_proj.qzeros"] = torch.zeros(3, 160 * bits // 32, dtype=torch.int32)
    save_file(tensors, copy / "model.safetensors")
    before = Checkpoint.read(copy).size_bytes
    edit_config(copy, quantization_config={"quant_method": method, "bits": bits})
    found = structure.describe_any(copy)
    up = {part.name: part for part in found.layers[0].mlp.parts}["mlp.up_proj"]
    assert (up.shape, up.parameters, up.dtype) == ((160, 96), 160 * 96, "int32")
    assert found.quantization == method
    assert found.bytes == before
    edit_config(copy, quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError, match="doesn't say in how many bits"):
        structure.describe_any(copy)


def test_an_unknown_family_is_described_by_the_names_of_its_tensors(copy):
    base = Checkpoint.read(copy)
    known = structure.describe(base, family_of(base))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.2.self_attn.q_proj.bias"] = torch.zeros(144, dtype=torch.bfloat16)
    tensors["model.layers.2.self_attn.sinks"] = torch.zeros(6, dtype=torch.bfloat16)
    tensors["model.rotary.table"] = torch.zeros(7, dtype=torch.float32)
    save_file(tensors, copy / "model.safetensors")
    edit_config(copy, model_type="qwen9")
    found = structure.describe_any(copy)
    assert found.uncuttable.startswith("architecture: model_type 'qwen9' is not known here")
    assert found.mlp == known.mlp
    assert found.norms == known.norms
    assert found.attention.parameters == known.attention.parameters + 144 + 6
    assert (found.other.parameters, found.other.bytes) == (7, 28)
    assert found.bytes == base.size_bytes + 2 * (144 + 6) + 28
    assert [layer.like(found.layers[0]) for layer in found.layers] == [True, True, False, True, True]
    assert (found.num_attention_heads, found.head_dim, found.tied) == (6, 24, True)


def test_the_names_of_gpt2_are_recognized(tmp_path):
    shapes = {
        "transformer.wte.weight": (50, 8),
        "transformer.wpe.weight": (16, 8),
        "transformer.ln_f.weight": (8,),
        "transformer.ln_f.bias": (8,),
    }
    for layer in range(12):
        shapes |= {
            f"transformer.h.{layer}.ln_1.weight": (8,),
            f"transformer.h.{layer}.attn.c_attn.weight": (8, 24),
            f"transformer.h.{layer}.attn.c_proj.weight": (8, 8),
            f"transformer.h.{layer}.mlp.c_fc.weight": (8, 32),
            f"transformer.h.{layer}.mlp.c_proj.weight": (32, 8),
        }
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 2, "n_embd": 8}))
    found = structure.describe_any(tmp_path)
    assert found.parameters == sum(map(math.prod, shapes.values()))
    assert (found.embedding.parameters, found.norms.parameters) == (66 * 8, 12 * 8 + 16)
    assert (found.attention.parameters, found.mlp.parameters) == (12 * 32 * 8, 12 * 64 * 8)
    assert [layer.index for layer in found.layers] == list(range(12))
    assert (found.num_attention_heads, found.head_dim, found.vocab_size) == (2, 4, None)
    assert (found.other.count, found.tied, found.dtype) == (0, True, "float32")


def test_experts_are_one_part_and_their_decode_bytes_are_unknown(tmp_path):
    shapes = {"model.embed_tokens.weight": (50, 8), "lm_head.weight": (50, 8)}
    shapes |= {f"model.layers.0.mlp.experts.{number}.up_proj.weight": (16, 8) for number in range(11)}
    shapes |= {"vision.layers.0.self_attn.q_proj.weight": (8, 8)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "moe", "text_config": {"hidden_size": 8}}))
    found = structure.describe_any(tmp_path)
    (experts,) = found.layers[0].mlp.parts
    assert (experts.name, experts.count, experts.shape) == ("mlp.experts.*.up_proj", 11, (16, 8))
    assert experts.parameters == 11 * 128
    assert len(found.layers) == 1
    assert (found.other.parameters, found.attention.count) == (64, 0)  # a vision tower's are not the model's layers
    assert (found.decode_bytes, found.tied, found.hidden_size) == (None, False, 8)


def test_a_model_that_cannot_be_cut_as_it_is_says_why(copy):
    (copy / "tokenizer.json").unlink()
    found = structure.describe_any(copy)
    assert "has no tokenizer" in found.uncuttable
    assert len(found.layers) == 5


# -- what can't be read --------------------------------------------------------------------------------------


def refused(path):
    with pytest.raises(CheckpointError) as caught:
        structure.describe_any(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model_type", ["llama", "qwen9"])
def test_broken_directories_are_errors_of_one_line(copy, model_type):
    edit_config(copy, model_type=model_type)
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "not a whole safetensors file" in refused(copy)
    weights.unlink()
    assert "has no weights" in refused(copy)
    (copy / "pytorch_model.bin").write_bytes(b"\x80")
    assert "only pickled weights" in refused(copy)
    (copy / "pytorch_model.bin").unlink()
    save_file({}, weights)
    assert "hold no tensors" in refused(copy)
    weights.write_bytes(whole)
    (copy / "config.json").write_text("{")
    assert "config.json can't be read" in refused(copy)
    (copy / "config.json").unlink()
    assert "has no config.json" in refused(copy)


@pytest.mark.parametrize(
    "config", [{"model_type": None, "num_attention_heads": "many", "hidden_size": -3, "text_config": 4}, {}]
)
def test_nonsense_in_a_config_raises_no_other_error(copy, config):
    (copy / "config.json").write_text(json.dumps(config))
    found = structure.describe_any(copy)
    assert found.uncuttable
    assert found.parameters == sum(tensor.numel() for tensor in load_file(copy / "model.safetensors").values())


@pytest.mark.parametrize("quantization", ["yes", {"config_groups": {"a": 1}, "bits": 0}])
def test_a_quantization_of_a_wrong_type_is_refused(copy, quantization):
    (copy / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=r"config\.json has quantization_config"):
        structure.describe_any(copy)


def test_a_layer_number_of_any_length_is_read(copy):
    edit_config(copy, model_type="qwen9")
    rewrite(copy, lambda name: name.replace("layers.4", "layers." + "4" * 5000))
    found = structure.describe_any(copy)
    assert len(found.layers) == 4
