"""Window gradients against autograd, in float64: equal up to rounding, not just close."""

from __future__ import annotations

import copy
import inspect
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

import tiny
from stepquant.calibrate.rounding import SoftRounding, input_scales, materialised, soften_
from stepquant.calibrate.trajectory import State, Trajectory, advance, record, replay, seal, state_at
from stepquant.calibrate.windows import (
    GradientMode,
    equal_windows,
    unrolled_loss,
    window_gradient,
    window_loss,
    windows_of,
)
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.layer import QuantizedLayer
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.numerics.spec import scheme_for
from stepquant.run import Run

Gradients = dict[str, Tensor]
STEPS = 7
MODES: tuple[GradientMode, ...] = ("identity", "exact", "per_step")


class TinyNet(nn.Module):
    """Two layers that know the timestep, for samples [B, 2, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Conv2d(2, 6, 3, padding=1)
        self.outer = nn.Conv2d(6, 2, 1)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        phase = torch.sin(torch.as_tensor(timestep).to(sample.dtype) / 200)
        return self.outer(torch.tanh(self.inner(sample) + phase))


def without_float32(scheduler: type[Any]) -> type[Any]:
    """The scheduler with diffusers' own `step`, but for its cast to float32, which would hide all but seven digits."""
    source = textwrap.dedent(inspect.getsource(scheduler.step))
    assert source.count("sample = sample.to(torch.float32)") == 1
    namespace: dict[str, Any] = dict(vars(sys.modules[scheduler.__module__]))
    exec(source.replace("torch.float32", "torch.float64"), namespace)
    return type(scheduler.__name__, (scheduler,), {"step": namespace["step"]})


EXACT_SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "ddim clipped": lambda: DDIMScheduler(clip_sample=True),
    "ddpm": lambda: DDPMScheduler(clip_sample=False),
    "euler": lambda: without_float32(EulerDiscreteScheduler)(),
    "flow euler": lambda: without_float32(FlowMatchEulerDiscreteScheduler)(),
    "dpm++ 2m": lambda: without_float32(DPMSolverMultistepScheduler)(),
    "dpm++ 3m": lambda: without_float32(DPMSolverMultistepScheduler)(solver_order=3),
    "pndm": lambda: PNDMScheduler(),
    "pndm plms": lambda: PNDMScheduler(skip_prk_steps=True),
    "unipc": lambda: UniPCMultistepScheduler(),
    "heun": lambda: HeunDiscreteScheduler(),
}


@dataclass
class Case:
    """A recorded trajectory and a quantized denoiser with live rounding and scales."""

    trajectory: Trajectory
    full_precision: nn.Module
    quantized: nn.Module

    @property
    def layers(self) -> dict[str, Any]:
        return quantized_layers(self.quantized)

    def variables(self) -> Gradients:
        soft = {f"{n}.alpha": x.weight_quantizer.alpha for n, x in self.layers.items()}
        return soft | {f"{name}.scale": quantizer.scale for name, quantizer in input_scales(self.layers).items()}

    def gradients(self, work: Callable[[], object]) -> Gradients:
        """What `work` adds to the gradients."""
        for variable in self.variables().values():
            variable.grad = None
        work()
        found = {name: variable.grad for name, variable in self.variables().items()}
        assert all(gradient is not None for gradient in found.values())
        return found  # type: ignore[return-value]

    def of(self, mode: GradientMode, start: int, stop: int, state: State | None = None) -> Gradients:
        return self.gradients(
            lambda: window_gradient(self.quantized, self.trajectory, start, stop, mode=mode, state=state)
        )


