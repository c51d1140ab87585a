"""Learning how much each calibration sample counts, by looking one fitting step ahead.

Source: Hoang et al. 2026, "Gradient-Aligned Calibration for Post-Training Quantization of Diffusion Models" (GAC).

    omega_i        = exp(s_i / tau) / sum_j exp(s_j / tau)
    theta*(omega)  = theta - eta * sum_i omega_i grad L_i(theta)                    one inner step
    G_t            = d L_t(theta*) / d omega                                        t: a timestep group of validation
    L_GM           = -2 / (T (T - 1)) * sum_{t < k} G_t . G_k
    outer          = 1/T sum_t L_t(theta*) + L_GM

With Gamma = [grad L_1(theta) ... grad L_B(theta)] and g_t = grad L_t(theta*), theta* is linear in omega, so

    G_t               = -eta Gamma^T g_t             one forward-mode product of the vector of sample losses
    d G_t / d omega   = eta^2 Gamma^T H_t Gamma      H_t: Hessian of L_t at theta*, only ever times a vector

and no matrix of per-sample gradients is stored: `mixed` is Gamma u (reverse mode), `projected` is Gamma^T v.
The metric of the alignment is thus Gamma Gamma^T: it counts along the directions that calibration can move.

The first-order variant follows, by plain steps on s, one validation group after the other in random order and takes
the whole displacement as the update. In the mean over orders (Reptile, Nichol et al. 2018, sec. 5)

    E[s_T - s_0] = -a grad_s sum_t L_t + a^2 / 4 * grad_s sum_{t != k} (dL_t/ds) . (dL_k/ds) + O(a^3)

so it aligns gradients, in s, without second derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from stepquant.errors import CalibrationError, SpecError, nearest
from stepquant.recipe import Figures

__all__ = [
    "Derivative",
    "GroupLoss",
    "Lookahead",
    "Matching",
    "Outer",
    "SampleLosses",
    "SampleWeighting",
    "Theta",
    "UnitLosses",
    "Variant",
    "WeightLearner",
    "explicit_gradient",
    "matching_loss",
    "relative_weights",
    "softmax_chain",
    "stratified",
    "sweep",
]

Theta = tuple[Tensor, ...]
"""A unit's variables: the rounding variables of its layers."""

SampleLosses = Callable[[Theta], Tensor]
"""theta -> the loss of each calibration sample of a mini-batch, `[B]`."""

GroupLoss = Callable[[Theta], Tensor]
"""theta -> the mean loss of one timestep group of the validation set, a scalar."""

Variant = Literal["explicit", "first_order"]
Matching = Literal["product", "cosine"]
Derivative = Literal["forward", "finite_difference"]

FIRST_LOGIT = 1 / 32
"""s before the first unit (the paper's value; any constant gives uniform weights)."""


