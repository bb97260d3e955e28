"""``torch.nn.functional``'s convolutions, with its positional order, defaults and semantics."""

from jconv.functional.conv import conv1d as conv1d
from jconv.functional.conv import conv2d as conv2d
from jconv.functional.conv import conv3d as conv3d
from jconv.functional.conv import conv_transpose1d as conv_transpose1d
from jconv.functional.conv import conv_transpose2d as conv_transpose2d
from jconv.functional.conv import conv_transpose3d as conv_transpose3d
from jconv.functional.fold import fold as fold
from jconv.functional.fold import unfold as unfold
from jconv.functional.pad import pad as pad
