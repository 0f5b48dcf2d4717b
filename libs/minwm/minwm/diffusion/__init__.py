"""Flow matching: noise, velocity, schedules and samplers. Knows no model."""
