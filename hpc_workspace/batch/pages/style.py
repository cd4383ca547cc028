"""The page's style sheet: light, dark and on paper.

The colours are told apart with any of the usual kinds of colour blindness, after Paul Tol's qualitative schemes
(personal.sron.nl/~pault, technical note SRON/EPS/TN/09-002): what is done is a calm blue, the agent's own failures are
sand, what was lost to the infrastructure is reds and purples; every mark says its outcome in words as well.
"""

from __future__ import annotations

_LIGHT = {
    "paper": "#ffffff", "panel": "#f6f7f9", "ink": "#1b1f24", "soft": "#5c6670", "rule": "#dfe3e8", "link": "#0b57a4",
    "good": "#1d6f42", "bad": "#a3312b", "life": "#e9edf1", "hatch": "#8d99a5",
    "done": "#6f9bc8", "agent": "#e0a526", "task_timeout": "#7a5c00", "image": "#882255", "start": "#cc6677",
    "lost": "#d0391f", "oom": "#7d1f78", "preempted": "#332288", "node_fail": "#1b1f24", "time_limit": "#117755",
    "cancelled": "#87919b", "running": "#88ccee",
    "ph-image": "#882255", "ph-launch": "#cc6677", "ph-wait": "#ddb95f", "ph-connect": "#44aa99", "ph-agent": "#6f9bc8",
    "ph-close": "#87919b",
}  # fmt: skip
_DARK = {
    "paper": "#14171b", "panel": "#1c2026", "ink": "#e6e9ed", "soft": "#9aa5b1", "rule": "#343b44", "link": "#7db8f5",
    "good": "#6fcf97", "bad": "#ff8a80", "life": "#2a3038", "hatch": "#77828e",
    "done": "#4f7fb3", "agent": "#f0b93a", "task_timeout": "#a3781c", "image": "#ff9ecb", "start": "#c2244f",
    "lost": "#ff6b4a", "oom": "#e6b3f0", "preempted": "#b3a6ff", "node_fail": "#f2f4f6", "time_limit": "#4dc69f",
    "cancelled": "#8b96a1", "running": "#88ccee",
    "ph-image": "#ff9ecb", "ph-launch": "#e08a97", "ph-wait": "#d9b75e", "ph-connect": "#4fb9a7", "ph-agent": "#4f7fb3",
    "ph-close": "#8b96a1",
}  # fmt: skip
_OUTCOMES = (
    "done", "agent", "task_timeout", "image", "start", "lost", "oom", "preempted", "node_fail", "time_limit",
    "cancelled", "running",
)  # fmt: skip
_PHASES = ("image", "launch", "wait", "connect", "agent", "close")

_RULES = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .4rem 0; max-width: 52rem; }
a { color: var(--link); }
td a { display: inline-block; max-width: 100%; }
.lead { margin-top: 1rem; }
.soft, .note { color: var(--soft); }
.note { font-size: .87rem; }
.verdict { margin: .8rem 0 1rem; padding: .7rem 1rem; border-left: 5px solid var(--bad); background: var(--panel); }
.verdict.good { border-color: var(--good); }
.verdict strong { color: var(--bad); }
.verdict.good strong { color: var(--good); }
.verdict ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.tile { background: var(--panel); padding: .7rem 1rem; border-radius: 6px; border-top: 4px solid var(--soft); }
.tile b { display: block; font-size: 1.9rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: .15rem 2rem; margin: 1rem 0; }
dl div { display: flex; gap: .6rem; min-width: 0; }
dt { color: var(--soft); flex: none; }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .28rem .8rem .28rem 0; vertical-align: top; border-bottom: 1px solid var(--rule);
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; padding-right: 1.4rem; }
tr.group td { font-weight: 600; padding-top: .9rem; }
td code, pre { font: .85rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: .3rem 0; padding: .6rem .8rem; background: var(--panel); white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); font-size: .87rem; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .45em; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .87rem; margin: .4rem 0; }
.legend svg { width: .9em; height: .9em; margin-right: .4em; vertical-align: -.08em; }
svg.plot { display: block; width: 100%; height: auto; margin: .5rem 0; }
svg.plot text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--ink); }
svg.plot text.mark { fill: var(--soft); }
svg.plot .grid { stroke: var(--rule); stroke-width: 1; }
svg.plot .gap { fill: var(--panel); }
svg.plot .life { fill: var(--life); }
svg.plot a rect:hover { stroke: var(--ink); stroke-width: 1.5; }
svg.plot .hatch, .legend .hatch { stroke: var(--hatch); stroke-width: 1.2; fill: none; }
svg.plot .had { fill: var(--life); stroke: var(--hatch); stroke-width: 1; }
svg.plot .busy { fill: var(--done); }
svg.plot .dots { stroke: var(--done); stroke-width: 4; stroke-linecap: round; stroke-opacity: .55; fill: none; }
svg.plot .median { fill: none; stroke: var(--ink); stroke-width: 2; }
svg.plot .p95 { fill: none; stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 6 4; }
svg.plot .limit { stroke: var(--bad); stroke-width: 2; stroke-dasharray: 6 3; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  svg.plot, tr, .tile, .verdict, .drawn { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  a { color: inherit; text-decoration: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def sheet() -> str:
    """The style sheet; there is neither `<` nor `&` in it."""
    outcomes = "".join(f".o-{name} {{ fill: var(--{name}); background: var(--{name}); }}\n" for name in _OUTCOMES)
    phases = "".join(f".p-{name} {{ fill: var(--ph-{name}); background: var(--ph-{name}); }}\n" for name in _PHASES)
    dark = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(_DARK)} }} }}\n"
    return f":root {{ color-scheme: light dark; {_variables(_LIGHT)} }}\n{dark}{_RULES}{outcomes}{phases}"


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
