"""What `analyze` says, as values and as text on a terminal."""

import dataclasses
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from compressors import build
from compressors.methods import depth
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import family_of
from compressors.plan import CompressionPlan
from compressors.statistics.activations import Calibration
from evaluator import backends
from search.by_hand import analyze
from search.errors import UsageError
from search.show import structure

INFLUENCE = [0.9, 0.125, 0.0625, 0.125, 0.5]  # by layer


def importance(influence):
    nothing = torch.zeros(0)
    return Calibration(torch.tensor(influence), nothing, nothing, nothing, {})


def text(found, width=120):
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(structure.render(found))
    return console.export_text()


def line(shown, start):
    """The words of the one line that starts so."""
    (found,) = [line for line in shown.splitlines() if line.strip(" │├└─").startswith(start)]
    return found.strip(" │├└─").split()


def test_values_are_json_and_sum_to_the_checkpoint(pico):
    base = Checkpoint.read(pico)
    found = analyze.analysis_of(pico).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["parameters"] == base.total_parameters == sum(part["parameters"] for part in found["parts"])
    assert found["bytes"] == base.size_bytes == sum(part["bytes"] for part in found["parts"])
    assert found["decode_bytes"] == base.decode_bytes
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1)
    for layer in found["layers"]:
        assert layer["bytes"] == sum(part["bytes"] for part in layer["parts"])
        assert layer["share"] == layer["bytes"] / base.size_bytes
    assert (found["num_hidden_layers"], found["heads_per_group"], found["head_dim"]) == (5, 2, 24)
    assert (found["uncuttable"], found["drop_order"]) == (None, None)
    for cut in found["cuts"]:
        assert CompressionPlan.from_dict(cut["plan"]).num_hidden_layers in (3, 4, 5)


def test_importance_is_by_layer_and_the_order_is_that_in_which_layers_are_dropped(pico):
    measured = importance(INFLUENCE)
    found = analyze.analysis_of(pico, measured).to_dict()
    assert [layer["block_influence"] for layer in found["layers"]] == pytest.approx(INFLUENCE)
    assert found["drop_order"] == [2, 3, 1, 4]  # of two equal ones the later goes first
    for dropped in range(1, 5):
        kept = depth.choose(5, 5 - dropped, "importance", measured)
        assert set(found["drop_order"][:dropped]) == set(range(5)) - set(kept)


def test_importance_of_another_model_is_refused(pico_llama):
    with pytest.raises(UsageError, match=r"measured on 3 layers, and .* has 5; measure it on this model"):
        analyze.analysis_of(pico_llama, importance([0.1, 0.2, 0.3]))


def test_the_text_has_the_numbers(pico_exaone4):
    shown = text(analyze.analysis_of(pico_exaone4))
    # layer: 2 · 144 · 96 + 2 · 72 · 96 + 3 · 160 · 96 + 2 · 96 + 2 · 24 = 87,792; embedding 320 · 96 = 30,720
    assert line(shown, "exaone4, bfloat16:")[2:5] == ["469.8k", "parameters,", "0.94"]
    assert "6 query heads in 3 groups of 2, head_dim 24" in shown
    assert "hidden size 96, FFN width 160, vocabulary 320, embedding and lm_head tied" in shown
    assert line(shown, "embedding  ") == ["embedding", "30.7k", "0.06", "6.5", "%"]
    assert line(shown, "lm_head") == ["lm_head", "tied"]
    assert line(shown, "all  ") == ["all", "469.8k", "0.94", "100.0", "%"]
    assert "one layer × 5 layers: 87.8k parameters, 0.18 MB each" in shown
    assert line(shown, "self_attn.k_proj            [") == ["self_attn.k_proj", "[72,", "96]", "6.9k"]
    assert line(shown, "mlp.down_proj               [") == ["mlp.down_proj", "[96,", "160]", "15.4k"]
    assert line(shown, "self_attn.q_norm            [") == ["self_attn.q_norm", "[24]", "24"]
    assert "5 layers, all alike: 87.8k parameters, 0.18 MB, 18.7 % each" in shown
    assert "influence" not in shown
    assert line(shown, "layers 5 → 4") == ["layers", "5", "→", "4", "87.8k", "0.18", "18.7", "%"]
    assert line(shown, "bfloat16 → float16") == ["bfloat16", "→", "float16", "0", "0.00", "0.0", "%"]
    assert line(shown, "bfloat16 → W4A16")[3:6] == ["–", "–", "–"]
    assert "not here, because" in shown
    assert "W4A16: no group size" in shown


