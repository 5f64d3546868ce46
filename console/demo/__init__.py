"""The demo: the whole main job on real data, told step by step, with a report that can be checked."""
