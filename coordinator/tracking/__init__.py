"""Reports of runs to MLflow and TensorBoard, in a process of their own: their libraries are large, and servers hang.

May import the fabric only; `record` is shared with the coordinator.
"""