@dataclass(frozen=True)
class SampleWeighting:
    """How sample weights are learnt.

    variant: "explicit" descends the outer loss with its alignment term; "first_order" sweeps over validation groups.
    iterations: updates of s for each unit, on one mini-batch of `batch` calibration samples each.
    lr: Adam's rate on s. Adam, because the softmax makes the gradient smaller the more samples there are.
    temperature: tau.
    inner_step: length of the inner step as the root mean square change of a rounding variable; eta follows from it
        and from the gradient's norm, and counts as a constant in all derivatives.
    sweep_lr: rate of the first-order sweep, in units of (mini-batch size) / (validation loss of the unit).
    matching: "product" is the paper's L_GM, which has no bound below: large gradients lower it as agreeing ones do.
        "cosine" divides each G_t by its norm.
    matching_weight: share of the alignment term; 0 leaves the validation loss alone. Explicit variant only. Its
        coefficient is this times the unit's validation loss L at theta (cosine), or over L and the mini-batch's size
        (product), so that neither the scale of a unit's output nor the number of samples decides.
    normalise_groups: divide every group's loss by its value before the unit is fitted (keeping their mean).
    groups: timestep groups of the validation set, at most one for each calibrated step.
    validation: size of the validation set relative to the calibration set.
    hardness: where theta lies, from 0 (the full-precision weights, at which nothing is rounded yet) to 1 (to nearest).
    derivative: "forward" is forward-mode differentiation; "finite_difference" (central) needs none but forward passes,
        for units with an operator that has no forward derivative.

    Source: Hoang et al. 2026 for temperature, groups, validation and the product; all other defaults are ours, because
    the paper gives none. lr is that of the same group's MetaAug-PTQ code.
    """

    variant: Variant = "explicit"
    iterations: int = 20
    batch: int = 32
    lr: float = 0.01
    temperature: float = 1.0
    inner_step: float = 0.03
    sweep_lr: float = 1.0
    matching: Matching = "product"
    matching_weight: float = 1.0
    normalise_groups: bool = False
    groups: int = 5
    validation: float = 0.05
    hardness: float = 1.0
    derivative: Derivative = "forward"

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name, kinds in (("variant", Variant), ("matching", Matching), ("derivative", Derivative)):
            known, found = get_args(kinds), getattr(self, name)
            if found not in known:
                raise SpecError(f"{name} must be one of {', '.join(known)}, found {found!r}.{nearest(found, known)}")
        if min(self.iterations, self.batch, self.groups) < 1:
            raise SpecError(
                "iterations, batch and groups of the sample weighting must be at least 1, found "
                f"{self.iterations}, {self.batch} and {self.groups}."
            )
        for name in ("lr", "temperature", "inner_step", "sweep_lr", "validation"):
            if not getattr(self, name) > 0:
                raise SpecError(f"{name} of the sample weighting must be above 0, found {getattr(self, name)}.")
        if not 0 <= self.hardness <= 1 or not self.validation <= 1 or not self.matching_weight >= 0:
            raise SpecError(
                "hardness must lie in [0, 1], validation be at most 1 and matching_weight at least 0, found "
                f"{self.hardness}, {self.validation} and {self.matching_weight}."
            )

    def unit_evaluations(self, samples: int, validation: int, groups: int) -> int:
        """Work for one unit, in forward passes of one image through it.

        A reverse pass costs twice what it goes back through, a forward derivative as much as two forward passes.
        samples: of the calibration set; validation, groups: samples and groups of the validation set.
        """
        batch = min(self.batch, samples)
        if self.variant == "explicit":
            once = 5 * batch + 3 * validation + 2 * batch * groups
            if self._matches(groups):
                once += 2 * batch * groups + 9 * validation + 2 * batch
        else:
            once = 3 * batch + 4 * batch * groups + 3 * validation
        measured = 5 * batch + 3 * validation + 2 * batch * groups
        return self.iterations * once + 2 * measured + validation

    def _matches(self, groups: int) -> bool:
        return self.matching_weight > 0 and groups > 1


def relative_weights(logits: Tensor, temperature: float) -> Tensor:
    """N omega_i: the softmax over all samples scaled to mean 1. Exactly 1 where all logits are equal. Float64."""
    scaled = logits.detach().double() / temperature
    raised = torch.exp(scaled - scaled.max())
    return raised / raised.mean()


