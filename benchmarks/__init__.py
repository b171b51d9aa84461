import runtime  # noqa: F401  # turns telemetry off before other packages are imported
