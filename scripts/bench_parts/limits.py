"""What the machine allows: the probe's numbers and what follows from them for each workload.

The probe (`cargo run --release -p kernels --example limits`) times plain loops on all cores: reading memory, from a
buffer that no cache holds, and int8 multiply-adds. A multiply-add counts as two operations. From the model, SmolLM2-135M in GGUF Q4_1:

    layer_gop   = 0.212   operations of the layers' linear products for one token
    head_gop    = 0.057   operations of the vocabulary product, for tokens that are sampled only
    weight_gb   = 0.0964  bytes that one step reads: layers in Q4_1, head in Q8_0
    adapter_gb  = 0.0098  bytes of one rank-16 adapter on all seven products in f16, 3.6 % of the layers' operations

A step that reads G gigabytes and computes P operations takes at least max(G / read, P / int8), with all cores.
Prefill and decode are taken one after the other; reads and operations overlap perfectly within each. Attention,
norms, sampling, HTTP and the load generator are not counted, so that the limit is one nobody can reach:

    W1, W5  one request at a time: prefill of its prompt, then one step per further token
    W2      16 prompts, then steps of 16 rows
    W3      as W2, and every decode step reads 16 adapters (W3-4: four), the prefill each adapter once
    W4      as W3 with 32 rows; a step reads as many adapters as 32 draws of the law give, at most the slots
"""

import re
import subprocess

LAYER_GOP, HEAD_GOP, WEIGHT_GB, ADAPTER_GB, ADAPTER_OPS = 0.212, 0.057, 0.0964, 0.00977, 1.036
# Rows of a step in which prompts are read.
PREFILL_ROWS = 256


def probe(command):
    """The probe's line of limits as a dictionary; what else it would print is not waited for."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            found = re.match(r"limits: read ([\d.]+) GB/s from memory, int8 (\d+)[\d.]* GOP/s, f32 (\d+)", line)
            if found:
                read, int8, f32 = map(float, found.groups())
                return {"read_gb_per_s": read, "int8_gop_per_s": int8, "f32_gflop_per_s": f32}
    finally:
        process.terminate()
        process.communicate()
    raise RuntimeError(f"{command} printed no limits")


def _round_s(machine, n_requests, n_prompt, n_output, n_adapters):
    """Least seconds in which `n_requests` of this size can be answered together."""
    read, int8 = machine["read_gb_per_s"], machine["int8_gop_per_s"]
    layer = LAYER_GOP * (ADAPTER_OPS if n_adapters else 1)
    prompt_rows = n_requests * n_prompt
    prefill = max((-(-prompt_rows // PREFILL_ROWS) * WEIGHT_GB + n_adapters * ADAPTER_GB) / read,
                  (prompt_rows * layer + n_requests * HEAD_GOP) / int8)
    step = max((WEIGHT_GB + n_adapters * ADAPTER_GB) / read, n_requests * (layer + HEAD_GOP) / int8)
    return prefill + (n_output - 1) * step


def zipf_distinct(n_tenants, n_draws):
    """Expected number of different tenants in that many draws by Zipf's law with s = 1."""
    total = sum(1 / k for k in range(1, n_tenants + 1))
    return sum(1 - (1 - 1 / k / total) ** n_draws for k in range(1, n_tenants + 1))


def tokens_per_s(machine, workload):
    """The limit of a workload in the unit that the table has: output tokens per second, for W5 all tokens."""
    if workload == "W1":
        return 64 / _round_s(machine, 1, 96, 64, 0)
    if workload == "W2":
        return 16 * 64 / _round_s(machine, 16, 96, 64, 0)
    if workload in ("W3", "W3-mixed"):
        return 16 * 64 / _round_s(machine, 16, 96, 64, 16)
    if workload == "W3-4":
        return 16 * 64 / _round_s(machine, 16, 96, 64, 4)
    if workload in ("W4", "W4-1000"):
        n_tenants = 100 if workload == "W4" else 1000
        return 32 * 64 / _round_s(machine, 32, 96, 64, min(15, zipf_distinct(n_tenants, 32)))
    if workload == "W5":
        return (1024 + 8) / _round_s(machine, 1, 1024, 8, 0)
    return None


def one_stream_decode_per_s(machine):
    """Decoded tokens per second of one stream when nothing but reading the weights takes time."""
    return machine["read_gb_per_s"] / WEIGHT_GB
