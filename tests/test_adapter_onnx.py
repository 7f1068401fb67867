"""An ONNX session as a score: a stand-in with onnxruntime's interface, as strict about names, types and shapes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scores.adapters.diffusers import from_diffusers
from scores.adapters.onnx import OnnxNetwork, from_onnx
from sde import VP, Linear, Tabulated
from sde.errors import InputError, NetworkError
from solvers import sample

NUMPY = {"float": np.float32, "float16": np.float16, "double": np.float64, "int64": np.int64, "bool": np.bool_}
X = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))


class Session:
    """inputs {name: (type, shape)}; ``compute`` gets the arrays by name."""

    def __init__(self, inputs, compute, output="out_sample"):
        self.inputs, self.compute, self.output, self.fed = inputs, compute, output, []

    def get_inputs(self):
        return [SimpleNamespace(name=n, type=f"tensor({kind})", shape=list(shape)) for n, (kind, shape) in self.inputs.items()]

    def get_outputs(self):
        return [SimpleNamespace(name=self.output), SimpleNamespace(name="hidden")]

    def run(self, names, feed):
        assert names == [self.output]
        if set(feed) != set(self.inputs):
            raise ValueError(f"Required inputs ({sorted(set(self.inputs) - set(feed))}) are missing")
        for name, (kind, shape) in self.inputs.items():
            assert type(feed[name]) is np.ndarray
            assert feed[name].dtype == NUMPY[kind], name
            assert feed[name].ndim == len(shape), name
            assert all(isinstance(want, str) or want == got for want, got in zip(shape, feed[name].shape, strict=True)), name
        self.fed.append(feed)
        return [self.compute(**feed)]


def unet(kind="float", time="int64", shape=(1,)):
    """diffusers' export: the network knows the whole timestep and the text."""

    def compute(sample, timestep, encoder_hidden_states):
        share = np.asarray(timestep, dtype=np.float64).reshape(-1, 1, 1) / 1000.0
        return (share * sample + encoder_hidden_states.mean()).astype(sample.dtype)

    image, text = ("batch", 2, 4), ("batch", "length")
    return Session({"sample": (kind, image), "timestep": (time, shape), "encoder_hidden_states": (kind, text)}, compute)


def torch_unet(sample, timestep, encoder_hidden_states):
    return timestep.reshape(-1, 1, 1).to(sample) / 1000.0 * sample + encoder_hidden_states.mean()


TEXT = torch.tensor([[0.5, 1.5]])
SCHEDULER = {"_class_name": "DDIMScheduler", "clip_sample": False}


@pytest.mark.parametrize(("kind", "tolerance"), [("float", 1e-6), ("float16", 2e-3), ("double", 1e-6)])
def test_a_session_says_what_the_network_says(kind, tolerance):
    session = unet(kind)
    path, label = Tabulated.linear(), lambda t: (1000 * t - 1).round()
    ours = from_onnx(session, path, "v", label=label, conditions={"encoder_hidden_states": TEXT})
    want = from_diffusers(torch_unet, {**SCHEDULER, "prediction_type": "v_prediction"}, family="UNet2DConditionModel")
    for t in (0.001, 0.5, 1.0):
        a, b = ours.predict(X, t), want.predict(X, t, encoder_hidden_states=TEXT)
        assert a.x0.dtype is torch.float32
        assert (a.x0 - b.x0).abs().max() < tolerance
        assert (a.eps - b.eps).abs().max() < tolerance
    assert session.fed[-1]["timestep"].tolist() == [999]


def test_it_goes_where_its_scheduler_says():
    net = OnnxNetwork(unet())
    ours = from_diffusers(net, SCHEDULER, family="UNet2DConditionModel", rule="nearest")
    want = from_diffusers(torch_unet, SCHEDULER, family="UNet2DConditionModel", rule="nearest")
    a, b = (sample(s, x=X, solver="ddim", steps=6, conditions={"encoder_hidden_states": TEXT}) for s in (ours, want))
    assert (a.x - b.x).abs().max() < 1e-5 * b.x.abs().max()
    assert (a.nfe, b.nfe) == (6, 6)


