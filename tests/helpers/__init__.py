"""What several test files share: they import it from here, and never from one another."""
