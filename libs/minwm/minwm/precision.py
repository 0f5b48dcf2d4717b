"""The floating-point type that a device computes models in: bf16 where its products are quick, else float32.

Every GPU that models are served on multiplies bf16. Of CPUs, those with AVX-512 or Arm's bf16 do; on the others PyTorch
takes one number at a time, some hundred times slower than float32.
"""

import torch


def native_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Of weights, caches and activations on this device, unless asked otherwise."""
    if torch.device(device).type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16
