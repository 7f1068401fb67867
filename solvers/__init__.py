"""How it is solved: samplers as tables of numbers, one loop, exact laws."""

from .base import Solution as Solution
from .catalogue import SOLVERS as SOLVERS
from .exact import exact_law as exact_law
from .grids import GRIDS as GRIDS
from .plan import Plan as Plan
from .sampling import StepInfo as StepInfo
from .sampling import encode as encode
from .sampling import integrate as integrate
from .sampling import sample as sample
from .sampling import trace as trace
