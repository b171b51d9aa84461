"""Coverage-guided fuzzing of everything that reads bytes of others: `python -m tests.fuzz all --seconds 600`."""
