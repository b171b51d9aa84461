"""Bundle -> bundle with a quantised encoder: calibration images, ranges, Q/DQ graphs."""