def test_measured_importance_is_a_column_with_its_order(pico_llama):
    shown = text(analyze.analysis_of(pico_llama, importance(INFLUENCE)))
    table = [line.split() for line in shown[shown.index("Importance by layer") :].splitlines()[2:7]]
    assert [(row[0], row[1], row[-1]) for row in table] == [
        ("0", "0.9000", "stays"),
        ("1", "0.1250", "3"),
        ("2", "0.0625", "1"),
        ("3", "0.1250", "2"),
        ("4", "0.5000", "4"),
    ]
    bars = [row[2].count("█") for row in table]
    assert bars[0] == structure.BAR
    assert bars[0] > bars[4] > bars[1] == bars[3] > bars[2] > 0
    assert "layers that would go first: 2, 3, 1, 4" in shown


def test_layers_that_do_nothing_at_all_are_shown(pico_llama):
    found = analyze.analysis_of(pico_llama, importance([0.0] * 5))
    assert found.drop_order == (4, 3, 2, 1)
    assert "0.0000" in text(found)


def test_kernel_alignment_changes_what_is_possible(write_pico_model, tmp_path):
    path = write_pico_model(tmp_path / "model", "llama", head_dim=16, num_hidden_layers=1)
    assert "Marlin" not in text(analyze.analysis_of(path))
    found = analyze.analysis_of(path, kernels=backends.kernels("vllm", "cuda"))
    assert found.cuts[-1].infeasible.startswith("W4A16: q_proj+k_proj+v_proj is 192 × 96")
    assert "Marlin" in text(found)


def test_an_untied_model_says_what_a_step_no_longer_reads(write_pico_model, tmp_path):
    path = write_pico_model(tmp_path / "untied", "llama", tie_word_embeddings=False, vocab_size=32000)
    found = analyze.analysis_of(path)
    shown = text(found)
    assert "MB a step" in shown
    assert "embedding and lm_head apart" in shown
    hidden = next(cut for cut in found.cuts if cut.what.startswith("hidden"))
    embedding = 32000 * 12 * 2  # bytes of 12 of its 96 columns
    assert hidden.bytes_saved - hidden.decode_bytes_saved == embedding


def test_a_quantized_model_says_why_it_cannot_be_cut(write_pico_model, tmp_path):
    base = Checkpoint.read(write_pico_model(tmp_path / "base", "llama", head_dim=16))
    plan = dataclasses.replace(CompressionPlan.identity(base.config), precision="W8A8")
    build.apply(plan, base, family_of(base), None).write(tmp_path / "made")
    found = analyze.analysis_of(tmp_path / "made", importance(INFLUENCE))
    assert found.cuts == ()
    assert found.structure.parameters == base.total_parameters
    shown = text(found, width=400)
    assert "nothing can be cut: model" in shown
    assert "is quantized already (compressed-tensors)" in shown
    assert "quantized (compressed-tensors int-quantized)" in shown
    assert line(shown, "self_attn.q_proj          [")[1:] == ["[96,", "96]", "9.2k", "int8"]
    assert line(shown, "input_layernorm           [")[1:] == ["[96]", "96", "bfloat16"]


def test_layers_that_differ_are_told_apart_and_names_move_no_cursor(pico_llama, tmp_path):
    shutil.copytree(pico_llama, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.4.mlp.[red]\x1b[2Jextra.weight"] = torch.zeros(1000, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    shown = text(analyze.analysis_of(tmp_path / "model"))
    assert "\x1b" not in shown
    assert "mlp.[red]�[2Jextra" in shown
    assert "all alike" not in shown
    assert "layers 0–3: " in shown
    assert "layer 4: " in shown
    assert line(shown, "4  ") == ["4", "88.7k", "0.18", "18.9", "%"]
    assert "nothing can be cut: weights: 1 are not known to llama" in shown


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(pico_llama, width):
    shown = text(analyze.analysis_of(pico_llama, importance(INFLUENCE)), width)
    assert max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize(
    ("number", "shown"), [(0, "0"), (999, "999"), (1000, "1.0k"), (4_194_304, "4.19M"), (1_279_391_488, "1.28B")]
)
def test_counts_are_short(number, shown):
    assert structure.count(number) == shown


def test_what_is_small_is_not_called_nothing():
    assert (structure.megabytes(0), structure.megabytes(1152), structure.megabytes(7_080_192)) == (
        "0.00",
        "<0.01",
        "7.08",
    )
    assert (structure.percent(0), structure.percent(1e-5), structure.percent(0.0263)) == ("0.0 %", "<0.1 %", "2.6 %")
