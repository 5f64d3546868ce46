"""What peers send each other and what the API answers, as typed data.

Pure: may import plans and tensors; never nats.
"""
