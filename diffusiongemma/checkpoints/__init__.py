"""Reading and writing of model files; `load.load_model` opens any supported format."""
