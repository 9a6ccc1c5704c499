"""Tests the frames of a canvas and their display: terminal, text lines, GIF and web page."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling.state import SamplerOutput
from diffusiongemma.sampling.watch import Draft
from diffusiongemma.view import animation, frames, page, terminal

TOKENIZER = Tokenizer.load()
STOPS = TOKENIZER.stop_ids
TEXT = TOKENIZER.encode('Mia has 12 apples')[:4]
LIMIT = 12


def output(tokens, canvases, steps):
    padded = np.zeros((1, LIMIT), np.int32)
    padded[0, : len(tokens)] = tokens
    return SamplerOutput(
        padded, *(np.array([n]) for n in (len(tokens), steps, canvases, canvases, 0))
    )


def draft(before, step, tokens, entropies):
    noise = np.full((1, 4), TOKENIZER.unk_id) if step else np.array([tokens])
    return Draft(
        output=before,
        step=np.array(step),
        argmax=np.array([tokens]) if step else np.full((1, 4), -1),
        canvas=noise,
        entropies=np.array([entropies], np.float32),
        changing=np.array([bool(step)]),
    )


def watched(second, last):
    """Yields a canvas of two steps, then one of a single step whose `last` is committed."""
    nothing, one = output([], 0, 0), output(TEXT, 1, 2)
    newline = TOKENIZER.encode('\n')[0]
    yield draft(nothing, 0, [newline, TOKENIZER.pad_id, *TEXT[:2]], [math.inf] * 4)
    yield draft(nothing, 1, TEXT, [0.0, 0.7, 2.0, 5.0])
    yield draft(nothing, 2, TEXT, [0.0] * 4)
    yield draft(one, 0, TEXT, [math.inf] * 4)
    yield draft(one, 1, second, [0.1] * 4)
    yield output(TEXT + last, 2, 3)


def all_frames(second=TEXT, last=TEXT):
    return list(frames.frames(watched(second, last), TOKENIZER, STOPS))


def test_frames_follow_the_canvas_from_noise_to_commit():
    shown = all_frames()
    assert [(frame.canvas, frame.step) for frame in shown] == [
        (1, 0), (1, 1), (1, 2), (1, None), (2, 0), (2, 1), (2, None),
    ]  # fmt: skip
    assert [frame.tokens for frame in shown] == [0, 0, 0, 4, 4, 4, 8]
    assert [frame.denoising_steps for frame in shown] == [0, 1, 2, 2, 2, 3, 3]
    noise, first, *_, last = shown
    assert [cell.state for cell in noise.cells] == ['noise'] * 4
    assert [cell.text for cell in noise.cells][:2] == ['↵', frames.SPECIAL]
    assert first.mean_entropy == pytest.approx(7.7 / 4) and last.mean_entropy is None
    assert last.text == TOKENIZER.decode(TEXT + TEXT)
    assert all(a.seconds < b.seconds for a, b in zip(shown[:3], shown[1:4], strict=True))
    assert 'canvas 1: step 1, 1.92 nats | 0 tokens, 1 denoise pass' in first.caption
    assert first.rate == '- tokens/s' and float(last.rate.split()[0].replace(',', '')) > 0


def test_what_the_causal_pass_refuses_is_marked_unless_the_response_is_over():
    refused = all_frames(last=TEXT[:1])[-1]
    states = [cell.state for cell in refused.cells]
    assert states == ['settled'] * 5 + ['refused'] * 3 and '3 refused' in refused.caption
    stopped = all_frames([TEXT[0], STOPS[0], 0, 0], [TEXT[0], STOPS[0]])[-1]
    assert [cell.state for cell in stopped.cells] == ['settled'] * 6


def test_colors_go_from_certain_to_uncertain():
    green, amber, red = (frames.color_of(certainty) for certainty in (1.0, 0.5, 0.0))
    assert green[1] > green[0] and red[0] > red[1] and amber != green
    certain, uncertain = (frames.Cell('a', 'open', entropy) for entropy in (0.0, 9.0))
    assert certain.color == green and uncertain.color[0] > 240
    assert frames.Cell('a', 'open', math.log(4)).certainty == pytest.approx(0.25)
    assert frames.Cell('a', 'open', math.nan).color == red  # of a pass with NaN


def test_letters_of_several_tokens_are_whole_and_nothing_steers_the_terminal():
    tokens = [TOKENIZER._byte_ids[byte] for byte in '€\x1b'.encode()]
    settled = output(tokens, 1, 1)
    before = draft(output([], 0, 0), 1, [tokens[0]] * 4, [0.0] * 4)
    (*_, last) = frames.frames([before, settled], TOKENIZER, STOPS)
    assert last.text.startswith('€·') and '\x1b' not in last.text
    assert frames.printable('a\x1b[2J\tb\nc') == 'a·[2J·b\nc'


def test_a_terminal_gets_colors_and_anything_else_plain_lines():
    shown = all_frames()
    plain = io.StringIO()
    console = Console(file=plain, force_terminal=False, width=40, soft_wrap=True)
    assert terminal.show(iter(shown), console, 'How many?', 10.0) == shown
    lines = plain.getvalue().splitlines()
    assert len(lines) == len(shown) and '\x1b' not in plain.getvalue()
    assert lines[-1] == f'{shown[-1].caption}, {shown[-1].rate} | {shown[-1].text}'
    colored = io.StringIO()
    console = Console(file=colored, force_terminal=True, color_system='truecolor', width=100)
    assert terminal.show(iter(shown), console, '[How] many?', 0.0) == shown
    assert '[How] many?' in colored.getvalue()
    assert '38;2;{};{};{}'.format(*frames.color_of(1.0)) in colored.getvalue()


def test_a_gif_has_a_picture_for_every_frame_and_the_last_one_stays(tmp_path):
    shown = all_frames()
    animation.write_gif(tmp_path / 'a.gif', shown, 'How many apples? ' * 8, 0.2)
    with Image.open(tmp_path / 'a.gif') as gif:
        durations, pictures = [], []
        for place in range(gif.n_frames):
            gif.seek(place)
            durations.append(gif.info['duration'])
            pictures.append(np.asarray(gif.convert('RGB')).astype(int))
    assert len(pictures) == len(shown) and durations[0] == 200 and durations[-1] > 1000
    near = [(np.abs(p - frames.color_of(1.0)).max(axis=-1) < 24).sum() for p in pictures]
    assert near[2] - near[0] > 50  # certain tokens are green, noise is not
    with pytest.raises(ValueError, match='nothing to draw'):
        animation.write_gif(tmp_path / 'b.gif', [], '', 0.2)


def test_a_page_holds_all_frames_and_no_text_ends_its_script(tmp_path):
    shown = all_frames()
    cells = (frames.Cell('</script>FRAMES', 'settled'),)
    shown[-1] = dataclasses.replace(shown[-1], cells=cells)
    page.write_html(tmp_path / 'a.html', shown, '<b>PAUSE', 0.2)
    text = (tmp_path / 'a.html').read_text(encoding='utf-8')
    assert text.count('</script>') == 1 and '<h1>&lt;b&gt;PAUSE</h1>' in text
    data = json.loads(text.split('const frames = ')[1].split(';\n')[0])
    assert [frame['caption'] for frame in data] == [frame.caption for frame in shown]
    assert data[-1]['cells'][0][0] == '</script>FRAMES' and '}, 200);' in text
    assert 'http' not in text


def test_words_that_do_not_fit_open_a_line():
    cells = [frames.Cell(text, 'settled') for text in ('a' * 78, ' bc', ' d\n', 'e')]
    lines = animation._lines(cells)
    assert [[(column, text) for column, text, _ in line] for line in lines] == [
        [(0, 'a' * 78)], [(0, 'bc'), (2, ' d')], [(0, 'e')],
    ]  # fmt: skip
