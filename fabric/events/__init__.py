"""The vocabulary of the event log.

Pure: may import messages, plans and tensors; never nats.
"""
