"""Counts the FLOPs, traffic and memory of programs, and lists published figures of devices."""
