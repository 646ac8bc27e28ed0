"""Tokens per second of every server and workload as an SVG file: bars side by side, each workload scaled to its
own largest value, the machine's limit as a line. Written by hand, because a bar chart needs no library."""

from html import escape

COLOURS = ["#1f6f8b", "#c97b2a", "#7a5195", "#6b8e23", "#888888", "#444444"]


def bars(title, workloads, servers, values, limits):
    """`values[workload][server]` and `limits[workload]` in tokens per second; either may lack entries."""
    bar, gap, left, wide = 18, 26, 110, 520
    out, y = [], 50
    for workload in workloads:
        row = values.get(workload, {})
        limit = limits.get(workload)
        most = max([*row.values(), limit or 0, 1e-9])
        out.append(f'<text x="8" y="{y + 14}" font-weight="bold">{escape(workload)}</text>')
        top = y
        for place, server in enumerate(servers):
            if server not in row:
                continue
            width = wide * row[server] / most
            out.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{bar - 3}" '
                       f'fill="{COLOURS[place % len(COLOURS)]}"/>')
            out.append(f'<text x="{left + width + 6:.1f}" y="{y + 12}">{escape(server)} {row[server]:.0f}</text>')
            y += bar
        if limit:
            x = left + wide * limit / most
            out.append(f'<line x1="{x:.1f}" y1="{top - 3}" x2="{x:.1f}" y2="{y}" stroke="#c00" stroke-dasharray="4 3"/>')
            out.append(f'<text x="{x + 4:.1f}" y="{top - 5}" fill="#c00" font-size="10">limit {limit:.0f}</text>')
        y += gap
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 180}" height="{y}" '
            f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
            f'<text x="8" y="20" font-size="15">{escape(title)}</text>{"".join(out)}</svg>\n')
