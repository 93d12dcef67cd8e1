"""Test the repair by a short distillation."""

import dataclasses

import pytest
import torch

from compressors import build
from compressors.distillation import repair as distillation
from compressors.methods import precision
from compressors.model import family as families
from compressors.model.checkpoint import Checkpoint
from compressors.plan import CompressionPlan, canonical
from compressors.statistics import activations, second_moments


def windows_of(seed, low, high, count=32, length=32):
    return torch.randint(low, high, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


DOMAINS = {"low": windows_of(1, 3, 200), "high": windows_of(2, 100, 320)}


@pytest.fixture
def maker(tmp_path, monkeypatch):
    """Build plans of a base model by what differs from it."""
    monkeypatch.setattr(distillation, "TOKENS", 8192)
    monkeypatch.setattr(distillation, "BATCH_TOKENS", 256)

    def of_base(base):
        monkeypatch.setattr(distillation, "RATES", (3e-4 / distillation.typical_weight(base),))
        moments = second_moments.collect(base, DOMAINS, tmp_path / "m")
        statistics = activations.calibrate(base, DOMAINS["low"])
        own, its_family = CompressionPlan.identity(base.config), families.family_of(base)

        def make(said=None, rounded=None, simulate=False, **different):
            plan = canonical(dataclasses.replace(own, **different), own)
            say = (lambda line: None) if said is None else said.append
            return build.apply(
                plan, base, its_family, statistics, moments=moments, simulate=simulate, rounded=rounded, say=say
            )

        return make

    return of_base


@torch.inference_mode()
def kl(base, other, windows):
    ids = torch.tensor(windows)
    p, q = (
        one.to_model("cpu", torch.float32)(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        for one in (base, other)
    )
    return float((p.exp() * (p - q)).sum(-1).mean())


FFN = {"intermediate_size": 96, "importance": "energy"}


def gains(base, make, cut):
    """Whether a distilled plan predicts unseen text better than one with ridge, in the same shapes and dtypes."""
    ridge, distilled = (make(**cut, repair=repair) for repair in ("ridge", "distill"))
    for name, expected in ridge.tensors.items():
        tensor = distilled.tensors[name]
        values = tensor.load()
        assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
    unseen = windows_of(9, 3, 320)
    return kl(base, distilled, unseen) < 0.995 * kl(base, ridge, unseen)


@pytest.mark.long
def test_a_distilled_plan_of_each_family_loses_less_than_ridge(base, maker):
    assert gains(base, maker(base), FFN)


@pytest.mark.parametrize(
    "cut",
    [
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 4, "drop_from": "bottom"},  # with no layer before the gap that stream could refit
        {"hidden_size": 72, "rotation": "pca"},
        {"num_attention_heads": 4, "num_key_value_heads": 2},
    ],
    ids=["layers", "the first layer", "hidden", "heads"],
)
def test_every_kind_of_cut_can_be_distilled(pico_llama, maker, cut):
    base = Checkpoint.read(pico_llama)
    assert gains(base, maker(base), cut)


@pytest.mark.parametrize("order", [("stream", "distill"), ("distill", "stream")], ids=" first, then ".join)
def test_where_layers_went_it_begins_from_what_stream_gives(pico_llama, maker, monkeypatch, order):
    """At a learning rate of almost 0 the beginning is the end. With fewer channels stream begins from ridge there."""
    make = maker(Checkpoint.read(pico_llama))
    monkeypatch.setattr(distillation, "RATES", (1e-30,))
    monkeypatch.setattr(distillation, "TOKENS", 512)

    def same(one, other):
        return all(torch.equal(one[name], other[name]) for name in one)

    for more in ({}, FFN):  # what one repair keeps on disk must not be taken for the other's
        made = {
            repair: {
                name: each.load() for name, each in make(num_hidden_layers=3, **more, repair=repair).tensors.items()
            }
            for repair in (*order, "none")
        }
        assert not same(made["distill"], made["none"])
        assert same(made["distill"], made["stream"]) == (more == {})


@pytest.mark.long
def test_it_is_made_once_and_for_all_precisions(pico_llama, maker, tmp_path):
    make, said = maker(Checkpoint.read(pico_llama)), []
    first = {name: tensor.load() for name, tensor in make(said, **FFN, repair="distill").tensors.items()}
    assert any(line.startswith("repair: distilling, training") for line in said)
    assert not list((tmp_path / "m").glob("distilling-*"))
    again = []
    second = make(again, **FFN, repair="distill")
    assert all(torch.equal(tensor.load(), first[name]) for name, tensor in second.tensors.items())
    quantized = make(again, **FFN, repair="distill", precision="W8A8")
    assert any(name.endswith("weight_scale") for name in quantized.tensors)
    for tensor in quantized.tensors.values():
        tensor.load()
    assert again == []
    other = make(again, intermediate_size=128, importance="energy", repair="distill")
    other.tensors[next(iter(other.tensors))].load()
    assert again


@pytest.mark.long
@pytest.mark.parametrize(
    ("useless", "dtype"),
    [(1e-12, "bfloat16"), (30.0, "bfloat16"), (1e30, "bfloat16"), (30.0, "float32")],
    ids=["no progress", "destructive", "infinite", "destructive, and no rate trains the cut model's own tensors"],
)
def test_of_two_rates_the_one_that_learns_is_taken(write_pico_model, tmp_path, maker, monkeypatch, useless, dtype):
    base = Checkpoint.read(write_pico_model(tmp_path / "llama", "llama", dtype=dtype))
    make, said = maker(base), []
    (useful,) = distillation.RATES
    monkeypatch.setattr(distillation, "RATES", tuple(sorted((useful, useless))))
    both = {name: tensor.load() for name, tensor in make(said, **FFN, repair="distill").tensors.items()}
    tried = {line.split(" tried,")[0] for line in said if " tried," in line}
    assert len(tried) == 2
    assert any(line.startswith("repair: distilling, training") for line in said)
    monkeypatch.setattr(distillation, "RATES", (useful,))
    alone = make(**FFN, repair="distill").tensors
    assert all(torch.equal(alone[name].load(), values) for name, values in both.items())


@pytest.mark.long
def test_a_killed_repair_tries_no_rate_again(pico_llama, maker, monkeypatch, tmp_path):
    make = maker(Checkpoint.read(pico_llama))
    (useful,) = distillation.RATES
    monkeypatch.setattr(distillation, "RATES", (useful, 3 * useful))

    class Killed(BaseException):
        """Stands for a signal in the long training."""

    class Until(list):
        def append(self, line):
            super().append(line)
            if line.startswith("repair: distilling, training"):
                raise Killed

    def load(said):
        return {name: tensor.load() for name, tensor in make(said, **FFN, repair="distill").tensors.items()}

    first, second = Until(), []
    with pytest.raises(Killed):
        load(first)
    assert any("tried, training" in line for line in first)
    assert len(list((tmp_path / "m").glob("distilling-*/*/state.json"))) == 2
    assert not list((tmp_path / "m").glob("distilling-*/*/*.safetensors"))  # a rate is tried for its loss alone
    made = load(second)
    assert not any("tried, training" in line for line in second)
    assert not list((tmp_path / "m").glob("distilling-*"))
    for file in (tmp_path / "m").glob("distill-*"):
        file.unlink()
    assert all(torch.equal(values, made[name]) for name, values in load([]).items())


def test_a_plan_that_cuts_nothing_is_not_distilled(base):
    own = CompressionPlan.identity(base.config)
    for scheme in (own.precision, "W8A8", "FP8_DYNAMIC"):
        plan = dataclasses.replace(own, precision=scheme, repair="distill")
        assert canonical(plan, own).repair == "none"
    for repair in ("none", "ridge", "stream", "distill"):
        plan = canonical(dataclasses.replace(own, precision="W4A16", repair=repair), own)
        assert plan.repair == (repair if repair == "distill" else "none")


# -- scales --------------------------------------------------------------------------------------------------------

W4A16 = {"precision": "W4A16", "quantizer": "gptq"}


def loaded(checkpoint):
    return {name: tensor.load() for name, tensor in checkpoint.tensors.items()}


@pytest.fixture
def packable(write_pico_model, tmp_path):
    """Write models of a family whose widths are multiples of 32, the smallest group."""

    def of(family):
        sizes = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return Checkpoint.read(write_pico_model(tmp_path / family, family, **sizes))

    return of


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "exaone4", "qwen2"])
@pytest.mark.parametrize("cut", [{}, FFN], ids=["nothing cut", "FFN"])
def test_scales_of_integers_learn_and_the_integers_stay(packable, maker, family, cut):
    base = packable(family)
    make = maker(base)
    rounded, learnt = (make(**cut, **W4A16, repair=repair, simulate=True) for repair in ("ridge", "distill"))
    unseen = windows_of(9, 3, 320)
    assert kl(base, learnt, unseen) < 0.985 * kl(base, rounded, unseen)
    if cut:
        return
    before, after = loaded(make(**W4A16)), loaded(make(**W4A16, repair="distill"))
    assert before.keys() == after.keys()
    scales = {name for name in before if name.endswith("weight_scale")}
    integers = {name for name in before if name.endswith(("weight_packed", "weight_shape"))}
    assert all(torch.equal(before[name], after[name]) for name in integers)
    assert all(before[name].dtype == after[name].dtype and before[name].shape == after[name].shape for name in before)
    assert sum(not torch.equal(before[name], after[name]) for name in scales) > len(scales) / 2


