"""Zero points taken out of a graph's integer operators.

Activations are uint8 with a zero point z. oneDNN, below OpenVINO, can subtract it inside an operator, and that costs:
whole networks are faster without (docs/performance.md). All that z does is known before, and is added behind:

    conv(s (q - z), w) = conv(s q, w) - s z sum(w) + s z sum(the weights that meet padding)

The second term is one number for each output channel, part of the operator as its bias is. The third is not 0 where a
kernel reaches over an edge. There an operator in bfloat16 gives out what the third term is still missing from, rounded:
half a unit in the last place of a somewhat larger number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepquant.engines.borders import MOST_PATTERNS, Border, border_of

__all__ = ["EDGE", "take_zero_points_"]

EDGE = "stepquant_edge_"
"""How the names of the inputs begin that the graph gets for the places of outputs."""

Array = NDArray[Any]


def take_zero_points_(model: Any) -> dict[str, Array]:
    """Take zero points out of convolutions and products with constant weights of an OpenVINO model of fixed shapes.

    Returns new inputs of the model by name, `[1, ..., outputs]`, float32: 1 where the last axis of an output is one of
    those places that kernels meet the padding from in the same way. They are inputs, though they never change, because
    OpenVINO would multiply constants out, and read a table of an output's size in every call.
    """
    edges = _Edges()
    for node in model.get_ordered_ops():
        product = _product(node)
        if product is not None:
            _take(node, product, edges)
    model.add_parameters(edges.ports)
    model.validate_nodes_and_infer_types()
    return edges.values


class _Edges:
    """Inputs that mark places along the last axis."""

    def __init__(self) -> None:
        self.values: dict[str, Array] = {}
        self.ports: list[Any] = []
        self._known: dict[bytes, Any] = {}

    def of(self, places: Array, axes: int) -> Any:
        from openvino import Type, opset13

        values = places.astype(np.float32).reshape((1,) * (axes - 1) + (-1,))
        key = values.tobytes() + bytes([axes])
        if key not in self._known:
            name = f"{EDGE}{len(self.ports)}"
            port = opset13.parameter(list(values.shape), Type.f32)
            port.output(0).set_names({name})
            self.ports.append(port)
            self.values[name] = values
            self._known[key] = port
        return self._known[key]


@dataclass(frozen=True)
class _Product:
    """A convolution, or a product with a constant, whose input has a zero point.

    levels: the input's, float32. scale: of the input. total: s z sum(w), `[O]`. border: the part of it that meets
    padding; None without padding.
    """

    levels: Any
    scale: float
    total: Array
    border: Border | None


def _product(node: Any) -> _Product | None:
    kind = node.get_type_name()
    if kind not in ("Convolution", "GroupConvolution", "MatMul"):
        return None
    restored = node.input_value(0).get_node()
    moved = restored.input_value(0).get_node() if restored.get_type_name() == "Multiply" else None
    if moved is None or moved.get_type_name() != "Subtract":
        return None
    scale, zero_point = (_constant(each.input_value(1)) for each in (restored, moved))
    weight = _constant(node.input_value(1))
    if scale is None or scale.size != 1 or zero_point is None or zero_point.size != 1 or weight is None:
        return None
    shapes = node.get_input_partial_shape(0), node.get_output_partial_shape(0)
    if any(shape.is_dynamic for shape in shapes):
        return None
    s = float(scale.reshape(-1)[0])
    factor = s * float(zero_point.reshape(-1)[0])
    if factor == 0:
        return None
    at = node.get_attributes()
    if kind == "MatMul":
        if weight.ndim != 2 or at["transpose_a"] or at["transpose_b"]:
            return None
        return _Product(moved.input_value(0), s, factor * weight.sum(0, dtype=np.float64), None)
    if at["auto_pad"] not in ("explicit", "notset"):
        return None
    inputs = 2 if kind == "GroupConvolution" else 1  # the axis of input channels; the groups are before it
    taps = factor * weight.sum(inputs, dtype=np.float64)
    taps = taps.reshape(-1, *weight.shape[inputs + 1 :])
    border = None
    if any(at["pads_begin"]) or any(at["pads_end"]):
        if taps.ndim > 3:
            return None
        before, after = (tuple(shape.to_shape())[2:] for shape in shapes)
        border = border_of(
            taps, before, after, stride=at["strides"], padding=at["pads_begin"], dilation=at["dilations"]
        )
        if len(border.table) > MOST_PATTERNS:
            return None
    return _Product(moved.input_value(0), s, taps.reshape(len(taps), -1).sum(1), border)


def _constant(value: Any) -> Array | None:
    """What a value is that depends on no input, as exporters write weights, scales and zero points; else None."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        data: Array = node.get_data()
        return data
    if kind == "Reshape":
        whole = _constant(node.input_value(0))
        fixed = node.get_output_partial_shape(0).is_static
        return whole.reshape(tuple(node.get_output_shape(0))) if whole is not None and fixed else None
    if kind == "Convert":
        whole = _constant(node.input_value(0))
        known = node.get_output_element_type(0).get_type_name() == "f32"
        return whole.astype(np.float32) if whole is not None and known else None
    if kind == "Multiply":
        left, right = map(_constant, node.input_values())
        return None if left is None or right is None else left * right
    return None


def _take(node: Any, product: _Product, edges: _Edges) -> None:
    from openvino import opset13

    def constant(values: Any) -> Any:
        return opset13.constant(np.ascontiguousarray(values, dtype=np.float32))

    kind, axes = node.get_type_name(), len(node.get_output_shape(0))
    targets = list(node.output(0).get_target_inputs())
    node.input(0).replace_source_output(opset13.multiply(product.levels, constant(product.scale)).output(0))
    shape = [1] * axes
    shape[-1 if kind == "MatMul" else 1] = -1
    value = opset13.add(node, constant(-product.total.reshape(shape)))
    _lead(targets, value)
    if product.border is None:
        return
    bias = targets[0].get_node() if len(targets) == 1 else None
    if bias is not None and bias.get_type_name() == "Add":
        other = bias.input_value(1 - targets[0].get_index())
        if other.get_node().get_type_name() == "Constant":
            # Behind the bias: two numbers for each channel become one, part of the operator.
            value, targets = bias, list(bias.output(0).get_target_inputs())
    table, where = product.border.table, product.border.where
    spread = [1, *table.shape[1:], 1]
    for pattern in range(1, len(table)):
        there = edges.of(where == pattern, axes)
        value = opset13.add(value, opset13.multiply(constant((table[pattern] - table[0]).reshape(spread)), there))
    if table[0].any():
        value = opset13.add(value, constant(table[0].reshape(spread)))
    _lead(targets, value)


def _lead(targets: list[Any], value: Any) -> None:
    for target in targets:
        target.replace_source_output(value.output(0))
