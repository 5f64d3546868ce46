"""The same app on Flower's own loop and on fedtide: the same calls, replies, errors, results and arrays."""
