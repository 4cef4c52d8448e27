"""The methods that others are compared with, one file each."""
