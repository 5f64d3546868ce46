"""What a node serves: ONNX Runtime sessions, batching, and the inference protocol.

Imports nothing else of the agent but its configuration.
"""
