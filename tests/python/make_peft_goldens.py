"""Makes tests/data/peft: adapters written by PEFT, and the logits PEFT computes with them on two tiny models.

Not part of the test run: the files are committed, and tests/tests/peft compares the node with them. To make
them again (a new kind of adapter, a new PEFT):

    cargo test -p tests --test peft          # writes the tiny models below target/tmp/peft
    python3 -m venv .venv && .venv/bin/pip install torch transformers peft safetensors blake3
    .venv/bin/python tests/python/make_peft_goldens.py target/tmp/peft

The versions used are recorded in goldens.json. Same versions, same files: everything random is seeded by the
name of the kind. Every adapter is made by `get_peft_model`, saved by `save_pretrained`, and read back by
`PeftModel.from_pretrained` before its logits are computed in float32 on the CPU: the goldens say what PEFT does
with the committed files, not what it did in memory before.
"""

import json
import math
import pathlib
import shutil
import sys
import zlib

import blake3
import peft
import safetensors
import torch
import transformers
import transformers.utils.logging
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

OUT = pathlib.Path(__file__).resolve().parents[1] / "data/peft"
# One id of each sort: a special token, single bytes, merges; none twice in a row.
PROMPT = [1, 75, 260, 288, 31, 104, 270, 3, 199, 259, 133, 86]
LLAMA, QWEN = "tiny-llama-21", "tiny-qwen2-22"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ALL = ATTENTION + MLP
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# A rank for every pair of layer and module of k and v: below, at and above the widths that vectors have.
LADDER_LOW = [1, 2, 3, 5, 15, 16, 17, 32]
LADDER_HIGH = [31, 33, 64, 65, 100, 128, 192, 255]
LADDER_NAMES = [f"layers.{layer}.self_attn.{name}" for layer in range(4) for name in ("k_proj", "v_proj")]


def kinds():
    """(name, model, format on disk, LoraConfig fields, config fields rewritten after saving)."""
    yield "attention_f32", LLAMA, F32, dict(r=4, lora_alpha=8, target_modules=ATTENTION), {}
    yield "all_seven_bf16", LLAMA, BF16, dict(r=3, lora_alpha=16, target_modules=ALL), {}
    yield "mlp_f16", LLAMA, F16, dict(r=8, lora_alpha=8, target_modules=MLP), {}
    yield "one_module", LLAMA, F32, dict(r=5, lora_alpha=10, target_modules=["down_proj"]), {}
    yield "subset_k_o_up", LLAMA, BF16, dict(r=6, lora_alpha=3, target_modules=["k_proj", "o_proj", "up_proj"]), {}
    half = dict(layers_to_transform=[1, 3], layers_pattern="layers")
    yield "half_the_layers", LLAMA, F32, dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "gate_proj"], **half), {}
    yield "one_layer_as_number", LLAMA, F16, dict(r=4, lora_alpha=8, target_modules=["o_proj", "up_proj"], layers_to_transform=2), {}
    full = ["model.layers.0.mlp.down_proj", "layers.3.self_attn.q_proj", "1.self_attn.k_proj"]
    yield "full_names", LLAMA, F32, dict(r=4, lora_alpha=8, target_modules=full), {}
    yield "excluded", LLAMA, F32, dict(r=2, lora_alpha=4, target_modules=ALL, exclude_modules=r".*layers\.[02]\..*(k|o|up)_proj"), {}
    # PEFT replaces the word by names when it saves; other exporters keep it, and PEFT reads it back.
    yield "all_linear_rank_1", LLAMA, F32, dict(r=1, lora_alpha=2, target_modules="all-linear"), {"target_modules": "all-linear"}
    yield "regex", LLAMA, F32, dict(r=4, lora_alpha=8, target_modules=r".*layers\.(0|3)\..*\.(q_proj|up_proj)"), {}
    one = r"model\.layers\.2\.self_attn\.k_proj"
    yield "rank_256", LLAMA, BF16, dict(r=256, lora_alpha=16, target_modules=one), {}
    ladder = dict(r=9, lora_alpha=20, target_modules=["k_proj", "v_proj"])
    yield "ranks_1_to_32", LLAMA, BF16, dict(rank_pattern=dict(zip(LADDER_NAMES, LADDER_LOW)), **ladder), {}
    yield "ranks_31_to_255", LLAMA, F16, dict(rank_pattern=dict(zip(LADDER_NAMES, LADDER_HIGH)), **ladder), {}
    yield "rslora", LLAMA, F32, dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True), {}
    patterns = dict(
        # The first match counts, so an entry can shadow a later one. PEFT sorts the keys when it saves: patterns
        # that overlap must be in that order already, or the file means something else than the model it came from.
        rank_pattern={r".*[02]\.mlp\.down_proj": 7, "down_proj": 3, "model.layers.1.mlp.up_proj": 1, "q_proj": 2},
        alpha_pattern={r"(gate|down)_proj": 20, r".*layers\.3\..*": 32, "k_proj": 6.5, "layers.3.mlp.up_proj": 1},
    )
    yield "patterns", LLAMA, F32, dict(r=4, lora_alpha=8, target_modules=ALL, **patterns), {}
    yield "patterns_rslora", LLAMA, BF16, dict(r=4, lora_alpha=8, target_modules=ALL, use_rslora=True, **patterns), {}
    yield "dora_attention", LLAMA, F32, dict(r=4, lora_alpha=8, target_modules=ATTENTION, use_dora=True), {}
    yield "dora_mlp", LLAMA, F32, dict(r=4, lora_alpha=8, target_modules=MLP, use_dora=True), {}
    yield "dora_rslora_patterns", LLAMA, BF16, dict(r=4, lora_alpha=8, target_modules=ALL, use_dora=True, use_rslora=True, **patterns), {}
    yield "qwen2_qkv", QWEN, F32, dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"]), {}
    yield "qwen2_all_linear_rslora", QWEN, BF16, dict(r=2, lora_alpha=4, target_modules="all-linear", use_rslora=True), {"target_modules": "all-linear"}
    yield "qwen2_dora_qkv", QWEN, F32, dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], use_dora=True), {}
    yield "qwen2_dora_rslora", QWEN, F16, dict(r=3, lora_alpha=8, target_modules=ALL, use_dora=True, use_rslora=True), {}
    yield "qwen2_dora_half_regex", QWEN, BF16, dict(r=4, lora_alpha=8, target_modules=r".*layers\.[13]\.(self_attn\.[kv]|mlp\.down)_proj", use_dora=True), {}


