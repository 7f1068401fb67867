"""What a network, or an exact law, knows: scores on a noise path."""

from . import guidance as guidance
from .analytic import Empirical as Empirical
from .analytic import Gaussian as Gaussian
from .analytic import GaussianMixture as GaussianMixture
from .analytic import as_network as as_network
from .checking import Diagnosis as Diagnosis
from .checking import check as check
from .elbo import Elbo as Elbo
from .elbo import ddpm_elbo as ddpm_elbo
from .elbo import vdm_elbo as vdm_elbo
from .matching import denoising_loss as denoising_loss
from .network import Score as Score
