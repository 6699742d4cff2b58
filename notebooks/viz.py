"""Pictures of the workshop: token strips, a table of a group, curves. Green is A > 0, red is A < 0, signs for grey."""

import html

from IPython.display import HTML
from matplotlib import pyplot as plt


def color(value: float, largest: float) -> str:
    """A background: green above 0, red below, stronger with size. The red is darker, so that grey print tells them."""
    share = min(1.0, abs(value) / largest) if largest else 0.0
    red, green, blue = (46, 160, 67) if value >= 0 else (200, 40, 40)
    return f"rgba({red},{green},{blue},{0.1 + 0.5 * share if value else 0:.2f})"


def strip(tokens: list[str], values: list[float], label: str = "", largest: float | None = None) -> str:
    """One row of tokens as HTML, each with its value as colour and as tooltip."""
    largest = max(map(abs, values), default=0.0) if largest is None else largest
    spans = "".join(
        f'<span title="{value:+.3g}" style="background:{color(value, largest)};border:1px solid #bbb;padding:1px 3px">'
        f"{html.escape(token)}</span>"
        for token, value in zip(tokens, values, strict=True)
    )
    return f'<div style="font-family:monospace;line-height:1.9;color:inherit">{html.escape(label)} {spans}</div>'


def group_table(rollouts: list, tokenizer) -> HTML:
    """The completions of one prompt: reward, advantage, length, tokens coloured by advantage."""
    largest = max((abs(r.advantage) for r in rollouts), default=0.0)
    rows = "".join(
        f"<tr><td>{r.reward:.2f}</td><td>{r.advantage:+.2f}</td><td>{r.length}</td><td style='text-align:left'>"
        + strip(tokenizer.convert_ids_to_tokens(r.completion_ids), [r.advantage] * r.length, "", largest)
        + "</td></tr>"
        for r in rollouts
    )
    head = "<tr><th>reward</th><th>A</th><th>length</th><th style='text-align:left'>completion</th></tr>"
    return HTML(f"<p><code>{html.escape(rollouts[0].prompt)}</code></p><table>{head}{rows}</table>")


def curves(runs: dict[str, list[list[dict]]], keys: list[str]):
    """One panel a metric, one colour an arm, one thin line a seed; `runs` is {arm: [rows of a seed, ...]}."""
    figure, axes = plt.subplots(1, len(keys), figsize=(3.4 * len(keys), 2.8), layout="constrained", squeeze=False)
    for axis, key in zip(axes[0], keys, strict=True):
        for i, (arm, seeds) in enumerate(runs.items()):
            for j, rows in enumerate(seeds):
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                style = dict(color=f"C{i}", linestyle=("-", "--", ":", "-.")[i % 4], linewidth=1)
                axis.plot(*zip(*points, strict=True), label=arm if j == 0 else None, **style)
        axis.set(title=key, xlabel="step")
        axis.grid(alpha=0.25)
    axes[0][0].legend(fontsize=8)
    return figure
