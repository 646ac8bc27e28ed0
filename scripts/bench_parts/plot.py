"""Plots as SVG files, written by hand, because bars and lines need no library.

`bars`: tokens per second of every server and workload side by side, each workload scaled to its own largest value, the
machine's limit as a line. `lines`: panels of figures over a size that grows by factors."""

import math
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


def lines(title, x_name, x, panels):
    """`panels`: (name, {series: a value for each of `x`}, whether the axis of values is logarithmic), two in a row."""
    wide, high, left, top = 330, 190, 60, 60
    out = []
    for place, (name, series, logarithmic) in enumerate(panels):
        x0, y0 = left + place % 2 * (wide + 110), top + place // 2 * (high + 80)
        values = [value for row in series.values() for value in row if value is not None and value > 0]
        least, most = (min(values) / 1.3, max(values) * 1.3) if logarithmic else (0, max(values, default=1) * 1.1)
        scale = math.log10 if logarithmic else float
        across = lambda at: x0 + wide * (math.log10(at) - math.log10(x[0])) / max(math.log10(x[-1] / x[0]), 1e-9)
        up = lambda value: y0 + high - high * (scale(value) - scale(least)) / max(scale(most) - scale(least), 1e-9)
        out.append(f'<text x="{x0}" y="{y0 - 10}" font-weight="bold">{escape(name)}</text>'
                   f'<rect x="{x0}" y="{y0}" width="{wide}" height="{high}" fill="none" stroke="#bbb"/>')
        for at in x:
            out.append(f'<text x="{across(at):.1f}" y="{y0 + high + 15}" text-anchor="middle">{at}</text>')
        for value in (least, most):
            out.append(f'<text x="{x0 - 5}" y="{up(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        for number, (label, row) in enumerate(series.items()):
            colour = COLOURS[number % len(COLOURS)]
            points = [(across(at), up(value), value) for at, value in zip(x, row) if value is not None and
                      (value > 0 or not logarithmic)]
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in points)
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            for px, py, value in points:
                out.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>'
                           f'<text x="{px + 5:.1f}" y="{py - 5:.1f}" font-size="9" fill="{colour}">{value:.3g}</text>')
            out.append(f'<text x="{x0 + 8 + number * 120}" y="{y0 + high + 32}" fill="{colour}">{escape(label)}</text>')
    height = top + math.ceil(len(panels) / 2) * (high + 80)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * (wide + 110) + left}" height="{height}" '
            f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#fff"/>'
            f'<text x="8" y="22" font-size="15">{escape(title)}, by {escape(x_name)}</text>{"".join(out)}</svg>\n')
