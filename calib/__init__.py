"""Bundle -> bundle with a quantised encoder: calibration images, ranges, Q/DQ graphs."""

import runtime  # noqa: F401  # turns telemetry off before other packages are imported
