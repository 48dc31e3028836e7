"""Studies: trainings that differ in a few settings, compared at equal tokens over several seeds."""
