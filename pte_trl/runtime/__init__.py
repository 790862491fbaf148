"""What keeps a long run alive: launch, sharding, checkpoints, resume, faults, manifest."""
