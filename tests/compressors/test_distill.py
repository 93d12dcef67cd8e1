"""Test distillation: its loss, its training, its saved states, and what is refused."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from compressors.distillation import fit as distill_fit
from compressors.distillation import loss as distill_loss
from compressors.distillation import pair as distill_pair
from compressors.distillation.distill import Distillation, batch_of, best, distill, learning_rate
from compressors.errors import CheckpointError, CompressionError
from compressors.methods import depth, ffn, importance, precision
from compressors.model.checkpoint import Checkpoint
from compressors.model.family import family_of

WINDOW = 32
SETTINGS = Distillation(
    tokens=24 * 128,
    batch_tokens=128,
    window=WINDOW,
    learning_rate=1e-3,
    evaluate_every=6 * 128,
    held_out_windows=8,
    chunk=50,
    micro_batch=2,
    save_every=0,
)


def text(windows, seed, below=6):
    """Return windows of random walks over few tokens, so that training on some helps with others."""
    random = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 3, (windows, WINDOW), generator=random)
    return ((torch.randint(0, below, (windows, 1), generator=random) + steps.cumsum(1)) % below).tolist()


def pair_of(path, keep=3):
    teacher = Checkpoint.read(path)
    return depth.cut(teacher, family_of(teacher), range(keep)), teacher


def naive_kl(student, teacher, windows):
    models = [checkpoint.to_model("cpu", torch.float32) for checkpoint in (student, teacher)]
    with torch.no_grad():
        s, t = (log_softmax(model(torch.tensor(windows)).logits[:, :-1].double(), -1) for model in models)
    return float((t.exp() * (t - s)).sum(-1).mean())


def quiet(progress):
    pass


# -- the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("temperature", "weight_ce"), [(1.0, 0.0), (2.5, 0.0), (1.0, 0.7), (2.5, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_chunked_loss_and_its_gradients_equal_the_unchunked_ones(tied, temperature, weight_ce, dtype):
    random = torch.Generator().manual_seed(0)
    V, E, E_teacher, P = 37, 8, 12, 23  # 23 positions: the last of the chunks of 5 is a shorter one
    embedding, head = (torch.randn(V, E, generator=random, dtype=dtype).requires_grad_() for _ in range(2))
    mixing = torch.randn(E, E, generator=random, dtype=dtype).requires_grad_()
    teacher_hidden = 2 * torch.randn(P, E_teacher, generator=random, dtype=dtype)
    teacher_head = torch.randn(V, E_teacher, generator=random, dtype=dtype)
    tokens, targets = torch.randint(0, V, (2, P), generator=random)
    of_output = embedding if tied else head
    leaves = [embedding, mixing] if tied else [embedding, mixing, head]

    hidden = torch.tanh(embedding[tokens] @ mixing)
    logits = hidden @ of_output.t()
    p_t = (teacher_hidden @ teacher_head.t() / temperature).softmax(-1)
    naive = temperature**2 * kl_div(log_softmax(logits / temperature, -1), p_t, reduction="batchmean")
    naive = 3 * (naive + weight_ce * cross_entropy(logits, targets))
    expected = torch.autograd.grad(naive, leaves)

    hidden = torch.tanh(embedding[tokens] @ mixing)
    chunked = 3 * distill_loss.distillation_loss(
        hidden,
        of_output,
        teacher_hidden,
        teacher_head,
        targets,
        temperature=temperature,
        weight_ce=weight_ce,
        chunk=5,
    )
    found = torch.autograd.grad(chunked, leaves)
    close = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(chunked, naive, **close)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **close)


def test_no_tensor_holds_the_logits_of_all_positions():
    made = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            several = result if isinstance(result, tuple) else (result,)
            made.extend(tuple(one.shape) for one in several if isinstance(one, torch.Tensor))
            return result

    hidden, head = torch.randn(64, 8, requires_grad=True), torch.randn(333, 8, requires_grad=True)
    teacher_hidden, teacher_head = torch.randn(64, 8), torch.randn(333, 8)
    with Shapes():
        loss = distill_loss.distillation_loss(
            hidden, head, teacher_hidden, teacher_head, torch.zeros(64, dtype=torch.int64), weight_ce=1.0, chunk=4
        )
        loss.backward()
    assert {size for shape in made if 333 in shape for size in shape} == {333, 8, 4}


def test_the_gradient_of_a_batch_equals_that_of_the_stock_model(pico):
    student, teacher = pair_of(pico)
    ids = torch.tensor(text(4, 0))
    taught, teaching = (checkpoint.to_model("cpu", torch.float32) for checkpoint in (student, teacher))
    taught.requires_grad_(True)
    with torch.no_grad():
        t = log_softmax(teaching(ids).logits[:, :-1] / 2, -1)
    logits = taught(ids).logits[:, :-1]
    kl = (t.exp() * (t - log_softmax(logits / 2, -1))).sum(-1).mean()
    (4 * kl + 0.5 * cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())).backward()

    pair = distill_pair.make(student, teacher, torch.float32, "cpu")
    for some in ids.split(2):  # two micro-batches
        distill_pair.backward(pair, some, share=0.5, temperature=2.0, weight_ce=0.5, chunk=9)
    expected = dict(taught.named_parameters())
    assert pair.masters.keys() == expected.keys() == student.tensors.keys()
    for name, master in pair.masters.items():
        torch.testing.assert_close(master.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradient(pico_exaone4):
    student, teacher = pair_of(pico_exaone4)
    ids = torch.tensor(text(2, 0))
    once = distill_pair.make(student, teacher, torch.float32, "cpu")
    twice = distill_pair.make(student, teacher, torch.float32, "cpu")
    distill_fit.set_layers(once, twice=False, compiled=False)
    distill_fit.set_layers(twice, twice=True, compiled=False)
    for pair in (once, twice):
        distill_pair.backward(pair, ids, 1.0, 1.0, 0.0, 50)
    for name, master in once.masters.items():
        assert torch.equal(master.grad, twice.masters[name].grad)
    assert distill_fit.saved_bytes(twice, ids[0]) < 0.3 * distill_fit.saved_bytes(once, ids[0])


# -- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "exaone4"])
def test_distillation_brings_a_cut_student_nearer_to_its_teacher(family, request, tmp_path):
    teacher = Checkpoint.read(request.getfixturevalue(f"pico_{family}"))
    cut = depth.cut(teacher, family_of(teacher), range(4))
    student = ffn.cut(cut, family_of(teacher), importance.choose_channels(cut, family_of(teacher), 128, "activation"))
    held_out = text(8, 1)
    seen = []
    found = distill(student, teacher, text(64, 0), held_out, SETTINGS, "cpu", tmp_path / "work", seen.append)
    assert found.kl_best < 0.8 * found.kl_before
    assert found.kl_before == pytest.approx(naive_kl(student, teacher, held_out), rel=1e-4)
    assert found.kl_best == min(evaluation.held_out_kl for evaluation in found.evaluations)
    assert naive_kl(found.checkpoint, teacher, held_out) == pytest.approx(found.kl_best, rel=0.02), "in bfloat16"
    assert (found.tokens, found.updates, found.skipped, found.epochs) == (3072, 24, 0, 1.5)
    assert [evaluation.tokens for evaluation in found.evaluations] == [0, 768, 1536, 2304, 3072]
    assert found.stopped == "tokens"

    assert found.checkpoint.config == student.config
    assert found.checkpoint.files == student.files
    assert "lm_head.weight" not in found.checkpoint.tensors, "tied embeddings stay tied"
    for name, tensor in found.checkpoint.tensors.items():
        assert (tensor.shape, tensor.dtype) == (student.tensors[name].shape, student.tensors[name].dtype)
        assert tensor.load().dtype == torch.bfloat16
    found.checkpoint.write(tmp_path / "model")
    family_of(Checkpoint.read(tmp_path / "model"))

    layer = 96 * 144 * 2 + 96 * 72 * 2
    assert found.flops_per_token == 6 * (4 * (layer + 3 * 96 * 128) + 320 * 96) + 2 * (
        5 * (layer + 3 * 96 * 160) + 320 * 96
    )
    assert found.flops_per_second == pytest.approx(found.flops_per_token * found.tokens_per_second)
    stages = [progress.stage for progress in seen]
    assert {"loading", "training", "evaluating", "saving"} == set(stages)
    assert stages.count("training") == 24 * 2, "after every micro-batch"
    assert seen[-1].tokens == seen[-1].total_tokens == 3072
    assert 0 < seen[-1].loss < found.kl_before
    assert seen[-1].best_kl == found.kl_best
    assert seen[-1].tokens_per_second > 0
    assert seen[-1].seconds_left == 0
    assert sorted(file.name for file in (tmp_path / "work").iterdir()) == ["best-00000024.safetensors", "state.json"]


def test_an_untied_head_is_trained_too(write_pico_model, tmp_path):
    student, teacher = pair_of(write_pico_model(tmp_path / "model", "exaone4", tie_word_embeddings=False))
    settings = dataclasses.replace(SETTINGS, tokens=10 * 128)
    found = distill(student, teacher, text(32, 0), text(8, 1), settings, "cpu", tmp_path / "work", quiet)
    assert found.kl_best < found.kl_before
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert not torch.equal(found.checkpoint.tensors[name].load(), student.tensors[name].load())


KILLED = """
import dataclasses, pathlib, sys, time
import torch
torch.set_num_threads({threads})
sys.path.insert(0, {here!r})
from test_distill import SETTINGS, pair_of, text, distill

