"""fp32 ONNX file -> fp16 file for GPUs: weights and arithmetic in half the bytes."""

from __future__ import annotations

import warnings

import onnx

from onnxsim_embed.export.onnx.files import remove_unused_domains

METHOD = "weights and arithmetic float16; input int64 and output float32 as in model.onnx"

# Biases and norms, not the weights of linears, which nodes rarely share.
SMALL_CONSTANT_BYTES = 1 << 16

# Computed in float32: a square or a sum leaves float16's range (6e-8 to 65,504) on values well inside
# it. LayerNormalization and Softmax are absent: their GPU kernels accumulate in float32 as they are.
FLOAT32_OPERATORS = ("Pow", "ReduceMean", "ReduceSum", "CumSum", "Range")


def convert_to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the fp16 version of a model."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    duplicate_shared_constants(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one line for each value that is out of range and clipped
        model = convert_float_to_float16(
            model, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPERATORS]
        )
    remove_unused_domains(model)
    return model


def duplicate_shared_constants(model: onnx.ModelProto) -> None:
    """Give every node its own copy of the small constants that several share.

    onnxruntime's converter names the cast of a constant after the constant: two nodes that share one
    would get two casts of one name.
    """
    small = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.ByteSize() <= SMALL_CONSTANT_BYTES
    }
    seen: set[str] = set()
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name not in small:
                continue
            if name in seen:
                copy = model.graph.initializer.add()
                copy.CopyFrom(small[name])
                copy.name = node.input[index] = f"{name}::{node.output[0]}::{index}"
            seen.add(name)
