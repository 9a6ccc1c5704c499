"""From a teacher to a trained student."""
