"""Tasks from training bundles: ONNX Runtime and numpy do the whole step. Never imports flwr or torch."""
