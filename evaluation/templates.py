"""The pages as jinja2 templates: one style, no script, nothing from elsewhere."""

from __future__ import annotations

BASE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1b1d21; --paper: #fff; --soft: #5c6470; --line: #cdd2d9; --link: #1a5fa8;
  --dot: #2a6fbb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --paper: #14161a; --soft: #a4acb8; --line: #3b414b; --link: #8ab8f0;
  --dot: #6fb1ff; } }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
a { color: var(--link); } .soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin-bottom: 1.2rem; background: linear-gradient(90deg, var(--paper) 40%, transparent),
  linear-gradient(270deg, var(--paper) 40%, transparent) 100% 0, linear-gradient(90deg, var(--line), transparent),
  linear-gradient(270deg, var(--line), transparent) 100% 0; background-repeat: no-repeat;
  background-size: 3rem 100%, 3rem 100%, .8rem 100%, .8rem 100%; background-attachment: local, local, scroll, scroll; }
.card .scroll { margin: .5rem 0 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  overflow-wrap: normal; white-space: nowrap; }
th[scope=row], th:first-child, .text { text-align: left; } caption { text-align: left; font-weight: 600; }
td span, th span { display: block; font-weight: normal; color: var(--soft); font-size: .85rem; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; max-width: 100%; overflow-x: auto; }
svg { max-width: max(100%, 36rem); height: auto; } .fit svg { max-width: 100%; }
svg a:hover, svg a:focus { opacity: .6; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: .4rem; padding: .7rem; min-width: 0; }
.card:target { outline: 3px solid var(--link); } .card h3, .card h4 { margin: 0 0 .4rem; font-size: 1rem; }
summary { cursor: zoom-in; list-style: none; } summary::-webkit-details-marker { display: none; }
summary img { display: block; height: 9rem; max-width: 100%; object-fit: contain; }
summary.pair { display: flex; gap: .4rem; } summary.pair img { width: 50%; min-width: 0; flex: 1 1 0; }
.card:has(details[open]) { grid-column: 1 / -1; } details[open] img { width: 100%; height: auto; max-width: 40rem; }
.tables { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: flex-start; } .tables .scroll { max-width: 100%; }
.tables th, .tables td, .card th, .card td { padding: .2rem .4rem; }
.card th, .card td { padding: .2rem .25rem; font-size: .85rem; }
.card th { white-space: normal; } .card thead th { vertical-align: bottom; }
@media (max-width: 30rem) { th, td { padding: .2rem .3rem; font-size: .85rem; } th { white-space: normal; }
  td span { font-size: .75rem; } }
