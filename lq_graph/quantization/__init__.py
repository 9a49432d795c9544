"""From a float model to quantized layers: schemes, calibration, quantize."""
