"""An HTTP server around an `Engine`: OpenAI's protocol, metrics, and a page that shows a canvas."""

from diffusiongemma.serving.app import make_app
from diffusiongemma.serving.server import Server, listen, serve
from diffusiongemma.serving.service import Service, Settings

__all__ = [
    'Server',
    'Service',
    'Settings',
    'listen',
    'make_app',
    'serve',
]
