"""What people do by hand, on the parts that a study uses."""
