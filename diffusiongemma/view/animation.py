"""Writes frames as an animated GIF; needs the extra `view`."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffusiongemma.view.frames import QUIET, Cell, Color, Frame, color_of, legend

_BACKGROUND, _TITLE = (13, 17, 23), (121, 192, 255)
_COLUMNS, _FONT_SIZE, _MARGIN = 80, 15, 16
_LAST_SECONDS = 2.5  # how long the finished text is shown before the GIF repeats


def write_gif(path: Path, frames: Sequence[Frame], title: str, frame_seconds: float) -> None:
    """Writes an animated GIF that repeats.

    The font is DejaVu Sans Mono, which comes with matplotlib; characters that it lacks are boxes.

    Args:
      path: the path of the file.
      frames: the frames, at least one.
      title: the text above every picture, for example the prompt.
      frame_seconds: the duration of a frame in seconds.

    Raises:
      ValueError: if there are no frames.
    """
    if not frames:
        raise ValueError('Nothing was generated, so there is nothing to draw.')
    font = _font()
    height = max(len(_lines(frame.cells)) for frame in frames)
    palette = _palette()  # the same for all frames, so that the file only stores differences
    pictures = [
        _picture(frame, title, height, font).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    ]
    durations = [round(1000 * frame_seconds)] * (len(frames) - 1) + [round(1000 * _LAST_SECONDS)]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=False
    )


def _font() -> ImageFont.FreeTypeFont:
    from matplotlib.font_manager import FontProperties, findfont

    return ImageFont.truetype(findfont(FontProperties(family='DejaVu Sans Mono')), _FONT_SIZE)


def _palette() -> Image.Image:
    """Returns a palette with seven shades of every text color, for anti-aliased text."""
    texts = [QUIET, _TITLE, *(Cell('', state).color for state in ('settled', 'noise', 'refused'))]
    texts += [color_of(place / 20) for place in range(21)]
    shades = [
        tuple(round(b + share / 7 * (t - b)) for t, b in zip(text, _BACKGROUND, strict=True))
        for text in texts
        for share in range(1, 8)
    ]
    palette = Image.new('P', (1, 1))
    palette.putpalette([value for color in [_BACKGROUND, *shades] for value in color])
    return palette


def _picture(frame: Frame, title: str, num_lines: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    char, line = font.getlength('m'), round(1.5 * _FONT_SIZE)
    titles = textwrap.wrap(title, _COLUMNS) or ['']
    size = (
        round(2 * _MARGIN + _COLUMNS * char),
        2 * _MARGIN + line * (len(titles) + num_lines + 3),
    )
    picture = Image.new('RGB', size, _BACKGROUND)
    draw = ImageDraw.Draw(picture)

    def write(row: float, column: int, text: str, color: Color) -> None:
        draw.text((_MARGIN + column * char, _MARGIN + row * line), text, color, font)

    for row, text in enumerate(titles):
        write(row, 0, text, _TITLE)
    top = len(titles) + 0.5
    for row, runs in enumerate(_lines(frame.cells)):
        for column, text, cell in runs:
            write(top + row, column, text, cell.color)
            if cell.state == 'refused':
                y = _MARGIN + (top + row + 0.42) * line
                x = _MARGIN + column * char
                draw.line((x, y, x + len(text) * char, y), cell.color)
    write(top + num_lines + 0.5, 0, frame.caption, QUIET)
    column = 0
    for text, color in legend():
        write(top + num_lines + 1.5, column, text, color or QUIET)
        column += len(text)
    return picture


def _lines(cells: Sequence[Cell]) -> list[list[tuple[int, str, Cell]]]:
    """Returns lines of (column, text, cell); a token that does not fit starts a new line."""
    lines: list[list[tuple[int, str, Cell]]] = [[]]
    column = 0
    for cell in cells:
        for part, text in enumerate(cell.text.split('\n')):
            if part or column + len(text) > _COLUMNS:
                lines.append([])
                column, text = 0, text if part else text.lstrip(' ')
            if text:
                lines[-1].append((column, text, cell))
            column += len(text)
    return lines
