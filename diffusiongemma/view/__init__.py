"""Shows text generation: frames of a canvas in a terminal, as GIF and HTML, and a chat."""

from diffusiongemma.view.conversation import Conversation
from diffusiongemma.view.frames import Cell, EventFrames, Frame
from diffusiongemma.view.page import write_html
from diffusiongemma.view.terminal import show

__all__ = [
    'Cell',
    'Conversation',
    'EventFrames',
    'Frame',
    'show',
    'write_html',
]