def softmax_chain(omega: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """dL/ds from dL/domega: omega_j / tau * (dL/domega_j - sum_i omega_i dL/domega_i)."""
    return omega / temperature * (gradient - (omega * gradient).sum())


def matching_loss(gradients: Tensor, matching: Matching) -> Tensor:
    """L_GM of the groups' gradients `[T, B]`: minus the mean inner product, or cosine, over pairs; 0 for one group."""
    count = len(gradients)
    if count < 2:
        return gradients.sum() * 0
    if matching == "cosine":
        gradients = torch.nn.functional.normalize(gradients, dim=1, eps=torch.finfo(gradients.dtype).tiny)
    pairs = gradients.sum(0).square().sum() - gradients.square().sum()  # ordered pairs
    return -pairs / (count * (count - 1))


class _DenseGroupNorm(TorchFunctionMode):
    """Inside, group norms see contiguous inputs: torch's forward derivative takes views that other layouts refuse."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.group_norm:
            # A clone, because `contiguous` leaves the tangent's layout alone where the value's is right.
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Lookahead:
    """One unit on one mini-batch of B calibration samples and T validation groups: theta*(omega) and derivatives.

    theta: where the inner step starts; a constant.
    """

    theta: Theta
    losses: SampleLosses
    groups: tuple[GroupLoss, ...]
    derivative: Derivative = "forward"

    @cached_property
    def _graph(self) -> tuple[Theta, Tensor]:
        live = _live(self.theta)
        with torch.enable_grad():
            return live, self.losses(live)

    def mixed(self, mix: Tensor) -> Theta:
        """Gamma mix = sum_i mix_i grad L_i(theta). The graph of the losses is built once."""
        live, losses = self._graph
        return torch.autograd.grad(losses, live, mix.to(losses), retain_graph=True, materialize_grads=True)

    def projected(self, direction: Theta) -> Tensor:
        """Gamma^T direction = d/dh L(theta + h direction) at h = 0, `[B]`, float64 on the CPU."""
        if self.derivative == "finite_difference":
            return self._difference(direction)
        try:
            with _DenseGroupNorm():
                tangent = torch.func.jvp(self.losses, (self.theta,), (direction,))[1]
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            raise CalibrationError(
                f"The unit has no forward-mode derivative ({str(error).splitlines()[0]}): set "
                'derivative="finite_difference" in the sample weighting.'
            ) from error
        return _plain(tangent)

    def _difference(self, direction: Theta) -> Tensor:
        # Rounding variables are of order 1. The cube root of the precision balances truncation and rounding.
        length, size = _norm(direction), math.sqrt(sum(part.numel() for part in direction))
        if length == 0:
            return torch.zeros(len(self._graph[1]), dtype=torch.float64)
        step: float = math.cbrt(torch.finfo(self.theta[0].dtype).eps) * size / length
        with torch.no_grad():
            above = _plain(self.losses(_added(self.theta, direction, step)))
            below = _plain(self.losses(_added(self.theta, direction, -step)))
        return (above - below) / (2 * step)

    def step_size(self, omega: Tensor, inner_step: float) -> float:
        """eta for a change of `inner_step` in a variable, in the root mean square; 0 where the gradient is 0."""
        length = _norm(self.mixed(omega))
        return inner_step * math.sqrt(sum(part.numel() for part in self.theta)) / length if length > 0 else 0.0

    def after(self, omega: Tensor, eta: float) -> Theta:
        """theta*(omega)."""
        return _added(self.theta, self.mixed(omega), -eta)

    def group_gradient(self, group: int, theta: Theta) -> tuple[float, Theta]:
        """L_t and g_t = grad L_t at theta."""
        live = _live(theta)
        with torch.enable_grad():
            loss = self.groups[group](live)
        return float(loss.detach()), torch.autograd.grad(loss, live, materialize_grads=True)

    def curvature(self, group: int, theta: Theta, direction: Theta) -> Theta:
        """H_t direction at theta."""
        live = _live(theta)
        with torch.enable_grad():
            gradient = torch.autograd.grad(self.groups[group](live), live, create_graph=True, materialize_grads=True)
            along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
        if not (isinstance(along, Tensor) and along.requires_grad):
            return tuple(torch.zeros_like(part) for part in theta)  # the loss is linear in every variable
        return torch.autograd.grad(along, live, materialize_grads=True)


@dataclass(frozen=True)
class Outer:
    """The outer loss at one omega.

    losses: L_t(theta*) of the groups.
    matching: L_GM, without its coefficient.
    gradient: of the outer loss with respect to omega, `[B]`.
    """

    losses: tuple[float, ...]
    matching: float
    gradient: Tensor

    @property
    def validation(self) -> float:
        """Mean of the groups' losses."""
        return sum(self.losses) / len(self.losses)


def explicit_gradient(
    problem: Lookahead, omega: Tensor, eta: float, *, matching: Matching = "product", weight: float = 1.0
) -> Outer:
    """The outer loss and its gradient with respect to omega, through theta*(omega); eta is a constant.

    weight: coefficient of L_GM.

    The alignment term's gradient, with U_t = dL_GM / dG_t:

        sum_t (dG_t / domega)^T U_t = eta^2 Gamma^T sum_t H_t Gamma U_t
    """
    theta = problem.after(omega, eta)
    found = [problem.group_gradient(group, theta) for group in range(len(problem.groups))]
    losses = tuple(loss for loss, _ in found)
    gradients = torch.stack([-eta * problem.projected(gradient) for _, gradient in found])
    gradient = gradients.mean(0)
    live = gradients.clone().requires_grad_()
    with torch.enable_grad():
        aligned = matching_loss(live, matching)
    if weight > 0 and len(found) > 1:
        (pull,) = torch.autograd.grad(aligned, live)
        bends = [problem.curvature(group, theta, problem.mixed(pull[group])) for group in range(len(found))]
        total = tuple(torch.stack(parts).sum(0) for parts in zip(*bends, strict=True))
        gradient = gradient + weight * eta**2 * problem.projected(total)
    return Outer(losses, float(aligned.detach()), gradient)


def sweep(
    problem: Lookahead, logits: Tensor, order: Sequence[int], *, eta: float, rate: float, temperature: float
) -> Tensor:
    """s after one plain gradient step on each group's loss, in the given order.

    logits: s before, `[B]`. rate: a of the module's docstring.
    """
    for group in order:
        omega = torch.softmax(logits / temperature, 0)
        _, gradient = problem.group_gradient(group, problem.after(omega, eta))
        logits = logits - rate * softmax_chain(omega, -eta * problem.projected(gradient), temperature)
    return logits


def stratified(strata: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """`size` different positions, every stratum with its share up to one sample; each position is equally likely.

    strata: `[N]`, the step of each sample. Systematic sampling: positions in order of their stratum, shuffled within
    it, then every (N / size)-th from a random start.
    """
    count = len(strata)
    shuffled = torch.randperm(count, generator=generator)
    ordered = shuffled[torch.argsort(strata[shuffled], stable=True)]
    size = min(size, count)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    places = ((start + torch.arange(size, dtype=torch.float64)) * count / size).long().clamp(max=count - 1)
    return ordered[places]


@dataclass(frozen=True)
class UnitLosses:
    """What a unit is judged by.

    theta: its rounding variables, where the inner step starts.
    training: (theta, positions `[B]` in the calibration set) -> losses `[B]`.
    groups: the validation losses, one for each timestep group.
    """

    theta: Theta
    training: Callable[[Theta, Tensor], Tensor]
    groups: tuple[GroupLoss, ...]

    def lookahead(self, chosen: Tensor, groups: tuple[GroupLoss, ...], derivative: Derivative) -> Lookahead:
        return Lookahead(self.theta, lambda theta: self.training(theta, chosen), groups, derivative)


class WeightLearner:
    """The sample weights on their way through the units: s starts once and is updated at every unit (Algorithm 1).

    logits: s, `[N]`, float64; all that a resumed run needs.
    """

    def __init__(
        self, setting: SampleWeighting, strata: Tensor, groups: Sequence[Sequence[int]], weights: Sequence[float]
    ) -> None:
        """strata: the step of each calibration sample, `[N]`. groups: the steps of each timestep group.

        weights: of the calibration set, all above 0; s starts where omega is proportional to them.
        """
        self.setting = setting
        self.strata = strata
        group_of = {step: number for number, steps in enumerate(groups) for step in steps}
        self._groups = torch.tensor([group_of[int(step)] for step in strata])
        given = torch.tensor(weights, dtype=torch.float64)
        self.logits = FIRST_LOGIT + setting.temperature * (given / given.mean()).log()

    @property
    def weights(self) -> Tensor:
        """N omega, `[N]` float64: with mean 1 the loss keeps its scale against the rounding regulariser."""
        return relative_weights(self.logits, self.setting.temperature)

    def update_(self, unit: UnitLosses, generator: torch.Generator) -> Figures:
        """Update s for one unit by Adam, with moments of its own; returns what it did.

        validation_loss, matching, cosine: before and after, on one mini-batch: mean L_t(theta*), L_GM, and the mean
            cosine between the groups' g_t over pairs.
        effective_samples: 1 / sum omega^2. mass: sum of omega in each timestep group, noise first; mass_of_steps: of
            each step that calibrates, by its index.
        """
        setting = self.setting
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative and no second one
            groups, level = self._levelled(unit)
            probe = stratified(self.strata, setting.batch, generator)
            before = self._measured(unit, groups, probe)
            live = self.logits.clone().requires_grad_()
            optimizer = torch.optim.Adam([live], lr=setting.lr)
            for _ in range(setting.iterations):
                chosen = stratified(self.strata, setting.batch, generator)
                problem = unit.lookahead(chosen, groups, setting.derivative)
                live.grad = torch.zeros_like(live)
                live.grad[chosen] = self._gradient(problem, live.detach()[chosen], level, generator)
                optimizer.step()
            self.logits = live.detach()
            after = self._measured(unit, groups, probe)
        if not bool(torch.isfinite(self.logits).all()):
            raise CalibrationError(
                "Sample weights left the finite numbers: lower lr or inner_step of the sample weighting, or set "
                'matching="cosine".'
            )
        omega = self.weights / len(self.logits)
        mass = torch.zeros(int(self._groups.max()) + 1, dtype=torch.float64).index_add_(0, self._groups, omega)
        by_step = torch.zeros(int(self.strata.max()) + 1, dtype=torch.float64).index_add_(0, self.strata, omega)
        return {
            **{name: [before[name], after[name]] for name in before},
            "effective_samples": float(1 / omega.square().sum()),
            "mass": mass.tolist(),
            "mass_of_steps": {str(step): float(by_step[step]) for step in sorted(set(self.strata.tolist()))},
        }

    def _coefficient(self, level: float, samples: int) -> float:
        setting = self.setting
        if setting.matching == "cosine":
            return setting.matching_weight * level
        # An inner product is a sum over samples, of squares of losses: this makes it a mean, in units of the loss.
        return setting.matching_weight / (level * samples) if level > 0 else 0.0

    def _levelled(self, unit: UnitLosses) -> tuple[tuple[GroupLoss, ...], float]:
        """The groups' losses, normalised if asked for, and the mean of their values at theta."""
        with torch.no_grad():
            values = [float(loss(unit.theta)) for loss in unit.groups]
        level = sum(values) / len(values)
        if not self.setting.normalise_groups:
            return unit.groups, level
        # A group whose loss is 0 has no gradient either: any factor will do.
        return tuple(
            _times(loss, level / value if value > 0 else 1.0) for loss, value in zip(unit.groups, values, strict=True)
        ), level

    def _gradient(self, problem: Lookahead, logits: Tensor, level: float, generator: torch.Generator) -> Tensor:
        """What Adam takes for dL/ds on the mini-batch; omega is the softmax over it."""
        setting = self.setting
        omega = torch.softmax(logits / setting.temperature, 0)
        eta = problem.step_size(omega, setting.inner_step)
        if setting.variant == "explicit":
            outer = explicit_gradient(
                problem, omega, eta, matching=setting.matching, weight=self._coefficient(level, len(logits))
            )
            return softmax_chain(omega, outer.gradient, setting.temperature)
        count = len(problem.groups)
        rate = setting.sweep_lr * len(logits) / level if level > 0 else 0.0
        order = torch.randperm(count, generator=generator).tolist()
        end = sweep(problem, logits, order, eta=eta, rate=rate, temperature=setting.temperature)
        return logits - end

    def _measured(self, unit: UnitLosses, groups: tuple[GroupLoss, ...], probe: Tensor) -> dict[str, float]:
        setting = self.setting
        problem = unit.lookahead(probe, groups, setting.derivative)
        omega = torch.softmax(self.logits[probe] / setting.temperature, 0)
        eta = problem.step_size(omega, setting.inner_step)
        theta = problem.after(omega, eta)
        found = [problem.group_gradient(group, theta) for group in range(len(groups))]
        in_omega = torch.stack([-eta * problem.projected(gradient) for _, gradient in found])
        in_theta = torch.stack([torch.cat([_plain(part).flatten() for part in gradient]) for _, gradient in found])
        return {
            "validation_loss": sum(loss for loss, _ in found) / len(found),
            "matching": float(matching_loss(in_omega, setting.matching)),
            "cosine": -float(matching_loss(in_theta, "cosine")),
        }


def _times(loss: GroupLoss, factor: float) -> GroupLoss:
    return lambda theta: loss(theta) * factor


def _live(theta: Theta) -> Theta:
    return tuple(part.detach().requires_grad_() for part in theta)


def _added(theta: Theta, direction: Theta, by: float) -> Theta:
    return tuple(part + by * along for part, along in zip(theta, direction, strict=True))


def _norm(theta: Theta) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in theta))


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().double()