@pytest.mark.long
@pytest.mark.parametrize(
    "more", [{}, {"keep_16_bit": 1}, {"lm_head": "8-bit"}], ids=["all", "one in 16 bits", "lm_head"]
)
def test_what_is_written_is_what_was_scored(packable, maker, tmp_path, more):
    """In stock transformers, whether its integers come from the scored model's memory or from the kept fit."""
    import transformers

    make, known = maker(packable("llama")), {}
    plan = {**FFN, **W4A16, **more, "repair": "distill"}
    scored = make(simulate=True, rounded=known, **plan).to_model("cpu", torch.float32)
    ids = torch.tensor(windows_of(9, 3, 320, count=2))
    expected = scored(input_ids=ids).logits
    for name, rounded in {"from memory": known, "anew": None}.items():
        make(rounded=rounded, **plan).write(tmp_path / name)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=2e-3 * float(expected.abs().max()))


def test_a_rounded_student_computes_as_its_weights_multiplied_out_and_its_scales_have_gradients(packable, maker):
    base = packable("llama")
    its_family = families.family_of(base)
    how = {"quantizer": "nearest", "group_size": 0, "keep": (), "moments": None, "device": "cpu"}
    plain = maker(base)(precision="W4A16", simulate=True).to_model("cpu", torch.float32)
    half = precision.in_16_bits(base)
    tensors, values = dict(half.tensors), {}
    for module, (its, scales) in precision.rounded(half, its_family, "W4A16", **how).items():
        del tensors[f"{module}.weight"]
        values[module], tensors[f"{module}.weight_scale"] = its.load(), scales
    student = dataclasses.replace(base, tensors=tensors, values=values)
    model = student.to_model("cpu", torch.float32)
    ids = torch.tensor(windows_of(9, 3, 320, count=2))
    logits = model(input_ids=ids).logits
    assert torch.allclose(logits, plain(input_ids=ids).logits, atol=1e-4 * float(logits.abs().max()))
    model.requires_grad_(True)
    model(input_ids=ids).logits.square().mean().backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {f"{module}.weight_scale" for module in values} <= learning
    changed = dataclasses.replace(student, values={**values, module: values[module].flip(0)})
    assert changed.digest() != student.digest()  # a state that is resumed is of the same integers


