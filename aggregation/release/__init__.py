"""From a run's global model to a release: ONNX export and its proof.

Imports nothing else of the aggregator.
"""
