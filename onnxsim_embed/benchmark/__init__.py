"""`onnxsim-embed bench`: speed beside fidelity on the user's texts, ours and installed libraries.

bench/ of the repository imports these modules for its larger programme; nothing here imports bench/.
"""