def test_one_window_in_eight_of_each_text_judges():
    windows = {"a": [[n] * 4 for n in range(16)], "b": [[n] * 4 for n in range(20, 23)], "c": [[30] * 4]}
    trained, judged = distillation.parted(windows)
    assert [window[0] for window in judged] == [7, 15, 22]
    assert len(trained) == 17
    assert distillation.parted({"c": [[30] * 4]}) == ([[30] * 4], [[30] * 4])


def test_of_much_text_a_few_windows_judge():
    windows = {"a": [[n] * 4 for n in range(3000)], "b": [[n] * 4 for n in range(3000, 4000)]}
    trained, judged = distillation.parted(windows)
    assert distillation.MOST_JUDGES // 2 < len(judged) <= distillation.MOST_JUDGES
    assert len(trained) + len(judged) == 4000
    assert sum(window[0] >= 3000 for window in judged) == pytest.approx(len(judged) / 4, abs=1)


def test_the_learning_rate_follows_the_size_of_the_weights(base):
    """Adam's updates are as large as the rate, so what trains SmolLM2 breaks Qwen2.5, whose weights are a twelfth."""

    def scaled(by):
        tensors = {
            name: dataclasses.replace(tensor, load=lambda tensor=tensor: tensor.load() * by)
            for name, tensor in base.tensors.items()
        }
        return distillation.settings(dataclasses.replace(base, tensors=tensors), 512, 1, 262_144)

    plain, small = scaled(1), scaled(1 / 16)
    assert (plain.window, plain.batch) == (512, 4)
    assert small.learning_rate == pytest.approx(plain.learning_rate / 16, rel=0.01)
    sizes = [tensor.load().float().square().mean().sqrt() for tensor in base.tensors.values() if len(tensor.shape) == 2]
    assert plain.learning_rate == pytest.approx(
        distillation.RATES[0] * float(torch.stack(sizes).quantile(0.5)), rel=0.01
    )


@pytest.mark.long
def test_what_is_written_as_another_architecture_learns_as_that(write_pico_model, tmp_path, maker):
    base = Checkpoint.read(write_pico_model(tmp_path / "qwen2", "qwen2"))
    make = maker(base)
    cut = {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert make(**cut, repair="distill").config["model_type"] == "llama"
    assert gains(base, make, cut)
