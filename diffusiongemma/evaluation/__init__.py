"""Evaluation of quality and speed: the student compared with the teacher."""
