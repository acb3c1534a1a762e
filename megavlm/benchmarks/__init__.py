"""The built-in benchmarks, each with data, exact answers and a judge for drawings: scanned digits, and scenes of coloured shapes."""
