"""Models in files: formats that are read and written, and one function that opens any."""
