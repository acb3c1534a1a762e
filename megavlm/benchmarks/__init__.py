"""The built-in data: real images that ship with scikit-learn, with exact answers and a judge for drawings."""
