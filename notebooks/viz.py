"""Pictures of the workshop: token strips, a table of a group, curves. Green is A > 0, red is A < 0, signs for grey."""

import html

from IPython.display import HTML
from matplotlib import pyplot as plt


def color(value: float, largest: float) -> str:
    """A background: green above 0, red below, stronger with size. The red is darker, so that grey print tells them."""
    share = min(1.0, abs(value) / largest) if largest else 0.0
    red, green, blue = (46, 160, 67) if value >= 0 else (200, 40, 40)
    return f"rgba({red},{green},{blue},{0.1 + 0.5 * share if value else 0:.2f})"


def strip(tokens: list[str], values: list[float], largest: float | None = None) -> str:
    """One row of tokens as HTML, each with its value as colour and as tooltip."""
    largest = max(map(abs, values), default=0.0) if largest is None else largest
    spans = "<wbr>".join(
        f'<span title="{value:+.3g}" style="background:{color(value, largest)};border:1px solid #bbb;padding:1px 3px">'
        f"{html.escape(token)}</span>"
        for token, value in zip(tokens, values, strict=True)
    )
    return f'<div style="font-family:monospace;line-height:1.9;color:inherit">{spans}</div>'


def group_table(group: list, tokenizer) -> HTML:
    """The completions of one prompt, `Rollout`s or rows of rollouts.jsonl: tokens coloured by advantage."""
    group = [r if isinstance(r, dict) else vars(r) | {"completion": r.text, "length": r.length} for r in group]
    largest = max(abs(r["advantage"]) for r in group)
    rows = ""
    for r in group:
        tokens = tokenizer.tokenize(r["completion"]) + [tokenizer.eos_token] * (not r["truncated"])
        rows += f"<tr><td>{r['reward']:.2f}</td><td>{r['advantage']:+.2f}</td><td>{r['length']}</td>"
        colored = strip(tokens, [r["advantage"]] * len(tokens), largest)
        rows += f"<td style='text-align:left;max-width:44em'>{colored}</td></tr>"
    head = "<tr><th>reward</th><th>A</th><th>length</th><th style='text-align:left'>completion</th></tr>"
    return HTML(f"<p><code>{html.escape(group[0]['prompt'])}</code></p><table>{head}{rows}</table>")


def curves(runs: dict[str, list[list[dict]]], keys: list[str], yours: dict[str, list[dict]] | None = None):
    """One panel a metric, one colour an arm, one thin line a seed; `runs` is {arm: [rows of a seed, ...]}.

    `yours`, {name: rows}, are thick: what was run just now, beside what is recorded.
    """
    columns = min(3, len(keys))
    shape = (-(-len(keys) // columns), columns)
    figure, axes = plt.subplots(*shape, figsize=(3.6 * columns, 2.7 * shape[0]), layout="constrained", squeeze=False)
    lines = [(arm, rows, 1.0) for arm, seeds in runs.items() for rows in seeds]
    lines += [(name, rows, 2.6) for name, rows in (yours or {}).items()]
    names = list(dict.fromkeys(name for name, _, _ in lines))
    for axis, key in zip(axes.flat, keys, strict=False):
        for name, rows, width in lines:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            i = names.index(name)
            style = dict(color=f"C{i}", linestyle=("-", "--", ":", "-.")[i % 4], linewidth=width)
            label = name if name not in [line.get_label() for line in axis.lines] else None
            axis.plot([p[0] for p in points], [p[1] for p in points], label=label, **style)
        axis.set(title=key, xlabel="step")
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(keys) :]:
        axis.remove()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure
