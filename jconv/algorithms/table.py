"""Every algorithm, in one visible tuple. ``xla`` stands last and refuses nothing."""

from jconv.algorithms.base import Algorithm
from jconv.algorithms.depthwise import Depthwise
from jconv.algorithms.direct import Direct
from jconv.algorithms.fft import Fft
from jconv.algorithms.fold import Fold
from jconv.algorithms.grouped import Grouped
from jconv.algorithms.groupwise import Groupwise
from jconv.algorithms.im2col import Im2col
from jconv.algorithms.patches import Patches
from jconv.algorithms.phase import Phase, Subpixel
from jconv.algorithms.pointwise import Pointwise
from jconv.algorithms.volume import Volume
from jconv.algorithms.winograd import Winograd
from jconv.algorithms.xla import Xla

_CHANNEL_LAST = Xla("channel_last", channel_last=True)

ALGORITHMS: tuple[Algorithm, ...] = (
    Pointwise(),
    Patches(),
    Depthwise(),
    Grouped(),
    Groupwise(_CHANNEL_LAST),
    Groupwise(Winograd(), "groupwise_winograd"),
    Direct(),
    Winograd(),
    Winograd("winograd4", tile=4, accuracy="loose"),
    Im2col(),
    Fold(),
    Fft(),
    Volume(_CHANNEL_LAST),
    Phase(_CHANNEL_LAST),
    Subpixel(_CHANNEL_LAST),
    _CHANNEL_LAST,
    Xla("eigen", channel_last=True, eigen=True),
    Xla(),
)
