"""From shards to packs: read (``shards``), parse (``sample``), order (``lane``), encode, pack, load.

Nothing here communicates. What a lane yields is a pure function of the seed, the sources and the lane's number.
"""