def case(scheduler: Any, dtype: torch.dtype = torch.float64, steps: int = STEPS) -> Case:
    full_precision = TinyNet().to(dtype)
    pipe = DenoiserPipeline(full_precision, scheduler, (2, 4, 4))
    (recorded,) = record(pipe, full_precision, seeds=(3, 1), steps=steps, batch_size=8, run=Run())
    quantized = tiny.quantize_(TinyNet(), scheme_for(3, 5), rows=2, ends="same").to(dtype)
    weights = {name: module.weight for name, module in full_precision.named_modules() if hasattr(module, "weight")}
    for name, layer in quantized_layers(quantized).items():
        soft = soften_(layer, weights[name], keep=0.6)
        # Quantizers hold float32 whatever the network's dtype; a test of sixteen digits needs them wider.
        for holder in (soft, soft.quantizer, layer.input_quantizer):
            for tensor in (*holder.parameters(recurse=False), *holder.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
        layer.input_quantizer.scale.requires_grad_(True)
    return Case(seal(recorded), full_precision, quantized)


def assert_same(found: Gradients, expected: Gradients, relative: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float(gradient.norm()) > 0, name
        assert float((found[name] - gradient).norm()) <= relative * float(gradient.norm()), name


@pytest.mark.parametrize("name", EXACT_SCHEDULERS)
@pytest.mark.parametrize(("start", "stop"), [(3, 4), (1, 3), (0, 5), (2, 7)])
def test_exact_is_autograd_through_the_unrolled_window(name: str, start: int, stop: int) -> None:
    tested = case(EXACT_SCHEDULERS[name]())
    trajectory, quantized = tested.trajectory, tested.quantized
    assert trajectory.steps[-1].next_sample.dtype == torch.float64
    expected = tested.gradients(lambda: unrolled_loss(quantized, trajectory, start, stop).backward())
    assert_same(tested.of("exact", start, stop), expected)
    if stop - start > 1:  # the window is one where the modes differ, or the test would show nothing
        other = tested.of("identity", start, stop)
        assert any(not torch.allclose(other[n], expected[n], rtol=1e-6) for n in expected)


@pytest.mark.parametrize(
    "scheduler", [EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_exact_agrees_under_the_schedulers_that_users_have(scheduler: type[Any]) -> None:
    tested = case(scheduler(), torch.float32)
    trajectory, quantized = tested.trajectory, tested.quantized
    expected = tested.gradients(lambda: unrolled_loss(quantized, trajectory, 1, 6).backward())
    assert_same(tested.of("exact", 1, 6), expected, relative=1e-5)  # float32 sums in another order


def test_history_needs_its_own_adjoints() -> None:
    # What "cached predictions are constants" would give for a multistep solver is another gradient.
    tested = case(EXACT_SCHEDULERS["dpm++ 2m"]())
    trajectory, quantized = tested.trajectory, tested.quantized

    def forgetful() -> None:
        state = state_at(trajectory, 1)
        for index in range(1, 4):
            constant = {path: value.detach() for path, value in state.history.items()}
            state = advance(quantized, trajectory, index, State(state.sample, constant))
        window_loss(state.sample, trajectory.steps[3].next_sample).backward()

    exact = tested.of("exact", 1, 4)
    constants = tested.gradients(forgetful)
    assert all(float((exact[n] - constants[n]).norm()) > 1e-3 * float(exact[n].norm()) for n in exact)


@pytest.mark.parametrize("mode", MODES)
def test_a_window_may_start_from_any_state(mode: GradientMode) -> None:
    tested = case(EXACT_SCHEDULERS["dpm++ 2m"]())
    trajectory, quantized = tested.trajectory, tested.quantized
    with torch.no_grad():
        *_, state = replay(quantized, trajectory, 0, 3)
    recorded = [step.next_sample.clone() for step in trajectory.steps]
    found = tested.of(mode, 3, 6, state)
    if mode == "exact":
        expected = tested.gradients(lambda: unrolled_loss(quantized, trajectory, 3, 6, state).backward())
        assert_same(found, expected)
    else:
        other = tested.of(mode, 3, 6)
        assert any(not torch.equal(found[name], other[name]) for name in found)
    assert state.sample.grad is None
    assert all(torch.equal(step.next_sample, kept) for step, kept in zip(trajectory.steps, recorded, strict=True))


def _detached_states(tested: Case, start: int, stop: int) -> list[State]:
    with torch.no_grad():
        states = [state_at(tested.trajectory, start)]
        return states + list(replay(tested.quantized, tested.trajectory, start, stop))


@pytest.mark.parametrize("name", ["ddim", "euler", "flow euler", "dpm++ 2m"])
def test_identity_is_the_gradient_of_the_linear_surrogate(name: str) -> None:
    # sum_j < sg(lambda_M), F_j(sg(x~_j); theta) >
    tested = case(EXACT_SCHEDULERS[name]())
    start, stop = 1, 6
    states = _detached_states(tested, start, stop)
    end = states[-1].sample.clone().requires_grad_(True)
    (adjoint,) = torch.autograd.grad(window_loss(end, tested.trajectory.steps[stop - 1].next_sample), end)

    def surrogate() -> None:
        products = [
            (adjoint * advance(tested.quantized, tested.trajectory, index, states[index - start]).sample).sum()
            for index in range(start, stop)
        ]
        torch.stack(products).sum().backward()

    assert_same(tested.of("identity", start, stop), tested.gradients(surrogate))


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++ 2m"])
def test_per_step_is_the_gradient_of_each_steps_own_loss(name: str) -> None:
    tested = case(EXACT_SCHEDULERS[name]())
    start, stop = 1, 6
    states = _detached_states(tested, start, stop)

    def losses() -> None:
        found = []
        for index in range(start, stop):
            after = advance(tested.quantized, tested.trajectory, index, states[index - start]).sample
            found.append(window_loss(after, tested.trajectory.steps[index].next_sample))
        torch.stack(found).sum().backward()

    assert_same(tested.of("per_step", start, stop), tested.gradients(losses))


def test_a_window_of_one_step_is_the_same_in_every_mode() -> None:
    tested = case(EXACT_SCHEDULERS["ddim"]())
    exact = tested.of("exact", 2, 3)
    for mode in ("identity", "per_step"):
        found = tested.of(mode, 2, 3)
        assert all(torch.equal(found[name], exact[name]) for name in exact)


def test_the_loss_is_that_of_the_windows_end_in_every_mode() -> None:
    tested = case(EXACT_SCHEDULERS["ddim"]())
    with torch.no_grad():
        expected = float(unrolled_loss(tested.quantized, tested.trajectory, 1, 6))
    for mode in MODES:
        found = window_gradient(tested.quantized, tested.trajectory, 1, 6, mode=mode)
        assert found == pytest.approx(expected, rel=1e-12)


def test_the_loss_by_hand() -> None:
    found = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 1.0]]]])  # [2, 1, 1, 2]
    wanted = torch.zeros_like(found)
    assert float(window_loss(found, wanted)) == pytest.approx(((1 + 4) + (0 + 1)) / 2)


