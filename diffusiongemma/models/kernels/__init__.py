"""Kernels of backends: grouped matmuls for experts, and fused causal attention."""
