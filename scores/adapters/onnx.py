"""A network exported to ONNX: ``from_onnx(session, path, "eps", label=...)``.

Call    session.run([output], {input: array}), numpy in, a list of numpy out (``onnxruntime.InferenceSession``, or anything with
        its ``get_inputs``, ``get_outputs`` and ``run``). There is no one convention: diffusers exported
        unet(sample, timestep, encoder_hidden_states) -> out_sample, and those are the names looked for; others by ``names``.
Time    whatever the network was trained with, by ``label`` as in ``Score``. A timestep declared as an integer takes whole
        labels only: they are not rounded here. One declared with a single entry takes one time for the batch.
Output  ``predicts``, as in ``Score``.
Traps   dtypes are those the session declares (a half-precision export is fed float16); everything passes through host memory.
        There is no autograd behind it: no likelihood, no guidance by gradients, no gradient of a sample.

An exported model of diffusers takes its path, timestep and output from its scheduler:

    from_diffusers(OnnxNetwork(session), scheduler, family="UNet2DConditionModel", rule="nearest")

Source: diffusers pipeline_onnx_stable_diffusion.py and Optimum's exports; the onnxruntime API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sde.errors import InputError, nearest
from sde.path import Path

from ..network import Coefficient, Score, TimeFunction
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class OnnxNetwork:
    """A session as network(sample, timestep, **conditions), tensors in and out; conditions by the names of its inputs.

    names   {"sample": its input for x, "timestep": its input for the time, "output": its output}, those that differ from the
            defaults "sample", "timestep" and the first output
    """

    def __init__(self, session: Any, names: Mapping[str, str] | None = None) -> None:
        if not all(callable(getattr(session, m, None)) for m in ("run", "get_inputs", "get_outputs")):
            raise InputError(
                f"session is a {type(session).__name__}: give an onnxruntime.InferenceSession, made from the file by the caller"
            )
        names = {} if names is None else dict(names)
        for name in names:
            if name not in ("sample", "timestep", "output"):
                raise InputError(f"names has {name!r}: {nearest(name, ('sample', 'timestep', 'output'))}")
        self.session = session
        self._inputs = {i.name: i for i in session.get_inputs()}
        self._outputs = [str(o.name) for o in session.get_outputs()]
        self.sample = self._known(names.get("sample", "sample"), "sample", self._inputs)
        self.timestep = self._known(names.get("timestep", "timestep"), "timestep", self._inputs)
        self.output = self._known(names.get("output", "") or self._outputs[0], "output", self._outputs)

    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Any) -> Tensor:
        if torch.is_grad_enabled() and (sample.requires_grad or timestep.requires_grad):
            raise InputError(
                "an ONNX session has no gradient: likelihoods and gradient guidance need the network itself, as a torch module"
            )
        feed = {self.sample: self._array(self.sample, sample), self.timestep: self._time(timestep)}
        for name, value in conditions.items():
            feed[name] = self._array(self._known(name, "condition", self._inputs), value)
        (out,) = self.session.run([self.output], feed)
        return torch.from_numpy(np.ascontiguousarray(out)).to(device=sample.device, dtype=sample.dtype)

    def _known(self, name: str, role: str, known: Sequence[str] | Mapping[str, Any]) -> str:
        if name not in known:
            fix = "" if role == "condition" else f"; say which by names={{{role!r}: ...}}"
            raise InputError(f"the session has no {name!r} for the {role}: it has {', '.join(known)}{fix}")
        return name

    def _dtype(self, name: str) -> Any:
        kind = self._inputs[name].type
        if kind not in DTYPES:
            raise InputError(
                f"the session's input {name!r} is a {kind}: numpy has no such type; export it in float16 or float32"
            )
        return DTYPES[kind]

    def _array(self, name: str, value: Any) -> Any:
        value = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        return np.ascontiguousarray(value, dtype=self._dtype(name))

    def _time(self, time: Tensor) -> Any:
        """The time in the shape and dtype that the session declares."""
        values = time.detach().cpu().double().numpy()
        shape = self._inputs[self.timestep].shape
        if list(shape) in ([], [1]):
            if np.any(values != values[0]):
                raise InputError(f"the session takes one {self.timestep!r} for the batch, and these samples have several")
            values = values[:1].reshape(shape)
        dtype = self._dtype(self.timestep)
        if np.issubdtype(dtype, np.integer):
            if np.any(np.abs(values - np.round(values)) > 1e-3):
                raise InputError(
                    f"the session takes whole timesteps, got {float(values.flat[0]):g}: round the label, e.g. "
                    "label=lambda t: (1000 * t - 1).round(), or rule='nearest' with from_diffusers"
                )
            values = np.round(values)
        return values.astype(dtype)


def from_onnx(
    session: Any,
    path: Path,
    predicts: str | tuple[Coefficient, Coefficient] = "eps",
    *,
    names: Mapping[str, str] | None = None,
    label: TimeFunction | None = None,
    scale: TimeFunction | None = None,
    sigma_data: float = 0.5,
    split: str | None = None,
    **options: Unpack[Options],
) -> Score:
    """The score of an ONNX session on ``path``; everything but ``names`` (see ``OnnxNetwork``) as for ``Score``.

    Errors: InputError for a session without the inputs named, a type numpy lacks, fractional labels where it takes integers,
    or a gradient asked for.
    """
    return Score(
        OnnxNetwork(session, names),
        path,
        predicts,
        label=label,
        scale=scale,
        sigma_data=sigma_data,
        split=split,
        **options,
    )
