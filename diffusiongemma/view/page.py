"""Writes frames as a self-contained HTML page."""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

from diffusiongemma.view.frames import QUIET, Frame, css, legend


def write_html(path: Path, frames: Sequence[Frame], title: str, frame_seconds: float) -> None:
    """Writes a page with the frames, a slider and a button; the arguments are as in `write_gif`."""
    contents = [
        {
            'caption': frame.caption,
            'cells': [[cell.text, cell.state, css(cell.color)] for cell in frame.cells],
        }
        for frame in frames
    ]
    words = ''.join(
        f'<span style="color:{css(color or QUIET)}">{html.escape(text)}</span>'
        for text, color in legend()
    )
    values = {
        'TITLE': html.escape(title),
        'LEGEND': words,
        'PAUSE': str(round(1000 * frame_seconds)),
        'FRAMES': json.dumps(contents).replace('<', '\\u003c'),  # '</script>' would end the script
    }
    page = re.sub('|'.join(values), lambda name: values[name[0]], _PAGE)
    Path(path).write_text(page, encoding='utf-8')


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>TITLE</title>
<style>
  body { background: #0d1117; color: #8b949e; font: 16px/1.5 monospace; max-width: 50em;
         margin: 2em auto; padding: 0 1em }
  h1 { color: #79c0ff; font-size: 1em }
  #text { white-space: pre-wrap; min-height: 9em }
  .refused { text-decoration: line-through }
  input { width: 70% }
</style>
<h1>TITLE</h1>
<div id="text"></div>
<p id="caption"></p>
<p><button id="play">pause</button> <input id="frame" type="range" min="0" value="0"></p>
<p>LEGEND</p>
<script>
const frames = FRAMES;
const [text, caption, play, slider] = ['text', 'caption', 'play', 'frame'].map(
  (id) => document.getElementById(id));
let playing = true;
slider.max = frames.length - 1;
function draw() {
  const frame = frames[slider.value];
  text.replaceChildren(...frame.cells.map(([word, state, color]) => {
    const span = document.createElement('span');
    span.textContent = word;
    span.className = state;
    span.style.color = color;
    return span;
  }));
  caption.textContent = frame.caption;
}
function setPlaying(value) {
  playing = value;
  play.textContent = playing ? 'pause' : 'play';
}
slider.oninput = () => { setPlaying(false); draw(); };
play.onclick = () => {
  if (!playing && +slider.value === frames.length - 1) slider.value = 0;
  setPlaying(!playing);
  draw();
};
setInterval(() => {
  if (!playing) return;
  if (+slider.value === frames.length - 1) return setPlaying(false);
  slider.value = +slider.value + 1;
  draw();
}, PAUSE);
draw();
</script>
</html>
"""
