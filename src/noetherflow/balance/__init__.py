"""Everything that writes: models, checkpoints and optimiser states moved along the orbits of a model's symmetries."""
