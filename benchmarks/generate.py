"""Compare the answers of an engine with those of plain transformers: 32 prompts of many lengths in one call.

    python benchmarks/generate.py MODEL [--engine transformers|vllm] [--dtype float32|bfloat16] [--json FILE]

MODEL is a directory. Each prompt is the beginning of an embedded document, 4 to 400 tokens long, continued greedily by
48 tokens. The reference is transformers' own `generate`, one prompt after the other, in the same dtype. Prints how many
answers are equal, the tokens up to the first difference of the others, and the perplexity that the reference model
gives both sets of answers: two greedy answers may part at a tie and still be as good.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import shutil
import tempfile
import time

import torch
import transformers

from evaluator import embedded_texts
from evaluator.backends import EngineSettings
from evaluator.generation import Limits
from evaluator.process import EngineProcess

PROMPTS, TOKENS, LENGTHS = 32, 48, (4, 400)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model")
        in_dtype(arguments.model, path, arguments.dtype)
        prompts = prompts_of(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, arguments.dtype))
        model = model.to(arguments.device).eval()
        began = time.perf_counter()
        expected = [alone(model, prompt) for prompt in prompts]
        alone_s = time.perf_counter() - began
        if arguments.device == "cuda":
            model.to("cpu")
            torch.cuda.empty_cache()
        settings = EngineSettings(
            max_model_len=LENGTHS[1] + TOKENS + 16,
            max_num_seqs=PROMPTS,
            arguments={"dtype": arguments.dtype} if arguments.engine == "vllm" else {},
        )
        with EngineProcess(arguments.engine, path, settings, pathlib.Path(folder, "log")) as engine:
            began = time.perf_counter()
            answers = engine.generate(prompts, Limits(max_tokens=TOKENS))
            together_s = time.perf_counter() - began
            facts = engine.facts()
        found = [list(answer.tokens) for answer in answers]
        model.to(arguments.device)
        agreed = [common(one, other) for one, other in zip(found, expected, strict=True)]
        equal = sum(one == other for one, other in zip(found, expected, strict=True))
        result = {
            "engine": facts["engine_version"], "device": facts["device"], "dtype": arguments.dtype,
            "prompts": len(prompts), "equal": equal, "agreed_tokens": agreed,
            "perplexity": perplexity(model, prompts, found),
            "reference_perplexity": perplexity(model, prompts, expected),
            "one_by_one_s": round(alone_s, 2), "together_s": round(together_s, 2),
        }  # fmt: skip
    print(f"{arguments.model.name}, {result['engine']} on {result['device']}, {arguments.dtype}: {equal} of "
          f"{len(prompts)} answers equal; perplexity of the answers {result['perplexity']:.4f}, of plain transformers' "
          f"{result['reference_perplexity']:.4f}; {alone_s:.1f} s one by one, {together_s:.1f} s together")  # fmt: skip
    if equal < len(prompts):
        parted = [n for n, one, other in zip(agreed, found, expected, strict=True) if one != other]
        print("the others agree for", ", ".join(map(str, parted)), "tokens")
    if arguments.json:
        arguments.json.write_text(json.dumps(result))


def in_dtype(source: pathlib.Path, target: pathlib.Path, dtype: str) -> None:
    """Copy a model with its weights cast."""
    from compressors.methods import precision
    from compressors.model.checkpoint import Checkpoint

    precision.cast(Checkpoint.read(source), dtype).write(target)
    for name in ("generation_config.json",):
        if (source / name).is_file() and not (target / name).exists():
            shutil.copy(source / name, target / name)


def prompts_of(path: pathlib.Path) -> list[list[int]]:
    """Return token ids of prompts whose lengths are spread evenly, in an order that is not by length."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    low, high = LENGTHS
    lengths = [round(low + (high - low) * (number * 7 % PROMPTS) / (PROMPTS - 1)) for number in range(PROMPTS)]
    prompts = []
    documents = iter(embedded_texts.documents())
    for length in lengths:
        ids: list[int] = []
        while len(ids) < length:
            ids = tokenizer(next(documents).text)["input_ids"]
        prompts.append(ids[:length])
    return prompts


def alone(model: transformers.PreTrainedModel, prompt: list[int]) -> list[int]:
    """Return the ids that transformers generates for one prompt, without the end-of-sequence id."""
    given = torch.tensor([prompt], device=model.device)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    with torch.no_grad():
        made = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=TOKENS, do_sample=False,
                              pad_token_id=0, repetition_penalty=1.0)  # fmt: skip
    ids = made[0, len(prompt) :].tolist()
    return next((ids[:at] for at, token in enumerate(ids) if token in ends), ids)


def common(one: list[int], other: list[int]) -> int:
    """Return how many tokens both begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@torch.no_grad()
def perplexity(model: transformers.PreTrainedModel, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """Return the model's perplexity of the answers, given their prompts."""
    total, count = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        if not answer:
            continue
        ids = torch.tensor([prompt + answer], device=model.device)
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += len(answer)
    return math.exp(total / count)


if __name__ == "__main__":
    main()
