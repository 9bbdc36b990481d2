"""Speed, fidelity and memory beside other systems, measured on one's own texts and machine.

The scripts in bench/ run it; `onnxsim-embed bench` is the smaller `onnxsim_embed.benchmark`. Every
system is a process of its own; `worker`, `text_systems`, `similarity_systems` and `products` run in the
environments of those processes and import nothing of this package unless the system is ours.
"""
