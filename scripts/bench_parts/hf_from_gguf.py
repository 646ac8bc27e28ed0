"""Writes a llama-architecture GGUF file as a Hugging Face folder: weights dequantised to bf16, configuration,
tokenizer. Runs in an environment with torch, safetensors, tokenizers and gguf: GGUF file, folder."""

import json
import sys
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

source, folder = sys.argv[1], Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
reader = gguf.GGUFReader(source)


def fact(key, default=None):
    field = reader.get_field(key)
    return field.contents() if field else default


n_heads, n_kv = fact("llama.attention.head_count"), fact("llama.attention.head_count_kv")
hidden = fact("llama.embedding_length")
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
       "output.weight": "lm_head.weight"}
tensors = {}
for tensor in reader.tensors:
    values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    name = TOP.get(tensor.name)
    if name is None:
        if not tensor.name.startswith("blk."):
            continue
        _, layer, kind, _ = tensor.name.split(".")
        name = f"model.layers.{layer}.{NAMES[kind]}.weight"
        if kind in ("attn_q", "attn_k"):
            # Files of this architecture interleave the two halves of each head's rows; Hugging Face does not.
            heads = n_heads if kind == "attn_q" else n_kv
            rows, columns = values.shape
            values = values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    tensors[name] = values.to(torch.bfloat16).contiguous()
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
    "hidden_size": hidden, "intermediate_size": fact("llama.feed_forward_length"),
    "num_hidden_layers": fact("llama.block_count"), "num_attention_heads": n_heads, "num_key_value_heads": n_kv,
    "head_dim": hidden // n_heads, "max_position_embeddings": fact("llama.context_length"),
    "rms_norm_eps": fact("llama.attention.layer_norm_rms_epsilon"), "rope_theta": fact("llama.rope.freq_base"),
    "vocab_size": len(fact("tokenizer.ggml.tokens")), "tie_word_embeddings": "lm_head.weight" not in tensors,
    "bos_token_id": fact("tokenizer.ggml.bos_token_id"), "eos_token_id": fact("tokenizer.ggml.eos_token_id"),
}
(folder / "config.json").write_text(json.dumps(config, indent=1))

words, types = fact("tokenizer.ggml.tokens"), fact("tokenizer.ggml.token_type")
merges = [tuple(merge.split(" ")) for merge in fact("tokenizer.ggml.merges")]
tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
tokenizer.decoder = decoders.ByteLevel()
# Type 3 marks control tokens.
tokenizer.add_special_tokens([AddedToken(w, special=True) for w, kind in zip(words, types) if kind == 3])
tokenizer.save(str(folder / "tokenizer.json"))
(folder / "tokenizer_config.json").write_text(json.dumps({
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": words[config["bos_token_id"]],
    "eos_token": words[config["eos_token_id"]], "clean_up_tokenization_spaces": False,
}))
