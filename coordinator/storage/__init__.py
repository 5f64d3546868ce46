"""What the streams of hub and regions hold: what of it is needed, what goes, and how full they are."""
