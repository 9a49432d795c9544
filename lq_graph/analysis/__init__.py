"""What a quantized model computes beside the float one (compare), and what it becomes on the
device (explain)."""
