"""Where MLX computes."""

import mlx.core as mx


def on_cpu() -> bool:
    """Return whether MLX runs on the CPU, where some of its fused primitives are many small ones."""
    return mx.default_device().type == mx.DeviceType.cpu
