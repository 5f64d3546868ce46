"""The code around the pure core, in one process: a broker in memory, and time that passes when nobody has work."""
