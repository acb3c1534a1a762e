"""The study: does joint training gain over training one task alone, and how much of the gain does each policy keep?"""
