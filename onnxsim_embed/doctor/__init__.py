"""Checks a model directory against the rules of other programs, and fixes its JSON files."""

from onnxsim_embed.doctor.directory import READERS, Finding
from onnxsim_embed.doctor.fix import repair
from onnxsim_embed.doctor.rules import diagnose

__all__ = ["READERS", "Finding", "diagnose", "repair"]
