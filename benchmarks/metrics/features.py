"""What a sample looks like to a metric: float64 rows (n, k). Nothing is downloaded and no file's code is run.

    raw         the numbers themselves
    own         what the problem gives as its features (the digits: what the shipped network sees), else raw
    inception   the 2048 features of FID, by torch-fidelity; "inception=FILE.pth" says where its weights are
    dinov2      the class token of DINOv2 (224 pixels, bicubic), by transformers; "dinov2=FOLDER" of weights (.safetensors)
    clip        CLIP's image embedding, of length 1, by transformers; "clip=FOLDER"

The last three take pictures (B, 1 or 3, H, W) in [-1, 1], rounded to 8 bits first as a file would. Without FILE or FOLDER the
weights are those in the library's own cache.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path as File
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sde.errors import InputError, nearest

from ..laws import Points
from ..problems import FIXED, Problem, to_bytes

Extractor = Callable[[Tensor], Tensor]

CHUNK = 64  # pictures at a time
DRAWS = 1 << 14  # true draws whose features make a reference, where the data are not a finite set
MOST = 50_000  # points of a finite set, at most

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


def is_raw(features: str, problem: Problem) -> bool:
    return features == "raw" or (features == "own" and problem.features is None)


def missing(features: str, problem: Problem) -> str | None:
    """Why these features cannot be had here, or None. InputError for a name that does not exist."""
    kind, _, place = features.partition("=")
    if kind in ("raw", "own") and not place:
        return None
    if kind not in LOADERS:
        raise InputError(f"features={features!r} is unknown: {nearest(kind, ['raw', 'own', *LOADERS])}")
    if not _of_pictures(problem):
        return f"{kind} features are of pictures (1 or 3, H, W), and {problem.name} has samples {problem.shape}"
    return _load(kind, place).reason


def check(features: str, problem: Problem) -> None:
    """InputError: the weights that are named cannot be had, where the problem has pictures to show them."""
    if "=" in features and _of_pictures(problem) and (reason := missing(features, problem)):
        raise InputError(reason)


def _of_pictures(problem: Problem) -> bool:
    shape = problem.picture or problem.shape
    return len(shape) == 3 and shape[0] in (1, 3)


def extract(features: str, problem: Problem, x: Tensor) -> Tensor:
    """The features of samples (B, *shape) in float64, (B, k)."""
    if is_raw(features, problem):
        return x.double().reshape(len(x), -1)
    if features == "own" and problem.features is not None:
        found = problem.features(x)
        if found.dim() != 2 or len(found) != len(x):
            raise InputError(f"features of {problem.name} gave {tuple(found.shape)} for {len(x)} samples: give (B, k)")
        return found.double()
    reason = missing(features, problem)
    if reason is not None:
        raise InputError(reason)
    kind, _, place = features.partition("=")
    run: Any = _load(kind, place).run
    pictures = to_bytes(x.reshape(-1, *(problem.picture or problem.shape)))
    pictures = pictures.expand(-1, 3, -1, -1)
    with torch.no_grad():
        return torch.cat([run(part).double() for part in pictures.split(CHUNK)])


def of_truth(features: str, problem: Problem) -> Tensor:
    """The features of the truth: of every point of a finite set once (with the noise of where sampling stops), or of draws."""
    if isinstance(problem.data, Points) and len(problem.data.points) <= MOST:
        points, k = problem.data.points, problem.path.knot(problem.stop)
        eps = torch.randn(points.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return extract(features, problem, (k.alpha * points + k.sigma * eps).reshape(-1, *problem.shape))
    return extract(features, problem, problem.truth(0, range(DRAWS), FIXED))


# --- networks of others -------------------------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    """A function of pictures (B, 3, H, W) uint8, or why there is none."""

    run: Extractor | None
    reason: str | None


@cache
def _load(kind: str, place: str) -> Loaded:
    try:
        return Loaded(LOADERS[kind](place), None)
    except ImportError as error:
        library = "torch-fidelity" if kind == "inception" else "transformers"
        return Loaded(None, f"{kind} features need {library}: pip install {library} ({error})")
    except OSError as error:
        where = place or "the library's cache (nothing is downloaded)"
        hint = f"say features={kind}=" + ("FILE" if kind == "inception" else "FOLDER")
        return Loaded(None, f"{kind} features: no weights in {where}: {hint} ({type(error).__name__})")
    except (ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()
        return Loaded(None, f"{kind} features: {line[0] if line else type(error).__name__}")


def _scaled(pictures: Tensor, size: int, constants: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Bytes as the network wants them: ``size`` pixels, bicubic with anti-aliasing, standardised."""
    x = torch.nn.functional.interpolate(pictures.float() / 255.0, size=(size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(c, device=x.device).reshape(1, 3, 1, 1) for c in constants)
    return (x.clamp(0.0, 1.0) - mean) / std


def _clip(place: str) -> Extractor:
    from transformers import CLIPVisionModelWithProjection

    model = _pretrained(CLIPVisionModelWithProjection, place or "openai/clip-vit-large-patch14-336")
    size = int(model.config.image_size)

    def run(pictures: Tensor) -> Tensor:
        found = model.to(pictures.device)(pixel_values=_scaled(pictures, size, _CLIP)).image_embeds
        return found / found.norm(dim=-1, keepdim=True)

    return run


def _dinov2(place: str) -> Extractor:
    from transformers import Dinov2Model

    model = _pretrained(Dinov2Model, place or "facebook/dinov2-large")
    return lambda pictures: model.to(pictures.device)(pixel_values=_scaled(pictures, 224, _IMAGENET)).last_hidden_state[:, 0]


def _pretrained(cls: Any, place: str) -> Any:
    """A model of transformers from a folder or from its cache: safetensors only, and nothing from the network."""
    return cls.from_pretrained(place, local_files_only=True, use_safetensors=True).eval().requires_grad_(False)


def _inception(place: str) -> Extractor:
    from scores.checkpoint import load_weights

    file = File(place) if place else _hub() / _INCEPTION
    if not file.is_file():
        hint = f"fetch {_INCEPTION} from torch-fidelity's releases, or say features=inception=FILE"
        raise InputError(f"no weights at {file}: {hint}")
    from torch_fidelity import FeatureExtractorInceptionV3  # pyright: ignore[reportMissingImports]

    # torch-fidelity would unpickle the file: it is read safely here, and handed over as tensors written again
    buffer = io.BytesIO()
    torch.save(dict(load_weights(file).tensors), buffer)
    buffer.seek(0)
    model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=buffer).eval()
    return lambda pictures: model.to(pictures.device)(pictures)[0]


def _hub() -> File:
    """Where torch keeps downloaded weights."""
    home = os.environ.get("TORCH_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch")
    return File(home).expanduser() / "hub" / "checkpoints"


LOADERS: dict[str, Callable[[str], Extractor]] = {"inception": _inception, "dinov2": _dinov2, "clip": _clip}
