"""What a run leaves behind and stands on: folder, log, checkpoints, manifest, clocks, the device's facts."""
