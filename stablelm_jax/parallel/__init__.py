"""Where arrays live: the device mesh and the sharding of every parameter, moment and batch."""
