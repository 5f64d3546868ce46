"""A package of the app's own, called as a part of fedtide is."""
