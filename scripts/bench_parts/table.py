"""From runs to the figures that are compared: medians over rounds, ratios to rivals, fractions of the limit."""

from statistics import median

from . import limits

# Workloads whose figure is a rate, with the place of the figure in a report.
RATES = {"W1": "output_tokens_per_s", "W2": "output_tokens_per_s", "W3": "output_tokens_per_s",
         "W3-4": "output_tokens_per_s", "W3-mixed": "output_tokens_per_s",
         "W4": "output_tokens_per_s", "W4-1000": "output_tokens_per_s", "W5": "tokens_per_s"}


def _median(runs, pick):
    values = [pick(run["report"]) for run in runs]
    return median(values) if values else None


def rates(runs, servers):
    """{workload: {server: tokens per second}}, medians over rounds."""
    found = {}
    for workload, key in RATES.items():
        for server in servers:
            mine = [run for run in runs if run["workload"] == workload and run["server"] == server]
            if mine:
                found.setdefault(workload, {})[server] = _median(mine, lambda report: report["all"][key])
    return found


def render(runs, servers, machine):
    """The table as Markdown lines."""
    out = ["| workload | server | tok/s | ours / it | of limit | TTFT p50 / p95 ms | per token p50 ms | gap p95 ms "
           "| speed Jain | failed, unfinished | CPU s per 1000 tok (generator s) | peak RSS MiB |",
           "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    found = rates(runs, servers)
    for workload, row in found.items():
        limit = limits.tokens_per_s(machine, workload)
        for server, rate in row.items():
            mine = [run for run in runs if run["workload"] == workload and run["server"] == server]

            def mid(*path):
                def pick(report):
                    for key in path:
                        report = report[key]
                    return report
                return _median(mine, pick)

            bad = [sum(run["report"]["all"][key] for run in mine) for key in ("n_failed", "n_unfinished")]
            ratio = f"{row[servers[0]] / rate:.2f}" if server != servers[0] and servers[0] in row else ""
            part = f"{rate / limit:.0%}" if limit else ""
            out.append(
                f"| {workload} | {server} | {rate:.1f} | {ratio} | {part} | {mid('all', 'ttft_ms', 'p50'):.0f} / "
                f"{mid('all', 'ttft_ms', 'p95'):.0f} | {mid('all', 'per_token_ms', 'p50'):.2f} | "
                f"{mid('all', 'gap_ms', 'p95'):.1f} | {mid('fairness', 'speed_jain'):.3f} | {bad[0]}, {bad[1]} | "
                f"{mid('cpu', 'server_s_per_1000_output_tokens'):.2f} ({mid('cpu', 'generator_s'):.2f}) | "
                f"{mid('cpu', 'server_memory', 'rss_peak_mib'):.0f} |")
    return out + _special(runs, servers, machine)


def _special(runs, servers, machine):
    out = []
    for server in servers:
        mine = [run for run in runs if run["server"] == server]
        one = [run for run in mine if run["workload"] == "W1"]
        if one:
            per_token = _median(one, lambda report: report["all"]["per_token_ms"]["p50"])
            limit = limits.one_stream_decode_per_s(machine)
            out.append(f"W1 {server}: decode alone {1e3 / per_token:.0f} tok/s, {1e3 / per_token / limit:.0%} of "
                       f"{limit:.0f} (reading the weights as we store them)")
        beside = {v: [r for r in mine if r["workload"] == "W5+" and r["variant"] == v] for v in ("alone", "beside")}
        if all(beside.values()):
            for p in ("mean", "p50", "p95"):
                alone = _median(beside["alone"], lambda report: report["all"]["gap_ms"][p])
                with_it = _median(beside["beside"], lambda report: report["groups"]["runner"]["gap_ms"][p])
                out.append(f"W5+ {server}: a running stream's gap {p} {alone:.1f} -> {with_it:.1f} ms beside prefill "
                           f"({with_it / alone:.2f} times)")
        for workload in ("W1", "W2", "W3"):
            out += _elsewhere(workload, server, [run for run in mine if run["workload"] == workload])
        first = [run for run in mine if run["workload"] == "W6"]
        if first:
            once, again = (_median(first, lambda report: report["groups"][g]["ttft_ms"]["p50"])
                           for g in ("first", "again"))
            p95 = _median(first, lambda report: report["groups"]["first"]["ttft_ms"]["p95"])
            out.append(f"W6 {server}: TTFT first use {once:.1f} ms (p95 {p95:.1f}), again {again:.1f} ms, "
                       f"difference {once - again:.1f} ms")
        out += _flood(server, [run for run in mine if run["workload"] == "W7"])
    return out


def _elsewhere(workload, server, runs):
    """CPU time outside the threads that compute: our engine thread (forward pass, sampling, planning) and its
    kernel workers. Other servers do not name their threads so."""
    def share(report):
        threads = report["cpu"]["server_threads_s"]
        inside = sum(s for name, s in threads.items() if name.startswith(("engine", "kernel")))
        return 1 - inside / max(sum(threads.values()), 1e-9) if inside else 0
    if server != "tenantry" or not runs:
        return []
    return [f"{workload} {server}: {_median(runs, share):.1%} of the CPU time outside engine and kernel threads"]


def _flood(server, runs):
    out = []
    for base in ("absent", "share"):
        pairs = [(a["report"], b["report"]) for a in runs for b in runs
                 if a["variant"] == base and b["variant"] == "flood" and a["round"] == b["round"]]
        if not pairs:
            continue
        # Without the ninth tenant there is one group only, and it is all.
        others = [(a["groups"].get("others", a["all"]), b["groups"]["others"]) for a, b in pairs]
        for name, p in (("ttft_ms", "p95"), ("gap_ms", "p95"), ("gap_ms", "p50")):
            usable = [(a[name][p], b[name][p]) for a, b in others if a[name][p] > 0]
            if usable:
                ratios = sorted(b / a for a, b in usable)
                out.append(f"W7 {server}: others' {name} {p}, flood against {base}: median ratio "
                           f"{median(ratios):.2f} (of {len(ratios)}: {ratios[0]:.2f} to {ratios[-1]:.2f}); "
                           f"{median(a for a, _ in usable):.1f} -> {median(b for _, b in usable):.1f} ms")
        unfinished = sum(b["n_unfinished"] for _, b in others)
        out.append(f"W7 {server}: others' unfinished under flood {unfinished} of {sum(b['n_requests'] for _, b in others)}")
    return out