@media print { :root { color-scheme: light; --ink: #000; --paper: #fff; --soft: #333; --line: #888; --link: #000;
  --dot: #333; }
  body { padding: 0; font-size: .8rem; } h2, h3, h4, caption { break-after: avoid; } nav { display: none; }
  .card, figure, tr { break-inside: avoid; } .plots, .tables { display: block; }
  .scroll { overflow: visible; background: none; }
  figure { display: inline-block; vertical-align: top; } .cards { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .card { padding: .3rem; } .card h3, .card h4 { font-size: .75rem; } figure svg { max-width: 100%; }
  th, td { padding: .1rem .35rem; font-size: .68rem; } th, .text { white-space: normal; }
  .text, th[scope=row] { overflow-wrap: anywhere; }
  .card th, .card td { padding: .1rem .15rem; font-size: .6rem; } .card th[scope=row] { overflow-wrap: break-word; }
  td span { font-size: .62rem; } summary img { max-width: 100%; } }
</style>
</head>
<body>
{% block body %}{% endblock %}
</body>
</html>
"""

REPORT = """{% extends "base" %}
{% block body %}
<header>
<h1>{{ summary.title }}</h1>
<p>{{ summary.cases }} case{{ "" if summary.cases == 1 else "s" }}{% if summary.failures %},
{{ summary.failures | length }} more could not be scored{% endif %}. Model selected by: {{ summary.selection }}.</p>
{% if summary.postprocess != "none" %}
<p><strong>Post-processed:</strong> the largest connected component of each predicted class, nothing else of it.</p>
{% endif %}
<nav><a href="#results">Results</a> · <a href="#spread">Every case</a> · <a href="#cases">Worst cases first</a> ·
{% if odd %}<a href="#odd">Missed, false alarms, absent</a> ·{% endif %} <a href="#about">Rules and versions</a></nav>
</header>
<main>
<h2 id="results">Results</h2>
<p class="soft">Mean ± standard deviation, below it the 95 % interval of the mean over the cases (BCa bootstrap, 10 000
resamples, fixed seed) and N.{% if few %} <strong>Caution:</strong> with fewer than {{ few_cases }} cases such intervals
are too narrow; at N = 12 a nominal 95 % covered the true mean 81 % of the time in a simulation.{% endif %}</p>
<div class="tables">
{% for table in tables %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ table.name }}"><table>
<caption>{{ table.name }}</caption>
<thead><tr><th scope="col">{{ table.corner }}</th>
{% for head in table.heads %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, cells in table.lines %}
<tr><th scope="row">{{ name }}</th>{% for mean, ends, n in cells %}<td>{{ mean }}<span>{{ ends }} N {{ n }}</span></td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
</div>
{% if published %}
<p>{{ summary.published.name }}: {% for line in published %}{{ line }}{{ "" if loop.last else "; " }}{% endfor %}.</p>
{% endif %}
<h2 id="spread">Every case</h2>
<p class="soft">Each point is a case and links to it.</p>
<div class="plots">
{% for title, plot in plots %}
<figure aria-label="Box plots of {{ title }} for each class">{{ plot | safe }}</figure>
{% endfor %}
</div>
{% if odd %}
<h2 id="odd">Missed, false alarms, absent</h2>
{% for status, number, found in odd %}
<h3>{{ status }} ({{ number }})</h3>
<ul>
{% for case, anchor, structures in found %}
<li><a href="#{{ anchor }}">{{ case }}</a>: {{ structures | join(", ") }}</li>
{% endfor %}
</ul>
{% endfor %}
{% endif %}
{% if summary.failures %}
<h2 id="failures">Could not be scored</h2>
<ul>
{% for reason in summary.failures.values() %}
<li>{{ reason }}</li>
{% endfor %}
</ul>
{% endif %}
<h2 id="cases">Worst cases first</h2>
<p class="soft">Predicted outlines are coloured, those of the label white and dashed. A picture opens larger.
{% if left_out %}The {{ left_out }} cases that scored best have none, to keep the page small.{% endif %}</p>
<div class="cards">
{% for card in cards %}
<section class="card" id="{{ card.anchor }}">
<h3>{{ card.name }}: {{ card.score }}</h3>
{% if card.picture %}
<details><summary><img alt="{{ card.alt }}" src="data:image/webp;base64,{{ card.picture }}"></summary></details>
{% endif %}
<div class="scroll" tabindex="0" role="region" aria-label="scores of {{ card.name }}"><table>
<thead><tr><th scope="col">class</th>{% for head in heads %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, status, cells in card.rows %}
<tr><th scope="row">{{ name }}{% if status != "computed" %} ({{ status }}){% endif %}</th>
{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
</section>
{% endfor %}
</div>
<h2 id="about">Rules and versions</h2>
<dl>
{% for name, protocol in summary.protocols.items() %}
<dt>{{ name }}</dt><dd>{{ protocol.rules }}.</dd>
{% endfor %}
<dt>computed by</dt><dd>{{ summary.engine }}; {% for name, number in summary.versions.items() %}
{{ name }} {{ number }}{{ "" if loop.last else "," }}
{% endfor %}</dd>
</dl>
</main>
{% endblock %}
"""

COMPARISON = """{% extends "base" %}
{% block body %}
<header>
<h1>{{ title }}</h1>
<p>{{ cases }} case{{ "" if cases == 1 else "s" }} in each evaluation, against the same labels under the same rules.
{% if few %}<strong>Caution:</strong> with fewer than {{ few_cases }} cases the intervals are too narrow.{% endif %}</p>
<div class="scroll" tabindex="0" role="region" aria-label="what is compared"><table>
<thead><tr><th scope="col">evaluation</th><th scope="col" class="text">title</th>
<th scope="col" class="text">model selected by</th><th scope="col" class="text">post-processed</th></tr></thead>
<tbody>
{% for one in results %}
<tr><th scope="row">{{ one.folder }}{% if loop.first %} (first){% endif %}</th>
<td class="text">{{ one.summary.title }}</td><td class="text">{{ one.summary.selection }}</td>
<td class="text">{{ one.summary.postprocess }}</td></tr>
{% endfor %}
</tbody></table></div>
<nav>{% for part in parts %}<a href="#{{ part.id }}">{{ part.second }}</a> · {% endfor %}<a href="#about">Rules and
versions</a></nav>
</header>
<main>
<p class="soft">Differences are second − first over the cases in which both have the metric, with the 95 % interval of
their mean (BCa bootstrap, 10 000 resamples, fixed seed). p is that of Wilcoxon's signed-rank test; Holm's correction is
over the classes of one metric.</p>
{% for part in parts %}
<h2 id="{{ part.id }}">{{ part.second }} against {{ part.first }}</h2>
<div class="tables">
{% for table in part.tables %}
<div class="scroll" tabindex="0" role="region" aria-label="differences{{ table.name }}"><table>
<caption>{{ table.caption }}</caption>
<thead><tr><th scope="col">{{ table.head }}</th><th scope="col">difference</th><th scope="col">N</th>
<th scope="col">p</th><th scope="col">p (Holm)</th><th scope="col">better</th><th scope="col">worse</th></tr></thead>
<tbody>
{% for line in table.lines %}
<tr><th scope="row">{{ line.name }}</th><td>{{ line.mean }}<span>{{ line.ends }}</span></td><td>{{ line.n }}</td>
<td>{{ line.p }}</td><td>{{ line.p_holm }}</td><td>{{ line.better }}</td><td>{{ line.worse }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
</div>
{% if part.undefined %}
<p class="soft">Left out, because one of the two has no such number: {{ part.undefined }} values.</p>
{% endif %}
<h3>Mean differences and every case</h3>
<p class="soft">First the means with their intervals, filled where the interval leaves out 0. Then each case as a point,
above the line where its {{ part.metric }} grew. The cases that changed most are links.</p>
<div class="plots">
{% for label, plot in part.plots %}
<figure class="fit" aria-label="{{ label }}">{{ plot | safe }}</figure>
{% endfor %}
</div>
<h3>Cases that changed most</h3>
{% if not part.cards %}
<p>{{ part.metric }} is the same in every case.</p>
{% elif part.pictured %}
<p class="soft">Predicted outlines are coloured, those of the label white and dashed; left the first, right the second.
A picture opens larger.</p>
{% endif %}
<div class="cards">
{% for card in part.cards %}
<section class="card" id="{{ card.anchor }}">
<h4>{{ card.name }}</h4>
{% if card.pictures %}
<details><summary class="pair">{% for alt, picture in card.pictures %}<img alt="{{ alt }}"
src="data:image/webp;base64,{{ picture }}">{% endfor %}</summary></details>
{% endif %}
<div class="scroll" tabindex="0" role="region" aria-label="change of {{ card.name }}"><table>
<thead><tr><th scope="col">{{ part.metric }}</th><th scope="col">first</th><th scope="col">second</th>
<th scope="col">change</th></tr></thead>
<tbody>
{% for name, before, after, change in card.rows %}
<tr><th scope="row">{{ name }}</th><td>{{ before }}</td><td>{{ after }}</td><td>{{ change }}</td></tr>
{% endfor %}
</tbody></table></div>
</section>
{% endfor %}
</div>
{% endfor %}
<h2 id="about">Rules and versions</h2>
<dl>
{% for name, protocol in results[0].summary.protocols.items() %}
<dt>{{ name }}</dt><dd>{{ protocol.rules }}.</dd>
{% endfor %}
{% for one in results %}
<dt>{{ one.folder }}</dt><dd>computed by {{ one.summary.engine }};
{% for name, number in one.summary.versions.items() %}{{ name }} {{ number }}{{ "" if loop.last else ", " }}{% endfor %}
</dd>
{% endfor %}
</dl>
</main>
{% endblock %}
"""

TEMPLATES = {"base": BASE, "report": REPORT, "comparison": COMPARISON}
