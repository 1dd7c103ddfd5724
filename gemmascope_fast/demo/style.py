"""The report's style sheet: no external font, script or image; light and dark."""

CSS = """
:root { --ink: #1c2330; --soft: #5b6575; --line: #e3e7ed; --page: #f6f7f9; --card: #fff;
  --ours: #0a7d78; --dense: #d9822b; --mark: 10 125 120; --good: #0a7d78; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b5; --line: #2c3442;
  --page: #12161d; --card: #1a202a; --ours: #3cc4bc; --dense: #f0a35a; --mark: 60 196 188;
  --good: #3cc4bc; --bad: #ff7b6b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 44px 0 6px; }
p { max-width: 78ch; margin: 6px 0 14px; }
.soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px;
  margin: 24px 0 10px; }
.tile, figure, .latent, .panel { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.tile { padding: 14px 18px; }
.tile b { display: block; font-size: 28px; line-height: 1.25; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.panel { padding: 6px 18px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 10px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
tr.ours td { font-weight: 600; color: var(--ours); }
ul.checks { list-style: none; padding: 0; margin: 14px 0; }
ul.checks li::before { content: "\\2713"; color: var(--good); font-weight: 700; margin-right: 9px; }
ul.checks li.fails::before { content: "\\2717"; color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 14px; }
.chart { max-width: 440px; margin-bottom: 14px; }
figure { margin: 0; padding: 12px 12px 4px; }
figcaption { font-size: 14px; font-weight: 600; padding: 0 4px 4px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: var(--soft); }
svg .label { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .curve { fill: none; stroke-linejoin: round; }
svg .curve.dense { stroke: var(--dense); stroke-width: 4; opacity: .45; }
svg .curve.ours { stroke: var(--ours); stroke-width: 1.6; }
svg .bar.dense { fill: var(--dense); opacity: .75; }
svg .bar.ours { fill: var(--ours); opacity: .9; }
.key { display: flex; gap: 22px; font-size: 13px; color: var(--soft); margin: 6px 0 12px; }
.key i { display: inline-block; width: 22px; height: 4px; border-radius: 2px; margin-right: 7px;
  vertical-align: middle; }
.key .ours { background: var(--ours); } .key .dense { background: var(--dense); }
.latents { columns: 2 440px; column-gap: 14px; }
.latent { break-inside: avoid; padding: 12px 16px 8px; margin: 0 0 14px; }
.latent header { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: baseline; }
.latent header b { font-size: 15px; } .latent header span { color: var(--soft); font-size: 13px; }
.tag { border: 1px solid var(--line); border-radius: 20px; padding: 0 9px; }
.passage { font: 13px/1.75 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  margin: 8px 0 0; padding: 6px 0 2px; border-top: 1px solid var(--line); max-width: none;
  overflow-wrap: anywhere; }
.passage mark { color: inherit; border-radius: 3px; padding: 1px 0;
  background: rgb(var(--mark) / var(--a)); }
.passage mark.peak { outline: 1.5px solid var(--ours); font-weight: 700; }
code { font-family: ui-monospace, Menlo, "DejaVu Sans Mono", monospace; font-size: .92em; }
"""
