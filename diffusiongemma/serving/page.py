"""The web page at the root of a server, which shows a canvas live; it needs no other files."""

import html
import json
import re

from diffusiongemma.serving.protocol import Limits
from diffusiongemma.view.frames import css, legend


def page(name: str, limits: Limits) -> str:
    """Returns the HTML page of a model, with the decode modes that it supports."""
    scale = ''.join(
        f'<span style="color:{css(color) if color else "inherit"}">{html.escape(words)}</span>'
        for words, color in legend()
    )
    modes = ''.join(
        f'<option{" selected" if mode == limits.default_mode else ""}>{mode}</option>'
        for mode, reason in limits.modes.items()
        if reason is None
    )
    values = {
        '@NAME': html.escape(name),
        '@MODES': modes,
        '@LEGEND': scale,
        '@LIMIT': json.dumps(limits.max_new_tokens),
    }
    return re.sub('|'.join(values), lambda key: values[key[0]], _PAGE)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>@NAME</title>
<style>
  body { background: #0d1117; color: #8b949e; font: 16px/1.5 monospace; max-width: 50em;
         margin: 2em auto; padding: 0 1em }
  h1 { color: #79c0ff; font-size: 1em }
  #text { white-space: pre-wrap; overflow-wrap: anywhere; min-height: 9em }
  .refused { text-decoration: line-through }
  .error { color: #f85149 }
  textarea, input, select, button { background: #161b22; color: #e6edf3; font: inherit;
         border: 1px solid #30363d; padding: .2em .4em }
  textarea { width: 100%; box-sizing: border-box }
  input { width: 5em }
</style>
<h1>@NAME</h1>
<form id="form">
<p><textarea id="prompt" rows="2" aria-label="prompt">Paul is 17 years old. Omar is 4 years older \
than Paul. How old is Omar?</textarea></p>
<p><select id="mode" aria-label="mode">@MODES</select>
<label>temperature
<input id="temperature" type="number" min="0" max="5" step="any" value="0"></label>
<label>seed <input id="seed" type="number" min="0" value="0"></label>
<label>key <input id="key" type="password" autocomplete="off"></label>
<select id="colors" aria-label="colors"><option value="entropy">color: entropy</option>
<option value="runs">color: accepted runs</option></select>
<button id="go">run</button></p>
</form>
<div id="text"></div>
<p id="caption"></p>
<p>@LEGEND</p>
<script>
const [form, text, caption, go] = ['form', 'text', 'caption', 'go'].map(
  (id) => document.getElementById(id));
const value = (id) => document.getElementById(id).value;
const RUNS = ['#79c0ff', '#d2a8ff', '#56d364', '#e3b341'];
let aborter = null, runs = [], last = null;

function draw(frame) {
  last = frame;
  const settled = frame.cells.filter(([, state]) => state === 'settled').length;
  while (runs.length < settled) runs.push(null);
  const fresh = runs.indexOf(null);
  if (fresh >= 0) {
    const next = fresh ? runs[fresh - 1] + 1 : 0;
    runs = runs.map((run) => run === null ? next : run);
  }
  const byRun = value('colors') === 'runs';
  text.replaceChildren(...frame.cells.map(([word, state, color], place) => {
    const span = document.createElement('span');
    span.textContent = word;
    span.className = state;
    span.style.color = byRun && state === 'settled' ? RUNS[runs[place] % RUNS.length] : color;
    return span;
  }));
  caption.className = '';
  caption.textContent = `${frame.caption}, ${frame.rate}`;
}

function fail(message) {
  caption.className = 'error';
  caption.textContent = message;
}

async function run() {
  aborter = new AbortController();
  runs = [];
  text.replaceChildren();
  caption.className = '';
  caption.textContent = 'waiting; the first answer of a mode compiles';
  const headers = {'Content-Type': 'application/json'};
  if (value('key')) headers.Authorization = `Bearer ${value('key')}`;
  const response = await fetch('v1/frames', {
    method: 'POST', headers, signal: aborter.signal,
    body: JSON.stringify({
      messages: [{role: 'user', content: value('prompt')}],
      mode: value('mode'), temperature: +value('temperature'), seed: +value('seed'),
    }),
  });
  if (!response.ok) return fail((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = '';;) {
    const {done, value: part} = await reader.read();
    if (done) return;
    const events = (held + part).split('\\n\\n');
    held = events.pop();
    for (const event of events) {
      if (event === 'data: [DONE]') continue;
      const frame = JSON.parse(event.slice('data: '.length));
      frame.error ? fail(frame.error.message) : draw(frame);
    }
  }
}

form.onsubmit = async (event) => {
  event.preventDefault();
  if (aborter) return aborter.abort();
  go.textContent = 'stop';
  try {
    await run();
  } catch (error) {
    if (error.name !== 'AbortError') fail(error.message);
  }
  aborter = null;
  go.textContent = 'run';
};
document.getElementById('colors').onchange = () => last && draw(last);

// A link such as /?prompt=Hello&mode=lossless fills in the form and runs it.
const parameters = new URLSearchParams(location.search);
const invalid = [];
for (const [id, text] of parameters) {
  const field = ['prompt', 'mode', 'temperature', 'seed', 'colors'].includes(id)
    ? document.getElementById(id) : null;
  const before = field && field.value;
  if (field) field.value = text;
  if (!field || !field.value || !field.checkValidity()) {
    invalid.push(`${id}=${text}`);
    if (field) field.value = before;
  }
}
if (invalid.length) fail(`the link has invalid values: ${invalid.join(', ')}`);
else if (parameters.has('prompt')) form.requestSubmit();
</script>
</html>
"""
