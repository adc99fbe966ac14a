"""Write a tiny model of a family, with random weights; runs in an engine's interpreter.

``python make_model.py FAMILY TARGET TOKENIZER``: the tokenizer is that of the folder TOKENIZER.
"""

from __future__ import annotations

import sys
from typing import Any

HIDDEN, HEADS, KV_HEADS, LAYERS, WIDE, CONTEXT = 128, 4, 2, 2, 256, 512
HAS_TEMPLATE = ("llama", "mistral", "mixtral", "qwen2", "qwen3")
"""The others are base models, of which their makers have no template for chats."""


def config_of(family: str, vocabulary: int) -> Any:
    """The configuration, in the words of the family."""
    import transformers as t

    usual: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": WIDE,
        "max_position_embeddings": CONTEXT,
        "vocab_size": vocabulary,
    }
    grouped = {**usual, "num_key_value_heads": KV_HEADS}
    match family:
        case "llama":
            return t.LlamaConfig(**grouped)
        case "mistral":
            return t.MistralConfig(**grouped, sliding_window=None)
        case "mixtral":
            return t.MixtralConfig(**grouped, num_local_experts=4, num_experts_per_tok=2)
        case "qwen2":
            return t.Qwen2Config(**grouped)
        case "qwen3":
            return t.Qwen3Config(**grouped, head_dim=HIDDEN // HEADS)
        case "stablelm":
            return t.StableLmConfig(**grouped)
        case "gpt_neox":
            return t.GPTNeoXConfig(**usual)
        case "falcon":
            return t.FalconConfig(
                hidden_size=HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                max_position_embeddings=CONTEXT,
                vocab_size=vocabulary,
                multi_query=True,
                parallel_attn=True,
                bias=False,
                alibi=False,
                new_decoder_architecture=False,
            )
        case "opt":
            return t.OPTConfig(
                hidden_size=HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                ffn_dim=WIDE,
                word_embed_proj_dim=HIDDEN,
                max_position_embeddings=CONTEXT,
                vocab_size=vocabulary,
            )
        case "bloom":
            return t.BloomConfig(
                hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, vocab_size=vocabulary
            )
        case "mpt":
            return t.MptConfig(
                d_model=HIDDEN,
                n_layers=LAYERS,
                n_heads=HEADS,
                max_seq_len=CONTEXT,
                vocab_size=vocabulary,
            )
    raise ValueError(f"no such family: {family}")


def make(family: str, target: str, tokenizer_folder: str) -> None:
    """Write model and tokenizer."""
    import torch
    import transformers

    torch.manual_seed(7)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    config = config_of(family, len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(target)
    if family not in HAS_TEMPLATE:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    make(*sys.argv[1:4])
