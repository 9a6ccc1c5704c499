"""What people look at while text is made: frames of a canvas, a terminal, GIF and HTML, a chat."""
