"""Compiles the programs of a config for devices that this machine lacks, and reports their cost."""
