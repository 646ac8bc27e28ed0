"""The workloads: what each asks of a server, as words for the load generator and a tenants file. Prompts have 96
tokens and answers 64 unless said otherwise; greedy, end of sequence ignored, no two prompts alike.

    W1       base, one stream                          W5  prefill: four streams of 1024 tokens in, 8 out
    W2       base, 16 streams                          W5+ one running stream, alone and beside W5
    W3       16 tenants with an adapter each           W6  first use of an adapter against its second
    W4       100 tenants by Zipf, 32 streams           W7  eight tenants with two streams; a ninth has none, two
    W4-1000  1,000 tenants by Zipf, 32 streams             or 32 streams
    W3-4     16 streams over four of W3's tenants      W3-mixed  as W3 with ranks from 4 to 64, as many bytes in all
"""

from dataclasses import dataclass, field


@dataclass
class Load:
    """One run of the generator."""

    tenants: list
    words: list = field(default_factory=list)
    # What distinguishes the runs of one workload.
    variant: str = ""


def bounds(seconds, drain, **more):
    words = ["--seconds", str(seconds), "--drain", str(drain), "--requests", "100000"]
    for key, value in more.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return words


def loads(workload, server, patience):
    """The runs of a workload on one server. `patience` stretches the time for slow servers."""
    tenants = [server.tenant(k) for k in range(server.n_adapters)]
    drain = 150
    if workload == "W1":
        return [Load([server.base()], bounds(8 * patience, drain, streams=1, warmup=1))]
    if workload == "W2":
        return [Load([server.base()], bounds(8 * patience, drain, streams=16, warmup=1))]
    if workload == "W3-4":
        return [Load([{**tenant, "streams": 4} for tenant in tenants[:4]],
                     bounds(12 * patience, drain, draw="pinned", warmup=1))]
    if workload in ("W3", "W3-mixed"):
        return [Load(tenants[:16], bounds(12 * patience, drain, draw="pinned", warmup=1))]
    if workload in ("W4", "W4-1000"):
        return [Load(tenants, bounds(15 * patience, drain, draw="zipf:1.0", streams=32))]
    if workload == "W5":
        return [Load([server.base()], bounds(8 * patience, drain, streams=4, warmup=1, **LONG))]
    if workload == "W5+":
        runner = {**server.base(), "name": "runner", "group": "runner", "output_tokens": 256}
        beside = {**server.base(), "name": "beside", "group": "beside", "streams": 4, "prompt_tokens": 1024,
                  "output_tokens": 8}
        words = bounds(8, drain, draw="pinned")
        return [Load([runner], words, "alone"), Load([runner, beside], words, "beside")]
    if workload == "W6":
        twice = [{**tenant, "group": group} for tenant in tenants[20:50] for group in ("first", "again")]
        words = ["--requests", str(len(twice)), "--seconds", "120", "--draw", "cycle", "--output-tokens", "8"]
        return [Load(twice, words)]
    if workload == "W7":
        others = [{**tenant, "group": "others", "streams": 2} for tenant in tenants[:8]]
        words = bounds(10 * patience, 30, draw="pinned", warmup=1)
        return [Load(others + ([{**tenants[8], "group": "flooder", "streams": n}] if n else []), words, variant)
                for n, variant in ((0, "absent"), (2, "share"), (32, "flood"))]
    raise ValueError(f"unknown workload {workload}")


LONG = {"prompt_tokens": 1024, "output_tokens": 8}