def progress(now):
    if now.stage == "training" and now.tokens >= 15 * 128:
        print("in the middle", flush=True)
        time.sleep(600)

student, teacher = pair_of(pathlib.Path({model!r}))
distill(student, teacher, text(50, 0), text(8, 1), {settings}, "cpu", pathlib.Path({work!r}), progress)
"""


@pytest.mark.long
def test_a_killed_and_resumed_run_ends_like_an_uninterrupted_one(pico_exaone4, tmp_path):
    settings = "dataclasses.replace(SETTINGS, weight_ce=0.1)"
    script = KILLED.format(
        threads=torch.get_num_threads(),
        here=str(pathlib.Path(__file__).parent),
        model=str(pico_exaone4),
        settings=settings,
        work=str(tmp_path / "killed"),
    )
    root = str(pathlib.Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    ) as child:
        assert child.stdout.readline() == "in the middle\n"
        child.kill()
    state = json.loads((tmp_path / "killed" / "state.json").read_text())["standing"]
    assert (state["step"], state["ended"]) == (12, None), "the last saved state is older than what was killed"
    (tmp_path / "killed" / ".weights-00000018.safetensors").write_bytes(b"half")

    student, teacher = pair_of(pico_exaone4)
    assert best(student, tmp_path / "killed") is not None
    changed = dataclasses.replace(SETTINGS, weight_ce=0.1)
    seen = []
    resumed, whole = (
        distill(student, teacher, text(50, 0), text(8, 1), changed, "cpu", tmp_path / name, progress)
        for name, progress in (("killed", seen.append), ("whole", quiet))
    )
    assert min(progress.tokens for progress in seen if progress.stage == "training") == 12 * 128
    assert resumed.evaluations == whole.evaluations
    assert whole.kl_best == whole.evaluations[-1].held_out_kl, "the best are the last: both say the same weights"
    for name, tensor in whole.checkpoint.tensors.items():
        assert torch.equal(resumed.checkpoint.tensors[name].load(), tensor.load())
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(os.listdir(tmp_path / "whole"))

    again = distill(student, teacher, text(50, 0), text(8, 1), changed, "cpu", tmp_path / "whole", quiet)
    assert dataclasses.replace(again, checkpoint=whole.checkpoint) == whole, "an ended one is not trained again"


def test_training_stops_without_improvement_and_returns_the_best_student(pico_exaone4, tmp_path):
    student, teacher = pair_of(pico_exaone4)
    settings = dataclasses.replace(
        SETTINGS, tokens=4000 * 128, learning_rate=2e-3, warmup_share=0.0, evaluate_every=2 * 128, patience=1
    )
    found = distill(student, teacher, text(64, 0), text(8, 1), settings, "cpu", tmp_path / "work", quiet)
    assert found.stopped == "no improvement"
    by_kl = [evaluation.held_out_kl for evaluation in found.evaluations]
    assert 0 < by_kl.index(min(by_kl)) == len(by_kl) - 1 - settings.patience
    assert found.kl_best == min(by_kl) < by_kl[-1]
    assert naive_kl(found.checkpoint, teacher, text(8, 1)) == pytest.approx(found.kl_best, rel=0.02)


def test_master_weights_keep_what_bfloat16_would_lose(pico_exaone4, tmp_path):
    cut, teacher = pair_of(pico_exaone4, keep=4)
    student = precision.cast(cut, "float32")
    settings = dataclasses.replace(
        SETTINGS, tokens=20 * 128, learning_rate=1e-5, warmup_share=0.0, dtype="bfloat16", patience=100
    )
    work = tmp_path / "work"
    kept = {}

    def progress(now):
        if now.stage == "evaluating" and now.tokens == 20 * 128 and not kept:
            kept.update(load_file(next(work.glob("weights-*.safetensors"))))

    distill(student, teacher, text(32, 0), text(8, 1), settings, "cpu", work, progress)
    for name in ("model.norm.weight", "model.layers.2.post_feedforward_layernorm.weight"):
        gain = student.tensors[name].load()  # 0.5 to 1.5: neighbours in bfloat16 are 0.002 or more apart
        moved = (kept[f"weight.{name}"] - gain).abs()
        assert 3e-5 < moved.max() < 1.1e-4, "10 updates of up to 1e-5, each far below half of that"
        assert torch.equal(kept[f"weight.{name}"].bfloat16().float(), gain)


def test_bfloat16_with_master_weights_learns_as_float32_does(pico_exaone4, tmp_path):
    student, teacher = pair_of(pico_exaone4)
    found = [
        distill(
            student,
            teacher,
            text(32, 0),
            text(8, 1),
            dataclasses.replace(SETTINGS, tokens=12 * 128, dtype=dtype),
            "cpu",
            tmp_path / dtype,
            quiet,
        )
        for dtype in ("float32", "bfloat16")
    ]
    assert found[1].kl_best < 0.9 * found[1].kl_before
    assert found[1].kl_best == pytest.approx(found[0].kl_best, rel=0.03)


def broken_token(checkpoint, token):
    """Return the student with a NaN embedding of one token, so that every window with it gives NaN."""

    def broken(embedding):
        embedding = embedding.clone()
        embedding[token] = math.nan
        return embedding

    name = "model.embed_tokens.weight"
    return dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, name: checkpoint.tensors[name].map(broken)})


def test_nan_batches_are_skipped_and_three_in_a_row_end_the_training(write_pico_model, tmp_path):
    student, teacher = pair_of(write_pico_model(tmp_path / "model", "exaone4", tie_word_embeddings=False))
    student = broken_token(student, 319)
    good = text(16, 0)
    bad = [[*window[:-5], 319, *window[-4:]] for window in text(20, 2)]
    settings = dataclasses.replace(
        SETTINGS, tokens=16 * WINDOW, batch_tokens=WINDOW, evaluate_every=4 * WINDOW, micro_batch=1, weight_decay=0.0
    )
    one = [*good[:15], bad[0]]
    found = distill(student, teacher, one, text(8, 1), settings, "cpu", tmp_path / "one", quiet)
    assert (found.skipped, found.updates) == (1, 15)
    assert found.kl_best < found.kl_before
    assert torch.isfinite(found.checkpoint.tensors["lm_head.weight"].load()).all()

    rows = [*good[:5], *bad]  # of 25 windows most are bad: three in a row come soon, after a good one
    settings = dataclasses.replace(settings, evaluate_every=WINDOW, seed=next(filter(good_then_bad, range(1000))))
    arguments = (student, teacher, rows, text(8, 1), settings, "cpu", tmp_path / "three")
    for _ in range(2):  # a second call raises the same error, without more training
        with pytest.raises(CompressionError, match="3 batches in a row, at 4 of 16") as caught:
            distill(*arguments, quiet)
        assert "\n" not in str(caught.value)
    kept = best(student, tmp_path / "three")
    assert f"{naive_kl(kept, teacher, text(8, 1)):.2f}"[:4] in str(caught.value)


def good_then_bad(seed):
    return [batch_of(step, 1, 25, seed)[0] < 5 for step in range(4)] == [True, False, False, False]


# -- what it is asked for ------------------------------------------------------------------------------------


def test_a_student_that_was_not_kept_is_not_taken_for_the_best(pico_llama, tmp_path):
    """Nor is the student as it was, beside a KL that another one had."""
    student, teacher = pair_of(pico_llama)
    given = (student, teacher, text(32, 0), text(8, 1), SETTINGS, "cpu", tmp_path / "work", quiet)
    tried = distill(*given, keep_best=False)
    assert tried.kl_best < tried.kl_before
    assert all(
        torch.equal(tensor.load(), student.tensors[name].load()) for name, tensor in tried.checkpoint.tensors.items()
    )
    assert not list((tmp_path / "work").glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="its best student was not kept"):
        distill(*given)


def test_the_learning_rate_rises_and_falls_along_a_cosine():
    settings = Distillation(tokens=100 * 128, batch_tokens=128, window=32, learning_rate=0.8, warmup_share=0.2)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert settings.steps == 100
    assert rates[:20] == pytest.approx([0.8 * (step + 1) / 21 for step in range(20)])
    assert rates[20] == 0.8 == max(rates)
    assert rates[60] == pytest.approx(0.4)
    assert rates[80] == pytest.approx(0.4 * (1 + math.cos(0.75 * math.pi)))
    assert 0 < rates[99] < 0.001
    assert rates[20:] == sorted(rates[20:], reverse=True)
    short = dataclasses.replace(settings, tokens=1, warmup_share=0.9)
    assert (short.steps, learning_rate(0, short)) == (1, 0.8)


def test_every_epoch_holds_each_window_once_in_another_order():
    seen = [number for step in range(15) for number in batch_of(step, 4, 20, seed=3)]
    epochs = [seen[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert batch_of(0, 4, 20, seed=4) != seen[:4]
    assert [number for step in range(4) for number in batch_of(step, 5, 3, seed=3)][:3] != [0, 0, 0], "batch > windows"


def test_embeddings_and_norms_are_not_decayed(pico_exaone4):
    pair = distill_pair.make(*pair_of(pico_exaone4), torch.float32, "cpu")
    decayed, spared = distill_pair.optimizer_of(pair, 0.1).param_groups
    names = {id(master): name for name, master in pair.masters.items()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all(names[id(one)].split(".")[-2].endswith("_proj") for one in decayed["params"])
    assert len(decayed["params"]) == 3 * 7
    assert {names[id(one)].split(".")[-2] for one in spared["params"]} == {
        "embed_tokens",
        "norm",
        "q_norm",
        "k_norm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    }


@pytest.mark.parametrize(("batch", "most", "found"), [(32, 9, 8), (32, 0, 1), (7, 6, 1), (6, 100, 6)])
def test_micro_batches_divide_a_batch(batch, most, found):
    assert distill_fit.divisor(batch, most) == found


# -- what is refused -----------------------------------------------------------------------------------------


def refused(error, student, teacher, work, windows=None, held_out=None, device="cpu", **changes):
    settings = dataclasses.replace(SETTINGS, tokens=4 * 128, **changes)
    with pytest.raises(error) as caught:
        distill(student, teacher, windows or text(8, 0), held_out or text(8, 1), settings, device, work, quiet)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_that_can_not_be_distilled_are_refused(pico_llama, pico_exaone4, write_pico_model, tmp_path):
    student, teacher = pair_of(pico_llama)
    work = tmp_path / "work"
    for made in (
        precision.quantize(student, family_of(student), "W8A8"),
        precision.simulate(student, family_of(student), "W8A8"),
    ):
        assert "the student is quantized" in refused(CheckpointError, made, teacher, work)
        assert "the teacher is quantized" in refused(CheckpointError, student, made, work)
    larger = Checkpoint.read(write_pico_model(tmp_path / "larger", "llama", vocab_size=352))
    assert "the student has 320 tokens and the teacher 352" in refused(CheckpointError, student, larger, work)
    other = json.loads((pico_exaone4 / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    swapped = dataclasses.replace(student, files={**student.files, "tokenizer.json": tmp_path / "tokenizer.json"})
    assert "number their tokens differently" in refused(CheckpointError, swapped, teacher, work)
    name = "model.norm.weight"
    broken = {**student.tensors, name: student.tensors[name].map(lambda gain: gain * math.nan)}
    said = refused(CheckpointError, dataclasses.replace(student, tensors=broken), teacher, work)
    assert "logits are NaN or infinite before training" in said
    assert not work.exists()


def test_a_model_whose_logits_are_capped_is_refused(pico_llama):
    pair = distill_pair.make(*pair_of(pico_llama), torch.float32, "cpu")
    window = torch.tensor(text(1, 0)[0])
    distill_pair.require_plain_logits(pair, window)
    pair.teacher.lm_head.register_forward_hook(lambda module, args, output: 10 * torch.tanh(output / 10))  # capped
    with pytest.raises(CheckpointError, match="the teacher's logits are not"):
        distill_pair.require_plain_logits(pair, window)


def test_invalid_text_and_settings_are_refused(pico_llama, tmp_path):
    student, teacher = pair_of(pico_llama)

    def said(**changes):
        return refused(CompressionError, student, teacher, tmp_path / "work", **changes)

    assert "windows holds windows of 31 tokens, but window is 32" in said(windows=[text(1, 0)[0][1:]])
    assert "held_out holds tokens 5 to 320, and the models have 320" in said(held_out=[[5] * 31 + [320]])
    assert "2 of 8 held-out windows are trained on too" in said(held_out=[*text(6, 1), *text(8, 0)[:2]])
    assert "tokens is 0" not in said(batch_tokens=31)
    for name, value in {
        "batch_tokens": 31,
        "learning_rate": 0.0,
        "warmup_share": 1.0,
        "temperature": -1.0,
        "weight_ce": math.nan,
        "patience": 0,
        "held_out_windows": 0,
        "chunk": 0,
        "micro_batch": 0,
        "dtype": "float16",
    }.items():
        assert f"{name} is {value!r}" in said(**{name: value})
    assert not (tmp_path / "work").exists()


def test_the_directory_of_another_distillation_is_refused(pico_exaone4, tmp_path):
    student, teacher = pair_of(pico_exaone4)
    settings = dataclasses.replace(SETTINGS, tokens=4 * 128)
    work = tmp_path / "work"
    distill(student, teacher, text(8, 0), text(8, 1), settings, "cpu", work, quiet)
    before = (work / "state.json").read_bytes()
    assert "learning_rate was 0.001 and is 0.002" in refused(
        CheckpointError, student, teacher, work, learning_rate=2e-3
    )
    assert "windows was" in refused(CheckpointError, student, teacher, work, windows=text(8, 5))
    assert "student was" in refused(CheckpointError, teacher, teacher, work)
    assert (work / "state.json").read_bytes() == before


def test_a_damaged_state_begins_again(pico_exaone4, tmp_path, damages):
    student, teacher = pair_of(pico_exaone4)
    settings = dataclasses.replace(SETTINGS, tokens=4 * 128)
    work = tmp_path / "work"

    def distilled():
        return distill(student, teacher, text(8, 0), text(8, 1), settings, "cpu", work, quiet).checkpoint.digest()

    expected = distilled()
    state = work / "state.json"

    def without_digest(**changes):
        values = json.loads(state.read_text())
        del values["sha256"]
        values["standing"] |= changes
        state.write_text(json.dumps(values))

    without_digest()  # as earlier versions wrote it
    assert distilled() == expected
    assert damages.told() == []
    damaged = (
        lambda: state.write_bytes(state.read_bytes()[:-20]),
        lambda: without_digest(best="../best-00000004.safetensors"),
        lambda: without_digest(step="four"),
        lambda: damages.flip(next(work.glob("best-*"))),
        lambda: next(work.glob("best-*")).unlink(),
    )
    for damage in damaged:
        damage()
        assert distilled() == expected
        assert damages.told() == [state]


def test_a_directory_that_can_not_be_created_is_refused(pico_llama, tmp_path):
    student, teacher = pair_of(pico_llama)
    (tmp_path / "file").write_text("")
    assert "can't be made (Not a directory)" in refused(CheckpointError, student, teacher, tmp_path / "file" / "work")
