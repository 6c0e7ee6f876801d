"""What a run is asked for: settings, their files, presets."""
