"""Many sessions on one model: the turns of a batch that rows join and leave."""

from specdec.pool.engine import TooLarge
from specdec.pool.pool import PoolFull, SessionPool
from specdec.pool.request import Request

__all__ = ["PoolFull", "Request", "SessionPool", "TooLarge"]