def test_one_time_a_sample_where_the_session_takes_it():
    session = unet(time="float", shape=("batch",))
    net = OnnxNetwork(session)
    t = torch.tensor([1.0, 20.5, 300.25])
    want = torch_unet(X, t, TEXT)
    assert (net(X, t, encoder_hidden_states=TEXT) - want).abs().max() < 1e-6
    assert session.fed[0]["timestep"].tolist() == [1.0, 20.5, 300.25]  # fractions are kept where they can be
    for shape in ((1,), ()):
        fixed = unet(time="float", shape=shape)
        assert (OnnxNetwork(fixed)(X, torch.full((3,), 7.5), encoder_hidden_states=TEXT)).shape == X.shape
        assert fixed.fed[0]["timestep"].shape == shape
        with pytest.raises(InputError, match="takes one 'timestep' for the batch"):
            OnnxNetwork(unet(time="float", shape=shape))(X, t, encoder_hidden_states=TEXT)


def test_whole_timesteps_are_not_made_here():
    net = OnnxNetwork(unet())
    with pytest.raises(InputError, match=r"whole timesteps, got 20\.7"):
        net(X, torch.full((3,), 20.7), encoder_hidden_states=TEXT)
    net(X, torch.full((3,), 20.9999), encoder_hidden_states=TEXT)  # rounding of float32 is no fraction
    assert net.session.fed[0]["timestep"].tolist() == [21]


def test_names_of_another_export():
    def compute(x, t):
        return x - t.reshape(-1, 1, 1)

    session = Session({"x": ("float", ("n", 2, 4)), "t": ("float", ("n",))}, compute, output="velocity")
    score = from_onnx(session, Linear(), "velocity", names={"sample": "x", "timestep": "t"})
    pair = score.predict(X, 0.25)
    assert (pair.x0 - (X - 0.25 * (X - 0.25))).abs().max() < 1e-6
    assert OnnxNetwork(session, {"sample": "x", "timestep": "t", "output": "hidden"}).output == "hidden"


def test_two_c_channels_and_other_types():
    def compute(sample, timestep, labels):
        assert labels.tolist() == [3, 4, 5]
        return np.concatenate([sample, 9.0 + sample], 1)

    inputs = {"sample": ("float", ("n", 2, 4)), "timestep": ("int64", (1,)), "labels": ("int64", ("n",))}
    score = from_onnx(Session(inputs, compute), VP(), "x0", label=lambda t: (999 * t).round(), split="learned_var")
    labels = torch.tensor([3.0, 4.0, 5.0])  # of another dtype than the session wants
    assert torch.equal(score.predict(X, 0.5, labels=labels).x0, X)


def test_there_is_no_gradient():
    net = OnnxNetwork(unet())
    x = X.clone().requires_grad_()
    with pytest.raises(InputError, match="an ONNX session has no gradient"):
        net(x, torch.full((3,), 7.0), encoder_hidden_states=TEXT)
    with torch.no_grad():
        assert net(x, torch.full((3,), 7.0), encoder_hidden_states=TEXT).shape == X.shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OnnxNetwork("unet.onnx"), "session is a str"),
        (lambda: OnnxNetwork(unet(), {"state": "sample"}), "names has 'state'"),
        (lambda: OnnxNetwork(unet(), {"sample": "x"}), "no 'x' for the sample: it has sample, timestep, encoder_hidden_states"),
        (lambda: OnnxNetwork(Session({"sample": ("float", ("n", 2))}, None)), "no 'timestep' for the timestep"),
        (lambda: OnnxNetwork(unet(), {"output": "eps"}), "no 'eps' for the output: it has out_sample, hidden"),
        (lambda: OnnxNetwork(unet())(X, torch.zeros(3), text=TEXT), "no 'text' for the condition"),
        (
            lambda: OnnxNetwork(unet("bfloat16"))(X, torch.zeros(3), encoder_hidden_states=TEXT),
            "'sample' is a tensor(bfloat16)",
        ),
    ],
)
def test_one_clear_error(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value)


def test_what_the_session_raises_is_told_with_the_time():
    score = from_onnx(unet(), VP(), label=lambda t: (999 * t).round())
    with pytest.raises(
        NetworkError, match=r"ValueError at t=0\.5: Required inputs \(\['encoder_hidden_states'\]\) are missing"
    ):
        score.predict(X, 0.5)
