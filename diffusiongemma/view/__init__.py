"""Shows text generation: frames of a canvas in a terminal, as GIF and HTML, and a chat."""
