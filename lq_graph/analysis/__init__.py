"""The errors of a quantized model (compare), and its GE nodes on the device (explain)."""
