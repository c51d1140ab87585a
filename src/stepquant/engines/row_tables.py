"""The tables of a graph's rows, as one.

Every layer with rows gathers a few numbers of the present timestep's row from tables of its own. Each of these gathers
is an operator of the graph, and in bfloat16 a conversion behind it: hundreds of operators that do next to nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stepquant.engines.waves import HEAVY

__all__ = ["join_row_tables_"]


def join_row_tables_(model: Any, source: str) -> int:
    """Gather from one table where an OpenVINO model gathers from many at the same place, and split what comes.

    source: name of the input, integer `[1]`, that is the place, or that chooses it in a table of integers. Only gathers
    count whose result gets a shape with at most one axis beside ones. Returns how many went.
    """
    port = next((port for port in model.inputs if source in port.names), None)
    if port is None:
        return 0
    gone = _share_places(port)
    places = [port, *(gather.output(0) for gather in _gathers(port, "i64"))]
    tail = _tail(model)
    for place in places:
        found = [gather for gather in _gathers(place, "f32") if gather.get_friendly_name() not in tail]
        shaped = [(gather, reshape) for gather in found if (reshape := _reshape(gather)) is not None]
        for axis, chosen in _alike(shaped):
            gone += _join(place, axis, chosen)
    model.validate_nodes_and_infer_types()
    return gone


def _tail(model: Any) -> set[str]:
    """Names of the operators between the last products and the results.

    OpenVINO leaves these in float32 when the rest is in bfloat16, and with them all that they take from elsewhere: the
    whole table, if they took a part of it.
    """
    found: set[str] = set()
    open_ends = list(model.get_results())
    while open_ends:
        node = open_ends.pop()
        if node.get_friendly_name() not in found and node.get_type_name() not in HEAVY:
            found.add(node.get_friendly_name())
            open_ends += [value.get_node() for value in node.input_values()]
    return found


def _gathers(place: Any, kind: str) -> list[Any]:
    """What gathers from a constant table of a type, `[n]` or `[n, O]`, along its first axis at a place."""
    found = []
    for target in _beyond_conversions(place):
        node = target.get_node()
        if node.get_type_name() != "Gather" or target.get_index() != 1:
            continue
        table, axis = node.input_value(0), node.input_value(2).get_node()
        constant = table.get_node().get_type_name() == axis.get_type_name() == "Constant"
        if not constant or table.get_element_type().get_type_name() != kind or len(table.get_shape()) > 2:
            continue
        if int(axis.get_data().reshape(-1)[0]) == 0:
            found.append(node)
    return found


def _beyond_conversions(place: Any) -> list[Any]:
    """The inputs that take a value, as it is or converted to another type."""
    found: list[Any] = []
    for target in place.get_target_inputs():
        node = target.get_node()
        found += _beyond_conversions(node.output(0)) if node.get_type_name() == "Convert" else [target]
    return found


def _share_places(port: Any) -> int:
    """One gather for all layers with the same rows over time."""
    known: dict[bytes, Any] = {}
    gone = 0
    for gather in _gathers(port, "i64"):
        table = gather.input_value(0).get_node().get_data()
        kept = known.setdefault(np.ascontiguousarray(table).tobytes(), gather)
        if kept is not gather:
            _replace(gather.output(0), kept.output(0))
            gone += 1
    return gone


def _reshape(gather: Any) -> Any | None:
    """The one operator that takes what a gather gives, if it gives it a shape with at most one axis beside ones."""
    targets = list(gather.output(0).get_target_inputs())
    node = targets[0].get_node() if len(targets) == 1 else None
    if node is None or node.get_type_name() != "Reshape" or node.get_output_partial_shape(0).is_dynamic:
        return None
    return node if sum(size != 1 for size in node.get_output_shape(0)) <= 1 else None


def _alike(shaped: list[tuple[Any, Any]]) -> list[tuple[int, list[tuple[Any, Any]]]]:
    """Gathers of tables of one length, with reshapes to one number of axes; and the axis that is not 1 in them."""
    groups: dict[tuple[int, int], dict[int | None, list[tuple[Any, Any]]]] = {}
    for gather, reshape in shaped:
        shape = list(reshape.get_output_shape(0))
        axis = next((axis for axis, size in enumerate(shape) if size != 1), None)
        key = gather.input_value(0).get_shape()[0], len(shape)
        groups.setdefault(key, {}).setdefault(axis, []).append((gather, reshape))
    found = []
    for (_, axes), by_axis in groups.items():
        single = by_axis.pop(None, [])  # go with any
        if not by_axis:
            by_axis[axes - 1] = []
        next(iter(by_axis.values())).extend(single)
        found += [(axis, chosen) for axis, chosen in by_axis.items() if axis is not None and len(chosen) > 1]
    return found


def _join(place: Any, axis: int, chosen: list[tuple[Any, Any]]) -> int:
    from openvino import opset13

    tables = [gather.input_value(0).get_node().get_data() for gather, _ in chosen]
    tables = [table.reshape(len(table), -1) for table in tables]
    joined = opset13.constant(np.concatenate(tables, 1))
    row = opset13.gather(joined, place, opset13.constant(np.int64(0)))
    shape = np.ones(len(chosen[0][1].get_output_shape(0)), np.int64)
    shape[axis] = -1
    whole = opset13.reshape(row, opset13.constant(shape), special_zero=False)
    sizes = opset13.constant(np.array([table.shape[1] for table in tables]))
    parts = opset13.variadic_split(whole, opset13.constant(np.int64(axis)), sizes)
    for number, (_, reshape) in enumerate(chosen):
        _replace(reshape.output(0), parts.output(number))
    return len(chosen) - 1


def _replace(value: Any, other: Any) -> None:
    for target in list(value.get_target_inputs()):
        target.replace_source_output(other)
