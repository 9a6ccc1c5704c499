"""An HTTP server around an `Engine`: OpenAI's protocol, metrics, and a page that shows a canvas."""
