"""Lists published figures of accelerators, for utilization and roofline times.

Sources for TPUs: https://cloud.google.com/tpu/docs/v5e, .../v5p and .../v6e (specifications of a
chip: peak compute in bf16, HBM capacity and bandwidth, inter-chip interconnect). The interconnect
bandwidth is the sum over all links of a chip, in one direction, in bytes per second. Sources for
GPUs: NVIDIA's data sheets of A100, H100 SXM, H200 SXM, L4, L40 and L40S (dense bf16, without
sparsity; the last three have only PCIe).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DeviceFigures:
    """The published peak figures of one device.

    Attributes:
      name: the short name, such as 'v5e' or 'H200'.
      peak_flops: the peak of bf16 matmuls, FLOP/s.
      hbm_bytes: the size of the memory, bytes.
      hbm_bandwidth: the bandwidth of the memory, bytes/s.
      link_bandwidth: the bandwidth to other devices, all links in one direction, bytes/s.
    """

    name: str
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float


# The keys are prefixes of jax's `device_kind`; the longest matching prefix is used.
_FIGURES = {
    'TPU v5 lite': DeviceFigures('v5e', 197e12, 16e9, 819e9, 200e9),
    'TPU v5': DeviceFigures('v5p', 459e12, 95e9, 2765e9, 600e9),
    'TPU v6 lite': DeviceFigures('v6e', 918e12, 32e9, 1640e9, 448e9),
    'NVIDIA A100': DeviceFigures('A100', 312e12, 80e9, 2039e9, 300e9),
    'NVIDIA A100-SXM4-40GB': DeviceFigures('A100-40GB', 312e12, 40e9, 1555e9, 300e9),
    'NVIDIA A100-PCIE-40GB': DeviceFigures('A100-40GB', 312e12, 40e9, 1555e9, 300e9),
    'NVIDIA H100': DeviceFigures('H100', 989e12, 80e9, 3350e9, 450e9),
    'NVIDIA H200': DeviceFigures('H200', 989e12, 141e9, 4800e9, 450e9),
    'NVIDIA L4': DeviceFigures('L4', 121e12, 24e9, 300e9, 32e9),
    'NVIDIA L40': DeviceFigures('L40', 181e12, 48e9, 864e9, 32e9),
    'NVIDIA L40S': DeviceFigures('L40S', 362e12, 48e9, 864e9, 32e9),
}
GPUS = tuple(
    sorted({figures.name for kind, figures in _FIGURES.items() if kind.startswith('NVIDIA')})
)


def figures_of(device_kind: str) -> DeviceFigures | None:
    """Returns the figures of a device by its jax `device_kind`, or None if the table lacks it."""
    matching = [kind for kind in _FIGURES if device_kind.startswith(kind)]
    return _FIGURES[max(matching, key=len)] if matching else None


def figures_named(name: str) -> DeviceFigures:
    """Returns the figures of a device by its short name, such as 'v5e' or 'H200'.

    Raises:
      ValueError: if the table lacks the device.
    """
    by_name = {figures.name: figures for figures in _FIGURES.values()}
    if name not in by_name:
        raise ValueError(f'unknown device {name!r}; known: {sorted(by_name)}.')
    return by_name[name]
