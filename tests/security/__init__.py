"""That nobody gets what he should not have; see SECURITY.md."""
