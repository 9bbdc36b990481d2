"""ONNX graphs: builders, tracing, files, fp16."""
