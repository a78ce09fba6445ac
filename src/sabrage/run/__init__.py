"""What a run leaves behind and stands on: folder, manifest, log, clocks and the device's facts."""
