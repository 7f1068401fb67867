"""A trained network as a score.

A network of the field is called ``network(c_in x, label)`` and returns one row y = a x0 + b eps of the pair that
``sde.prediction`` describes. ``Score`` holds the three conventions (what is predicted, the time label, the input
scaling), calls the network, and checks what comes back. It reduces the output with

    x0 = (b x - sigma y) / det,   eps = (alpha y - a x) / det,   det = alpha b - sigma a,   score = -eps / sigma.

The rule for gradients: nothing here switches them off or on. ``predict`` and the score are differentiable in x and in the
network's parameters; solvers run under ``torch.no_grad`` unless they are asked for a gradient. Times carry no gradient.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import threading
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sde.errors import InputError, NetworkError, PathError, PrecisionWarning, ToolkitError, TrainModeWarning, nearest
from sde.path import Path, check_inside
from sde.prediction import OUTPUTS, Knot, Prediction, Predictor, Row, Tally, solve_row

TimeFunction = Callable[[Tensor], Tensor]
Coefficient = float | Callable[[Tensor], Any]

MODES = (None, "eval", "keep")
SPLITS = (None, "learned_var")


class Score(Predictor):
    """A network, its path, and what it predicts.

    network     called as ``network(c_in x, label, **conditions)``; x (B, *event), label (B,) of x's dtype (integers stay
                integers) on x's device; returns (B, *event). Any callable: a module, a function, a bound method.
    path        the noise path the network was trained on.
    predicts    a name of ``sde.prediction.OUTPUTS``, or a pair (a, b) of numbers or functions of t for y = a x0 + b eps.
    label       function t -> time label, on float64 tensors of any shape (default: t itself). An integer result stays integer.
    scale       function t -> c_in, on float64 tensors (default: no scaling).
    sigma_data  of the "F" row.
    output      which element of a tuple, list or dict, or which attribute of an object, is the output (a tensor is itself).
    split       "learned_var": of 2C channels returned for C, the first C are the output; the rest is for ``with_variance``.
    mode        None: warn when dropout or batch-norm layers are in train mode. "eval": be in eval mode while ``running``, then
                restore. "keep": leave the mode alone, silently.
    conditions  constant keyword arguments of the network, handed over as they are (only moved to x's device). Those given to
                ``predict`` or ``at`` override them and are per sample: tensors with a batch dimension must have B rows, or one.
    dtype       cast the input to this dtype (a half-precision network) and the output back. The state itself, the time
                label and all arithmetic on states stay float32 or more. Default: the input is handed over as it is.
    evals       batches of samples that one call puts through the network: 2 where it guides itself, for ``net_evals``.

    Conventions of well-known families:

        EDM     Score(net, EDM(), "F", label=lambda t: t.log() / 4, scale=lambda t: (t * t + 0.25) ** -0.5)
        DDPM    Score(net, path, "eps", label=lambda t: 999 * t)
        flows   Score(net, Linear(), "velocity")               where t = 1 is noise; label=lambda t: 1 - t where t = 1 is data

    Errors: InputError at construction for arguments that cannot work (the message shows the signature seen);
    NetworkError, chained, with the time in ``t``, when the network raises or returns something that is not shaped like x;
    PathError where the output says nothing about what is asked. Values are not checked: solvers check the end of a run
    once. Changing x or the label in place is an error, seen by the version counter (``torch.inference_mode`` keeps none, so it
    goes unseen there). A state is the network's to read during the call only: solvers go on in the same memory. A Score is
    a value: make another one rather than change its attributes.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        path: Path,
        predicts: str | tuple[Coefficient, Coefficient] = "eps",
        *,
        label: TimeFunction | None = None,
        scale: TimeFunction | None = None,
        sigma_data: float = 0.5,
        output: int | str | None = None,
        split: str | None = None,
        mode: str | None = None,
        conditions: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        evals: int = 1,
    ) -> None:
        self._signature = _signature(network)
        self._accepted: set[tuple[str, ...]] = set()  # condition names that the signature takes
        self._last: Any = None  # what ``_prepared`` made last: (knots, batch and dtype, its result)
        if not isinstance(path, Path):
            raise InputError(f"path is {_seen(path)}: give a sde.Path, for example VP()")
        if isinstance(predicts, str):
            if predicts not in OUTPUTS:
                raise InputError(f"predicts={predicts!r} is unknown: {nearest(predicts, OUTPUTS)}")
        elif not (isinstance(predicts, (tuple, list)) and len(predicts) == 2 and all(map(_is_coefficient, predicts))):
            raise InputError(f"predicts={predicts!r}: give a name of OUTPUTS, or a pair (a, b) of numbers or functions of t")
        for name, function in (("label", label), ("scale", scale)):
            if function is not None and not callable(function):
                raise InputError(f"{name} is {_seen(function)}: give a function of t (a float64 tensor), or None")
        if not (isinstance(sigma_data, (int, float)) and 0.0 < sigma_data < math.inf):
            raise InputError(f"sigma_data={sigma_data!r}: must be a finite number > 0")
        for name, value, known in (("mode", mode, MODES), ("split", split, SPLITS)):
            if value not in known:
                raise InputError(f"{name}={value!r} is unknown: give one of {', '.join(map(repr, known))}")
        if output is not None and not isinstance(output, (int, str)):
            raise InputError(f"output={output!r}: give the index or the name of the element to use")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InputError(f"dtype={dtype!r}: give a floating torch.dtype, or None to hand the input over as it is")
        if conditions is not None and not isinstance(conditions, Mapping):
            raise InputError(f"conditions is {_seen(conditions)}: give a dict of keyword arguments of the network")
        if isinstance(evals, bool) or not isinstance(evals, int) or evals < 1:
            raise InputError(f"evals={evals!r}: give the number of batches that one call puts through the network, an int >= 1")
        self.network = network
        self.path = path
        self.predicts = predicts
        self.label, self.scale, self.sigma_data = label, scale, float(sigma_data)
        self.output, self.split, self.mode, self.dtype, self.evals = output, split, mode, dtype, evals
        self.conditions = dict(conditions or {})
        self._module = _module_of(network)
        self._moody = [] if self._module is None else _mode_dependent(self._module)
        self._lock, self._depth, self._flags = threading.Lock(), 0, []
        self._warned = False
        probe = torch.tensor([path.T], dtype=torch.float64)  # a label or scale of the wrong kind is reported here, not mid-run
        self._labels(probe)
        self._scales(probe)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but the lock. A copy made inside ``running()`` is not itself inside it."""
        state = {k: v for k, v in self.__dict__.items() if k != "_lock"}
        return state | {"_depth": 0, "_flags": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in {**state, "_lock": threading.Lock()}.items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        name = type(self.network).__name__ if self._module is self.network else getattr(self.network, "__name__", self.network)
        return f"Score({name}, {self.path}, predicts={self.predicts!r})"

    @property
    def native_dtype(self) -> torch.dtype:
        """The dtype a state has unless told otherwise: float64 where the network's parameters are, else float32."""
        return torch.float64 if self._parameter_dtype() is torch.float64 else torch.float32

    def _parameter_dtype(self) -> torch.dtype | None:
        if self._module is None:
            return None
        return next((p.dtype for p in self._module.parameters() if p.is_floating_point()), None)

    def row(self, knot: Knot) -> Row:
        """(a, b) of the raw output y = a x0 + b eps: floats at a knot of floats, tensors at a knot of tensors.

        Infinite where the row is (the score row at sigma = 0, a velocity where sigma' is infinite).
        """
        if isinstance(self.predicts, str):
            return OUTPUTS[self.predicts](knot.alpha, knot.sigma, knot.dalpha, knot.dsigma, self.sigma_data)
        a, b = (_coefficient(c, knot.t) for c in self.predicts)
        return Row(a, b)

    def at(
        self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally
    ) -> list[Callable[[Tensor], Tensor]]:
        """One function a knot: state (B, *event) -> raw output y of x's shape, dtype and device. One NFE a call.

        Labels and scalings of all knots are computed together in float64, cast, and moved once; so are the conditions. A label
        that is not finite (log t at t = 0) is an error of the call, not of this preparation.
        """
        self._check_mode()
        return self._at(knots, x, self._maker(x, conditions, tally))

    def with_variance(
        self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally
    ) -> list[Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """As ``at``, for networks of 2C channels: state -> (first half, second half), both of x's shape, dtype and device.

        ``split="learned_var"`` says that the second half is the learned variance of Nichol & Dhariwal (2021).
        """
        if self.split is None:
            return super().with_variance(knots, x, conditions, tally)
        self._check_mode()
        return self._at(knots, x, self._maker(x, conditions, tally, self._halves))

    def _at(self, knots: Sequence[Knot], x: Tensor, make: Callable[..., Any]) -> list[Any]:
        rows, factors, labels = self._prepared(knots, x)
        return [
            make(row, factor, k.t)
            if math.isfinite(label)
            else _raising(f"label({k.t:g}) = {label:g} is not finite: stop the grid before t={k.t:g}")
            for k, row, factor, label in zip(knots, rows, factors, labels, strict=True)
        ]

    def each(self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> Callable[[Tensor], Tensor]:
        """One function for a batch whose sample i is at ``knots[i]``, prepared like those of ``at``. One NFE a call."""
        self._check_mode()
        t = torch.tensor([k.t for k in knots], dtype=torch.float64)
        labels, scales = self._labels(t), self._scales(t)
        if self.dtype is torch.float16:
            _check_half_range(knots, [None] * len(knots) if scales is None else scales.tolist())
        make = self._maker(x, conditions, tally)
        for k, label in zip(knots, labels.tolist(), strict=True):
            if not math.isfinite(label):
                return _raising(f"label({k.t:g}) = {label:g} is not finite: stop the grid before t={k.t:g}")
        return make(_label_dtype(labels, x), None if scales is None else per_sample(scales, x), None)

    def _prepared(self, knots: Sequence[Knot], x: Tensor) -> tuple[Sequence[Tensor], Sequence[Any], Sequence[float]]:
        """(labels for x's batch, input scalings, labels as numbers) at the knots. The last ones are kept: a plan asks again."""
        key = (x.shape[0], x.dtype, x.device, torch.is_inference_mode_enabled())
        last = self._last
        if last is not None and last[0] is knots and last[1] == key:
            return last[2]
        t = torch.tensor([k.t for k in knots], dtype=torch.float64)
        labels, scales = self._labels(t), self._scales(t)
        factors = [None] * len(knots) if scales is None else scales.tolist()
        if self.dtype is torch.float16:
            _check_half_range(knots, factors)
        rows = _label_dtype(labels, x)[:, None].expand(-1, x.shape[0]).unbind(0)
        prepared = rows, factors, labels.tolist()
        if isinstance(knots, tuple):  # a list may change under its name
            self._last = knots, key, prepared
        return prepared

    def raw(self, x: Tensor, t: Any, **conditions: Any) -> tuple[Tensor, Row]:
        """(y, (a, b)): the network's own output at (x, t) and its row, for training. Leaves the train mode alone, silently."""
        knot = levels(self.path, t, x)
        y, row = self._raw(x, knot, conditions)
        return y, Row(per_sample(row.a, x), per_sample(row.b, x))

    def predict(self, x: Tensor, t: Any, **conditions: Any) -> Prediction:
        """The pair (x0, eps) at x (B, *event) and time t: a number, or a tensor of shape () or (B,). One network call.

        Raises PathError where the output says nothing about the pair: eps at alpha = 0, x0 and score at sigma = 0.
        """
        state, back = working(x)
        knot = levels(self.path, t, state)
        inverse = solved(self.row(knot), knot, self.path, self.predicts)
        self._check_running()
        with self.running():
            y, _ = self._raw(state, knot, conditions)
        (p, q), (r, s) = [(per_sample(u, state), per_sample(v, state)) for u, v in inverse]
        return Prediction(back(p * state + q * y), back(r * state + s * y))

    def __call__(self, x: Tensor, t: Any, **conditions: Any) -> Tensor:
        """The score grad_x log p_t(x) = -eps / sigma, shaped like x. A network that predicts the score is returned as it is.

        Raises PathError at sigma = 0, and where the output says nothing about eps.
        """
        state, back = working(x)
        knot = levels(self.path, t, state)
        if self.predicts == "score":
            p, q = 0.0, 1.0
        else:
            row = self.row(knot)
            needs_sigma(knot.sigma, self.path)
            if isinstance(row.a, float) and row.a == 0.0:  # y is eps times a factor: defined at alpha = 0 too
                p, q = 0.0, -1.0 / (row.b * knot.sigma)
            else:
                _, (r, s) = solved(row, knot, self.path, self.predicts)
                p, q = -r / knot.sigma, -s / knot.sigma
        self._check_running()
        with self.running():
            y, _ = self._raw(state, knot, conditions)
        p, q = per_sample(p, state), per_sample(q, state)
        if isinstance(p, float) and p == 0.0:
            return back(y if isinstance(q, float) and q == 1.0 else q * y)
        return back(p * state + q * y)

    @contextmanager
    def running(self) -> Generator[None, None, None]:
        """Around a run: with ``mode="eval"`` the network is in eval mode inside, and every module's mode is restored after.

        Otherwise a no-op. May be nested and entered from several threads: the last one out restores. Solvers enter it
        once a run.
        """
        if self.mode != "eval" or self._module is None:
            yield
            return
        with self._lock:
            if self._depth == 0:
                self._flags = [(m, m.training) for m in self._module.modules()]
                self._module.eval()
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if self._depth == 0:
                    for module, training in self._flags:
                        module.training = training
                    self._flags = []

    def _raw(self, x: Tensor, knot: Knot, conditions: Mapping[str, Any]) -> tuple[Tensor, Row]:
        check_state(x)
        make = self._maker(x, conditions, Tally())
        t = torch.as_tensor(knot.t, dtype=torch.float64)
        labels, scales = self._labels(t), self._scales(t)
        if labels.is_floating_point() and not bool(labels.isfinite().all()):
            raise PathError(f"label(t) is not finite for t in [{float(t.min()):g}, {float(t.max()):g}]")
        labels = _label_dtype(labels, x)
        if t.dim():
            factor = None if scales is None else per_sample(scales, x)
            return make(labels, factor, None)(x), self.row(knot)
        factor = None if scales is None else float(scales)
        return make(labels.expand(x.shape[0]), factor, float(t))(x), self.row(knot)

    def _labels(self, t: Tensor) -> Tensor:
        return _of_time("label", self.label, t)

    def _scales(self, t: Tensor) -> Tensor | None:
        return None if self.scale is None else _of_time("scale", self.scale, t).to(torch.float64)

    def _maker(
        self, x: Tensor, conditions: Mapping[str, Any], tally: Tally, accept: Callable[..., Any] | None = None
    ) -> Callable[..., Callable[[Tensor], Any]]:
        """make(label, factor, t) -> call(x): everything that does not depend on the time is bound here, once.

        ``accept`` is what takes every output; without one an output that is right as it is passes, and ``_accept`` the rest.
        """
        check_state(x)
        if x.dtype not in (torch.float32, torch.float64):
            raise InputError(f"the state is {_short(x)}: give float32 or float64, and Score(dtype={x.dtype}) for the network")
        kwargs = {**_moved(self.conditions, x.device), **_moved_rows(conditions, x)}
        self._check_arguments(kwargs)
        network, evals, cast = self.network, self.evals, self.dtype
        plain, accept = accept is None, accept or self._accept
        shape, dtype, device = x.shape, x.dtype, x.device
        watch = not (torch.is_inference_mode_enabled() or x.is_inference())

        def make(label: Tensor, factor: Any, t: float | None) -> Callable[[Tensor], Tensor]:
            tracked = watch
            feed = None if factor is None and cast is None else functools.partial(_feed, factor, cast)

            def call(x: Tensor) -> Tensor:
                nonlocal tracked
                tally.nfe += 1
                tally.net_evals += evals
                version = written = 0
                try:
                    if tracked:
                        version, written = x._version, label._version
                    y = network(x if feed is None else feed(x), label, **kwargs)
                except Exception as error:
                    if tracked and x.is_inference():  # no version counter, so the network was not reached
                        tracked = False
                        tally.nfe -= 1
                        tally.net_evals -= evals
                        return call(x)
                    if isinstance(error, ToolkitError):
                        raise
                    place = "" if t is None else f" at t={t:g}"
                    said = f"{type(error).__name__}{place}: {str(error)[:300]}{self._mixed(str(error), x, label)}"
                    raise NetworkError(f"the network raised {said}", t=t) from error
                if tracked and label._version != written:
                    self._last = None  # the labels kept for the next run are spoilt
                    raise NetworkError("the network changed its time label in place: let it work on a copy, t = t * 1000", t=t)
                changed = tracked and x._version != version
                if plain and type(y) is Tensor and y.dtype is dtype and y.shape == shape and y.device == device and not changed:
                    return y
                return accept(y, x, t, changed)

            return call

        return make

    def _mixed(self, error: str, x: Tensor, label: Tensor) -> str:
        """What to write where a network's ``error`` is about dtypes that do not go together, or nothing."""
        if not re.search(r"dtype|[Tt]ype|Half|BFloat16|Double", error):
            return ""
        given, own = self.dtype or x.dtype, self._parameter_dtype()
        if own not in (None, given):
            return f" (its parameters are {own}, and x {given}: write Score(..., dtype={own}), or network.to({given}))"
        if label.is_floating_point() and label.dtype is not given:
            return f" (x is {given}, but the time label, which that would round, {label.dtype}: cast it inside, t.to(x.dtype))"
        return ""

    def _accept(self, y: Any, x: Tensor, t: float | None, changed: bool) -> Tensor:
        """Everything off the good path: pick the element, then say what is wrong, or cast."""

        def fail(message: str) -> NoReturn:
            raise NetworkError(message if t is None else f"at t={t:g}: {message}", t=t)

        if changed:
            fail("the network changed its input in place: let it work on a copy (x = x.clone(), or no in-place operations)")
        y = self._element(y, fail)
        if y.is_complex():
            fail(f"network output has dtype {_short(y)}: complex is not supported")
        if not y.is_floating_point():
            fail(f"network output has dtype {_short(y)}: need floating")
        if y.device != x.device:
            fail(f"network output on {y.device}, state on {x.device}: must be on the same device")
        doubled = x.dim() > 1 and y.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        if doubled and self.split is not None:
            y = y[:, : x.shape[1]]
        elif y.shape != x.shape:
            if doubled:
                fail(f"network output has {y.shape[1]} channels for {x.shape[1]}: pass split='learned_var'")
            fail(f"network output shape {tuple(y.shape)}, state {tuple(x.shape)}: must be equal (no broadcasting)")
        if y.dtype is x.dtype:
            return y
        if y.dtype is torch.float64 and self.dtype is None and not self._warned:
            self._warned = True
            warnings.warn(
                f"the network returns float64 for a {_short(x)} state: cast back; let it compute in {_short(x)}, or give a "
                "float64 state",
                PrecisionWarning,
                stacklevel=4,
            )
        return y.to(x.dtype)

    def _halves(self, y: Any, x: Tensor, t: float | None, changed: bool) -> tuple[Tensor, Tensor]:
        """Both halves of 2C channels, each accepted like an output."""

        def fail(message: str) -> NoReturn:
            raise NetworkError(message if t is None else f"at t={t:g}: {message}", t=t)

        y = self._element(y, fail)
        if x.dim() < 2 or y.shape != (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
            fail(f"network output {tuple(y.shape)} for a state {tuple(x.shape)} has no learned variance: use solver='ddpm'")
        first, second = y.chunk(2, dim=1)
        return self._accept(first, x, t, changed), self._accept(second, x, t, changed)

    def _element(self, y: Any, fail: Callable[[str], NoReturn]) -> Tensor:
        if isinstance(y, Tensor):
            return y
        if y is None:
            fail("the network returned None: does its forward end in a return?")
        kind = type(y).__name__
        if self.output is not None:
            try:
                y = getattr(y, self.output) if isinstance(self.output, str) and hasattr(y, self.output) else y[self.output]
            except (LookupError, TypeError, AttributeError):
                fail(f"the network returned {kind} without output={self.output!r}: it has {_contents(y)}")
        elif isinstance(getattr(y, "sample", None), Tensor):
            y = y.sample
        elif isinstance(y, Mapping):
            if "sample" in y or len(y) == 1:
                y = y["sample"] if "sample" in y else next(iter(y.values()))
            else:
                fail(f"the network returned {kind} with {_contents(y)}: name the element by output='...'")
        elif isinstance(y, (tuple, list)):
            fail(f"the network returned {kind} of {len(y)}: name the element by output=0")
        if not isinstance(y, Tensor):
            fail(f"the network returned {type(y).__name__}: need a tensor")
        return y

    def _check_arguments(self, kwargs: Mapping[str, Any]) -> None:
        names = tuple(kwargs)
        if self._signature is None or names in self._accepted:
            return
        try:
            self._signature.bind(None, None, **kwargs)
            self._accepted.add(names)
        except TypeError as error:
            given = f"with conditions {', '.join(kwargs)}" if kwargs else "without conditions"
            raise InputError(f"the network{self._signature} cannot be called as network(x, label) {given}: {error}") from None

    def _check_mode(self) -> None:
        if self.mode == "keep":
            return
        names = [name for name, module in self._moody if module.training]
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            fix = "enter score.running() around the run" if self.mode == "eval" else "call network.eval(), or give mode='eval'"
            warnings.warn(f"in train mode: {', '.join(names[:4])}{more}: {fix}", TrainModeWarning, stacklevel=3)

    def _check_running(self) -> None:
        if self.mode is None:
            self._check_mode()


def levels(path: Path, t: Any, x: Tensor) -> Knot:
    """The path at time t for the batch x: a knot of floats for one time, of float64 tensors (B,) for a time a sample."""
    if isinstance(t, Tensor):
        if t.dtype is torch.bool or t.is_complex():
            raise InputError(f"t has dtype {t.dtype}: give times as floating numbers")
        if t.dim() > 1 or (t.numel() not in (1, x.shape[0])):
            raise InputError(f"t has shape {tuple(t.shape)} for a batch of {x.shape[0]}: give a number or a tensor () or (B,)")
        if t.is_floating_point() and torch.finfo(t.dtype).bits < 32:
            warnings.warn(f"t is {t.dtype}: times in half precision are coarse; give float64", PrecisionWarning, stacklevel=3)
    elif isinstance(t, (bool, str)) or t is None:
        raise InputError(f"t={t!r}: give a number or a tensor of shape () or (B,)")
    if not isinstance(t, Tensor) or t.numel() == 1:
        try:
            return path.knot(float(t))
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"t={t!r}: give a number or a tensor of shape () or (B,)") from None
    t = t.detach().to(torch.float64)
    check_inside(path, t)
    columns: Any = (t, path.alpha(t), path.sigma(t), path.lam(t), path.dalpha(t), path.dsigma(t), path.g2(t))
    return Knot(*columns)


def per_sample(value: Any, x: Tensor) -> Any:
    """A float as it is; a tensor (B,) in x's dtype and device, shaped to broadcast against x."""
    if not isinstance(value, Tensor):
        return float(value)
    value = value.to(device=x.device, dtype=x.dtype)
    return value.reshape(-1, *(1,) * (x.dim() - 1)) if value.dim() else value


def solved(row: Row, knot: Knot, path: Path, predicts: Any) -> tuple[Row, Row]:
    """``solve_row`` after the check that it can be solved; PathError names a time where it can."""
    a, b = row
    det = torch.as_tensor(knot.alpha * b - knot.sigma * a, dtype=torch.float64)
    bad = ~(det.isfinite() & (det != 0.0))
    if bool(bad.any()):
        at = {name: _first(getattr(knot, name), bad) for name in ("t", "alpha", "sigma")}
        name = f"{predicts}-prediction" if isinstance(predicts, str) else "this prediction"
        if at["alpha"] == 0.0:
            raise PathError(
                f"{name} is undefined at alpha=0 (t={at['t']:g} of {path}): its output says nothing about x0; "
                f"use a v, x0 or velocity network, or start at t={0.999 * path.T:g}"
            )
        if at["sigma"] == 0.0:
            raise PathError(
                f"{name} is undefined at sigma=0 (t={at['t']:g} of {path}): its output says nothing about eps; "
                f"the last usable time is t={path.t_min:g}"
            )
        raise PathError(
            f"{name} at t={at['t']:g} has the row ({_first(a, bad):g}, {_first(b, bad):g}), parallel to "
            f"(alpha, sigma) = ({at['alpha']:g}, {at['sigma']:g}) or not finite: it does not determine x0 and eps"
        )
    return solve_row(row, knot.alpha, knot.sigma)


def needs_sigma(sigma: float | Tensor, path: Path) -> None:
    """PathError at sigma = 0, where score = -eps / sigma has no value."""
    if bool(torch.as_tensor(sigma == 0.0).any()):
        raise PathError(f"the score is undefined at sigma=0 of {path}: the last usable time is t={path.t_min:g}")


def check_state(x: Any) -> None:
    """InputError unless x is a dense floating tensor with a batch dimension."""
    if not isinstance(x, Tensor):
        fix = "torch.from_numpy(x)" if type(x).__module__ == "numpy" else "torch.as_tensor(x)"
        raise InputError(f"x is {_seen(x)}: give a tensor (B, ...), for example {fix}")
    if x.is_complex():
        raise InputError(f"x has dtype {_short(x)}: complex is not supported")
    if not x.is_floating_point():
        raise InputError(f"x has dtype {_short(x)}: need floating, for example x.float()")
    if x.layout is not torch.strided:
        raise InputError(f"x has layout {x.layout}: give a dense tensor, for example x.to_dense()")
    if x.dim() == 0:
        raise InputError("x is 0-dimensional: the first dimension is the batch; give x[None]")


def working(x: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(x in float32 or more, the cast back to x's dtype)."""
    check_state(x)
    if torch.finfo(x.dtype).bits >= 32:
        return x, _same
    dtype = x.dtype
    return x.float(), lambda y: y.to(dtype)


def _same(y: Tensor) -> Tensor:
    return y


def _feed(factor: Any, cast: torch.dtype | None, x: Tensor) -> Tensor:
    x = x if factor is None else x * factor
    return x if cast is None else x.to(cast)


def _raising(message: str) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        raise PathError(message)

    return call


def _check_half_range(knots: Sequence[Knot], factors: Sequence[float | None]) -> None:
    for k, factor in zip(knots, factors, strict=True):
        size = 6.0 * k.sigma * (1.0 if factor is None else abs(factor))
        if size > 65504.0:
            raise InputError(f"dtype=torch.float16 overflows at t={k.t:g}, inputs reach {size:.3g}: give scale=, or bfloat16")


def _of_time(name: str, function: TimeFunction | None, t: Tensor) -> Tensor:
    """function(t), or t itself, checked to be one number a time."""
    if function is None:
        return t
    try:
        out = function(t.clone())
    except Exception as error:
        raise InputError(f"{name}(t) raised {type(error).__name__} on a float64 tensor {tuple(t.shape)}: {error}") from error
    if not isinstance(out, Tensor) or out.shape != t.shape or out.is_complex() or out.dtype is torch.bool:
        seen = f"{_short(out)} {tuple(out.shape)}" if isinstance(out, Tensor) else _seen(out)
        raise InputError(f"{name}(t) gave {seen} for t of shape {tuple(t.shape)}: give a real tensor of the same shape")
    return out.detach()


def _label_dtype(labels: Tensor, x: Tensor) -> Tensor:
    dtype = x.dtype if labels.is_floating_point() else labels.dtype
    return labels.to(device=x.device, dtype=dtype)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _moved(v, device) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(v, device) for v in value)
    return value


def _moved_rows(conditions: Mapping[str, Any], x: Tensor) -> dict[str, Any]:
    """Conditions on x's device; tensors with a batch dimension have B rows, and a single row is expanded to B."""
    batch = x.shape[0]

    def move(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dim() and value.shape[0] not in (1, batch):
                raise InputError(
                    f"condition {name} has {value.shape[0]} rows for a batch of {batch}: give {batch} rows, or 1 "
                    "(constants without a batch dimension go to Score(..., conditions=))"
                )
            value = value.to(x.device)
            return value.expand(batch, *value.shape[1:]) if value.dim() and batch != 1 and value.shape[0] == 1 else value
        if isinstance(value, Mapping):
            return {k: move(f"{name}[{k!r}]", v) for k, v in value.items()}
        if type(value) in (tuple, list):
            return type(value)(move(f"{name}[{i}]", v) for i, v in enumerate(value))
        return value

    return {name: move(name, value) for name, value in conditions.items()}


def _is_coefficient(c: Any) -> bool:
    return callable(c) or (isinstance(c, (int, float)) and not isinstance(c, bool) and math.isfinite(c))


def _coefficient(c: Coefficient, t: Any) -> Any:
    if not callable(c):
        return float(c)
    out = c(torch.as_tensor(t, dtype=torch.float64))
    return torch.as_tensor(out, dtype=torch.float64).expand(t.shape) if isinstance(t, Tensor) else float(out)


def _module_of(network: Any) -> nn.Module | None:
    """The network, or what a function calls it by: a method's object, or the modules that a lambda closes over."""
    while isinstance(network, functools.partial):
        network = network.func
    network = network if isinstance(network, nn.Module) else getattr(network, "__self__", network)
    if isinstance(network, nn.Module):
        return network
    try:
        seen = inspect.getclosurevars(network)
    except (TypeError, ValueError):  # no Python function
        return None
    modules = [v for v in {**seen.globals, **seen.nonlocals}.values() if isinstance(v, nn.Module)]
    return modules[0] if len(modules) == 1 else nn.ModuleList(modules) if modules else None


def _mode_dependent(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """("Dropout 'block.drop'", module) of every layer that computes something else in train mode."""
    found = []
    for name, layer in module.named_modules():
        kind = type(layer).__name__
        rates = [vars(layer).get(key) for key in ("p", "drop_prob", "dropout")]  # not getattr: some configs warn when asked
        rates = [r for r in rates if isinstance(r, (int, float))]
        drops = (not rates or any(rates)) and ("drop" in kind.lower() or kind == "StochasticDepth")
        inside = any(rates) and isinstance(layer, (nn.MultiheadAttention, nn.RNNBase))
        tracks = isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats
        if drops or inside or tracks or isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.RReLU)):
            found.append((f"{kind} {name!r}" if name else kind, layer))
    return found


def _signature(network: Any) -> inspect.Signature | None:
    """The signature of network(x, label, ...), None where there is none to see; InputError when it cannot be called so."""
    if isinstance(network, type):
        raise InputError(f"network is the class {network.__name__}: give an instance, {network.__name__}(...)")
    if not callable(network):
        raise InputError(f"network is {_seen(network)}: give something callable as network(x, label)")
    try:
        signature = inspect.signature(network.forward if isinstance(network, nn.Module) else network)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind_partial(None, None)
    except TypeError as error:
        raise InputError(f"the network{signature} cannot be called as network(x, label): {error}") from None
    return signature


def _contents(y: Any) -> str:
    if isinstance(y, Mapping):
        return f"keys {', '.join(map(repr, y))}"
    if isinstance(y, (tuple, list)):
        return f"{len(y)} elements"
    return f"attributes {', '.join(n for n in vars(y) if not n.startswith('_'))}" if hasattr(y, "__dict__") else "no elements"


def _first(value: Any, bad: Tensor) -> float:
    return float(value[bad][0]) if isinstance(value, Tensor) and value.dim() else float(value)


def _seen(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _short(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
