"""Every algorithm, in one visible tuple. ``xla`` stands last and refuses nothing."""

from jconv.algorithms.base import Algorithm
from jconv.algorithms.im2col import Im2col
from jconv.algorithms.pointwise import Pointwise
from jconv.algorithms.xla import Xla

ALGORITHMS: tuple[Algorithm, ...] = (Pointwise(), Im2col(), Xla())
