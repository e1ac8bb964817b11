"""Every way to compute the loss that is compared, a file each."""

from __future__ import annotations

from orpo_kernels.bench.peers import cce, full_logits, liger, ours, torch_fused, trl_fused
from orpo_kernels.bench.peers.interface import Peer, Unavailable

__all__ = ["PEERS", "Peer", "Unavailable"]

PEERS: dict[str, Peer] = {
    peer.name: peer for module in (ours, full_logits, liger, trl_fused, torch_fused, cce) for peer in module.PEERS
}
