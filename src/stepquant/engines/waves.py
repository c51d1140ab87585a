"""Sines and cosines of a graph's inputs, taken out into a small graph of their own.

Timestep embeddings are sines of timestep times frequency: angles of up to a thousand radians. From 512 on bfloat16 has
every fourth number only, so a graph in bfloat16 tells neighbouring timesteps apart badly or not at all, and OpenVINO
has no setting that keeps single operators of it in float32 on a CPU.
"""

from __future__ import annotations

from typing import Any

__all__ = ["WAVE", "take_waves_"]

WAVE = "stepquant_wave_"
"""How the names of the inputs begin that the graph gets in the place of its sines and cosines."""

HEAVY = frozenset({"Convolution", "GroupConvolution", "LSTMSequence", "MatMul", "ScaledDotProductAttention"})
"""Operators whose results are features, not angles."""


def take_waves_(model: Any) -> Any | None:
    """Cut the sines and cosines of the inputs out of an OpenVINO model. None if there are none.

    Returns a model with the same inputs, whose output number i is the new input `WAVE + i` of the one that was given.
    """
    from openvino import Model, opset13

    of_inputs: set[str] = set()
    waves: list[Any] = []
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        sources = [value.get_node() for value in node.input_values()]
        light = kind not in HEAVY and all(
            source.get_friendly_name() in of_inputs or source.get_type_name() == "Constant" for source in sources
        )
        if kind == "Parameter" or (sources and light):
            of_inputs.add(node.get_friendly_name())
            if kind in ("Sin", "Cos"):
                waves.append(node)
    if not waves:
        return None
    # A copy, before the originals lose their inputs.
    taken = Model([opset13.result(wave.output(0)) for wave in waves], model.get_parameters()).clone()
    inputs = []
    for number, wave in enumerate(waves):
        value = wave.output(0)
        port = opset13.parameter(value.get_partial_shape(), value.get_element_type())
        port.output(0).set_names({f"{WAVE}{number}"})
        for target in list(value.get_target_inputs()):
            target.replace_source_output(port.output(0))
        inputs.append(port)
    model.add_parameters(inputs)
    model.validate_nodes_and_infer_types()
    return taken
