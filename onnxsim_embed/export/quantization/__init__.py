"""int8: calibration, ranges, GPTQ."""
