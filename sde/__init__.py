"""What is being solved: noise paths, predictions, forward and reverse SDEs, the probability flow."""

from .likelihood import Likelihood as Likelihood
from .likelihood import bits_per_dim as bits_per_dim
from .likelihood import dequantise as dequantise
from .likelihood import log_likelihood as log_likelihood
from .noise import Brownian as Brownian
from .noise import White as White
from .noise import clock as clock
from .path import EDM as EDM
from .path import VE as VE
from .path import VP as VP
from .path import Cosine as Cosine
from .path import FromCoefficients as FromCoefficients
from .path import FromFunctions as FromFunctions
from .path import Linear as Linear
from .path import Path as Path
from .path import SubVP as SubVP
from .path import Tabulated as Tabulated
from .path import Trigonometric as Trigonometric
from .prediction import Knot as Knot
from .prediction import Prediction as Prediction
from .problem import ForwardSDE as ForwardSDE
from .problem import ProbabilityFlow as ProbabilityFlow
from .problem import ReverseSDE as ReverseSDE
