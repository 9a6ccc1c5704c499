"""Student against teacher: quality and speed."""
