"""Parity with PyTorch: is a port the same network, and if not, which layer parts from it, and by what mistake?"""

from jconv.parity.comparison import assert_parity as assert_parity
from jconv.parity.comparison import compare as compare
from jconv.parity.report import Diagnosis as Diagnosis
from jconv.parity.report import Report as Report
from jconv.parity.report import Row as Row
from jconv.parity.sweeping import SweepReport as SweepReport
from jconv.parity.sweeping import sweep as sweep
from jconv.parity.training import TrainingReport as TrainingReport
from jconv.parity.training import compare_training as compare_training
from jconv.parity.training import optax_of as optax_of