@pytest.mark.parametrize("mode", MODES)
def test_materialised_weights_collect_the_same_gradient(mode: GradientMode) -> None:
    tested = case(EXACT_SCHEDULERS["ddim"]())
    expected = tested.of(mode, 1, 6)
    before = {name: layer.weight for name, layer in tested.layers.items()}

    def work() -> None:
        with materialised(tested.layers):
            window_gradient(tested.quantized, tested.trajectory, 1, 6, mode=mode)

    assert_same(tested.gradients(work), expected)
    for name, layer in tested.layers.items():
        assert layer.weight is before[name]
        assert isinstance(layer.weight_quantizer, SoftRounding)
        assert not layer.on_grid


class _Held:
    """Stands for a saved tensor while autograd holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Meter:
    """Bytes that autograd holds for its backward passes: now, and at most."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0

    def pack(self, tensor: Tensor) -> _Held:
        held, size = _Held(tensor), tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(held, self.release, size)
        return held

    def release(self, size: int) -> None:
        self.now -= size


@contextmanager
def _metered() -> Iterator[_Meter]:
    meter = _Meter()
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda held: held.tensor):
        yield meter


@pytest.mark.parametrize("name", ["ddim", "dpm++ 2m"])
def test_one_graph_is_in_memory_however_long_the_window(name: str) -> None:
    tested = case(EXACT_SCHEDULERS[name](), steps=12)
    trajectory = tested.trajectory

    def peak(work: Callable[[int], object], length: int) -> int:
        with _metered() as meter, materialised(tested.layers):
            before = meter.now  # the graphs of the weights, once for all steps
            meter.peak = before
            work(length)
            assert meter.now == before
            return meter.peak - before

    for mode in MODES:

        def ours(length: int, mode: GradientMode = mode) -> float:
            return window_gradient(tested.quantized, trajectory, 1, 1 + length, mode=mode)

        # A window of one step needs no gradient for the sample it starts from, hence two to begin with.
        assert peak(ours, 2) == pytest.approx(peak(ours, 1), rel=0.05)
        assert peak(ours, 5) == peak(ours, 10) == pytest.approx(peak(ours, 2), rel=0.01), mode

    def naive(length: int) -> None:
        unrolled_loss(tested.quantized, trajectory, 1, 1 + length).backward()

    assert peak(naive, 5) >= 4.5 * peak(naive, 1)
    assert peak(naive, 10) >= 9 * peak(naive, 1)


