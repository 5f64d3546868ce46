"""What cloud and edge share: types, subjects, codecs, blobs, the broker link, errors.

May import nothing of ours; never torch, and flwr only inside `fedtide.fabric.flower.bridge`.
"""
