"""How many parameters a checkpoint has, and what a token takes, from its ``config.json``. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_unified.errors import ConfigurationError

# Models whose feed-forward part has two matrices and no gate.
_UNGATED = frozenset({"gpt_neox", "opt", "bloom", "falcon", "mpt", "gpt2", "gptj"})
_BIASED = frozenset({"gpt_neox", "opt", "bloom", "gpt2"})
_QKV_BIASED = frozenset({"qwen2", "qwen2_moe"})
_HEAD_NORMS = frozenset({"qwen3", "qwen3_moe"})
_TIED = frozenset({"bloom", "mpt", "opt", "falcon", "gpt2", "gemma", "gemma2"})
_ONE_NORM = frozenset({"falcon"})
_BIASED_NORMS = _BIASED | {"falcon", "stablelm"}


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a decoder, and what follows from them."""

    family: str
    """``model_type`` of the configuration."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    context: int
    """Tokens that it was made for."""
    vocabulary: int
    dtype: str
    """Of the checkpoint, such as ``bfloat16``."""
    matrices: int
    """Parameters of all matrices in the layers, which quantization makes smaller."""
    embeddings: int
    """Parameters of embeddings and output head."""
    rest: int
    """Parameters of norms, routers and positions."""
    widest: int
    """The width of the widest activation between two matrices, of one token."""
    latent: int = 0
    """Values of one token and layer in a compressed KV cache (MLA); 0: keys and values."""
    experts: int = 0
    quantization: str | None = None
    """Method of a checkpoint that is quantized already."""
    bits: int | None = None
    """Of its weights."""
    steps: tuple[str, ...] = ()
    """The arithmetic."""

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.matrices + self.embeddings + self.rest

    def kv_values(self, parts: int = 1) -> int:
        """Values that one token has in the KV cache of one device, of ``parts`` that share each
        layer. A head is never split; a compressed cache is on all of them."""
        if self.latent:
            return self.layers * self.latent
        return 2 * self.layers * max(1, self.kv_heads // parts) * self.head_size


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a ``config.json`` describes.

    Raises:
        ConfigurationError: a size is missing: it is no language model's, or of a family whose
            configuration has other names.
    """
    text = config.get("text_config")
    inner: Mapping[str, Any] = {**config, **text} if isinstance(text, Mapping) else config
    family = str(inner.get("model_type", ""))
    hidden = _size(inner, "hidden_size", "n_embd", "d_model")
    layers = _size(inner, "num_hidden_layers", "n_layer", "n_layers")
    heads = _size(inner, "num_attention_heads", "n_head", "n_heads")
    vocabulary = _size(inner, "vocab_size")
    head_size = int(inner.get("head_dim") or hidden // heads)
    kv_heads = _kv_heads(inner, heads)
    wide = _wide(inner, hidden)
    steps = [
        f"{layers} layers, hidden size {hidden}, {heads} heads of {head_size}, "
        f"{kv_heads} for keys and values, vocabulary {vocabulary:,}"
    ]
    attention, latent = _attention(inner, family, hidden, heads, kv_heads, head_size, steps)
    forward, experts, router, widest = _forward(inner, family, hidden, layers, wide, steps)
    norms = (1 if family in _ONE_NORM else 2) * hidden * layers + hidden
    if family in _HEAD_NORMS:
        norms += 2 * head_size * layers
    if family in _BIASED_NORMS:
        norms *= 2
    if family == "bloom":  # has one for its embeddings, too
        norms += 2 * hidden
    embeddings = _embeddings(inner, family, vocabulary, hidden, steps)
    matrices = layers * attention + forward
    total = matrices + embeddings + norms + router
    steps.append(
        f"parameters: {layers} x {attention:,} + {forward:,} + {embeddings:,}"
        f" + {norms + router:,} for norms{' and routers' if router else ''} = {total:,}"
    )
    quantization = inner.get("quantization_config")
    return ModelShape(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        context=_context(inner),
        vocabulary=vocabulary,
        dtype=str(inner.get("dtype") or inner.get("torch_dtype") or "bfloat16"),
        matrices=matrices,
        embeddings=embeddings,
        rest=norms + router,
        widest=widest,
        latent=latent,
        experts=experts,
        quantization=_method(quantization),
        bits=_bits(quantization),
        steps=tuple(steps),
    )


def _attention(
    config: Mapping[str, Any],
    family: str,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    steps: list[str],
) -> tuple[int, int]:
    """Parameters of one layer's attention, and values of a compressed cache."""
    rank = config.get("kv_lora_rank")
    if rank:
        return _latent_attention(config, hidden, heads, int(rank), steps)
    q, kv = heads * head_size, kv_heads * head_size
    count = hidden * q + 2 * hidden * kv + q * hidden
    words = f"attention of a layer: {hidden} x {q} + 2 x {hidden} x {kv} + {q} x {hidden}"
    biased = family in _BIASED or bool(config.get("attention_bias"))
    if family in _QKV_BIASED or biased:
        bias = q + 2 * kv + (hidden if biased else 0)
        count += bias
        words += f" + {bias} (bias)"
    steps.append(f"{words} = {count:,}")
    return count, 0


def _latent_attention(
    config: Mapping[str, Any], hidden: int, heads: int, rank: int, steps: list[str]
) -> tuple[int, int]:
    rope, plain = _size(config, "qk_rope_head_dim"), _size(config, "qk_nope_head_dim")
    value = _size(config, "v_head_dim")
    q_rank = config.get("q_lora_rank")
    width = heads * (rope + plain)
    query = hidden * q_rank + q_rank + q_rank * width if q_rank else hidden * width
    keys = hidden * (rank + rope) + rank + rank * heads * (plain + value)
    count = query + keys + heads * value * hidden
    steps.append(
        f"attention of a layer (compressed): {query:,} for queries + {keys:,} for keys and values"
        f" + {heads * value} x {hidden} = {count:,}"
    )
    return count, rank + rope


def _forward(
    config: Mapping[str, Any], family: str, hidden: int, layers: int, wide: int, steps: list[str]
) -> tuple[int, int, int, int]:
    """Parameters of all feed-forward parts, experts of a layer, parameters of routers, width."""
    gates = 2 if family in _UNGATED else 3
    bias = wide + hidden if family in _BIASED else 0
    dense = gates * hidden * wide + bias
    names = ("num_local_experts", "n_routed_experts", "num_experts")
    experts = int(next((config[name] for name in names if config.get(name)), 0))
    if not experts:
        words = f"feed-forward of a layer: {gates} x {hidden} x {wide}"
        steps.append(f"{words}{f' + {bias} (bias)' if bias else ''} = {dense:,}")
        steps.append(f"feed-forward of all layers: {layers} x {dense:,} = {layers * dense:,}")
        return layers * dense, 0, 0, wide
    width = int(config.get("moe_intermediate_size") or wide)
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    shared += int(config.get("n_shared_experts") or 0) * width
    plain = int(config.get("first_k_dense_replace") or 0) + len(config.get("mlp_only_layers") or ())
    sparse = layers - plain
    layer = 3 * hidden * (experts * width + shared)
    router = (
        sparse * hidden * (experts + (1 if config.get("shared_expert_intermediate_size") else 0))
    )
    if config.get("topk_method") == "noaux_tc":
        router += sparse * experts
    words = f"experts of a layer: 3 x {hidden} x ({experts} x {width}"
    steps.append(f"{words}{f' + {shared} (shared)' if shared else ''}) = {layer:,}")
    total = sparse * layer + plain * dense
    dense_words = f" + {plain} x {dense:,} (dense)" if plain else ""
    steps.append(f"feed-forward of all layers: {sparse} x {layer:,}{dense_words} = {total:,}")
    used = int(config.get("num_experts_per_tok") or 2)
    return total, experts, router, max(width * used + shared, wide if plain else 0)


def _embeddings(
    config: Mapping[str, Any], family: str, vocabulary: int, hidden: int, steps: list[str]
) -> int:
    tied = config.get("tie_word_embeddings")
    tied = family in _TIED if tied is None else bool(tied)
    width = int(config.get("word_embed_proj_dim") or hidden)
    count = (1 if tied else 2) * vocabulary * width
    words = (
        "embeddings, which are the output head as well" if tied else "embeddings and output head"
    )
    steps.append(f"{words}: {'' if tied else '2 x '}{vocabulary:,} x {width} = {count:,}")
    if family == "opt":  # learned positions, of which two are never used
        positions = (_context(config) + 2) * hidden
        count += positions
        steps.append(f"positions: {_context(config) + 2} x {hidden} = {positions:,}")
    return count


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else heads
    attention = config.get("attn_config")
    if isinstance(attention, Mapping) and attention.get("kv_n_heads"):
        return int(attention["kv_n_heads"])
    names = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
    return int(next((config[name] for name in names if config.get(name)), heads))


def _wide(config: Mapping[str, Any], hidden: int) -> int:
    names = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
    given = next((config[name] for name in names if config.get(name)), None)
    if given is not None:
        return int(given)
    return int(hidden * float(config.get("expansion_ratio") or 4))


def _context(config: Mapping[str, Any]) -> int:
    names = ("max_position_embeddings", "seq_length", "n_positions", "max_seq_len")
    return int(next((config[name] for name in names if config.get(name)), 2048))


def _size(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    raise ConfigurationError(
        f"the model's config.json has no {' or '.join(names)}",
        hint="Only language models whose configuration says their sizes can be planned.",
    )


def _method(quantization: object) -> str | None:
    if not isinstance(quantization, Mapping):
        return None
    method = quantization.get("quant_method")
    return str(method) if method else None


def _bits(quantization: object) -> int | None:
    if not isinstance(quantization, Mapping):
        return None
    bits = quantization.get("bits") or quantization.get("w_bit")
    if bits is None and quantization.get("quant_method") == "fp8":
        return 8
    groups = quantization.get("config_groups")
    if bits is None and isinstance(groups, Mapping):
        for group in groups.values():
            bits = ((group or {}).get("weights") or {}).get("num_bits", bits)
    return int(bits) if bits is not None else None
