"""One file, one published method; `registry` finds them by name, `base` has what they implement."""
