"""Random LoRA adapters for the benchmark: rank 16 by default, all seven linear layers, f16, in the two forms that
servers read: a PEFT folder and a GGUF file. Same number, same bytes. Speed does not depend on the values, which
are small enough to keep the model's numbers ordinary. Standard library only."""

import json
import random
import struct
from pathlib import Path

# The shapes of SmolLM2-135M, the model that scripts/fetch-model gets.
N_LAYERS, HIDDEN, KV, FFN = 30, 576, 192, 1536
# PEFT's name, GGUF's name, inputs, outputs
LINEARS = [
    ("self_attn.q_proj", "attn_q", HIDDEN, HIDDEN),
    ("self_attn.k_proj", "attn_k", HIDDEN, KV),
    ("self_attn.v_proj", "attn_v", HIDDEN, KV),
    ("self_attn.o_proj", "attn_output", HIDDEN, HIDDEN),
    ("mlp.gate_proj", "ffn_gate", HIDDEN, FFN),
    ("mlp.up_proj", "ffn_up", HIDDEN, FFN),
    ("mlp.down_proj", "ffn_down", FFN, HIDDEN),
]
# High byte of an f16 with a random sign and a magnitude between 2^-7 and 2^-5 (0.008 to 0.03).
HIGH_BYTE = bytes((byte & 0x83) | (8 + (byte >> 2 & 1)) << 2 for byte in range(256))


def bytes_of_one(rank):
    """Bytes of one adapter's weights in f16."""
    return N_LAYERS * sum(2 * rank * (n_in + n_out) for _, _, n_in, n_out in LINEARS)


def _values(rng, n):
    raw = bytearray(rng.randbytes(2 * n))
    raw[1::2] = raw[1::2].translate(HIGH_BYTE)
    return bytes(raw)


def _tensors(number, rank):
    """(PEFT name, GGUF name, rows, columns, f16 bytes) of every matrix."""
    rng = random.Random(number * 1000 + rank)
    for layer in range(N_LAYERS):
        for peft, gguf, n_in, n_out in LINEARS:
            head = f"base_model.model.model.layers.{layer}.{peft}"
            yield f"{head}.lora_A.weight", f"blk.{layer}.{gguf}.weight.lora_a", rank, n_in, _values(rng, rank * n_in)
            yield f"{head}.lora_B.weight", f"blk.{layer}.{gguf}.weight.lora_b", n_out, rank, _values(rng, rank * n_out)


def make(folder: Path, number: int, rank: int = 16):
    """Makes adapter `number` unless it is there; returns (PEFT folder, GGUF file)."""
    peft, gguf = folder / f"r{rank}-{number:04}", folder / f"r{rank}-{number:04}.gguf"
    if not gguf.exists():
        tensors = list(_tensors(number, rank))
        peft.mkdir(parents=True, exist_ok=True)
        _write_peft(peft, rank, tensors)
        part = gguf.with_suffix(".part")
        _write_gguf(part, rank, tensors)
        part.rename(gguf)
    return peft, gguf


def _write_peft(folder, rank, tensors):
    head, offset = {}, 0
    for name, _, rows, columns, data in tensors:
        head[name] = {"dtype": "F16", "shape": [rows, columns], "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(data for *_, data in tensors)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "SmolLM2-135M-Instruct",
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": [peft.split(".")[1] for peft, *_ in LINEARS],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def _write_gguf(path, rank, tensors):
    def text(value):
        raw = value.encode()
        return struct.pack("<Q", len(raw)) + raw

    strings = [("general.type", "adapter"), ("general.architecture", "llama"), ("adapter.type", "lora")]
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(strings) + 1))
        for key, value in strings:
            file.write(text(key) + struct.pack("<I", 8) + text(value))
        file.write(text("adapter.lora.alpha") + struct.pack("<If", 6, float(rank)))
        offset = 0
        for _, name, rows, columns, data in tensors:
            # Dimensions fastest first; type 1 is f16; data aligned to 32 bytes.
            file.write(text(name) + struct.pack("<IQQIQ", 2, columns, rows, 1, offset))
            offset += len(data) + -len(data) % 32
        file.write(b"\0" * (-file.tell() % 32))
        for *_, data in tensors:
            file.write(data + b"\0" * (-len(data) % 32))
