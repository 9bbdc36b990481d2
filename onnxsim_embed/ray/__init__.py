"""Texts and vectors that outgrow one machine, on an existing engine: Ray Data (extra `ray`).

`encode_files` and `write_graph` are the commands `encode` and `similarity` with `--engine ray`;
`encode_dataset` adds vectors to a Ray dataset of your own.
"""

from onnxsim_embed.ray.connection import cluster
from onnxsim_embed.ray.datasets import encode_dataset
from onnxsim_embed.ray.encoding import EncodedFiles, encode_files
from onnxsim_embed.ray.graph import write_graph

__all__ = ["EncodedFiles", "cluster", "encode_dataset", "encode_files", "write_graph"]
