"""Reads a directory as other programs would, and says which of them it breaks, and where."""

from onnxsim_embed.doctor.examine import diagnose
from onnxsim_embed.doctor.place import READERS, Finding
from onnxsim_embed.doctor.repair import repair

__all__ = ["READERS", "Finding", "diagnose", "repair"]
