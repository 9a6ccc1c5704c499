"""Shows frames in a terminal, in color and in place, or as lines of plain text elsewhere."""

import time
from collections.abc import Iterable

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from diffusiongemma.view.frames import Frame, legend


def show(
    frames: Iterable[Frame], console: Console, title: str, frame_seconds: float
) -> list[Frame]:
    """Shows frames as they are computed, each for at least `frame_seconds`.

    Args:
      frames: the frames of one response.
      console: the output; if it is not a terminal, every frame is printed as a plain line.
      title: the text above the response.
      frame_seconds: the pause after each frame on a terminal, to make a fast model visible.

    Returns:
      All frames as a list.
    """
    if not console.is_terminal:
        return [_printed(frame, console) for frame in frames]
    shown = []
    with Live(console=console, auto_refresh=False) as live:
        for frame in frames:
            live.update(_panel(frame, title), refresh=True)
            shown.append(frame)
            time.sleep(frame_seconds)
    return shown


def _printed(frame: Frame, console: Console) -> Frame:
    text = frame.text.replace('\n', '↵')
    console.out(f'{frame.caption}, {frame.rate} | {text}', highlight=False)
    return frame


def _panel(frame: Frame, title: str) -> Panel:
    text = Text()
    for cell in frame.cells:
        style = 'rgb({},{},{})'.format(*cell.color)
        text.append(cell.text, style + (' strike' if cell.state == 'refused' else ''))
    scale = Text()
    for words, color in legend():
        scale.append(words, 'rgb({},{},{})'.format(*color) if color else 'dim')
    caption = Text(f'{frame.caption}, {frame.rate}', 'dim')
    return Panel(Group(text, Text(), caption, scale), title=Text(title), title_align='left')
