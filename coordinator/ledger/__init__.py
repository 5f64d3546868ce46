"""Who used what, what that costs, and what it may cost. Pure."""
