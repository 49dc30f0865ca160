"""Items of different content on one ID, and what becomes of them: one module per policy.

All of it is a table job: sorts and run lengths over packed IDs. Items of equal content on one ID are one
*unit* and share it; nothing forces them apart. Retired items keep their raw ID and take no room.
"""

from qbrec.quantizer.collisions.digit import digit
from qbrec.quantizer.collisions.next_nearest import next_nearest, next_nearest_beside
from qbrec.quantizer.collisions.sinkhorn import sinkhorn
from qbrec.quantizer.collisions.units import Resolution

__all__ = ["Resolution", "digit", "next_nearest", "next_nearest_beside", "sinkhorn"]
