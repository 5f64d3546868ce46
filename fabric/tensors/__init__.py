"""Named tensors: frames, codecs, content addresses, and the training bundle made of them.

Pure: numpy and hashlib only.
"""
