"""Abstract tests of an interface. Subclass one for each implementation; see docs/extending.md."""
