"""Training of teachers, and distillation of a teacher into a student."""
