"""What a config takes on devices that are not there."""
