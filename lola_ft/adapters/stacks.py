"""PEFT's stacks of the LoRA factors of an MoE layer's experts: A is expert-slowest, B expert-fastest."""

from torch import Tensor


def split_a(weight: Tensor, num_experts: int) -> Tensor:
    """Split PEFT's A (E*R, in) to (E, R, in)."""
    return weight.reshape(num_experts, -1, weight.shape[-1])


def split_b(weight: Tensor, num_experts: int) -> Tensor:
    """Split PEFT's B (out, R*E), expert-fastest, to (E, out, R)."""
    return weight.reshape(weight.shape[0], -1, num_experts).permute(2, 0, 1)


def join_a(a_ERI: Tensor) -> Tensor:
    """Join (E, R, in) to PEFT's A (E*R, in)."""
    return a_ERI.reshape(-1, a_ERI.shape[-1])


def join_b(b_EOR: Tensor) -> Tensor:
    """Join (E, out, R) to PEFT's B (out, R*E), expert-fastest."""
    return b_EOR.permute(1, 2, 0).reshape(b_EOR.shape[1], -1)
