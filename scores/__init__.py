"""What a network, or an exact law, knows: scores on a noise path."""

from .analytic import Empirical as Empirical
from .analytic import Gaussian as Gaussian
from .analytic import GaussianMixture as GaussianMixture
from .analytic import as_network as as_network
from .matching import denoising_loss as denoising_loss
from .network import Score as Score
