"""Levels of 2 to 8 bits into bytes and back.

Levels are stored as unsigned numbers `level - qmin` in little-endian bit order: bit i of the stream is bit `i % 8` of
byte `i // 8`, level k occupies bits `[k * bits, (k + 1) * bits)`, lowest bit first. The last byte is filled with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.errors import SpecError

__all__ = ["pack", "packed_bytes", "unpack"]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` levels of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(levels: Tensor, bits: int) -> Tensor:
    """Pack unsigned levels (any shape, any integer dtype, each in [0, 2^bits)) into a flat uint8 tensor."""
    flat = levels.reshape(-1).to(torch.int64)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 2**bits):
        raise SpecError(f"Levels from {int(flat.min())} to {int(flat.max())} do not fit into {bits} unsigned bits.")
    if bits == 8:
        return flat.to(torch.uint8)
    # Eight levels make `bits` whole bytes and fit into one 64-bit word.
    eights = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
    words = (eights << (bits * torch.arange(8, device=flat.device))).sum(1)
    stream = (words[:, None] >> (8 * torch.arange(bits, device=flat.device))) & 255
    result: Tensor = stream.reshape(-1)[: packed_bytes(flat.numel(), bits)].to(torch.uint8)
    return result


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """`count` unsigned levels as a flat uint8 tensor. Inverse of `pack`."""
    if packed.dtype != torch.uint8 or packed.numel() != packed_bytes(count, bits):
        raise SpecError(
            f"{count} levels of {bits} bits take {packed_bytes(count, bits)} bytes of uint8, "
            f"found {packed.numel()} of {packed.dtype}."
        )
    flat = packed.reshape(-1)
    if bits == 8:
        return flat
    if bits == 4:
        return torch.stack((flat & 15, flat >> 4), 1).reshape(-1)[:count]
    stream = torch.nn.functional.pad(flat, (0, -flat.numel() % bits)).reshape(-1, bits).to(torch.int64)
    words = (stream << (8 * torch.arange(bits, device=flat.device))).sum(1)
    eights = (words[:, None] >> (bits * torch.arange(8, device=flat.device))) & (2**bits - 1)
    result: Tensor = eights.reshape(-1)[:count].to(torch.uint8)
    return result