@pytest.mark.parametrize("mode", MODES)
def test_shared_noise_leaves_the_full_precision_model_nothing_to_learn(mode: GradientMode) -> None:
    tested = case(DDPMScheduler())
    model = copy.deepcopy(tested.full_precision).requires_grad_(True)
    assert tested.trajectory.steps[0].generator_states is not None
    for start, stop in windows_of((3, 3, 1), STEPS):
        assert window_gradient(model, tested.trajectory, start, stop, mode=mode) == 0.0
    assert all(float(parameter.grad.abs().max()) == 0.0 for parameter in model.parameters())


def test_other_noise_would_be_seen() -> None:
    # The control of the test above: without the recorded generators the loss of stochastic steps is not zero.
    tested = case(DDPMScheduler())
    noisy = copy.deepcopy(tested.trajectory)
    for step in noisy.steps:
        for state in step.generator_states or ():
            state.copy_(torch.Generator().manual_seed(99).get_state())
    assert window_gradient(tested.full_precision, noisy, 0, 3, mode="exact") > 0.01


def test_rows_of_other_windows_get_no_gradient() -> None:
    tested = case(EXACT_SCHEDULERS["ddim"]())
    first = next(iter(input_scales(tested.layers).values()))
    assert isinstance(first, InputQuantizer)
    tested.of("exact", 0, 1)
    assert int((first.scale.grad != 0).sum()) == 1  # of two rows


def test_hard_layers_take_part() -> None:
    # The settling phase: weights on their grid, only scales learn.
    tested = case(EXACT_SCHEDULERS["ddim"]())
    for layer in tested.layers.values():
        assert isinstance(layer, QuantizedLayer)
        layer.weight_quantizer = None
    scales = input_scales(tested.layers)
    window_gradient(tested.quantized, tested.trajectory, 0, 5, mode="exact")
    found = {name: quantizer.scale.grad.clone() for name, quantizer in scales.items()}
    for quantizer in scales.values():
        quantizer.scale.grad = None
    unrolled_loss(tested.quantized, tested.trajectory, 0, 5).backward()
    assert_same(found, {name: quantizer.scale.grad for name, quantizer in scales.items()})


def test_a_chain_that_leaves_the_finite_numbers_is_an_error() -> None:
    tested = case(EXACT_SCHEDULERS["ddim"]())
    next(iter(input_scales(tested.layers).values())).scale.data.fill_(float("nan"))
    for mode in MODES:
        with pytest.raises(CalibrationError, match="finite"):
            window_gradient(tested.quantized, tested.trajectory, 0, 3, mode=mode)


def test_an_unknown_mode_is_an_error() -> None:
    tested = case(EXACT_SCHEDULERS["ddim"]())
    with pytest.raises(SpecError, match="identity, exact or per_step"):
        window_gradient(tested.quantized, tested.trajectory, 0, 3, mode="tbptt")  # type: ignore[arg-type]


def test_equal_windows_cover_the_steps() -> None:
    assert equal_windows(20, 5) == (5, 5, 5, 5)
    assert equal_windows(20, 6) == (6, 6, 6, 2)
    assert equal_windows(3, 3) == (3,)
    for wrong in (0, -1, 4):
        with pytest.raises(SpecError, match="from 1 to 3"):
            equal_windows(3, wrong)


def test_windows_of_lengths() -> None:
    assert windows_of((3, 2, 1), 6) == [(0, 3), (3, 5), (5, 6)]
    for wrong in ((3, 2), (3, 2, 2), (6, 0), (7, -1), ()):
        with pytest.raises(SpecError, match="add up to the 6"):
            windows_of(wrong, 6)
