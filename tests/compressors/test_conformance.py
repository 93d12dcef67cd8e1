"""Test what every family and every method must keep to, on models on disk; `pico` is each family in turn."""

import dataclasses
import itertools
import json
import shutil

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from compressors import build
from compressors.errors import CheckpointError
from compressors.methods import depth, ffn, heads, hidden, importance, precision
from compressors.model import family
from compressors.model.checkpoint import Checkpoint
from compressors.plan import CompressionPlan
from compressors.statistics import activations

F32 = torch.float32


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, 320, (3, 40), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def statistics(base, windows):
    return activations.calibrate(base, windows)


@pytest.fixture(scope="module")
def own(base):
    return CompressionPlan.identity(base.config)


def stock(path, **options):
    """Load the model with stock transformers, which must find every weight and miss none."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def logits(model, windows):
    with torch.inference_mode():
        return model(torch.tensor(windows), use_cache=False).logits


PLANS = {
    "identity": {},
    "depth": {"num_hidden_layers": 3},
    "depth from the top": {"num_hidden_layers": 3, "drop_from": "top"},
    "depth from the bottom": {"num_hidden_layers": 4, "drop_from": "bottom"},
    "key/value groups": {"num_key_value_heads": 2, "num_attention_heads": 4},
    "query heads": {"num_attention_heads": 3},
    "ffn": {"intermediate_size": 96},
    "hidden": {"hidden_size": 72},
    "float16": {"precision": "float16"},
    "float32": {"precision": "float32"},
    "everything": {
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "hidden_size": 64,
        "precision": "float32",
    },
}
QUANTIZED = {
    "W8A8": {"precision": "W8A8"},
    "FP8_DYNAMIC": {"precision": "FP8_DYNAMIC"},
    "W4A16": {
        "precision": "W4A16",
        "num_key_value_heads": 2,
        "num_attention_heads": 4,
        "hidden_size": 96,
    },  # 4 · 24 = 96
    "W8A8 of a smaller model": {
        "precision": "W8A8",
        "num_hidden_layers": 3,
        "hidden_size": 72,
        "intermediate_size": 96,
    },
}


@pytest.fixture(params=PLANS)
def plan(request, own):
    return dataclasses.replace(own, **PLANS[request.param])


@pytest.fixture(params=QUANTIZED)
def quantized(request, own):
    return dataclasses.replace(own, **QUANTIZED[request.param])


def test_an_identity_plan_changes_no_bit(base, its_family, statistics, own, pico, tmp_path, windows):
    assert build.check(own, base, its_family, max_bytes=None) is None
    made = build.apply(own, base, its_family, statistics)
    made.write(tmp_path / "m")
    again = Checkpoint.read(tmp_path / "m")
    assert set(again.tensors) == set(base.tensors)
    assert all(torch.equal(again.tensors[name].load(), base.tensors[name].load()) for name in base.tensors)
    expected = logits(stock(pico), windows)
    assert torch.equal(logits(stock(tmp_path / "m"), windows), expected)
    assert torch.equal(logits(base.to_model("cpu"), windows), expected)


def test_stock_transformers_loads_a_checkpoint_and_computes_what_the_screen_did(
    base, its_family, statistics, plan, tmp_path, windows
):
    assert build.check(plan, base, its_family, max_bytes=None) is None
    in_memory = build.apply(plan, base, its_family, statistics, simulate=True).to_model("cpu", F32)
    build.apply(plan, base, its_family, statistics).write(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"):
        assert config[name] == getattr(plan, name)
    assert config["head_dim"] == 24
    assert config["dtype"] == plan.precision
    for name in ("rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"):
        assert config[name] == base.config[name]
    other = None if plan.num_attention_heads * 24 == plan.hidden_size else its_family.with_head_dim
    assert config["model_type"] == (other or its_family).model_type
    assert config["architectures"] == [(other or its_family).architecture]
    family.family_of(Checkpoint.read(tmp_path / "m"))  # and can be compressed again
    assert config["transformers_version"] == transformers.__version__
    assert "quantization_config" not in config
    assert len(config.get("layer_types") or [0] * plan.num_hidden_layers) == plan.num_hidden_layers
    assert torch.equal(logits(in_memory, windows), logits(stock(tmp_path / "m", dtype=F32), windows))
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {
        path.name for path in (tmp_path / "m").iterdir()
    }


def test_quantized_checkpoints_load_and_agree_with_the_simulation(
    base, its_family, statistics, quantized, tmp_path, windows
):
    assert build.check(quantized, base, its_family, max_bytes=None) is None
    plain = dataclasses.replace(quantized, precision="float32")
    unrounded = logits(build.apply(plain, base, its_family, statistics).to_model("cpu", F32), windows)
    simulated = build.apply(quantized, base, its_family, statistics, simulate=True)
    build.apply(quantized, base, its_family, statistics).write(tmp_path / "m")
    served = logits(stock(tmp_path / "m", dtype=F32), windows)
    assert (unrounded - served).abs().max() > 0.01, "nothing was rounded"
    torch.testing.assert_close(logits(simulated.to_model("cpu", F32), windows), served, atol=1e-4, rtol=1e-4)
    if quantized.precision != "W4A16":  # activations are rounded too, by transformers as in the simulation
        weights_alone = dataclasses.replace(simulated, activations={}).to_model("cpu", F32)
        assert (logits(weights_alone, windows) - served).abs().max() > 0.01


@pytest.mark.parametrize(
    ("stored", "unquantized"), [("float32", torch.bfloat16), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_quantized_checkpoints_keep_the_rest_in_16_bits(base, its_family, own, stored, unquantized):
    given = precision.cast(base, stored)
    for scheme in ("W8A8", "FP8_DYNAMIC"):
        made = build.apply(dataclasses.replace(own, precision=scheme), given, its_family, None)
        assert made.config["dtype"] == str(unquantized).removeprefix("torch.")
        kept = {name: tensor for name, tensor in made.tensors.items() if not name.endswith("_proj.weight")}
        assert {tensor.dtype for tensor in kept.values()} == {unquantized}
        assert any(name.endswith("weight_scale") for name in kept)


def test_predicted_bytes_and_parameters_are_those_of_the_written_model(base, its_family, statistics, own, tmp_path):
    for index, changes in enumerate([*PLANS.values(), *QUANTIZED.values()]):
        plan = dataclasses.replace(own, **changes)
        made = build.apply(plan, base, its_family, statistics)
        made.write(tmp_path / str(index))
        written = (tmp_path / str(index) / "model.safetensors").stat().st_size
        assert build.predicted_bytes(plan, base, its_family) == written
        plain = build.apply(dataclasses.replace(plan, precision="float32"), base, its_family, statistics)
        assert made.total_parameters == sum(p.numel() for p in plain.to_model("cpu").parameters())


def test_a_plan_over_the_size_limit_is_infeasible_by_its_exact_size(base, its_family, own):
    size = build.predicted_bytes(own, base, its_family)
    assert build.check(own, base, its_family, max_bytes=size) is None
    reason = build.check(own, base, its_family, max_bytes=size - 1)
    assert "exceeds the limit" in reason


# -- each cut equals the original with the cut parts masked ---------------------------------------------------


def masked(base, edit):
    """Return the base model in float32 after `edit(model)` has zeroed what a cut would remove."""
    model = base.to_model("cpu", F32)
    edit(model)
    return model


def test_a_depth_cut_computes_the_model_without_the_dropped_layers(base, its_family, windows):
    cut = depth.cut(base, its_family, (0, 2, 3)).to_model("cpu", F32)

    def edit(model):
        model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in (0, 2, 3))
        model.config.num_hidden_layers = 3
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = [model.config.layer_types[index] for index in (0, 2, 3)]

    assert torch.equal(logits(cut, windows), logits(masked(base, edit), windows))


def test_an_ffn_cut_computes_the_model_with_the_removed_channels_zeroed(base, its_family, statistics, windows):
    kept = importance.choose_channels(base, its_family, 96, "activation", activations=statistics)
    assert len({tuple(index.tolist()) for index in kept}) > 1, "which channels stay must differ by layer"

    def edit(model):
        for layer, index in zip(model.model.layers, kept, strict=True):
            gone = torch.ones(160, dtype=torch.bool)
            gone[index] = False
            layer.mlp.down_proj.weight.data[:, gone] = 0

    cut = ffn.cut(base, its_family, kept).to_model("cpu", F32)
    torch.testing.assert_close(logits(cut, windows), logits(masked(base, edit), windows), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("keep_heads", "keep_groups"), [(4, 2), (3, 3), (2, 2), (1, 1)])
def test_a_head_cut_computes_the_model_with_the_removed_heads_zeroed(
    base, its_family, statistics, windows, keep_heads, keep_groups
):
    kept = importance.choose_heads(base, its_family, keep_heads, keep_groups, "activation", activations=statistics)

    def edit(model):
        for layer, groups in zip(model.model.layers, kept, strict=True):
            stay = {head for _, members in groups for head in members}
            for head in set(range(6)) - stay:
                layer.self_attn.o_proj.weight.data[:, head * 24 : (head + 1) * 24] = 0

    cut = heads.cut(base, its_family, kept).to_model("cpu", F32)
    torch.testing.assert_close(logits(cut, windows), logits(masked(base, edit), windows), atol=2e-4, rtol=1e-4)


def test_a_hidden_cut_computes_the_model_with_the_removed_dimensions_zeroed(base, its_family, statistics, windows):
    """Zeroed dimensions count in the original's norms, so the mean over the kept ones is corrected by √(E'/E)."""
    width, layers = int(base.config["hidden_size"]), int(base.config["num_hidden_layers"])
    kept = hidden.choose(width, 72, statistics)
    gone = torch.ones(width, dtype=torch.bool)
    gone[kept] = False
    as_if_silent = torch.zeros(width)
    as_if_silent[kept] = 1.0  # mean over S: 1; mean over all: 72/E

    def edit(model):
        model.model.embed_tokens.weight.data[:, gone] = 0
        for layer in model.model.layers:
            for writes in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writes.weight.data[gone] = 0
                if writes.bias is not None:
                    writes.bias.data[gone] = 0
        for name in its_family.residual_norms(layers):
            model.get_submodule(name).weight.data[gone] = -its_family.norm_offset
        model.tie_weights()

    squares = [as_if_silent] * len(its_family.residual_norms(layers))
    cut = hidden.cut(precision.cast(base, "float32"), its_family, kept, squares).to_model("cpu", F32)
    torch.testing.assert_close(logits(cut, windows), logits(masked(base, edit), windows), atol=2e-3, rtol=1e-3)


def test_a_hidden_cut_keeps_the_size_of_each_norms_output_on_the_text(base, its_family, statistics, own):
    """The kept gain over the remaining root mean square is as large as in the uncut model."""
    plan = dataclasses.replace(own, num_hidden_layers=3, hidden_size=72, precision="float32", drop_from="bottom")
    made = build.apply(plan, precision.cast(base, "float32"), its_family, statistics)
    layers = (2, 3, 4)  # none keeps its number
    kept = torch.topk(statistics.hidden_activity, 72).indices.sort().values
    old_names = its_family.residual_norms(5)
    per_layer = len(its_family.block_norms)
    old_names = [old_names[layer * per_layer + norm] for layer in layers for norm in range(per_layer)] + old_names[-1:]
    factors = []
    for new, old in zip(its_family.residual_norms(3), old_names, strict=True):
        squares = statistics.norm_mean_square[old]
        whole = (base.tensors[f"{old}.weight"].load().float()[kept] + its_family.norm_offset) / squares.mean().sqrt()
        left = (made.tensors[f"{new}.weight"].load() + its_family.norm_offset) / squares[kept].mean().sqrt()
        if its_family.scaled_embedding and new == its_family.final_norm:  # its embedding, the head too, is larger
            left *= (len(squares) / 72) ** 0.5
        torch.testing.assert_close(left, whole, rtol=1e-5, atol=0)
        factors.append(float((squares[kept].mean() / squares.mean()).sqrt()))
    factors.sort()
    gaps = [larger - smaller for smaller, larger in itertools.pairwise(factors)]
    assert min(gaps) > 2e-5, "corrections closer than the tolerance above couldn't be told apart"


def test_a_block_whose_output_is_zero_gives_no_nan(base, its_family, statistics):
    silent = [torch.zeros(base.config["hidden_size"])] * len(its_family.residual_norms(5))
    cut = hidden.cut(base, its_family, torch.arange(72), silent)
    assert all(torch.isfinite(tensor.load()).all() for tensor in cut.tensors.values())


# -- what stays ----------------------------------------------------------------------------------------------


def test_statistics_equal_a_plain_computation(base, its_family, windows, statistics):
    model = base.to_model("cpu", F32)
    seen = {}

    def keep(name):
        def hook(module, args, kwargs, output):
            x = args[0] if args else kwargs["hidden_states"]
            seen.setdefault(name, []).append(
                (x[0], (output[0] if isinstance(output, tuple) else output).reshape(-1, base.config["hidden_size"]))
            )

        return hook

    layer, head, norm = 2, 4, its_family.residual_norms(5)[3]
    o, down = its_family.in_layer(layer, its_family.o), its_family.in_layer(layer, its_family.down)
    for name in (its_family.layer(layer), o, down, norm):
        model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True)
    for window in windows:
        logits(model, [window])
    x = torch.cat([pair[0] for pair in seen[its_family.layer(layer)]])
    y = torch.cat([pair[1] for pair in seen[its_family.layer(layer)]])
    cos = (x * y).sum(1) / x.norm(dim=1) / y.norm(dim=1)
    torch.testing.assert_close(statistics.block_influence[layer], (1 - cos).mean(), atol=1e-5, rtol=1e-4)
    by_window = torch.stack([z.abs().mean(0) for z, _ in seen[down]])
    torch.testing.assert_close(statistics.ffn_activity[layer], by_window.norm(dim=0), atol=1e-5, rtol=1e-4)
    by_window = torch.stack([z[:, head * 24 : (head + 1) * 24].norm(dim=1).mean() for z, _ in seen[o]])
    torch.testing.assert_close(statistics.head_activity[layer, head], by_window.norm(), atol=1e-5, rtol=1e-4)
    squares = torch.cat([pair[0] for pair in seen[norm]]).square().mean(0)
    torch.testing.assert_close(statistics.norm_mean_square[norm], squares, atol=1e-5, rtol=1e-4)


def test_hidden_activity_weighs_all_layers_the_same(base, its_family, windows, statistics):
    model = base.to_model("cpu", F32)
    streams = [[] for _ in range(5)]
    for layer, stream in zip(model.model.layers, streams, strict=True):
        layer.register_forward_hook(lambda module, args, output, stream=stream: stream.append(output.flatten(0, 1)))
    for window in windows:
        logits(model, [window])
    means = [torch.cat(stream).abs().mean(0) for stream in streams]
    expected = sum(mean / mean.mean() for mean in means)
    torch.testing.assert_close(statistics.hidden_activity, expected, atol=1e-4, rtol=1e-4)


def test_windows_of_different_lengths_are_weighted_by_their_tokens(base, its_family, windows):
    short, long = windows[0][:10], windows[1]
    both = activations.calibrate(base, [short, long])
    alone = [activations.calibrate(base, [window]) for window in (short, long)]
    expected = (10 * alone[0].block_influence + 40 * alone[1].block_influence) / 50
    torch.testing.assert_close(both.block_influence, expected, atol=1e-5, rtol=1e-4)


def test_text_of_another_tokenizer_and_no_text_are_refused(base):
    with pytest.raises(CheckpointError, match="token 320, and the model has 320"):
        activations.calibrate(base, [[3, 320]])
    with pytest.raises(CheckpointError, match="no text"):
        activations.calibrate(base, [])


def test_activations_that_are_not_finite_are_refused(base, windows):
    broken = dict(base.tensors)
    name = "model.layers.2.mlp.up_proj.weight"
    broken[name] = broken[name].map(lambda weight: torch.full_like(weight, torch.nan))
    with pytest.raises(CheckpointError, match="NaN"):
        activations.calibrate(dataclasses.replace(base, tensors=broken), windows)


def test_saved_statistics_are_loaded_unchanged(base, statistics, tmp_path):
    statistics.save(tmp_path / "s.safetensors")
    again = activations.Calibration.load(tmp_path / "s.safetensors", base)
    assert torch.equal(again.ffn_activity, statistics.ffn_activity)
    assert again.norm_mean_square.keys() == statistics.norm_mean_square.keys()


def test_statistics_follow_the_kept_layers(base, its_family, statistics, own):
    """Depth is cut first, so the new layer 0 must be cut by the activity of the old layer 2."""
    plan = dataclasses.replace(
        own, num_hidden_layers=3, intermediate_size=96, num_attention_heads=3, drop_from="bottom"
    )
    made = build.apply(plan, base, its_family, statistics)
    for new, old in enumerate((2, 3, 4)):
        by_group = statistics.head_activity[old].reshape(3, 2)  # one of two query heads stays in each group
        heads_kept = by_group.argmax(1) + 2 * torch.arange(3)
        rows = (heads_kept[:, None] * 24 + torch.arange(24)).flatten()
        query = base.tensors[f"{its_family.in_layer(old, its_family.q)}.weight"].load()
        assert torch.equal(made.tensors[f"{its_family.in_layer(new, its_family.q)}.weight"].load(), query[rows])
        channels = torch.topk(statistics.ffn_activity[old], 96).indices.sort().values
        name = f"{its_family.in_layer(old, its_family.up)}.weight"
        expected = base.tensors[name].load()[channels]
        found = made.tensors[f"{its_family.in_layer(new, its_family.up)}.weight"].load()
        assert torch.equal(found, expected)


def test_a_config_of_transformers_4_is_read_correctly(base, its_family, statistics, own, pico, tmp_path, windows):
    """Files on the hub have rope_theta, rope_scaling and torch_dtype; misread, they would give other logits."""
    shutil.copytree(pico, tmp_path / "old")
    config = dict(base.config)
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:  # Gemma's, by the type of layer
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    old = Checkpoint.read(tmp_path / "old")
    family.family_of(old)
    assert CompressionPlan.identity(old.config) == own
    assert torch.equal(logits(old.to_model("cpu", F32), windows), logits(base.to_model("cpu", F32), windows))
    plan = dataclasses.replace(own, num_hidden_layers=3, intermediate_size=96)
    for name, given in (("from old", old), ("from new", base)):
        build.apply(plan, given, its_family, statistics).write(tmp_path / name)
    written = [logits(stock(tmp_path / name, dtype=F32), windows) for name in ("from old", "from new")]
    assert torch.equal(*written)


def test_a_real_exaone4_agrees_with_stock_transformers(exaone4_mini, tmp_path):
    real = Checkpoint.read(exaone4_mini)
    real_family, plan = family.family_of(real), CompressionPlan.identity(real.config)
    text = torch.randint(3, 8000, (2, 64), generator=torch.Generator().manual_seed(2)).tolist()
    found = activations.calibrate(real, text)
    plan = dataclasses.replace(plan, num_hidden_layers=plan.num_hidden_layers - 1, precision="W8A8")
    build.apply(plan, real, real_family, found).write(tmp_path / "m")
    simulated = build.apply(plan, real, real_family, found, simulate=True).to_model("cpu", F32)
    torch.testing.assert_close(
        logits(simulated, text), logits(stock(tmp_path / "m", dtype=F32), text), atol=1e-3, rtol=1e-3
    )
