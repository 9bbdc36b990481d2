"""`python -m onnxsim_embed` is the command line."""

from onnxsim_embed.cli import main

if __name__ == "__main__":
    main()
