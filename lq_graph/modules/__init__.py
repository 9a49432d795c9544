"""nn.Modules that hold quantized layers, and how a model's layers are replaced and prepared."""
