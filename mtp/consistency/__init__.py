"""Consistency models: trajectories of Jacobi decoding, and training on them. The public names."""

from mtp.consistency.loss import ConsistencyConfig, ConsistencyLoss
from mtp.consistency.on_policy import OnPolicy
from mtp.consistency.packing import TrajectoryBatches
from mtp.consistency.trajectories import Collection, Trajectory, augmented

__all__ = [
    "Collection",
    "ConsistencyConfig",
    "ConsistencyLoss",
    "OnPolicy",
    "Trajectory",
    "TrajectoryBatches",
    "augmented",
]