def load(models, name):
    # Eager attention: the plain formula, not a fused kernel.
    return AutoModelForCausalLM.from_pretrained(models / name, dtype=F32, attn_implementation="eager").eval()


def randomise(model, name):
    """Strong random weights: each delta is about 0.7 of the base layer's output, magnitudes move by up to 30 %."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(like, std):
        return (torch.randn(like.shape, generator=generator, dtype=F32) * std).to(like.dtype)

    for _, layer in sorted((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.data.copy_(normal(a, 1 / math.sqrt(a.shape[1])))
        b.data.copy_(normal(b, 0.7 / (layer.scaling["default"] * math.sqrt(a.shape[0]))))
        if layer.use_dora.get("default", False):
            magnitude = layer.lora_magnitude_vector["default"].weight
            factor = 0.7 + 0.6 * torch.rand(magnitude.shape, generator=generator)
            magnitude.data.copy_(layer.get_base_layer().weight.norm(dim=1) * factor)


def make_adapter(models, folder, name, base, dtype, fields, rewritten):
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields)
    model = peft.get_peft_model(load(models, base), config, autocast_adapter_dtype=False)
    randomise(model, name)
    for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    # The path of the base on the machine that made it says nothing; sets come out in any order.
    config.update(base_model_name_or_path=base, **rewritten)
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2) + "\n")


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0, -1]


def difference(model, like):
    return (logits(model) - like).abs().max().item()


def scale_biases_too(model):
    """The wrong order of DoRA and bias, to show that the goldens tell it apart: the bias goes inside the scale."""
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        bias = layer.get_base_layer().bias
        if bias is not None and layer.use_dora["default"]:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            whole = layer.get_base_layer().weight + layer.scaling["default"] * b @ a
            bias.data *= layer.lora_magnitude_vector["default"].weight.data / whole.detach().norm(dim=1)


def make_case(models, name, base, dtype, fields, rewritten):
    folder = OUT / name
    make_adapter(models, folder, name, base, dtype, fields, rewritten)
    model = peft.PeftModel.from_pretrained(load(models, base), folder).eval()
    found = logits(model)
    case = {"name": name, "base": base, "logits": [round(x, 6) for x in found.tolist()]}
    case["modules"] = sum(isinstance(m, LoraLayer) for m in model.modules())
    case["base_difference"] = round((logits(load(models, base)) - found).abs().max().item(), 4)
    if fields.get("use_dora") and base == QWEN:
        scale_biases_too(model)
        case["bias_order_difference"] = round(difference(model, found), 4)
        model = peft.PeftModel.from_pretrained(load(models, base), folder).eval()
    case["float64_difference"] = float(f"{difference(model.double(), found.double()):.2g}")
    return case


def main():
    models = pathlib.Path(sys.argv[1])
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    cases = [make_case(models, *kind) for kind in kinds()]
    goldens = {
        "made_by": "tests/python/make_peft_goldens.py",
        "versions": {
            "python": sys.version.split()[0],
            **{m.__name__: m.__version__ for m in (torch, transformers, peft, safetensors)},
        },
        "prompt": PROMPT,
        "models": {
            name: {
                "safetensors_blake3": blake3.blake3((models / name / "model.safetensors").read_bytes()).hexdigest(),
                "logits": [round(x, 6) for x in logits(load(models, name)).tolist()],
            }
            for name in (LLAMA, QWEN)
        },
    }
    # One case a line, so that a diff shows which kinds changed.
    head = json.dumps(goldens, indent=1)[:-2]
    body = ",\n".join("  " + json.dumps(case, separators=(",", ":")) for case in cases)
    (OUT / "goldens.json").write_text(f'{head},\n "cases": [\n{body}\n ]\n}}\n')
    for case in cases:
        print(*(f"{k}={v}" for k, v in case.items() if k != "logits"))


main()
